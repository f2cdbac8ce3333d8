"""The relaxations in float32 against more digits: every layer's error and update, however small, is right."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import reference, reference_precise
from tests.reference_precise import relative_error, size_of
from torch2pc import PCInfer
from torch2pc.graph.network import Network
from torch2pc.inference.strict import strict

# Below, float32 itself has not the digits for products of errors.
SMALLEST = 1e-25


def mlp(depth: int, activation: type[nn.Module], width: int = 5) -> nn.Sequential:
    sizes = [4, *[width] * (depth - 1), 3]
    model = nn.Sequential()
    for l in range(depth):
        last = l == depth - 1
        item = nn.Sequential(
            nn.Linear(sizes[l], sizes[l + 1]), nn.Identity() if last else activation()
        )
        nn.init.normal_(item[0].weight, std=1.3 * sizes[l] ** -0.5)
        model.append(item)
    return model


def train(model: nn.Sequential, LossFun: Any, X: Tensor, Y: Tensor, ErrType: str) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(40):
        PCInfer(model, LossFun, X, Y, ErrType)
        optimizer.step()


def check(
    model: nn.Sequential,
    mean: bool,
    X: Tensor,
    Y: Tensor,
    tolerance: float,
    from_vinit: bool = False,
    **settings: Any,
) -> int:
    """Everything that Strict finds against the precise iteration; the number of layers held."""
    LossFun = nn.MSELoss(reduction="mean" if mean else "sum")
    vinit = None
    if from_vinit:
        vinit = [
            v + 0.01 * torch.randn_like(v) for v in PCInfer(model, LossFun, X, Y, "Exact").vhat
        ]
    eta, n = settings.get("eta", 0.1), settings.get("n", 20)
    right = reference_precise.strict(model, mean, X, Y, eta, n, vinit)
    network = Network(model, LossFun, X, Y)
    relaxation = strict(network, eta, vinit)
    with network.replaying():
        relaxation.run(n)
    result = PCInfer(model, LossFun, X, Y, "Strict", vinit=vinit, **settings)
    held = 0
    for l in range(1, len(model) + 1):
        if size_of(right.epsilon[l]) < SMALLEST:
            continue
        held += 1
        assert relative_error(result.epsilon[l], right.epsilon[l]) < tolerance
        weight, bias = model[l - 1][0].parameters()
        assert relative_error(weight.grad, right.updates[l][0]) < tolerance
        assert relative_error(bias.grad, right.updates[l][1]) < tolerance
        if l < len(model):
            assert relative_error(relaxation.energy.delta[l], right.delta[l]) < tolerance
    return held


def data(batch: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 4), torch.randn(batch, 3)


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("depth", [3, 12, 40])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.GELU])
def test_smooth_networks(activation: type[nn.Module], depth: int, mean: bool) -> None:
    held = check(mlp(depth, activation), mean, *data(), tolerance=1e-5)
    # Where float64's plain iteration has no digits left in the lower half.
    assert held >= min(depth, 15)


@pytest.mark.parametrize("activation", [nn.Sigmoid, nn.Softplus])
def test_other_activations(activation: type[nn.Module]) -> None:
    assert check(mlp(8, activation), True, *data(), tolerance=1e-5) == 8


@pytest.mark.parametrize("depth", [3, 12, 40])
def test_networks_with_kinks(depth: int) -> None:
    assert check(mlp(depth, nn.ReLU), False, *data(), tolerance=1e-3) >= min(depth, 10)


@pytest.mark.parametrize(("activation", "tolerance"), [(nn.Tanh, 1e-5), (nn.ReLU, 1e-3)])
@pytest.mark.parametrize("ErrType", ["Exact", "Strict"])
def test_after_training(activation: type[nn.Module], tolerance: float, ErrType: str) -> None:
    # More examples than can be learned: where an output meets its target, their difference is
    # rounding, in backpropagation too.
    model, (X, Y) = mlp(6, activation), data(batch=12)
    train(model, nn.MSELoss(), X, Y, ErrType)
    assert check(model, True, X, Y, tolerance) == 6


@pytest.mark.parametrize("settings", [dict(n=60), dict(eta=0.3, n=12), dict(eta=0.01, n=8)])
def test_other_settings(settings: dict[str, Any]) -> None:
    assert check(mlp(10, nn.Tanh), True, *data(), 1e-5, **settings) >= 8


def test_from_vinit() -> None:
    """How far initial beliefs are from vhat is known as well as vhat is: to 1e-7 of vhat."""
    assert check(mlp(6, nn.Tanh), True, *data(), tolerance=1e-4, from_vinit=True) == 6


def test_the_plain_iteration_would_not_do() -> None:
    """What the tolerances above are worth: in float32 the plain iteration loses the lower layers."""
    model, (X, Y) = mlp(20, nn.Tanh), data()
    right = reference_precise.strict(model, True, X, Y, 0.1, 20)
    plain = reference.strict(model, nn.MSELoss(), X, Y, 0.1, 20)
    found = PCInfer(model, nn.MSELoss(), X, Y, "Strict")
    layers = range(1, 21)
    errors = [relative_error(plain.epsilon[l], right.epsilon[l]) for l in layers]
    assert min(errors[:8]) > 0.99
    assert max(relative_error(found.epsilon[l], right.epsilon[l]) for l in layers) < 1e-5


def test_hooks_of_parameters_see_the_update_itself() -> None:
    model, (X, Y) = mlp(6, nn.Tanh), data()
    seen: list[Tensor] = []
    model[1][0].weight.register_hook(lambda g: seen.append(g.clone()))
    PCInfer(model, nn.MSELoss(), X, Y, "Strict", eta=0.01, n=6)
    assert torch.equal(seen[-1], model[1][0].weight.grad)


@pytest.mark.parametrize("depth", [3, 12, 40])
@pytest.mark.parametrize(
    ("activation", "tolerance"), [(nn.Tanh, 2e-5), (nn.GELU, 2e-5), (nn.ReLU, 1e-3)]
)
def test_error_based(activation: type[nn.Module], tolerance: float, depth: int) -> None:
    """Its errors are no differences: float64 has all the digits that they are held against."""
    model, (X, Y) = mlp(depth, activation), data()
    found = PCInfer(model, nn.MSELoss(), X, Y, "ErrorBased")
    updates = [p.grad for p in model.parameters()]
    in_float64 = copy.deepcopy(model).double(), nn.MSELoss(), X.double(), Y.double()
    right = reference.error_based(*in_float64, 0.1, 20)
    for l in range(1, depth + 1):
        assert off(found.epsilon[l], right.epsilon[l]) < tolerance
    for p, update in zip(in_float64[0].parameters(), updates, strict=True):
        assert off(update, right.updates[p]) < tolerance


@pytest.mark.parametrize("depth", [3, 12, 40])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.GELU])
def test_equilibrium(activation: type[nn.Module], depth: int) -> None:
    """It ends where the gradient is below 3e-4 of the errors, and so are these, in every layer."""
    model, (X, Y) = mlp(depth, activation), data(12)
    found = PCInfer(model, nn.MSELoss(), X, Y, "Equilibrium")
    in_float64 = copy.deepcopy(model).double(), nn.MSELoss(), X.double(), Y.double()
    right = PCInfer(*in_float64, "Equilibrium", n=100)
    assert found.evaluations < 20 and (right.distance < 2e-8).all()
    for l in range(1, depth + 1):
        assert off(found.epsilon[l], right.epsilon[l]) < 2e-3


def off(found: Tensor, right: Tensor) -> float:
    return ((found.double() - right).norm() / right.norm()).item()
