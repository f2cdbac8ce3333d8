"""Strict against the plain iteration, and the properties of its energy."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests import reference
from tests.cases import Case, assert_close, cases, random_beliefs
from torch2pc.displacement import Displacement
from torch2pc.layers import Network
from torch2pc.strict import Relaxation

iterations = st.integers(1, 12)


@given(case=cases(), eta=st.floats(0, 0.3), n=iterations, vinit=st.booleans(), dX=st.booleans())
def test_equals_the_iteration(case: Case, eta: float, n: int, vinit: bool, dX: bool) -> None:
    beliefs = random_beliefs(case) if vinit else None
    expected = reference.strict(*case, eta, n, beliefs)
    case.X.requires_grad_(dX)
    result = case.infer("Strict", eta=eta, n=n, vinit=beliefs)
    assert_close(result.vhat, expected.vhat)
    assert_close(result.v, expected.v)
    assert_close(result.epsilon[1:], expected.epsilon[1:])
    assert_close(
        {p: p.grad for p in case.model.parameters() if p.grad is not None}, expected.updates
    )
    if dX:
        assert_close(result.epsilon[0], expected.epsilon[0])


@given(case=cases(), n=iterations)
def test_the_ends_of_vinit_are_ignored(case: Case, n: int) -> None:
    beliefs = random_beliefs(case)
    expected = case.infer("Strict", n=n, vinit=beliefs)
    found = case.infer("Strict", n=n, vinit=[None, *beliefs[1:-1], "anything"])
    assert_close(list(found), list(expected), tolerance=0)


@given(case=cases(), n=iterations)
def test_vinit_equal_to_vhat_is_the_default(case: Case, n: int) -> None:
    """So skipping the layers that no error has reached changes nothing."""
    expected = case.infer("Strict", n=n)
    found = case.infer("Strict", n=n, vinit=expected.vhat)
    assert_close(list(found), list(expected), tolerance=1e-12)


@given(case=cases(smooth=True), vinit=st.booleans())
def test_energy_never_rises(case: Case, vinit: bool) -> None:
    network = Network(case.model, case.LossFun, case.X, case.Y)
    relaxation = Relaxation(network, 0.01, random_beliefs(case) if vinit else None)
    energies = [reference.energy(case.model, case.LossFun, case.Y, relaxation.v)]
    with network.replaying():
        for v, _ in itertools.islice(relaxation, 15):
            energies.append(reference.energy(case.model, case.LossFun, case.Y, v))
    assert all(later <= before + 1e-12 for before, later in itertools.pairwise(energies))


@given(case=cases())
def test_one_step_from_vhat_moves_only_the_belief_below_the_output(case: Case) -> None:
    result = case.infer("Strict", n=1)
    L = len(case.model)
    for l in range(L + 1):
        if l != L - 1:
            assert torch.equal(result.v[l], result.vhat[l])
    if L > 1:
        back = reference.input_vjp(case.model[-1], result.vhat[L - 1], result.dLdy)
        assert_close(result.v[L - 1], result.vhat[L - 1] - 0.1 * back)


@given(case=cases(smooth=True))
def test_nothing_moves_without_a_loss_gradient(case: Case) -> None:
    Y = case.model(case.X).detach()
    result = case._replace(LossFun=nn.MSELoss(), Y=Y).infer("Strict", n=5)
    assert_close(result.v, result.vhat, tolerance=0)
    assert all(not gradient.any() for gradient in case.gradients().values())


@given(case=cases(), vinit=st.booleans())
def test_the_iterator_follows_one_relaxation(case: Case, vinit: bool) -> None:
    beliefs = random_beliefs(case) if vinit else None
    network = Network(case.model, case.LossFun, case.X, case.Y)
    relaxation = Relaxation(network, 0.1, beliefs)
    with network.replaying():
        for n, (v, epsilon) in zip(range(1, 6), relaxation, strict=False):
            expected = case.infer("Strict", n=n, vinit=beliefs)
            assert_close(v, expected.v)
            assert_close(epsilon[1:], expected.epsilon[1:])
            found = {p: p.grad for p in case.model.parameters() if p.grad is not None}
            assert_close(relaxation.updates()[1], found)


def count_displacements(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The width of each displacement that is evaluated from now on."""
    widths: list[int] = []
    forward = Displacement.forward

    def counted(self: Displacement, delta: Tensor) -> object:
        widths.append(delta.shape[1])
        return forward(self, delta)

    monkeypatch.setattr(Displacement, "forward", counted)
    return widths


def test_layers_that_the_error_has_not_reached_are_not_evaluated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """n iterations from vhat on L layers evaluate 1 + ... + L-1 + (n-L+1)(L-1) times, no more."""
    calls = [0] * 5
    model = nn.Sequential(*(nn.Linear(l, l + 1) for l in range(3, 8)))
    for l, layer in enumerate(model):
        layer.register_forward_hook(lambda *_, l=l: calls.__setitem__(l, calls[l] + 1))
    case = Case(model, nn.MSELoss(), torch.randn(2, 3), torch.randn(2, 8))
    case.infer("Strict", n=7)
    # Once in the feed-forward pass, once to check what was recorded there, once for the update;
    # layer 1, whose input stays the same, once and for all.
    assert calls == [1, 3, 3, 3, 3]
    widths = count_displacements(monkeypatch)
    case.infer("Strict", n=7)
    assert calls == [2, 5, 5, 5, 5]
    assert [widths.count(width) for width in range(3, 8)] == [0, 4, 5, 6, 7]


def test_from_vinit_all_layers_are_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(
        nn.Sequential(*(nn.Linear(l, l + 1) for l in range(3, 8))),
        nn.MSELoss(),
        torch.randn(2, 3),
        torch.randn(2, 8),
    )
    vhat = case.infer("Strict").vhat
    widths = count_displacements(monkeypatch)
    case.infer("Strict", n=2, vinit=vhat)
    assert [widths.count(width) for width in range(3, 8)] == [0, 2, 2, 2, 2]


def test_with_a_sum_over_the_batch_the_update_is_the_sum_of_the_examples_own() -> None:
    """With a mean it is not their mean: the loss weighs less against the layers' errors."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    X, Y = torch.randn(6, 4).double(), torch.randn(6, 3).double()
    off = {}
    for reduction in ("sum", "mean"):
        case = Case(model, nn.MSELoss(reduction=reduction), X, Y)
        case.infer("Strict")
        found = case.gradients()
        model.zero_grad()
        for k in range(6):
            case._replace(X=X[k : k + 1], Y=Y[k : k + 1]).infer("Strict", accumulate=True)
        weight = 1.0 if reduction == "sum" else 1 / 6
        off[reduction] = max(
            float((weight * g - found[name]).norm() / found[name].norm())
            for name, g in case.gradients().items()
        )
    assert off["sum"] < 1e-9
    assert off["mean"] > 0.01
