"""Strict against the plain iteration, and the properties of its energy."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests import reference
from tests.cases import Case, assert_close, calls_of, cases, random_beliefs
from torch2pc import PCInfer
from torch2pc.displacement.lines import Displacement
from torch2pc.graph.network import Network
from torch2pc.inference.strict import strict

iterations = st.integers(1, 12)


@given(
    case=cases(),
    eta=st.floats(0, 0.3),
    n=iterations,
    vinit=st.booleans(),
    dX=st.booleans(),
    update_at=st.sampled_from(["v", "vhat", "before"]),
)
def test_equals_the_iteration(
    case: Case, eta: float, n: int, vinit: bool, dX: bool, update_at: str
) -> None:
    beliefs = random_beliefs(case) if vinit else None
    expected = reference.strict(*case, eta, n, beliefs, update_at)
    case.X.requires_grad_(dX)
    result = case.infer("Strict", eta=eta, n=n, vinit=beliefs, update_at=update_at)
    assert_close(result.vhat, expected.vhat)
    assert_close(result.v, expected.v)
    assert_close(result.epsilon[1:], expected.epsilon[1:])
    assert_close(
        {p: p.grad for p in case.model.parameters() if p.grad is not None}, expected.updates
    )
    if dX:
        assert_close(result.epsilon[0], expected.epsilon[0])


@given(case=cases(), n=iterations)
def test_where_updates_are_taken_changes_nothing_else(case: Case, n: int) -> None:
    expected = case.infer("Strict", n=n)
    found = case.infer("Strict", n=n, update_at="vhat")
    assert_close(list(found), list(expected), tolerance=0)


@given(case=cases(), n=iterations)
def test_the_ends_of_vinit_are_ignored(case: Case, n: int) -> None:
    beliefs = random_beliefs(case)
    expected = case.infer("Strict", n=n, vinit=beliefs)
    found = case.infer("Strict", n=n, vinit=[None, *beliefs[1:-1], "anything"])
    assert_close(list(found), list(expected), tolerance=0)


@given(case=cases(), n=iterations)
def test_vinit_equal_to_vhat_is_the_default(case: Case, n: int) -> None:
    """So skipping the layers that no error has reached changes nothing; it may require grad."""
    expected = case.infer("Strict", n=n)
    vinit = [vhat_l.clone().requires_grad_() for vhat_l in expected.vhat]
    found = case.infer("Strict", n=n, vinit=vinit)
    assert_close(list(found), list(expected), tolerance=1e-12)


@given(case=cases(smooth=True), vinit=st.booleans())
def test_energy_never_rises(case: Case, vinit: bool) -> None:
    network = Network(case.model, case.LossFun, case.X, case.Y)
    relaxation = strict(network, 0.01, random_beliefs(case) if vinit else None)
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
    relaxation = strict(network, 0.1, beliefs)
    with network.replaying():
        for n, (v, epsilon) in zip(range(1, 6), relaxation, strict=False):
            expected = case.infer("Strict", n=n, vinit=beliefs)
            assert_close(v, expected.v)
            assert_close(epsilon[1:], expected.epsilon[1:])
            found = {p: p.grad for p in case.model.parameters() if p.grad is not None}
            assert_close(relaxation.updates()[1], found)


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
    evaluated = calls_of(Displacement, "forward", monkeypatch)
    case.infer("Strict", n=7)
    assert calls == [2, 5, 5, 5, 5]
    widths = [delta.shape[1] for _, delta in evaluated]
    assert [widths.count(width) for width in range(3, 8)] == [0, 4, 5, 6, 7]


def test_from_vinit_all_layers_are_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(
        nn.Sequential(*(nn.Linear(l, l + 1) for l in range(3, 8))),
        nn.MSELoss(),
        torch.randn(2, 3),
        torch.randn(2, 8),
    )
    vhat = case.infer("Strict").vhat
    evaluated = calls_of(Displacement, "forward", monkeypatch)
    case.infer("Strict", n=2, vinit=vhat)
    widths = [delta.shape[1] for _, delta in evaluated]
    assert [widths.count(width) for width in range(3, 8)] == [0, 2, 2, 2, 2]


WARNING = "Strict takes its updates at v"


def dense(*activations: nn.Module, cut_before: bool = False) -> Case:
    """Items of a Linear and an activation, cut after it or before it, and a Linear at the end."""
    items: list[nn.Module] = []
    for activation in activations:
        parts = [activation, nn.Linear(6, 6)] if cut_before else [nn.Linear(6, 6), activation]
        items.append(nn.Sequential(*parts))
    model = nn.Sequential(*[nn.Linear(6, 6)] * cut_before, *items, nn.Linear(6, 6)).double()
    return Case(model, nn.MSELoss(), torch.randn(8, 6).double(), torch.randn(8, 6).double())


class Clamped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x.clamp(min=0).unsqueeze(1)[:, 0, :]


FLAT: list[nn.Module] = [
    nn.ReLU(),
    nn.ReLU(inplace=True),
    nn.ReLU6(),
    nn.Threshold(0.1, 0.1),
    nn.Hardtanh(),
    nn.Hardshrink(),
    nn.Softshrink(),
    nn.Hardsigmoid(),
    nn.Hardswish(),
    Clamped(),
    nn.Sequential(nn.ReLU(), nn.Dropout(0.5)),
    nn.Sequential(nn.ReLU(), nn.Unflatten(1, (2, 3)), nn.AvgPool1d(1), nn.Flatten()),
    nn.Sequential(nn.ReLU(), nn.Unflatten(1, (2, 3)), nn.MaxPool1d(1), nn.Flatten()),
]
NOT_FLAT: list[nn.Module] = [
    nn.LeakyReLU(),
    nn.PReLU(),
    nn.RReLU(),
    nn.ELU(),
    nn.GELU(),
    nn.SiLU(),
    nn.Tanh(),
    nn.Identity(),
    nn.Dropout(),
    nn.Sequential(nn.ReLU(), nn.LayerNorm(6)),
]


def warned(case: Case, **options: Any) -> list[str]:
    """The warnings of a call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        case.infer("Strict", n=6, **options)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("activation", FLAT, ids=str)
@pytest.mark.parametrize("place", [0, 1])
def test_warns_of_items_that_end_flat(activation: nn.Module, place: int) -> None:
    activations = [nn.Tanh(), nn.Tanh()]
    activations[place] = activation
    case = dense(*activations)
    (message,) = warned(case)
    assert message.startswith(WARNING)
    assert f"last in model[{place}] (Sequential)." in message
    assert "cut the model before" in message and 'update_at="vhat"' in message
    assert warned(case) == []
    assert warned(dense(*activations), update_at="vhat") == []


@pytest.mark.parametrize("activation", FLAT, ids=str)
def test_does_not_warn_where_the_cut_is_before_the_activation(activation: nn.Module) -> None:
    assert warned(dense(activation, activation, cut_before=True)) == []


@pytest.mark.parametrize("activation", NOT_FLAT, ids=str)
def test_does_not_warn_of_activations_that_are_never_flat(activation: nn.Module) -> None:
    assert warned(dense(activation, activation)) == []


def test_does_not_warn_of_a_residual_item_nor_of_the_output() -> None:
    class Residual(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x + super().forward(x).relu()

    model = nn.Sequential(
        Residual(4, 4), nn.Linear(4, 3), nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    )
    case = Case(model, nn.MSELoss(), torch.randn(5, 4), torch.randn(5, 3))
    assert warned(case) == []


def test_warns_of_each_item_and_only_where_something_above_trains() -> None:
    case = dense(nn.ReLU(), nn.ReLU(), nn.ReLU())
    for item in case.model[2:]:
        item.requires_grad_(False)
    (message,) = warned(case)
    assert "last in model[0] (Sequential). " in message
    (message,) = warned(dense(nn.ReLU(), nn.ReLU()))
    assert "last in model[0] (Sequential), model[1] (Sequential). " in message


def test_the_warning_points_at_the_call_and_as_an_error_leaves_all_as_it_was() -> None:
    case = dense(nn.ReLU())
    with pytest.warns(UserWarning, match=WARNING) as caught:
        PCInfer(*case, "Strict")
    assert caught[0].filename == __file__
    case = dense(nn.Sequential(nn.Dropout(), nn.ReLU()))
    random = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=WARNING):
            case.infer("Strict")
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in case.model.parameters())


@pytest.mark.parametrize("n", [1, 20])
def test_what_the_weights_that_leave_an_inactive_unit_get(n: int) -> None:
    """At v, -(W_j . epsilon) epsilon times what the belief has moved; at vhat, or cut before, nothing."""
    case = dense(nn.ReLU(), nn.Tanh())
    with torch.no_grad():
        case.model[0][0].bias[2] = -100.0  # unit 2 is inactive for every example
    weight = case.model[1][0].weight
    epsilon, v = case.infer("Strict", n=n).epsilon, case.infer("Strict", n=n).v
    at_v = weight.grad[:, 2].clone()
    if n == 1:
        assert not at_v.any()  # no error has reached the item above
    else:
        inner = epsilon[2] * (1 - torch.tanh(case.model[1][0](v[1])).square())
        assert_close(at_v, (inner * v[1][:, 2:3]).sum(0))
        # The belief goes against what comes down to it, so that the weight grows along itself.
        assert at_v @ weight[:, 2] < 0
    case.infer("Strict", n=n, update_at="vhat")
    assert not weight.grad[:, 2].any() and weight.grad[:, 1].any() == (n > 1)
    first, second = case.model[0], case.model[1]
    recut = nn.Sequential(
        first[0], nn.Sequential(first[1], second[0]), nn.Sequential(second[1], case.model[2])
    )
    case._replace(model=recut).infer("Strict", n=20)
    assert not weight.grad[:, 2].any() and weight.grad[:, 1].any()


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
