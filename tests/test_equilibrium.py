"""Equilibrium against another minimiser, closed forms and the stationary points of the relaxations."""

from __future__ import annotations

import copy
import io
import itertools
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests import reference
from tests.cases import Case, assert_close, calls_of, cases, random_beliefs, squared_error
from tests.test_error_based import linear_case
from torch2pc import PCResult
from torch2pc.energy import Errors
from torch2pc.inference.equilibrium import NODES, largest
from torch2pc.pcinfer import EquilibriumResult


@settings(max_examples=30)
@given(
    case=cases(smooth=True),
    vinit=st.booleans(),
    dX=st.booleans(),
    update_at=st.sampled_from(["v", "vhat", "before"]),
)
def test_equals_another_minimiser(case: Case, vinit: bool, dX: bool, update_at: str) -> None:
    beliefs = random_beliefs(case) if vinit else None
    expected = reference.equilibrium(*case, vinit=beliefs, update_at=update_at)
    case.X.requires_grad_(dX)
    result = case.infer("Equilibrium", n=200, vinit=beliefs, update_at=update_at)
    assert_close(result.vhat, expected.vhat)
    assert_close(result.v, expected.v, tolerance=1e-6)
    assert_close(result.epsilon[1:], expected.epsilon[1:], tolerance=1e-6)
    found = {p: p.grad for p in case.model.parameters() if p.grad is not None}
    assert_close(found, expected.updates, tolerance=1e-6)
    if dX:
        assert_close(result.epsilon[0], expected.epsilon[0], tolerance=1e-6)
    assert (result.distance <= 2e-8).all() and result.evaluations < 200


def test_the_rule_of_gauss_and_legendre_is_exact_up_to_the_fifth_power() -> None:
    for k in range(6):
        assert sum(weight * x**k for x, weight in NODES) == pytest.approx(1 / (k + 1))


@given(case=cases(), n=st.integers(1, 8), vinit=st.booleans())
def test_energy_never_rises(case: Case, n: int, vinit: bool) -> None:
    """Whether the network and the loss are smooth or not, from the start to the end."""
    beliefs = random_beliefs(case) if vinit else None
    start = reference.feed_forward(case.model, case.X)
    if vinit:
        start = [case.X, *beliefs[1:-1], start[-1]]
    energies = [reference.energy(case.model, case.LossFun, case.Y, start)]
    for k in (n, n + 1, n + 6):
        v = case.infer("Equilibrium", n=k, vinit=beliefs).v
        energies.append(reference.energy(case.model, case.LossFun, case.Y, v))
    assert all(later <= energies[0] + 1e-12 * energies[0].abs() for later in energies)


def test_a_longer_search_ends_no_higher() -> None:
    case = trained()
    energies = [
        reference.energy(case.model, case.LossFun, case.Y, case.infer("Equilibrium", n=n).v)
        for n in range(1, 15)
    ]
    assert all(later <= before + 1e-12 for before, later in itertools.pairwise(energies))
    assert energies[-1] < 0.9 * energies[0]


def trained(activation: type[nn.Module] = nn.Tanh, steps: int = 15) -> Case:
    """A network that knows its data, for which the energy is steep."""
    torch.manual_seed(4)
    model = nn.Sequential(
        nn.Linear(4, 12), *(nn.Sequential(activation(), nn.Linear(12, 12)) for _ in range(3))
    )
    model.append(nn.Sequential(activation(), nn.Linear(12, 3)))
    model.double()
    X, Y = torch.randn(20, 4).double(), torch.randn(20, 3).double()
    case = Case(model, nn.MSELoss(reduction="sum"), X, Y)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(steps):
        case.infer("Exact")
        optimizer.step()
    return case


@pytest.mark.parametrize("activation", [nn.Tanh, nn.GELU, nn.Softplus])
def test_the_relaxations_end_where_it_is(activation: type[nn.Module]) -> None:
    case = trained(activation, steps=5)
    found = case.infer("Equilibrium", n=100)
    gradients = case.gradients()
    for ErrType, eta, n in [("ErrorBased", 0.1, 400), ("Strict", 0.2, 2000)]:
        result = case.infer(ErrType, eta=eta, n=n)
        assert_close(result.v, found.v, tolerance=1e-6)
        assert_close(result.epsilon[1:], found.epsilon[1:], tolerance=1e-6)
        assert_close(case.gradients(), gradients, tolerance=1e-6)


@pytest.mark.parametrize("depth", [2, 5, 12])
def test_closed_form_for_deep_linear_networks_and_squared_error(depth: int) -> None:
    """r = Y - f(X) is shared out by S = I + sum_l P_l P_l^T, P_l = W_L ... W_{l+1}."""
    case = linear_case(depth)
    case = case._replace(LossFun=squared_error)
    yhat = case.model(case.X).detach()
    W = [layer.weight.detach() for layer in case.model]
    P = {depth: torch.eye(3).double()}
    for l in range(depth - 1, 0, -1):
        P[l] = P[l + 1] @ W[l]
    S = sum(P[l] @ P[l].T for l in range(1, depth + 1))
    e_L = (yhat - case.Y) @ torch.linalg.inv(S)
    result = case.infer("Equilibrium", n=100)
    assert_close(result.epsilon[1:], [e_L @ P[l] for l in range(1, depth + 1)], tolerance=1e-6)
    energy = reference.energy(case.model, case.LossFun, case.Y, result.v)
    assert_close(energy, 0.5 * (e_L * (yhat - case.Y)).sum(), tolerance=1e-10)


def test_each_example_is_a_problem_of_its_own() -> None:
    """What is found for an example does not depend on the others, however steep these are."""
    case = trained()
    X, Y = torch.cat([case.X, 30 * case.X]), torch.cat([case.Y, -30 * case.Y])
    alone = case.infer("Equilibrium", n=6)
    together = case._replace(X=X, Y=Y).infer("Equilibrium", n=6)
    assert alone.distance.shape == (20,) and together.distance.shape == (40,)
    assert_close(together.distance[:20], alone.distance, tolerance=1e-7)
    for one, both in zip(alone.epsilon[1:], together.epsilon[1:], strict=True):
        assert_close(both[:20], one, tolerance=1e-7)


class MeanOfAll(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0, keepdim=True).tanh()


class Back(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(20, 12)


def with_item(*items: nn.Module) -> Case:
    case = trained()
    for item in reversed(items):
        case.model.insert(2, item.double())
    return case


def distance_of_all(yhat: Tensor, Y: Tensor) -> Tensor:
    return (yhat - Y).square().sum().sqrt()


@pytest.mark.parametrize(
    "case",
    [
        with_item(nn.BatchNorm1d(12)),
        with_item(MeanOfAll()),
        with_item(nn.Sequential(nn.Unflatten(0, (4, 5)), nn.Flatten(1, 2)), Back()),
        trained()._replace(LossFun=distance_of_all),
    ],
)
def test_examples_that_are_mixed_are_one_problem(case: Case) -> None:
    if case.LossFun is not distance_of_all:
        case = case._replace(LossFun=nn.MSELoss())
    twice = [case.infer("Equilibrium", n=100) for _ in range(2)]
    assert [r.distance.shape for r in twice] == [(1,)] * 2
    assert twice[0].distance < 2e-8
    twin = copy.deepcopy(case.model)
    expected = reference.equilibrium(*case._replace(model=reference.freeze(twin, case.X)))
    assert_close(twice[0].epsilon[1:], expected.epsilon[1:], tolerance=1e-6)


@pytest.mark.parametrize(
    "items",
    [
        [nn.BatchNorm1d(12).eval()],
        [nn.LayerNorm(12)],
        [nn.Dropout(0.3)],
        [
            nn.Unflatten(1, (3, 4)),
            nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True),
            nn.Flatten(),
        ],
    ],
)
def test_examples_that_are_not_mixed_are_told_apart(items: list[nn.Module]) -> None:
    case = with_item(*items)
    assert case.infer("Equilibrium", n=3).distance.shape == (20,)


def test_a_trained_network_is_near_equilibrium_after_a_few_evaluations() -> None:
    case = trained(steps=300)
    found = [case.infer("Equilibrium", n=n).distance.max().item() for n in (5, 15, 20)]
    assert found[2] < 1e-6 < found[1] < 1e-3 < found[0]


def test_in_float32_it_stops_by_itself() -> None:
    case = trained()
    right = case.infer("Equilibrium", n=100)
    single = Case(case.model.float(), case.LossFun, case.X.float(), case.Y.float())
    found = single.infer("Equilibrium", n=100)
    assert found.evaluations < 20 and (found.distance < 4e-4).all()
    for e, precise in zip(found.epsilon[1:], right.epsilon[1:], strict=True):
        assert (e - precise).norm() < 1e-3 * precise.norm()


def test_where_units_switch_it_still_comes_down() -> None:
    case = trained(nn.ReLU)
    energies = {
        n: reference.energy(case.model, case.LossFun, case.Y, case.infer("Equilibrium", n=n).v)
        for n in (1, 10, 20, 100)
    }
    assert energies[100] <= energies[20] <= energies[10] < energies[1]
    assert energies[10] - energies[100] < 0.05 * (energies[1] - energies[100])


def test_nothing_is_far_where_nothing_is_hidden() -> None:
    case = Case(nn.Sequential(nn.Linear(4, 3)).double(), nn.MSELoss(), *data())
    result = case.infer("Equilibrium")
    assert result.evaluations == 0 and not result.distance.any()
    assert result.distance.shape == (6,)
    assert_close(result.epsilon[1], result.dLdy, tolerance=0)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(()).double())

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.weight * x)


def test_tensors_without_dimensions_are_one_example() -> None:
    """As if there were one."""
    model, (X, Y) = nn.Sequential(*[Scaled() for _ in range(3)]), torch.randn(2).double()
    case = Case(model, squared_error, X, Y)
    found, gradients = case.infer("Equilibrium", n=9), case.gradients()
    one = case._replace(X=X.reshape(1, 1), Y=Y.reshape(1, 1))
    expected = one.infer("Equilibrium", n=9)
    assert found.distance.shape == expected.distance.shape == (1,)
    assert_close([v.reshape(1, 1) for v in found.v], expected.v)
    assert_close(gradients, one.gradients())


def data() -> tuple[Tensor, Tensor]:
    return torch.randn(6, 4).double(), torch.randn(6, 3).double()


def test_without_a_gradient_it_stays_at_the_feed_forward_pass() -> None:
    case = trained()
    case = case._replace(Y=case.model(case.X).detach())
    result = case.infer("Equilibrium")
    assert result.evaluations == 1 and not result.distance.any()
    assert_close(result.v, result.vhat, tolerance=0)


@pytest.mark.parametrize("scale", [300.0, 1000.0])
def test_examples_whose_errors_are_tiny_do_not_spoil_it(scale: float) -> None:
    """Cross-entropy's gradients of what is sure are so small that float32 cannot square them."""
    case = trained(steps=0)
    with torch.no_grad():
        case.model[-1][1].weight.mul_(scale)
        case.model[-1][1].bias.zero_()
    Y = case.model(case.X).argmax(1)
    single = Case(case.model.float(), nn.CrossEntropyLoss(), case.X.float(), Y)
    result = single.infer("Equilibrium")
    sizes = result.epsilon[1].abs().amax(1)
    assert sizes.min() < 1e-19
    assert all(e.isfinite().all() for e in result.epsilon[1:])
    assert all(g.isfinite().all() for g in single.gradients().values())
    assert not result.distance.isnan().any()


def test_says_how_far_it_came_and_keeps_saying_so_when_saved() -> None:
    result = trained().infer("Equilibrium", n=9)
    _, _, _, v, epsilon = result
    assert isinstance(result, PCResult) and result.v is v and result.epsilon is epsilon
    assert not result.distance.requires_grad
    file = io.BytesIO()
    torch.save(result, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert isinstance(loaded, EquilibriumResult)
    assert_close(list(loaded), list(result), tolerance=0)
    assert torch.equal(loaded.distance, result.distance)
    assert loaded.evaluations == result.evaluations == 9


def test_warns_once_where_it_stopped_far_from_equilibrium() -> None:
    case = trained()
    with pytest.warns(
        UserWarning, match=r"after n=2 evaluations .* in \d+ of 20 examples"
    ) as caught:
        case.infer("Equilibrium", n=2)
    assert [w.filename for w in caught] == [Case.infer.__code__.co_filename]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        case.infer("Equilibrium", n=2)
        trained().infer("Equilibrium", n=20)


def test_runs_plainly_when_asked_to_compile_and_says_so_once() -> None:
    case = trained()
    expected = case.infer("Equilibrium")
    with pytest.warns(UserWarning, match="runs without compilation, because Equilibrium is not"):
        found = case.infer("Equilibrium", compile=True)
    assert_close(list(found), list(expected), tolerance=0)
    case.infer("Equilibrium", compile=True)


def test_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """One up and one down for each evaluation, and one or two up at the end."""
    case = trained()
    case.infer("Equilibrium", n=4)
    up, down = [calls_of(Errors, name, monkeypatch) for name in ("_climb", "descend")]
    case.infer("Equilibrium", n=5)
    assert len(down) == 5 and len(up) in (6, 7)


def test_largest_entry_of_each_row() -> None:
    """However large or small it is; a row of zeros counts as one of ones."""
    a = torch.tensor([[3e30, -4e30], [1e-30, 0.0], [0.0, 0.0], [0.5, -0.25]])
    b = torch.tensor([[0.0, 5e30, 0.0], [0.0] * 3, [0.0] * 3, [-2.0, 1.0, 0.0]])
    assert torch.equal(largest(a), torch.tensor([[4e30], [1e-30], [1.0], [0.5]]))
    assert torch.equal(largest(a, b), torch.tensor([[5e30], [1e-30], [1.0], [2.0]]))
