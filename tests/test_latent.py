"""PCInferLatent against gradient descent on its energy written out."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests import reference
from tests.cases import Case, assert_close, cases, squared_error
from torch2pc import PCInferLatent, steps
from torch2pc.energy.factors import Terms
from torch2pc.graph.network import Network
from torch2pc.inference.strict import latent


def quadratic(v: list[Tensor]) -> Tensor:
    """A prior on every belief, with another weight for each."""
    terms = [0.1 * (l + 1) * v_l.square().sum() for l, v_l in enumerate(v)]
    return torch.stack(terms).sum()


def on_the_latent(v: list[Tensor]) -> Tensor:
    return (1 + v[0].square()).log().sum()


priors = st.sampled_from([None, quadratic, on_the_latent])
precisions = st.floats(0.1, 3)


@given(
    case=cases(),
    eta=st.floats(0, 0.2),
    n=st.integers(1, 10),
    pi=precisions,
    prior=priors,
    one_number=st.booleans(),
)
def test_beliefs_and_gradients(
    case: Case, eta: float, n: int, pi: float, prior: Any, one_number: bool
) -> None:
    L = len(case.model)
    pis = [pi] * (L - 1) if one_number else [pi / (l + 1) for l in range(L - 1)]
    expected = reference.latent(case.model, case.LossFun, case.Y, case.X, eta, n, pis, prior)
    result = PCInferLatent(
        case.model,
        case.LossFun,
        case.Y,
        case.X,
        eta,
        n,
        precision=pi if one_number else pis,
        prior=prior,
    )
    assert_close(result.v[:L], expected)

    parameters = list(case.model.parameters())
    if parameters:
        F = reference.latent_energy(case.model, case.LossFun, case.Y, result.v, pis, prior)
        gradients = torch.autograd.grad(F, parameters)
        assert_close([p.grad for p in parameters], gradients)
    for l in range(1, L):
        error = case.model[l - 1](result.v[l - 1]).detach() - result.v[l]
        assert_close(result.epsilon[l], error)
    _, error = reference.loss_gradient(case.LossFun, case.model[-1](result.v[L - 1]), case.Y)
    assert_close(result.epsilon[L], error)
    assert result.epsilon[0] is None


@given(case=cases(), eta=st.floats(0.01, 0.2))
def test_output_is_clamped_and_feed_forward_values_are_kept(case: Case, eta: float) -> None:
    Y, Xinit = case.Y.clone(), case.X.clone()
    result = PCInferLatent(case.model, case.LossFun, case.Y, case.X, eta, 5)
    assert torch.equal(case.Y, Y) and torch.equal(case.X, Xinit)
    assert torch.equal(result.v[-1], result.vhat[-1]) and torch.equal(result.vhat[0], Xinit)
    assert_close(result.Loss, case.LossFun(case.model(Xinit), Y).detach())


@given(case=cases(smooth=True), prior=priors)
def test_energy_falls(case: Case, prior: Any) -> None:
    network = Network(case.model, case.LossFun, case.X, case.Y, free_input=True, prior=prior)
    ones = [1.0] * len(case.model)
    relaxation = latent(network, 0.01, Terms(ones))
    energies = []
    with network.replaying():
        for v, _ in itertools.islice(relaxation, 15):
            F = reference.latent_energy(case.model, case.LossFun, case.Y, v, ones, prior)
            energies.append(F.detach())
            # What a step size that is found is judged by.
            assert_close(relaxation.energy.terms().sum(), energies[-1])
    assert all(later <= before + 1e-12 for before, later in itertools.pairwise(energies))


def test_hidden_and_latent_beliefs_relax_together() -> None:
    """With the hidden belief where its prediction is, a step moves it first, then the latent."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    Y, Xinit = torch.randn(5, 4), torch.zeros(5, 2)
    once = PCInferLatent(model, squared_error, Y, Xinit, 0.1, 1)
    assert torch.equal(once.v[0], Xinit) and not torch.equal(once.v[1], once.vhat[1])
    twice = PCInferLatent(model, squared_error, Y, Xinit, 0.1, 2)
    assert not torch.equal(twice.v[0], Xinit) and not torch.equal(twice.v[1], once.v[1])


def test_linear_decoder_with_quadratic_prior_is_ridge_regression() -> None:
    W = nn.Linear(3, 6, bias=False).double()
    Y, weight = torch.randn(4, 6).double(), 0.3
    result = PCInferLatent(
        nn.Sequential(W),
        squared_error,
        Y,
        torch.zeros(4, 3).double(),
        eta=0.3,
        n=2000,
        prior=lambda v: 0.5 * weight * v[0].square().sum(),
    )
    A = W.weight.detach()
    ridge = torch.linalg.solve(A.T @ A + weight * torch.eye(3).double(), A.T @ Y.T).T
    assert_close(result.v[0], ridge)


def test_deep_linear_decoder_weighs_the_layers_by_their_precision() -> None:
    """Two linear layers: Y ~ N(B h, I), h ~ N(A z, I/pi), z ~ N(0, I), so z has a closed form."""
    A, B, pi = nn.Linear(2, 3, bias=False).double(), nn.Linear(3, 5, bias=False).double(), 0.5
    Y = torch.randn(4, 5).double()
    result = PCInferLatent(
        nn.Sequential(A, B),
        squared_error,
        Y,
        torch.zeros(4, 2).double(),
        eta=0.3,
        n=4000,
        precision=pi,
        prior=lambda v: 0.5 * v[0].square().sum(),
    )
    A, B = A.weight.detach(), B.weight.detach()
    covariance = B @ B.T / pi + torch.eye(5).double()
    M = B @ A
    solve = torch.linalg.solve(covariance, torch.cat([M, Y.T], dim=1))
    z = torch.linalg.solve(M.T @ solve[:, :2] + torch.eye(2).double(), M.T @ solve[:, 2:]).T
    assert_close(result.v[0], z)


class LearnedPrior(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.ones(2))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, v: list[Tensor]) -> Tensor:
        self.calls += 1
        return 0.5 * (v[0] - self.mean).square().sum()


def test_parameters_of_prior_and_loss_get_their_gradients() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, yhat: Tensor, Y: Tensor) -> Tensor:
            return self.scale * squared_error(yhat, Y)

    model, prior, LossFun = nn.Sequential(nn.Linear(2, 3), nn.Tanh()), LearnedPrior(), Scaled()
    Y = torch.randn(4, 3)
    v = PCInferLatent(model, LossFun, Y, torch.zeros(4, 2), 0.1, 10, prior=prior).v
    assert_close(prior.mean.grad, (prior.mean - v[0]).sum(0).detach(), tolerance=1e-6)
    assert_close(LossFun.scale.grad, squared_error(model[-1](v[-2]), Y).detach(), tolerance=1e-6)
    assert prior.calls == 1


def test_dropout_mask_and_generator() -> None:
    model = nn.Sequential(nn.Linear(2, 8), nn.Dropout(), nn.Linear(8, 3)).double()
    Y, Xinit = torch.randn(4, 3).double(), torch.zeros(4, 2).double()
    torch.manual_seed(1)
    model(Xinit)
    after_one_pass = torch.get_rng_state()
    torch.manual_seed(1)
    mask = (nn.Dropout()(torch.ones(4, 8).double())).detach()
    torch.manual_seed(1)
    result = PCInferLatent(model, squared_error, Y, Xinit, 0.1, 20)
    assert torch.equal(torch.get_rng_state(), after_one_pass)

    class Masked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * mask

    fixed = nn.Sequential(model[0], Masked(), model[2])
    expected = reference.latent(fixed, squared_error, Y, Xinit, 0.1, 20, [1.0, 1.0])
    assert_close(result.v[:-1], expected)


def decoder_and_images() -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(2)
    decoder = nn.Sequential(
        nn.Sequential(nn.Linear(8, 32), nn.Tanh()),
        nn.Sequential(nn.Linear(32, 32), nn.Tanh()),
        nn.Sequential(nn.Linear(32, 32), nn.Tanh()),
        nn.Linear(32, 20),
    )
    return decoder, torch.rand(16, 20)


def updates(decoder: nn.Sequential, Y: Tensor, n: int) -> tuple[list[Tensor], list[Tensor]]:
    """Each layer's update, in one vector, and the errors."""
    Xinit = torch.zeros(16, 8, dtype=decoder[0][0].weight.dtype)
    result = PCInferLatent(decoder, squared_error, Y, Xinit, 0.01, n)
    found = [torch.cat([p.grad.double().flatten() for p in l.parameters()]) for l in decoder]
    return found, [error.double() for error in result.epsilon[1:]]


@pytest.mark.parametrize("n", [1, 3, 40])
def test_float32_loses_nothing(n: int) -> None:
    """Not even after one step, where the lower layers' errors are products of small ones."""
    decoder, Y = decoder_and_images()
    in_float64 = updates(copy.deepcopy(decoder).double(), Y.double(), n)
    for found, expected in zip(updates(decoder, Y, n), in_float64, strict=True):
        for one, other in zip(found, expected, strict=True):
            assert (one - other).norm() <= 1e-5 * other.norm()


@pytest.mark.parametrize("kind", ["autocast", "bfloat16 model"])
def test_half_precision(kind: str) -> None:
    decoder, Y = decoder_and_images()
    expected, _ = updates(copy.deepcopy(decoder), Y, 20)
    if kind == "bfloat16 model":
        decoder, Y = decoder.bfloat16(), Y.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        found, _ = updates(decoder, Y, 20)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 0.02 * other.norm()


def test_accumulates() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 4))
    arguments = (model, squared_error, torch.randn(5, 4), torch.zeros(5, 2), 0.1, 10)
    PCInferLatent(*arguments)
    once = [p.grad.clone() for p in model.parameters()]
    PCInferLatent(*arguments, accumulate=True)
    assert_close([p.grad for p in model.parameters()], [2 * g for g in once], tolerance=1e-6)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        (dict(model=nn.Linear(2, 3)), TypeError, "model must be"),
        (dict(Xinit=None), TypeError, "Xinit must be a torch.Tensor"),
        (dict(Xinit=torch.zeros(5, 2, device="meta")), ValueError, "Xinit must hold numbers"),
        (dict(Xinit=torch.zeros(5, 2).long()), TypeError, "Xinit must be a floating"),
        (dict(LossFun=None), TypeError, "LossFun must be"),
        (dict(eta=float("nan")), ValueError, "eta must be"),
        (dict(n=0), ValueError, "n must be"),
        (dict(precision="high"), TypeError, "precision must be a number"),
        (dict(precision=[1.0]), ValueError, "precision must have .* = 2 entries"),
        (dict(precision=[1.0, -1.0]), ValueError, "precision of layer 2 must be finite and > 0"),
        (dict(precision=[1.0, "1"]), TypeError, "precision of layer 2 must be a number"),
        (dict(prior=0.1), TypeError, "prior must be a callable"),
        (dict(prior=lambda v: v[0]), ValueError, r"prior must return a scalar, got .*\(5, 2\)"),
        (dict(prior=lambda v: 0.0), TypeError, "prior .*must return one floating-point tensor"),
    ],
)
def test_bad_argument(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 4))
    arguments = dict(
        model=model,
        LossFun=squared_error,
        Y=torch.randn(5, 4),
        Xinit=torch.zeros(5, 2),
        eta=0.1,
        n=3,
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=message):
        PCInferLatent(**(arguments | changed))
    assert_close(model.state_dict(), before, tolerance=0)
    assert all(p.grad is None for p in model.parameters())


def test_one_sweep_that_is_too_long_for_a_free_input_is_told_of() -> None:
    """What is sought is the latent, and not the errors."""
    torch.manual_seed(0)
    model, Y = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 8)).double(), torch.randn(4, 8).double()
    latents = torch.randn(4, 3).double()
    with pytest.warns(UserWarning, match="steps are too long"):
        PCInferLatent(model, squared_error, Y, latents, steps.Descent(9.0, sweep="down"), 1)
