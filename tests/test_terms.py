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
from tests.cases import Case, assert_close, cases, random_beliefs, squared_error, tanh_chain
from torch2pc import PCGraph, PCInfer, PCInferLatent, PCResult, energies, follow, steps
from torch2pc.energy.curvature import hessian, largest_eigenvalue
from torch2pc.energy.factors import Terms
from torch2pc.graph.network import Network
from torch2pc.inference import RELAXATIONS
from torch2pc.inference.strict import strict

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


class Switching(nn.Module):
    """Uses one of two parameters, by the sign of what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.ones(()).double()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.up if x.sum() > 0 else self.down)


@pytest.mark.parametrize("ErrType", ["Strict", "ErrorBased"])
def test_a_parameter_that_one_side_of_a_nudge_uses_gets_the_slope_too(ErrType: str) -> None:
    """As if its update were 0 on the other side."""
    model = nn.Sequential(nn.Linear(2, 1), Switching(), nn.Linear(1, 1)).double()
    X = torch.randn(1, 2).double()
    with torch.no_grad():
        model[0].bias -= model[0](X)[0]  # the belief starts at 0, and moves to either side
    case = Case(model, squared_error, X, torch.ones(1, 1).double())
    sides = []
    for beta in (0.3, -0.3):
        case._replace(LossFun=scaled(squared_error, beta)).infer(ErrType, n=3)
        sides.append(case.gradients())
    used = [{name for name, g in side.items() if g is not None and g.any()} for side in sides]
    assert used[0] ^ used[1] == {"1.up", "1.down"}
    zero = torch.zeros(()).double()
    case.infer(ErrType, n=3, nudge=0.3)
    for name, g in case.gradients().items():
        above, below = (zero if side[name] is None else side[name] for side in sides)
        assert_close(g, (above - below) / 0.6)


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


# Other energies.

BETWEEN: dict[str, Any] = {
    "huber": energies.Huber(0.05),
    "laplace": energies.Laplace(0.2),
    "categorical": energies.Categorical(),
    "own": lambda f, v: 0.25 * (f - v).pow(4).sum(),
    "least elsewhere": lambda f, v: 0.5 * (f - v).square().sum() + 0.1 * v.square().sum(),
}


def energy_between(
    case: Case, between: dict[int, Any], pi: list[float]
) -> Callable[[list[Tensor]], Tensor]:
    """The energy of beliefs [v_0..v_L]."""

    def F(v: list[Tensor]) -> Tensor:
        found = case.LossFun(case.model[-1](v[-2]), case.Y)
        for l, p in enumerate(pi, start=1):
            f = case.model[l - 1](v[l - 1])
            E = between.get(l, lambda f, v: 0.5 * (f - v).square().sum())
            found = found + p * E(f, v[l])
        return found

    return F


@pytest.mark.parametrize("name", BETWEEN)
@given(case=cases(max_layers=4, smooth=True), data=st.data(), n=st.integers(1, 6))
def test_another_energy_equals_the_naive_descent(
    name: str, case: Case, data: st.DataObject, n: int
) -> None:
    hidden = range(1, len(case.model))
    between = {l: BETWEEN[name] for l in hidden if data.draw(st.booleans())}
    pi, down = [data.draw(precisions) for _ in hidden], data.draw(st.booleans())
    F = energy_between(case, between, pi)
    v, epsilon = reference.strict_by(*case, reference.Step(0.1), n, down, F, between)
    rule = steps.Descent(0.1, sweep="down" if down else "together")
    result = case.infer("Strict", eta=rule, n=n, precision=pi, energies=between)
    assert_close(result.v, v, 1e-8)
    assert_close(result.epsilon[1:], epsilon[1:], 1e-8)
    assert_close(grads(case), updates(case, v, epsilon, pi), 1e-8)


SHIPPED = ["huber", "laplace", "categorical"]


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("size", [30.0, 1.0, 1e-2, 1e-5, 1e-8])
def test_slopes_in_float32_keep_their_digits(name: str, size: float) -> None:
    """Down to displacements whose differences of values would be noise."""
    E = BETWEEN[name]
    torch.manual_seed(2)
    vhat = 3 * torch.randn(16, 7)
    df, dv = size * torch.randn(16, 7), size * torch.randn(16, 7)
    wide = [x.double() for x in (vhat, df, dv)]
    found, expected = E.slopes(vhat, df, dv), E.slopes(*wide)
    for mine, right in zip(found, expected, strict=True):
        assert float((mine.double() - right).norm() / right.norm()) < (3e-6 if size > 1 else 1e-6)
    assert float(E.value(vhat, df, dv)) == pytest.approx(float(E.value(*wide)), rel=2e-6)
    # In float64 they are the derivatives.
    f, v = [(wide[0] + d).requires_grad_() for d in wide[1:]]
    of_value = torch.autograd.grad(E(f, v), (f, v))
    for right, derivative in zip(expected, of_value, strict=True):
        assert float((right - derivative).norm() / right.norm()) < max(1e-11, 1e-13 / size)
    if size > 1e-5:
        assert float(E(f, v).detach()) == pytest.approx(float(E.value(*wide)), rel=1e-8)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_relaxation_in_float32_keeps_its_digits(name: str) -> None:
    """With a small loss, whose errors are small: the lower layers too."""
    exact = tanh_chain()
    exact = exact._replace(LossFun=scaled(squared_error, 1e-5))
    between = {1: BETWEEN[name], 2: BETWEEN[name]}
    expected = exact.infer("Strict", n=12, energies=between)
    found = in_float32(exact).infer("Strict", n=12, energies=between)
    for mine, right in zip(found.epsilon[1:], expected.epsilon[1:], strict=True):
        assert mine is not None and right is not None
        assert float((mine.double() - right).norm() / right.norm()) < 1e-5


@pytest.mark.parametrize("name", BETWEEN)
def test_auto_follow_and_latents_know_of_them(name: str) -> None:
    case, pi = tanh_chain(), [1.0, 2.0, 1.0]
    between = {2: BETWEEN[name], 3: BETWEEN[name]}
    F = torch.no_grad()(energy_between(case, between, pi))
    options: dict[str, Any] = dict(precision=pi, energies=between)
    result = case.infer("Strict", eta="auto", n=30, **options)
    assert float(F(result.v)) < float(F(result.vhat))
    record = follow(*case, "Strict", 0.02, 5, **options)
    v = case.infer("Strict", eta=0.02, n=5, **options).v
    assert float(record.F[-1]) == pytest.approx(float(F(v)), rel=1e-9)
    # The gradient of F, by autograd.
    free = [x.clone().requires_grad_() for x in v[1:-1]]
    with torch.enable_grad():
        value = energy_between(case, between, pi)([case.X, *free, v[-1]])
    found = torch.stack([g.norm() for g in torch.autograd.grad(value, free)])
    assert_close(record.gradient[-1, 1:4], found)
    halved = case.infer("Strict", eta=steps.Halving(0.02), n=5, **options).v
    assert_close(halved, v)
    # Without labels, where layer 1's prediction moves too.
    args = (case.model, case.LossFun, case.Y, case.X, 0.02, 5)
    latent = PCInferLatent(*args, **options)
    x = reference.feed_forward(case.model, case.X)
    for _ in range(5):
        free = [x_i.detach().requires_grad_() for x_i in x[:-1]]
        value = energy_between(case, between, pi)([*free, x[-1]])
        gradients = torch.autograd.grad(value, free)
        x = [*[a - 0.02 * g for a, g in zip(free, gradients, strict=True)], x[-1]]
    assert_close(latent.v[:-1], [x_i.detach() for x_i in x[:-1]])


@pytest.mark.parametrize("start", ["vhat", "vinit"])
@pytest.mark.parametrize("ErrType", ["Strict", "Multipliers", "ErrorBased"])
@pytest.mark.parametrize("kind", ["usual", "from above", "other energies"])
def test_an_energy_begun_anew_is_as_at_first(kind: str, ErrType: str, start: str) -> None:
    """As it is where a step size was too large."""
    case = tanh_chain()
    if kind == "from above":
        model = PCGraph(
            a=(nn.Linear(4, 6), "x"),
            b=(nn.Tanh(), "a"),
            out=(nn.Linear(6, 3), "b"),
            above={"a": (nn.Linear(6, 6), "b")},
        )
        case = case._replace(model=model.double())
    between = {1: energies.Huber(0.05)} if kind == "other energies" else {}
    network = Network(case.model, case.LossFun, case.X, case.Y)
    network.record()
    vinit = random_beliefs(case) if start == "vinit" else None
    terms = Terms(between=between, alpha=0.5 if ErrType == "Multipliers" else None)
    relaxation = RELAXATIONS[ErrType](network, 0.3, vinit, "v", terms)
    energy = relaxation.energy

    def course() -> list[Any]:
        found: list[Any] = [energy.terms(), *energy.beliefs()[1:]]
        for _ in range(3):
            relaxation.step()
            before = [e.clone() for e in energy.epsilon[1:]]
            energy.terms()
            assert_close(energy.epsilon[1:], before, 0)
            found += [energy.terms(), *energy.beliefs()[1:], *energy.epsilon[1:]]
        return [x.clone() for x in found]

    first = course()
    energy.restart()
    assert_close(course(), first, 0)


def test_energies_say_what_they_are() -> None:
    shown = [energies.Huber(0.5), energies.Laplace(2), energies.Categorical(1)]
    assert list(map(repr, shown)) == [
        *("Huber(delta=0.5)", "Laplace(smoothing=2.0)", "Categorical(dim=1)")
    ]


def test_the_curvature_is_that_of_the_other_energy() -> None:
    """Against the largest eigenvalue of the whole Hessian, by autograd, at the start."""
    case = tanh_chain()
    case = case._replace(X=case.X[:2], Y=case.Y[:2])
    between = {2: energies.Laplace(0.05)}
    v = reference.feed_forward(case.model, case.X)
    sizes = [x.numel() for x in v[1:-1]]

    def F(x: Tensor) -> Tensor:
        parts = [p.reshape(a.shape) for p, a in zip(x.split(sizes), v[1:-1], strict=True)]
        return energy_between(case, between, [1.0] * 3)([case.X, *parts, v[-1]])

    H = torch.autograd.functional.hessian(F, torch.cat([x.flatten() for x in v[1:-1]]))
    network = Network(case.model, case.LossFun, case.X, case.Y)
    relaxation = strict(network, 0.1, terms=Terms(between=between))
    product = hessian(relaxation.energy)
    found = largest_eigenvalue(product, relaxation.energy.variables, passes=30)
    # (Where errors are 0 nothing is left of the layers' own second derivatives but the loss's.)
    assert found == pytest.approx(float(torch.linalg.eigvalsh(H)[-1]), rel=0.02)
    assert found > 15


def test_other_options_go_with_them() -> None:
    case = tanh_chain()
    # Errors below delta are those of half the squared difference.
    same = case.infer("Strict", n=4, energies={1: energies.Huber(100.0)})
    assert_close(list(same), list(case.infer("Strict", n=4)), 1e-12)
    # A nudge small enough is backpropagation's gradient, whatever the energies are.
    case.infer("Exact")
    expected = case.gradients()
    both = {1: energies.Huber(), 2: energies.Laplace(1.0)}
    case.infer("Strict", eta=0.3, n=400, nudge=1e-5, energies=both)
    assert_close(case.gradients(), expected, 1e-6)


def test_a_graph_takes_energies_by_name() -> None:
    model, X, Y = graph(), torch.randn(5, 3).double(), torch.randn(5, 2).double()
    E = energies.Categorical()
    found = PCInfer(model, squared_error, X, Y, "Strict", n=4, energies={"b": E})
    expected = PCInfer(model, squared_error, X, Y, "Strict", n=4, energies={2: E})
    assert_close(list(found), list(expected), 0)
    assert not torch.equal(found.v[2], PCInfer(model, squared_error, X, Y, "Strict", n=4).v[2])


def test_half_precision_is_held_in_float32() -> None:
    case = in_float32(tanh_chain())
    options: dict[str, Any] = dict(n=4, energies={1: energies.Categorical(), 2: energies.Huber()})
    expected = case.infer("Strict", **options)
    with torch.autocast("cpu", torch.bfloat16):
        found = case.infer("Strict", **options)
    assert found.epsilon[1] is not None and found.epsilon[1].dtype == torch.float32
    assert_close(found.v[1], expected.v[1], 0.05)


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


BAD += [
    (dict(ErrType="Exact", energies={}), ValueError, "energies must be None for Exact"),
    (dict(ErrType="ErrorBased", energies={}), ValueError, "energies must be None for ErrorBased"),
    (dict(energies=[energies.Huber()]), TypeError, "energies must be a dict .* got list"),
    (
        dict(energies={0: energies.Huber()}),
        ValueError,
        "energies must have .* keys, 1 to 3.* got 0",
    ),
    (dict(energies={"a": energies.Huber()}), ValueError, "energies must have .* keys.* got 'a'"),
    (dict(energies={1: energies.Huber}), TypeError, r"energies\[1\] must be one of .* got Huber"),
    (dict(energies={1: 0.5}), TypeError, r"energies\[1\] must be one of .* got float"),
    (dict(energies={1: nn.Linear(2, 2)}), TypeError, r"energies\[1\] must have no parameters"),
    (
        dict(energies={1: lambda f, v: f - v}),
        ValueError,
        r"energies\[1\] must return a scalar, got shape \(8, 6\)",
    ),
    (
        dict(energies={1: lambda f, v: torch.zeros(())}),
        ValueError,
        r"energies\[1\] must depend on the prediction and the belief",
    ),
    (
        dict(model=graph(), energies={"out": energies.Huber()}),
        ValueError,
        r"energies must have hidden layers as keys, \['a', 'b', 'c'\], got 'out'",
    ),
]


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: energies.Huber(0.0), ValueError, "delta must be a number > 0, got 0.0"),
        (lambda: energies.Huber("1"), TypeError, "delta must be a number > 0, got str"),
        (lambda: energies.Laplace(-1), ValueError, "smoothing must be a number > 0, got -1"),
        (lambda: energies.Categorical(1.0), TypeError, "dim must be an int, got float"),
    ],
)
def test_bad_numbers_are_named(
    make: Callable[[], object], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        make()


@pytest.mark.parametrize(("arguments", "kind", "message"), BAD)
def test_bad_input_is_named(arguments: dict[str, Any], kind: type[Exception], message: str) -> None:
    model, LossFun, X, Y = tanh_chain()
    kept = dict(model=model, LossFun=LossFun, X=X, Y=Y, ErrType="Strict")
    with pytest.raises(kind, match=message):
        PCInfer(**{**kept, **arguments})
    assert all([p.grad is None for p in model.parameters()])
