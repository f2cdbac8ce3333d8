"""What is foretold of a descent, on functions whose curvature and edges are known."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests import reference
from tests.cases import Case, assert_close, tanh_chain
from torch2pc.energy.curvature import Product
from torch2pc.energy.factors import Terms
from torch2pc.follow.outlook import (
    AHEAD,
    NEAR,
    TRIED,
    Landscape,
    Point,
    _decay,
    _descent,
    _is_near,
    _jumps,
    _largest,
    _quadrature,
    largest_stable,
    look_ahead,
)
from torch2pc.graph.network import Network
from torch2pc.inference.error_based import error_based
from torch2pc.inference.strict import latent

Function = Callable[[Tensor], Tensor]
few = settings(max_examples=20)


def half_square(x: Tensor) -> Tensor:
    return 0.5 * x.square().sum()


class Of(Landscape):
    """The landscape of a function, by autograd. The distance is the gradient's length there."""

    def __init__(self, function: Function) -> None:
        self.function = function

    def gradient(self, x: Sequence[Tensor]) -> list[Tensor]:
        with torch.enable_grad():
            moving = x[0].detach().requires_grad_()
            return list(torch.autograd.grad(self.function(moving), moving))

    def look(self, x: Sequence[Tensor]) -> Point:
        g, F = self.gradient(x), self.function(x[0]).item()
        return Point(list(x), g, F, 1e-12 * abs(F), g[0].norm().item())

    def hessian(self, x: Sequence[Tensor]) -> Product:
        H = torch.autograd.functional.hessian(self.function, x[0])
        return lambda u: [H @ u[0]]


def falls(function: Function, x: Tensor, eta: float, steps: int) -> bool:
    points = list(Of(function).descend([x], eta, steps))
    return all([after.is_below(before) for before, after in itertools.pairwise(points)])


def at(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


@few
@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=8))
def test_of_a_quadratic_function_it_is_two_over_its_curvature(curvatures: list[float]) -> None:
    of = at(*curvatures)
    x = torch.ones_like(of)
    found = largest_stable(Of(lambda x: 0.5 * (of * x * x).sum()), [x], [x])
    assert found.falls and found.eta == pytest.approx(2 / max(curvatures))


@few
@given(
    across=st.floats(0.5, 1.5),
    start=st.floats(2.0, 4.0),
    steep=st.floats(1.0, 4.0),
)
def test_where_the_curvature_grows_along_the_way_shorter_steps_are_found(
    across: float, start: float, steep: float
) -> None:
    """A valley that narrows downwards: across it F curves as 1 + steep (start - x)."""

    def function(v: Tensor) -> Tensor:
        x, y = v
        return 0.5 * (1 + steep * (start - x)) * y**2 + 0.5 * x**2 + 0.1 * y

    x = at(start, across)
    of_start = torch.autograd.functional.hessian(function, x)
    limit = 2 / torch.linalg.eigvalsh(of_start)[-1].item()
    # Were it constant, this would be stable; it is not at the bottom.
    assert not falls(function, x, 0.9 * limit, 100)
    found = largest_stable(Of(function), [x], [x])
    assert found.falls and found.eta is not None
    assert falls(function, x, 0.9 * found.eta, 100)
    # It is not shorter than it need be: the curvature at the bottom is 1 + steep start.
    assert found.eta > 0.5 / (1 + steep * start)


@few
@given(width=st.floats(0.0, 0.2), place=st.floats(-0.9, 0.9), edges=st.integers(1, 40))
def test_an_edge_is_told_from_a_bend(width: float, place: float, edges: int) -> None:
    """Edges that lie beside each other are still edges, and a bend of some width is none."""
    places = at(*[place * (1 + k / 50) for k in range(edges)])

    def function(v: Tensor) -> Tensor:
        away = v[0] - places
        if width > 0.02:
            return (away**2 + width**2).sqrt().sum()
        return away.abs().sum() + 0.5 * v[0] ** 2

    landscape = Of(function)
    before, after = (landscape.look([at(x)]) for x in (-1.0, 1.0))
    assert _jumps(landscape, before, after) == (width <= 0.02)


def test_at_an_edge_the_step_is_the_one_that_is_stable_beside_it() -> None:
    def function(v: Tensor) -> Tensor:
        return 0.5 * (v * v * at(1.0, 4.0)).sum() + 3 * (v[0] - 0.3).abs()

    found = largest_stable(Of(function), [at(2.0, 1.0)], [at(2.0, 1.0)])
    assert not found.falls and found.eta == pytest.approx(0.5)
    # With no step whatever it comes to rest beside the edge.
    assert not falls(function, at(2.0, 1.0), 0.01, 400)


def test_a_descent_is_tried_until_it_rises_or_has_arrived() -> None:
    """Within a thousandth of equilibrium; where F has risen, the places before and after."""
    square = Of(lambda v: 0.5 * (v * v).sum())
    (end,) = _descent(square, [at(1.0)], 0.9)
    assert end.distance == pytest.approx(1e-3)
    (end,) = _descent(square, [at(1.0)], 0.01)
    assert end.distance == pytest.approx(0.99**TRIED)
    before, after = _descent(square, [at(1.0)], 2.5)
    assert (before.distance, after.distance) == (1, 1.5)


def test_a_function_that_is_not_finite_has_no_step() -> None:
    x = at(1.0)
    assert largest_stable(Of(lambda v: (v / 0).sum() ** 2), [x], [x]).eta is None
    assert largest_stable(Of(lambda v: v.sum()), [x], [x]) == (math.inf, True)


@few
@given(
    slow=st.floats(0.01, 0.5),
    eta=st.floats(0.1, 0.9),
    row=st.integers(0, 9),
    bent=st.booleans(),
)
def test_the_iterations_that_are_foretold_are_those_it_takes(
    slow: float, eta: float, row: int, bent: bool
) -> None:
    """Whether it was tried or foretold; where F bends, the first ones are not foretold by its Hessian."""

    def function(v: Tensor) -> Tensor:
        smooth = 0.5 * (v * v * at(1.0, slow)).sum()
        return smooth - (torch.cosh(v).log().sum() * 0.3 * slow if bent else 0)

    x = at(1.0, 1.0)
    outlook = look_ahead(Of(function), [x], row, eta)
    assert outlook is not None
    descent = Of(function).descend([x], eta, 10**5)
    taken = next(k for k, point in enumerate(descent) if point.distance <= NEAR)
    found = outlook.iterations_to(NEAR, eta, eta)
    assert found is not None
    if taken <= AHEAD:
        assert found == row + taken
    else:
        assert abs(found - row - taken) <= 0.1 * taken


def test_a_descent_that_rattles_is_not_foretold() -> None:
    """Between the sides of an edge the gradient stays as long as it is."""

    def function(v: Tensor) -> Tensor:
        return v[0].abs() + 0.005 * v[1] ** 2

    outlook = look_ahead(Of(function), [at(1.0, 1.0)], 0, 0.1)
    assert outlook is not None and outlook.iterations_to(NEAR, 0.1, 0.1) is None


@few
@given(
    curvatures=st.lists(st.floats(0.1, 1), min_size=1, max_size=6, unique=True),
    size=st.sampled_from([1.0, 1e-200, 1e200]),
    eta=st.floats(0.1, 2.5),
)
def test_the_quadrature_is_exact_for_as_many_steps_as_it_has_nodes(
    curvatures: list[float], size: float, eta: float
) -> None:
    of, g = at(*curvatures), size * torch.linspace(1, 2, len(curvatures)).double()
    theta, weight = _quadrature(Of(lambda x: 0.5 * (of * x * x).sum()), point(g / of, g))
    for j in range(len(curvatures)):
        expected = ((1 - eta * of) ** j * g / size).norm() / (g / size).norm()
        assert _decay(theta, weight, j, eta) == pytest.approx(expected.item(), rel=1e-6)


def point(x: Tensor, gradient: Tensor) -> Point:
    return Point([x], [gradient], 0.0, 0.0, 1.0)


def test_a_gradient_of_zeros_and_one_that_is_not_finite_have_a_quadrature_or_none() -> None:
    square, x = Of(lambda x: 0.5 * (x * x).sum()), at(1.0, 2.0)
    theta, weight = _quadrature(square, point(x, 0 * x))
    assert theta and all(map(math.isfinite, [*theta, *weight]))
    assert _quadrature(square, point(x, x / 0)) == ((), ())


@pytest.mark.parametrize(
    ("seen", "foretold", "is_near"),
    [
        (0.0, 0.0, True),
        (0.0, 0.1, False),
        (0.1, 0.0, False),
        (math.nan, 0.1, False),
        (math.exp(-1.19), math.exp(-1), True),
        (math.exp(-1.22), math.exp(-1), False),
        (math.exp(-0.81), math.exp(-1), True),
        (math.exp(-0.78), math.exp(-1), False),
        (1.004, 1.0, True),
        (1.006, 1.0, False),
        (math.exp(1.19), math.exp(1), True),
    ],
)
def test_what_has_come_true(seen: float, foretold: float, is_near: bool) -> None:
    """To a fifth of the logarithm that it has fallen by, or half a percent."""
    assert _is_near(seen, foretold) == is_near


def test_the_largest_of_curvatures_is_above_0() -> None:
    for curvatures in itertools.permutations([-3.0, math.nan, 0.5, 2.0]):
        assert _largest(curvatures) == 2
    assert _largest([math.nan, -1.0, 0.0]) == _largest([]) == 1e-300


def test_a_straight_way_has_no_jump_and_one_to_infinity_none_either() -> None:
    straight, steep = Of(lambda v: 3 * v.sum()), Of(lambda v: (1 / (v - 1)).sum())
    for function in (straight, steep):
        assert not _jumps(function, *[function.look([at(x)]) for x in (0.0, 1.0)])


# ------------------------------------------------------------------------ the energy as a landscape


def prior(v: list[Tensor]) -> Tensor:
    """With a sign of its own, so that F is not the sum of its terms' sizes."""
    return -3 * v[0].cos().sum() + 0.1 * v[1].square().sum()


def landscape_of(case: Case, is_latent: bool, pi: list[float] | None = None) -> Landscape:
    chosen: Any = dict(free_input=True, prior=prior) if is_latent else {}
    network = Network(*case, **chosen)
    relaxation_of = latent if is_latent else error_based
    return Landscape(relaxation_of(network, 0.1, terms=Terms(pi)).energy)


@pytest.mark.parametrize("is_latent", [True, False])
@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_the_landscape_is_that_of_the_energy(is_latent: bool, scale: float) -> None:
    """In beliefs with a prior, and in errors; its Hessian too, also where all beliefs are zeros."""
    case = tanh_chain()
    with torch.no_grad():
        case.model.append(nn.Linear(3, 3).double())
        for p in case.model.parameters():
            p *= scale
    if is_latent:
        case = case._replace(X=scale * case.X)
    vhat, pi = reference.feed_forward(case.model, case.X), [1.0, 2.0, 0.5, 1.5]
    landscape = landscape_of(case, is_latent, pi if is_latent else None)
    x = [torch.randn_like(v) for v in vhat[0 if is_latent else 1 : -1]]

    def terms_of(x: Sequence[Tensor]) -> list[Tensor]:
        if not is_latent:
            v, y = reference.perturbed_pass(case.model, case.X, [None, *x])
            return [case.LossFun(y, case.Y), *map(half_square, x)]
        v = [a + d for a, d in zip(vhat, x, strict=False)]
        errors = [f(a) - b for f, a, b in zip(case.model, v, v[1:], strict=False)]
        squares = [p * half_square(e) for p, e in zip(pi, errors, strict=True)]
        return [case.LossFun(case.model[-1](v[-1]), case.Y), *squares, prior(v)]

    def F(*x: Tensor) -> Tensor:
        return torch.stack(terms_of(x)).sum()

    free = [x_i.clone().requires_grad_() for x_i in x]
    gradient = torch.autograd.grad(F(*free), free)
    point, terms = landscape.look(x), torch.stack(terms_of(x))
    of_sums = [terms.sum().item(), 256 * 2**-52 * terms.abs().sum().item()]
    assert [point.F, point.slack] == pytest.approx(of_sums, rel=1e-9, abs=0)
    assert all(mine is its for mine, its in zip(point.x, x, strict=True))
    assert_close(point.gradient, gradient)
    assert_close(landscape.gradient(x), gradient)
    if is_latent:
        v = [a + d for a, d in zip(vhat, x, strict=False)]
        errors = [f(a) - b for f, a, b in zip(case.model, v, v[1:], strict=False)]
        pulls = [0 * x[0], *[p * e for p, e in zip(pi, errors, strict=True)]]
        arriving = [g + e for g, e in zip(gradient, pulls, strict=True)]
    else:
        pulls, arriving = x, [e - g for g, e in zip(gradient, x, strict=True)]
    lengths = [torch.cat([a.flatten() for a in of]).norm() for of in (gradient, pulls, arriving)]
    assert point.distance == pytest.approx((lengths[0] / max(lengths[1:])).item())
    product = landscape.hessian(x)
    for u in ([torch.randn_like(x_i) for x_i in x], [torch.zeros_like(x_i) for x_i in x]):
        _, expected = torch.autograd.functional.hvp(F, tuple(x), tuple(u))
        assert_close(product(u), list(expected), tolerance=1e-5)


def test_where_nothing_slopes_the_distance_is_0() -> None:
    case = tanh_chain()
    still = case._replace(Y=case.model(case.X).detach())
    landscape = landscape_of(still, is_latent=False)
    x = [torch.zeros_like(v) for v in reference.feed_forward(case.model, case.X)[1:-1]]
    assert landscape.look(x).distance == 0 and landscape.look(x).F == 0


@pytest.mark.parametrize("half", ["all", "the output", "a belief"])
def test_steps_of_differences_are_as_long_as_half_precision_needs(half: str) -> None:
    case = tanh_chain(torch.float32)
    case.model.insert(2, nn.Identity())
    x = [0.3 * torch.randn_like(v) for v in reference.feed_forward(case.model, case.X)[1:-1]]
    u = [torch.randn_like(x_i) for x_i in x]
    precise = landscape_of(Case(*case), is_latent=False).hessian(x)(u)
    if half == "all":
        case.model.to(torch.bfloat16)
        case = case._replace(X=case.X.bfloat16())
    elif half == "the output":
        case.model[-1].append(To(torch.bfloat16))
    else:
        case.model[1].append(To(torch.bfloat16))
        case.model[2] = To(torch.float32)
    found = landscape_of(case, is_latent=False).hessian(x)(u)
    for a, b in zip(found, precise, strict=True):
        assert (a - b).norm() < 0.05 * b.norm(), half


class To(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)
