"""Losses whose gradient has a closed form: found for what they compute, and the same as autograd's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch2pc import PCInfer
from torch2pc.graph.network import Network
from torch2pc.inference.strict import strict

N, C = 6, 4
LABELS, WEIGHT = torch.tensor([0, 3, 1, 1, 2, 0]), torch.tensor([0.5, 2.0, 1.0, 0.3])
SHARES = torch.softmax(torch.linspace(-1, 2, N * C).reshape(N, C), 1)
NUMBERS = torch.linspace(-2, 3, N * C).reshape(N, C)


class Twice(nn.CrossEntropyLoss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return 2 * super().forward(input, target)


CLOSED: dict[str, tuple[Callable[..., Tensor], Tensor]] = {
    "cross-entropy": (nn.CrossEntropyLoss(), LABELS),
    "sum": (nn.CrossEntropyLoss(reduction="sum"), LABELS),
    "weights": (nn.CrossEntropyLoss(WEIGHT), LABELS),
    "smoothing": (nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.2), LABELS),
    "smoothing, sum": (nn.CrossEntropyLoss(label_smoothing=0.2, reduction="sum"), LABELS),
    "ignored labels": (nn.CrossEntropyLoss(ignore_index=1, label_smoothing=0.1), LABELS),
    "nothing but ignored labels": (nn.CrossEntropyLoss(ignore_index=1), torch.ones_like(LABELS)),
    "probabilities": (nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.1), SHARES),
    "of each example": (lambda y, t: F.cross_entropy(y, t, reduction="none").mean(), LABELS),
    "a partial": (partial(F.cross_entropy, reduction="sum", weight=WEIGHT), LABELS),
    "a multiple": (lambda y, t: 0.3 * F.cross_entropy(y, t) / 2 + 1, LABELS),
    "a subclass": (Twice(), LABELS),
    "Kullback and Leibler": (
        lambda y, t: F.kl_div(F.log_softmax(y, 1), t, reduction="batchmean"),
        SHARES,
    ),
    "squared error": (nn.MSELoss(), NUMBERS),
    "squared error, sum": (lambda y, t: 0.5 * F.mse_loss(y, t, reduction="sum"), NUMBERS),
    "squared error of each": (
        lambda y, t: F.mse_loss(t, y, reduction="none").sum(1).mean(),
        NUMBERS,
    ),
}


class Shifted(nn.CrossEntropyLoss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return super().forward(input, target) + 0.1 * input.sum()


class Halved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g / 2


def with_hook(y: Tensor, t: Tensor) -> Tensor:
    p = F.log_softmax(y, 1)
    p.register_hook(lambda g: g / 2)
    return F.nll_loss(p, t)


# Each depends on y in another way besides, or hands down something else.
OPEN: dict[str, tuple[Callable[..., Tensor], Tensor]] = {
    "more of y": (Shifted(), LABELS),
    "a conversion to a narrower type, and more of y": (
        lambda y, t: F.cross_entropy(y.float(), t) + y.sum(),
        LABELS,
    ),
    "targets that follow y": (lambda y, t: F.cross_entropy(y, y.argmax(1)), LABELS),
    "a detached y": (lambda y, t: F.mse_loss(y, 0.5 * y.detach()), NUMBERS),
    "weights that follow y": (
        lambda y, t: F.cross_entropy(y, t, y.detach().mean(0).square()),
        LABELS,
    ),
    "a square": (lambda y, t: F.cross_entropy(y, t).square(), LABELS),
    "a branch": (
        lambda y, t: F.cross_entropy(y, t) * (2.0 if y.sum() > 0 else 1.0),
        LABELS,
    ),
    "numbers": (lambda y, t: F.cross_entropy(y, t) * y.tolist()[0][0], LABELS),
    "NumPy's numbers": (
        lambda y, t: F.cross_entropy(y, t) * float(y.detach().numpy()[0, 0]),
        LABELS,
    ),
    "two of them": (lambda y, t: F.cross_entropy(y, t) + F.mse_loss(y, NUMBERS.to(y)), LABELS),
    "of a function of y": (lambda y, t: F.cross_entropy(y.tanh(), t), LABELS),
    "a backward of its own": (lambda y, t: F.cross_entropy(Halved.apply(y), t), LABELS),
    "its end": (lambda y, t: Halved.apply(F.cross_entropy(y, t)), LABELS),
    "a hook": (with_hook, LABELS),
}


def recorded(
    loss: Callable[..., Tensor], target: Tensor, dtype: torch.dtype, kind: torch.dtype | None = None
) -> Network:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, C)).to(dtype)
    loss = loss.to(dtype) if isinstance(loss, nn.Module) else loss
    if isinstance(loss, partial):
        loss = partial(loss.func, **{**loss.keywords, "weight": WEIGHT.to(dtype)})
    target = target.to(dtype) if target.is_floating_point() else target
    with torch.autocast("cpu", kind, enabled=kind is not None):
        network = Network(model, loss, torch.randn(N, 5, dtype=dtype), target)
        network.record()
    return network


def by_autograd(network: Network, y: Tensor) -> Tensor:
    y = y.clone().requires_grad_()
    (g,) = torch.autograd.grad(network.loss_at(y), y)
    return g


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CLOSED)
def test_is_autograds_to_the_last_bit(name: str, dtype: torch.dtype) -> None:
    network = recorded(*CLOSED[name], dtype)
    assert network.loss_gradient is not None
    for scale in (0.0, 1.0, 30.0):
        y = network.vhat[-1] + scale * torch.randn(N, C, dtype=dtype)
        found, expected = network.loss_gradient(y), by_autograd(network, y)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(
        network.dLdy.nan_to_num(), by_autograd(network, network.vhat[-1]).nan_to_num()
    )


@pytest.mark.parametrize("name", ["cross-entropy", "squared error, sum"])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("in_autocast", [True, False])
def test_is_autograds_in_half_precision(name: str, half: torch.dtype, in_autocast: bool) -> None:
    network = recorded(*CLOSED[name], *((torch.float32, half) if in_autocast else (half,)))
    assert network.vhat[-1].dtype == half and network.loss_gradient is not None
    y = network.vhat[-1].float() + torch.randn(N, C)
    found, expected = network.loss_gradient(y), by_autograd(network, y)
    assert found.dtype == torch.float32 and torch.equal(found, expected)


@pytest.mark.parametrize("name", OPEN)
def test_what_depends_on_the_output_otherwise_is_left_to_autograd(name: str) -> None:
    assert recorded(*OPEN[name], torch.float64).loss_gradient is None


def test_is_the_softmax_minus_the_target() -> None:
    network = recorded(*CLOSED["sum"], torch.float32)
    y = torch.tensor([[9.0, -3.0, 0.5, 0.0]]).repeat(N, 1)
    assert network.loss_gradient is not None
    expected = torch.softmax(y.double(), 1) - F.one_hot(LABELS, C)
    torch.testing.assert_close(network.loss_gradient(y).double(), expected, rtol=0, atol=2e-7)


def test_what_changes_between_calls_is_found_anew() -> None:
    loss = nn.CrossEntropyLoss(WEIGHT.clone())
    before = recorded(loss, LABELS, torch.float32).dLdy
    with torch.no_grad():
        loss.weight *= torch.tensor([1.0, 3.0, 1.0, 1.0])  # type: ignore[operator]
    after = recorded(loss, LABELS, torch.float32)
    assert not torch.equal(before, after.dLdy)
    assert torch.equal(after.dLdy, by_autograd(after, after.vhat[-1]))
    loss.register_full_backward_hook(lambda module, g, _: (g[0] * 2, None))
    assert recorded(loss, LABELS, torch.float32).loss_gradient is None


@pytest.mark.parametrize("name", ["smoothing", "squared error"])
def test_the_energy_has_its_loss(name: str) -> None:
    """Nothing computes it on the way, but it is there when it is asked for."""
    network = recorded(*CLOSED[name], torch.float64)
    relaxation = strict(network, 0.1)
    with network.replaying():
        relaxation.run(4)
        y = relaxation.energy.output.y
        assert not torch.equal(y, network.vhat[-1])
        assert torch.equal(relaxation.energy.output.Loss, network.loss_at(y))


@pytest.mark.parametrize("ErrType", ["Strict", "ErrorBased", "Equilibrium"])
def test_a_relaxation_is_what_autograd_makes_it(ErrType: str) -> None:
    loss, target = CLOSED["ignored labels"]
    X = torch.randn(N, 5, dtype=torch.float64)
    found = []
    for LossFun in (loss, lambda y, t: loss(y, t) + 0 * y.sum()):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, C)).double()
        result = PCInfer(model, LossFun, X, target, ErrType, n=6, update_at="vhat")
        found.append([*result.v, *result.epsilon[1:], *[p.grad for p in model.parameters()]])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
