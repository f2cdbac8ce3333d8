"""What is foretold of a descent, on functions whose curvature and edges are known."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torch2pc.energy.curvature import Product
from torch2pc.follow.outlook import (
    AHEAD,
    NEAR,
    Landscape,
    Point,
    _jumps,
    largest_stable,
    look_ahead,
)

Function = Callable[[Tensor], Tensor]
few = settings(max_examples=20)


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
