"""Energies of other terms than the usual ones: precisions, a loss that nudges, other divergences."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests import reference
from tests.cases import Case, assert_close, cases, squared_error
from torch2pc import PCGraph, PCInfer, PCInferLatent, PCResult, follow, steps

precisions = st.floats(0.1, 4.0)


def weighted(case: Case, pi: list[float]) -> Callable[[list[Tensor]], Tensor]:
    """The energy of beliefs [v_0..v_L]."""
    return lambda v: reference.latent_energy(case.model, case.LossFun, case.Y, v, pi, None)


def of_errors(case: Case, pi: list[float]) -> Callable[[list[Any]], Tensor]:
    def F(epsilon: list[Any]) -> Tensor:
        _, y = reference.perturbed_pass(case.model, case.X, epsilon)
        squares = [p * e.square().sum() / 2 for p, e in zip(pi, epsilon[1:], strict=True)]
        return sum(squares, case.LossFun(y, case.Y))

    return F


def updates(case: Case, v: list[Tensor], epsilon: list[Any], pi: list[float]) -> Any:
    """Those of errors that are weighted by their precisions."""
    of = [None, *[p * e for p, e in zip(pi, epsilon[1:-1], strict=True)], epsilon[-1]]
    return reference.parameter_updates(case.model, v, of)


def grads(case: Case) -> dict[Any, Tensor]:
    return {p: p.grad for p in case.model.parameters() if p.grad is not None}


@given(case=cases(max_layers=4, smooth=True), data=st.data(), n=st.integers(1, 6))
def test_strict_with_precisions(case: Case, data: st.DataObject, n: int) -> None:
    pi = [data.draw(precisions) for _ in case.model[1:]]
    down = data.draw(st.booleans())
    v, epsilon = reference.strict_by(*case, reference.Step(0.1), n, down, weighted(case, pi))
    rule = steps.Descent(0.1, sweep="down" if down else "together")
    result = case.infer("Strict", eta=rule, n=n, precision=pi)
    assert_close(result.v, v)
    assert_close(result.epsilon[1:], epsilon[1:])
    assert_close(grads(case), updates(case, v, epsilon, pi))


@given(case=cases(max_layers=4, smooth=True), data=st.data(), n=st.integers(1, 6))
def test_error_based_with_precisions(case: Case, data: st.DataObject, n: int) -> None:
    pi = [data.draw(precisions) for _ in case.model[1:]]
    expected = reference.error_based_by(*case, reference.Step(0.1), n, of_errors(case, pi))
    result = case.infer("ErrorBased", n=n, precision=pi)
    assert_close(result.v, expected.v)
    assert_close(result.epsilon[1:], expected.epsilon[1:])
    assert_close(grads(case), updates(case, expected.v, expected.epsilon, pi))


def tanh_chain(dtype: torch.dtype = torch.float64) -> Case:
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Linear(4, 6),
        *[nn.Sequential(nn.Tanh(), nn.Linear(6, 6)) for _ in range(2)],
        nn.Sequential(nn.Tanh(), nn.Linear(6, 3)),
    ).to(dtype)
    X, Y = torch.randn(8, 4, dtype=dtype), torch.randn(8, 3, dtype=dtype)
    return Case(model, squared_error, X, Y)


def in_float32(case: Case) -> Case:
    """The same weights and data."""
    return case._replace(
        model=copy.deepcopy(case.model).float(), X=case.X.float(), Y=case.Y.float()
    )


@pytest.mark.parametrize("mixes", [False, True])
@pytest.mark.parametrize("pi", [[0.01, 1.0, 30.0], [200.0, 5.0, 0.2]])
def test_equilibrium_with_precisions(mixes: bool, pi: list[float]) -> None:
    """It is where the weighted energy's gradient vanishes, and near in few evaluations."""
    case = tanh_chain()
    if mixes:  # one problem for all examples
        case = case._replace(
            LossFun=lambda y, Y: squared_error(y, Y) + (y - Y).mean(0).square().sum()
        )
    result = case.infer("Equilibrium", n=60, precision=pi)
    assert float(result.distance.max()) < 1e-6  # type: ignore[attr-defined]
    free = [v.clone().requires_grad_() for v in result.v[1:-1]]
    F = weighted(case, pi)([case.X, *free, result.v[-1]])
    for g, p, e in zip(torch.autograd.grad(F, free), pi, result.epsilon[1:-1], strict=True):
        assert float(g.norm()) < 1e-5 * p * float(e.norm())
    assert_close(grads(case), updates(case, result.v, result.epsilon, pi))


@pytest.mark.parametrize("ErrType", ["Strict", "ErrorBased", "Equilibrium"])
def test_one_number_is_all_of_it(ErrType: str) -> None:
    case = tanh_chain()
    found = case.infer(ErrType, precision=2)
    assert_close(list(found), list(case.infer(ErrType, precision=[2.0, 2.0, 2.0])), 0)
    assert not torch.equal(found.v[1], case.infer(ErrType).v[1])


@pytest.mark.parametrize("ErrType", ["Strict", "ErrorBased", "Equilibrium"])
def test_precisions_in_float32(ErrType: str) -> None:
    pi = [0.01, 1.0, 30.0]
    exact = tanh_chain()
    expected = exact.infer(ErrType, n=30, eta=0.02, precision=pi)
    case = in_float32(exact)
    found = case.infer(ErrType, n=30, eta=0.02, precision=pi)
    tolerance = 2e-3 if ErrType == "Equilibrium" else 1e-5  # where it stops
    assert_close([e.double() for e in found.epsilon[1:]], expected.epsilon[1:], tolerance)


def graph() -> PCGraph:
    class Add(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a + b

    torch.manual_seed(0)
    return PCGraph(
        a=(nn.Linear(3, 4), "x"),
        b=(nn.Sequential(nn.Tanh(), nn.Linear(4, 4)), "a"),
        c=(Add(), "a", "b"),
        out=(nn.Linear(4, 2), "c"),
    ).double()


def test_a_graph_takes_precisions_by_name() -> None:
    model, X, Y = graph(), torch.randn(5, 3).double(), torch.randn(5, 2).double()

    def infer(precision: Any) -> PCResult:
        return PCInfer(model, squared_error, X, Y, "Strict", n=9, precision=precision)

    found = infer({"b": 3.0})
    assert_close(list(found), list(infer([1.0, 3.0, 1.0])), 0)
    assert not torch.equal(found.v[2], infer(None).v[2])
    latent = PCInferLatent(model, squared_error, Y, X, 0.1, 5, precision={"b": 3.0})
    expected = PCInferLatent(model, squared_error, Y, X, 0.1, 5, precision=[1, 3, 1])
    assert_close(list(latent), list(expected), 0)


def test_auto_and_follow_know_of_precisions() -> None:
    case, pi = tanh_chain(), [10.0, 0.5, 10.0]
    F = torch.no_grad()(weighted(case, pi))
    result = case.infer("Strict", eta="auto", n=30, precision=pi)
    assert float(F(result.v)) < float(F(result.vhat))
    record = follow(*case, "Strict", 0.02, 10, precision=pi)
    v = case.infer("Strict", eta=0.02, n=10, precision=pi).v
    assert float(record.F[-1]) == pytest.approx(float(F(v)), rel=1e-9)
    assert record.stable_eta is not None
    assert record.stable_eta < 0.2


# Nudging.


def scaled(LossFun: Any, beta: float) -> Any:
    return lambda y, Y: beta * LossFun(y, Y)


@pytest.mark.parametrize("ErrType", ["Strict", "ErrorBased"])
@given(case=cases(max_layers=4, smooth=True), n=st.integers(1, 6), beta=st.floats(0.05, 1.0))
def test_nudging_is_the_slope_of_the_naive_updates(
    ErrType: str, case: Case, n: int, beta: float
) -> None:
    sides = []
    for b in (beta, -beta):
        of_side = case._replace(LossFun=scaled(case.LossFun, b))
        if ErrType == "Strict":
            sides.append(reference.strict(*of_side, 0.2, n))
        else:
            sides.append(reference.error_based(*of_side, 0.2, n))
    case.X.requires_grad_()
    result = case.infer(ErrType, eta=0.2, n=n, nudge=beta)
    assert_close(result.v, sides[0].v)
    assert_close(result.epsilon[1:], sides[0].epsilon[1:])
    assert_close(result.Loss, case.LossFun(case.model(case.X), case.Y).detach())
    expected = {
        p: (sides[0].updates[p] - sides[1].updates[p]) / (2 * beta) for p in sides[0].updates
    }
    assert_close(grads(case), expected, 1e-8)
    of_input = (sides[0].epsilon[0] - sides[1].epsilon[0]) / (2 * beta)
    assert_close(result.epsilon[0], of_input, 1e-8)
    assert torch.equal(case.X.grad, result.epsilon[0])


RELAXED: dict[str, dict[str, Any]] = {
    "Strict": dict(eta=0.5, n=300),
    "ErrorBased": dict(eta=1.0, n=3),
    "Equilibrium": dict(n=20),
}


@pytest.mark.parametrize("ErrType", RELAXED)
@pytest.mark.parametrize("beta", [1e-2, 1e-4, 1e-6, 1e-12])
def test_a_small_nudge_is_backpropagation_in_float32(ErrType: str, beta: float) -> None:
    """Off by a multiple of beta^2 and by round-off, in every layer; others stop near 1e-3."""
    exact = tanh_chain()
    exact.infer("Exact")
    expected = exact.gradients()
    case = in_float32(exact)
    case.infer(ErrType, nudge=beta, **RELAXED[ErrType])
    found = {name: g.double() for name, g in case.gradients().items() if g is not None}
    # A search stops where the gradient is sqrt(eps) of the errors.
    round_off = 1e-3 if ErrType == "Equilibrium" else 5e-6
    assert_close(found, expected, 50 * beta**2 + round_off)


def test_a_nudge_is_off_by_its_square() -> None:
    case = tanh_chain()
    case.infer("Exact")
    expected = [p.grad for p in case.model.parameters()]
    off = []
    for beta in (0.02, 0.01, 0.005):
        case.infer("ErrorBased", eta=0.5, n=60, nudge=beta)
        found = zip(case.model.parameters(), expected, strict=True)
        off.append(max([float((p.grad - g).norm() / g.norm()) for p, g in found]))
    assert off[0] / off[1] == pytest.approx(4, rel=0.1)
    assert off[1] / off[2] == pytest.approx(4, rel=0.1)


def test_a_nudge_has_the_effects_of_one_forward_pass() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 6),
        nn.Sequential(nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 6)),
        nn.Sequential(nn.Tanh(), nn.Linear(6, 3)),
    )
    twin = copy.deepcopy(model)
    X, Y = torch.randn(8, 4), torch.randn(8, 3)
    torch.manual_seed(3)
    squared_error(twin(X), Y).backward()
    after = torch.get_rng_state()
    torch.manual_seed(3)
    PCInfer(model, squared_error, X, Y, "ErrorBased", 1.0, 3, nudge=1e-4)
    assert torch.equal(torch.get_rng_state(), after)
    assert_close(dict(model.named_buffers()), dict(twin.named_buffers()), 0)
    # With the same mask on both sides the slope is the gradient.
    pairs = zip(model.parameters(), twin.parameters(), strict=True)
    for p, q in pairs:
        if float(q.grad.norm()) > 1e-5:
            assert_close(p.grad, q.grad, 1e-4)


def test_the_parameters_of_a_loss_get_its_gradient() -> None:
    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

        def forward(self, y: Tensor, Y: Tensor) -> Tensor:
            return self.scale * squared_error(y, Y)

    case = tanh_chain()._replace(LossFun=Weighted())
    case.infer("Exact")
    expected = case.LossFun.scale.grad  # type: ignore[attr-defined]
    case.infer("ErrorBased", eta=1.0, n=3, nudge=1e-5)
    assert_close(case.LossFun.scale.grad, expected, 1e-8)  # type: ignore[attr-defined]


def test_other_options_go_with_a_nudge() -> None:
    case, seen = tanh_chain(), []
    options: dict[str, Any] = dict(eta="auto", n=30, nudge=0.1, precision=[1.0, 2.0, 3.0])
    case.infer("Strict", **options)
    first = [p.grad.clone() for p in case.model.parameters()]
    case.infer(
        "Strict", accumulate=True, callback=lambda k, v, e: seen.append((k, e[-1])), **options
    )
    for p, g in zip(case.model.parameters(), first, strict=True):
        assert_close(p.grad, 2 * g, 1e-12)
    assert [k for k, _ in seen] == list(range(1, 31))
    result = case.infer("Equilibrium", n=20, nudge=0.1)
    assert result.distance.shape == (8,)  # type: ignore[attr-defined]
    plain = case.infer("Strict", n=3, nudge=0.1)
    with pytest.warns(UserWarning, match="without compilation, because nudge relaxes twice"):
        found = case.infer("Strict", n=3, nudge=0.1, compile=True)
    assert_close(list(found), list(plain), 0)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        dict(ErrType="Exact", precision=2.0),
        ValueError,
        "precision must be None for Exact, whose up",
    ),
    (
        dict(ErrType="FixedPred", precision=[1.0]),
        ValueError,
        "precision must be None for FixedPred",
    ),
    (dict(precision=[1.0]), ValueError, "precision must have .* 3 entries.* got 1"),
    (dict(precision=[1.0, 0.0, 1.0]), ValueError, "precision of layer 2 must be finite and > 0"),
    (
        dict(precision=[1.0, True, 1.0]),
        TypeError,
        "precision of layer 2 must be a number, got bool",
    ),
    (dict(precision="high"), TypeError, "precision must be a number or a list .* got str"),
    (dict(precision={"a": 1.0}), TypeError, "precision must be no dict for an nn.Sequential"),
    (
        dict(model=graph(), precision={"out": 2.0}),
        ValueError,
        r"precision must have hidden layers as keys, \['a', 'b', 'c'\], got 'out'",
    ),
]


BAD += [
    (
        dict(ErrType="Exact", nudge=0.1),
        ValueError,
        "nudge must be None for Exact, whose updates are l",
    ),
    (dict(nudge=0.0), ValueError, "nudge must be None or a finite number > 0, got 0.0"),
    (dict(nudge=True), TypeError, "nudge must be None or a finite number > 0, got bool"),
    (dict(nudge=0.1, vinit=[None] * 5), ValueError, "vinit must be None with nudge"),
    (
        dict(nudge=0.1, eta=steps.Langevin(0.1, 1.0)),
        ValueError,
        "eta must be a rule without noise with nudge",
    ),
]


@pytest.mark.parametrize(("arguments", "kind", "message"), BAD)
def test_bad_input_is_named(arguments: dict[str, Any], kind: type[Exception], message: str) -> None:
    model, LossFun, X, Y = tanh_chain()
    kept = dict(model=model, LossFun=LossFun, X=X, Y=Y, ErrType="Strict")
    with pytest.raises(kind, match=message):
        PCInfer(**{**kept, **arguments})
    assert all([p.grad is None for p in model.parameters()])
