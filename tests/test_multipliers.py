"""Multipliers against the naive iteration, and where it comes to rest: backpropagation's errors."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.utils import counters

from tests import reference
from tests.cases import (
    Case,
    assert_close,
    cases,
    graphs,
    random_beliefs,
    squared_error,
)
from torch2pc import PCGraph, PCInfer, follow, steps
from torch2pc.graph.network import Network
from torch2pc.inference.multipliers import multipliers

alphas = st.sampled_from([0.0, 0.3, 1.0])


def found(case: Case) -> dict[nn.Parameter, Tensor]:
    return {p: p.grad for p in case.model.parameters() if p.grad is not None}


@given(
    case=st.one_of(cases(), graphs()),
    eta=st.floats(0, 0.3),
    n=st.integers(1, 8),
    alpha=alphas,
    vinit=st.booleans(),
    dX=st.booleans(),
    update_at=st.sampled_from(["v", "vhat", "before"]),
    data=st.data(),
)
def test_equals_the_iteration(
    case: Case,
    eta: float,
    n: int,
    alpha: float,
    vinit: bool,
    dX: bool,
    update_at: str,
    data: st.DataObject,
) -> None:
    beliefs = random_beliefs(case) if vinit else None
    count = len(case.model) - 1
    pi = data.draw(st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=count, max_size=count))
    expected = reference.multipliers(*case, eta, n, beliefs, update_at, alpha, pi)
    case.X.requires_grad_(dX)
    options: dict[str, Any] = dict(vinit=beliefs, update_at=update_at, alpha=alpha, precision=pi)
    result = case.infer("Multipliers", eta=eta, n=n, **options)
    assert_close(result.v, expected.v)
    assert_close(result.epsilon[1:], expected.epsilon[1:])
    assert_close(found(case), expected.updates)
    if dX:
        assert_close(result.epsilon[0], expected.epsilon[0])


@given(case=st.one_of(cases(), graphs()), eta=st.floats(0, 0.2), n=st.integers(1, 6))
def test_a_rule_moves_the_beliefs_as_it_says(case: Case, eta: float, n: int) -> None:
    """All at once too, where a number sweeps from the top."""
    for sweep in ("together", "down"):
        expected = reference.multipliers(*case, eta, n, down=sweep == "down")
        result = case.infer("Multipliers", eta=steps.Descent(eta, sweep), n=n)
        assert_close(result.v, expected.v)
        assert_close(result.epsilon[1:], expected.epsilon[1:])


@given(case=cases(), n=st.integers(1, 6))
def test_without_growth_it_is_strict_in_sweeps(case: Case, n: int) -> None:
    expected = case.infer("Strict", eta=steps.Descent(0.3, sweep="down"), n=n)
    updates = case.gradients()
    result = case.infer("Multipliers", eta=0.3, n=n, alpha=0)
    assert_close(result.v, expected.v, 0)
    assert_close(result.epsilon, expected.epsilon, 0)
    assert_close(case.gradients(), updates, 0)


def chain(depth: int = 6, activation: type[nn.Module] = nn.Tanh, gain: float = 1.0) -> Case:
    torch.manual_seed(2)
    items = [nn.Sequential(activation(), nn.Linear(6, 6)) for _ in range(depth - 2)]
    last = nn.Sequential(activation(), nn.Linear(6, 3))
    model = nn.Sequential(nn.Linear(5, 6), *items, last).double()
    for *_, linear in model[1:]:
        nn.init.xavier_normal_(linear.weight, gain)
    X, Y = torch.randn(8, 5).double(), torch.randn(8, 3).double()
    return Case(model, nn.MSELoss(), X, Y)


class Join(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, a: Tensor, skip: Tensor) -> Tensor:
        return skip + self.linear(torch.tanh(a))


def graph() -> Case:
    torch.manual_seed(3)
    layers = {
        "a": (nn.Linear(5, 4), "x"),
        "b": (nn.Linear(4, 4), "a"),
        "c": (Join(), "b", "a"),
        "d": (nn.Linear(4, 4), "c"),
        "e": (Join(), "d", "c"),
        "y": (nn.Linear(4, 3), "e"),
    }
    X, Y = torch.randn(8, 5).double(), torch.randint(3, (8,))
    return Case(PCGraph(**layers).double(), nn.CrossEntropyLoss(), X, Y)


@pytest.mark.parametrize("make", [chain, graph])
@pytest.mark.parametrize(("eta", "n"), [(0.5, 300), ("auto", 1500)])
def test_it_comes_to_rest_at_backpropagations_errors(
    make: Callable[[], Case], eta: Any, n: int
) -> None:
    case = make()
    exact, gradients = case.infer("Exact"), case.gradients()
    result = case.infer("Multipliers", eta=eta, n=n)
    assert_close(result.epsilon[1:], exact.epsilon[1:], 1e-7)
    assert_close(result.v[1:-1], result.vhat[1:-1], 1e-7)
    assert_close(case.gradients(), gradients, 1e-7)


def test_a_heavy_loss_needs_a_heavy_penalty() -> None:
    """Where multipliers times the layers' second derivatives outweigh it, there is no rest."""
    case = chain(4)._replace(LossFun=squared_error)
    exact = case.infer("Exact").epsilon[1:-1]
    swings = case.infer("Multipliers", eta=0.5, n=200).epsilon[1:-1]
    assert all([(a - b).norm() > 0.1 * b.norm() for a, b in zip(swings, exact, strict=True)])
    found = case.infer("Multipliers", eta=0.05, n=200, precision=10.0).epsilon[1:-1]
    assert_close([10.0 * epsilon_l for epsilon_l in found], exact, 1e-8)


def test_in_float32_as_well() -> None:
    """Multipliers are sums of errors, each of which is right to the last digits of its own size."""
    case = chain()
    right = case.infer("Exact").epsilon
    case.model.float()
    of_float32 = Case(case.model, case.LossFun, case.X.float(), case.Y.float())
    result = of_float32.infer("Multipliers", eta=0.5, n=300)
    for epsilon_l, right_l in zip(result.epsilon[1:], right[1:], strict=True):
        assert (epsilon_l - right_l).norm() < 2e-6 * right_l.norm()


def test_with_eta_1_each_sweep_of_a_linear_network_is_backpropagation() -> None:
    """As no layer's Jacobian depends on the beliefs, whatever the multipliers are."""
    case = chain(activation=nn.Identity)
    case = case._replace(LossFun=lambda yhat, Y: (yhat * Y).sum())
    exact = case.infer("Exact").epsilon[1:]
    for n, alpha in itertools.product([1, 2, 5], [0.0, 0.5, 1.0]):
        found = case.infer("Multipliers", eta=1.0, n=n, alpha=alpha)
        assert_close(found.epsilon[1:], exact)


@given(case=cases(), eta=st.floats(0.05, 1))
def test_after_one_sweep_each_error_is_a_share_of_backpropagations(case: Case, eta: float) -> None:
    """No layer's Jacobian has been taken elsewhere than at the feed-forward pass by then."""
    exact = case.infer("Exact").epsilon[1:]
    result = case.infer("Multipliers", eta=eta, n=1)
    for below, (epsilon_l, of_exact) in enumerate(
        zip(result.epsilon[:0:-1], exact[::-1], strict=True)
    ):
        assert_close(epsilon_l, eta**below * of_exact)


@given(case=cases(max_layers=4))
def test_the_callback_and_the_record_follow_one_relaxation(case: Case) -> None:
    seen: list[Any] = []
    case.infer("Multipliers", n=4, callback=lambda k, v, e: seen.append((v, [*map(clone, e[1:])])))
    for n, (v, epsilon) in enumerate(seen, start=1):
        result = case.infer("Multipliers", n=n)
        assert_close(v, result.v)
        assert_close(epsilon, result.epsilon[1:])
    record = follow(*case, "Multipliers", n=4)
    assert record.stable_eta is None and record.rises_at is None
    differences = [0.5 * (f - v).square().sum() for f, v in predictions(case, seen[-1][0])]
    assert_close(list(record.energies[-1, 1:-1]), differences)


def clone(x: Tensor) -> Tensor:
    return x.clone()


def predictions(case: Case, v: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    layers = enumerate(case.model[:-1], start=1)
    return [(layer(v[l - 1].clone()).detach(), v[l]) for l, layer in layers]


def test_a_record_says_that_it_has_arrived() -> None:
    record = follow(*chain(), "Multipliers", eta=0.5, n=60)
    assert record.converged and bool((record.cosine[-1, 1:] > 0.999).all())
    assert "rises" not in str(record)


def test_a_step_that_diverges_is_told_of_and_auto_finds_another() -> None:
    case = chain(gain=3.0)
    with pytest.warns(UserWarning, match="Multipliers descends went from .* steps are too long"):
        case.infer("Multipliers", eta=0.5, n=30)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = chain(gain=3.0).infer("Multipliers", eta="auto", n=30)
    exact = case.infer("Exact").epsilon[1:]
    assert all([a.norm() < b.norm() for a, b in zip(result.epsilon[1:], exact, strict=True)])


def test_the_step_that_is_found_is_what_a_sweep_bears() -> None:
    """Three quarters of 2 over the largest curvature of a single belief, 1 + ||J||^2."""
    torch.manual_seed(0)
    J = [4.0, 1.0, 0.5]
    model = nn.Sequential(nn.Linear(3, 3), *[nn.Linear(3, 3, bias=False) for _ in J]).double()
    for linear, norm in zip(model[1:], J, strict=True):
        nn.init.orthogonal_(linear.weight, norm)
    X, Y = torch.randn(4, 3).double(), torch.randn(4, 3).double()
    light = Case(model, lambda yhat, Y: 1e-6 * (yhat * Y).sum(), X, Y)
    network = Network(*light)
    relaxation = multipliers(network, "auto")
    with network.replaying():
        relaxation.step()
    assert relaxation.rule.eta == pytest.approx(1.5 / (1 + 4.0**2), rel=0.02)


def test_the_rise_to_the_loss_is_no_divergence() -> None:
    """F ends where it began, or swings about it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for n in (1, 5, 20, 80):
            chain().infer("Multipliers", eta=0.5, n=n)


@pytest.mark.parametrize(("n", "expected"), [(1, 0), (3, 1)])
def test_one_sweep_is_no_divergence(n: int, expected: int) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        chain(gain=3).infer("Strict", eta=steps.Descent(0.9, sweep="down"), n=n)
    assert ["steps are too long" in str(warning.message) for warning in caught] == [True] * expected


@pytest.mark.usefixtures("traced")
@pytest.mark.filterwarnings("error:compile=True", "ignore::DeprecationWarning")
def test_compiled_it_is_the_same_whatever_eta_and_alpha_are() -> None:
    """Multipliers are state, and how fast they grow is an input: nothing is compiled anew."""
    case, graphs = chain(3), 0
    for eta, alpha in ((0.3, 1.0), (0.3, 1.0), (0.5, 0.4)):
        options: dict[str, Any] = dict(ErrType="Multipliers", eta=eta, alpha=alpha, n=6)
        plain = case.infer(**options)
        gradients = case.gradients()
        result = case.infer(**options, compile=True)
        assert_close(list(result), list(plain))
        assert_close(case.gradients(), gradients)
        assert graphs in (0, counters["stats"]["unique_graphs"])
        graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0


def test_says_where_sweeps_hardly_reach_the_lower_layers() -> None:
    """Half has come after as many sweeps as an error waits, and what it proposes is not warned of."""
    case = chain(30)
    with pytest.warns(
        UserWarning, match="hardly reaches layers 1 to 1[0-9] of 30 .* n=262, or eta=0.6"
    ):
        case.infer("Multipliers", eta=0.1, n=20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chain(30).infer("Multipliers", eta=0.6, n=20)
        chain(30).infer("Multipliers", eta="auto", n=2)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"alpha": "fast"}, TypeError, "alpha must be None or a finite number >= 0, got str"),
        ({"alpha": -0.1}, ValueError, "alpha must be None or a finite number >= 0, got -0.1"),
        ({"alpha": float("nan")}, ValueError, "alpha must be None or a finite number >= 0"),
        ({"eta": steps.Halving(0.5)}, ValueError, "eta must be a rule that looks at no energy"),
        ({"ErrType": "Strict", "alpha": 0.5}, ValueError, "alpha must be None for Strict"),
        ({"ErrType": "Exact", "alpha": 0.5}, ValueError, "alpha must be None for Exact"),
        ({"energies": {1: squared_error}}, ValueError, "energies must be None for Multipliers"),
    ],
)
def test_bad_arguments_are_named(
    options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    case = chain()
    with pytest.raises(kind, match=message):
        PCInfer(*case, **{"ErrType": "Multipliers", **options})
    assert all([p.grad is None for p in case.model.parameters()])
