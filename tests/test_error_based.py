"""ErrorBased against gradient descent by autograd, and what is known of it in closed form."""

from __future__ import annotations

import itertools
import re
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests import reference
from tests.cases import ITERATIONS, Case, assert_close, calls_of, cases, random_beliefs
from torch2pc.displacement.lines import Displacement
from torch2pc.energy.curvature import hessian as product_with_hessian
from torch2pc.energy.curvature import largest_eigenvalue, safe_step
from torch2pc.graph.network import Network
from torch2pc.inference.error_based import error_based
from torch2pc.inference.relax import Relaxation

iterations = st.integers(1, 12)


def step_of(relaxation: Relaxation) -> float:
    """The safe step size where a relaxation stands."""
    energy = relaxation.energy
    return safe_step(largest_eigenvalue(product_with_hessian(energy), energy.variables))


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
    expected = reference.error_based(*case, eta, n, beliefs, update_at)
    case.X.requires_grad_(dX)
    result = case.infer("ErrorBased", eta=eta, n=n, vinit=beliefs, update_at=update_at)
    assert_close(result.vhat, expected.vhat)
    assert_close(result.v, expected.v)
    assert_close(result.epsilon[1:], expected.epsilon[1:])
    assert_close(
        {p: p.grad for p in case.model.parameters() if p.grad is not None}, expected.updates
    )
    if dX:
        assert_close(result.epsilon[0], expected.epsilon[0])


@given(case=cases())
def test_one_step_of_size_1_is_backpropagation(case: Case) -> None:
    """Its errors below the output, and their updates at vhat."""
    exact = case.infer("Exact").epsilon
    gradients = case.gradients()
    found = case.infer("ErrorBased", eta=1, n=1, update_at="vhat").epsilon
    assert_close(found[1:-1], exact[1:-1])
    last = f"{len(case.model) - 1}."
    for name, gradient in case.gradients().items():
        if not name.startswith(last):
            assert_close(gradient, gradients[name])


def linear_case(depth: int = 4, linear_loss: bool = False) -> Case:
    sizes = [4, *[5] * (depth - 1), 3]
    model = nn.Sequential(*(nn.Linear(*pair) for pair in itertools.pairwise(sizes))).double()
    X, Y = torch.randn(6, 4).double(), torch.randn(6, 3).double()
    LossFun = (lambda yhat, Y: (yhat * Y).sum()) if linear_loss else nn.MSELoss(reduction="sum")
    return Case(model, LossFun, X, Y)


@pytest.mark.parametrize("eta", [0.1, 0.7, 1.0])
@pytest.mark.parametrize("n", [1, 2, 7])
def test_closed_form_for_a_linear_network_and_a_linear_loss(eta: float, n: int) -> None:
    case = linear_case(linear_loss=True)
    exact = case.infer("Exact").epsilon
    gradients = case.gradients()
    share = 1 - (1 - eta) ** n
    found = case.infer("ErrorBased", eta=eta, n=n, update_at="vhat").epsilon
    assert_close(found[1:-1], [share * e for e in exact[1:-1]])
    assert_close(found[-1], exact[-1])
    for name, gradient in case.gradients().items():
        assert_close(gradient, (1.0 if name.startswith("3.") else share) * gradients[name])


@given(case=cases(smooth=True), vinit=st.booleans())
def test_energy_never_rises(case: Case, vinit: bool) -> None:
    network = Network(case.model, case.LossFun, case.X, case.Y)
    beliefs = random_beliefs(case) if vinit else None
    relaxation = error_based(network, 0.01, beliefs)
    energies = [reference.energy(case.model, case.LossFun, case.Y, relaxation.v)]
    with network.replaying():
        for v, _ in itertools.islice(relaxation, 15):
            energies.append(reference.energy(case.model, case.LossFun, case.Y, v))
    assert all(later <= before + 1e-12 for before, later in itertools.pairwise(energies))


@given(case=cases(), vinit=st.booleans())
def test_the_iterator_follows_one_relaxation(case: Case, vinit: bool) -> None:
    beliefs = random_beliefs(case) if vinit else None
    network = Network(case.model, case.LossFun, case.X, case.Y)
    relaxation = error_based(network, 0.1, beliefs)
    with network.replaying():
        for n, (v, epsilon) in zip(range(1, 6), relaxation, strict=False):
            expected = case.infer("ErrorBased", n=n, vinit=beliefs)
            assert_close(v, expected.v)
            assert_close(epsilon[1:], expected.epsilon[1:])
            found = {p: p.grad for p in case.model.parameters() if p.grad is not None}
            assert_close(relaxation.updates()[1], found)


@given(case=cases(), n=iterations, vinit=st.booleans())
def test_beliefs_and_errors_that_are_returned_belong_together(
    case: Case, n: int, vinit: bool
) -> None:
    result = case.infer("ErrorBased", n=n, vinit=random_beliefs(case) if vinit else None)
    v, L = result.v, len(case.model)
    for l in range(1, L):
        assert_close(result.epsilon[l], case.model[l - 1](v[l - 1]).detach() - v[l])
    output = case.model[-1](v[L - 1])
    assert_close(result.epsilon[L], reference.loss_gradient(case.LossFun, output, case.Y)[1])
    assert_close(v[L], result.vhat[L])


def test_it_does_not_evaluate_more_than_one_pass_up_and_one_down_an_iteration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = linear_case()
    case.infer("ErrorBased")  # what is recorded is checked the first time
    up, down = [calls_of(Displacement, name, monkeypatch) for name in ("forward", "backward")]
    calls = [0]
    case.model[1].register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    n, moving = 20, len(case.model) - 1
    case.infer("ErrorBased", n=n)
    # One pass more at the end, where the returned beliefs and the output's error are taken; the
    # layer itself runs in the feed-forward pass and for its update, and once as it has a hook now.
    assert len(down) - n * moving in (0, 1)
    assert len(up) - (n + 1) * moving in (0, 1)
    assert calls[0] <= 3


def hessian(case: Case) -> Tensor:
    """That of F in the errors at 0, by autograd."""
    shapes = [v.shape for v in reference.feed_forward(case.model, case.X)[1:-1]]
    sizes = [shape.numel() for shape in shapes]

    def F(flat: Tensor) -> Tensor:
        parts = [part.reshape(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]
        _, y = reference.perturbed_pass(case.model, case.X, [None, *parts])
        return case.LossFun(y, case.Y) + 0.5 * flat.square().sum()

    return torch.autograd.functional.hessian(F, torch.zeros(sum(sizes)).double())


@pytest.mark.parametrize("depth", [2, 4, 8])
def test_the_step_that_is_chosen_is_the_reciprocal_of_the_largest_eigenvalue(depth: int) -> None:
    case = linear_case(depth)
    with torch.no_grad():
        for layer in case.model:
            layer.weight.mul_(2)
    largest = torch.linalg.eigvalsh(hessian(case))[-1].item()
    network = Network(case.model, case.LossFun, case.X, case.Y)
    relaxation = error_based(network, "auto")
    with network.replaying():
        assert step_of(relaxation) == pytest.approx(1 / largest, rel=0.02)
        product = product_with_hessian(relaxation.energy)
        u = [torch.randn_like(e) for e in relaxation.epsilon[1:-1]]
        found = torch.cat([part.flatten() for part in product(u)])
        assert_close(found, hessian(case) @ torch.cat([part.flatten() for part in u]), 1e-6)


@given(case=cases(), n=st.integers(1, 6), vinit=st.booleans())
def test_with_eta_auto_it_ends_no_higher_and_is_the_iteration(
    case: Case, n: int, vinit: bool
) -> None:
    beliefs = random_beliefs(case) if vinit else None
    found = case.infer("ErrorBased", eta="auto", n=n, vinit=beliefs)
    start = reference.feed_forward(case.model, case.X)
    if vinit:
        start = [case.X, *beliefs[1:-1], start[-1]]
    before, after = (
        reference.energy(case.model, case.LossFun, case.Y, v) for v in (start, found.v)
    )
    assert after <= before + 1e-12 * before.abs()
    network = Network(case.model, case.LossFun, case.X, case.Y)
    relaxation = error_based(network, "auto", beliefs)
    with network.replaying():
        relaxation.run(n)
    expected = case.infer("ErrorBased", eta=relaxation.rule.eta, n=n, vinit=beliefs)
    assert_close(list(found), list(expected), tolerance=1e-12)


def test_a_step_that_diverges_otherwise() -> None:
    """What is chosen is small where the energy is steep."""
    case = linear_case(6)
    with torch.no_grad():
        for layer in case.model:
            layer.weight.mul_(6)
    diverged = case.infer("ErrorBased", eta=0.1, n=20)
    assert diverged.epsilon[1].norm() > 1e3 * case.infer("Exact").epsilon[1].norm()
    found = case.infer("ErrorBased", eta="auto", n=20)
    energies = [
        reference.energy(case.model, case.LossFun, case.Y, v) for v in (found.vhat, found.v)
    ]
    assert energies[1] < 0.9 * energies[0]


@pytest.mark.parametrize("ErrType", ["ErrorBased", "Equilibrium"])
def test_warns_where_updates_at_v_feed_themselves(ErrType: str) -> None:
    def cut_after() -> Case:
        model = nn.Sequential(nn.Sequential(nn.Linear(4, 6), nn.ReLU()), nn.Linear(6, 3))
        return Case(model.double(), nn.MSELoss(), *(torch.randn(5, k).double() for k in (4, 3)))

    case = cut_after()
    with pytest.warns(UserWarning, match=f"{ErrType} takes its updates at v.*model"):
        case.infer(ErrType)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        case.infer(ErrType)
        cut_after().infer(ErrType, update_at="vhat")


def steep_case() -> Case:
    case = linear_case(8)
    with torch.no_grad():
        for layer in case.model:
            layer.weight.mul_(6)
    return case


@pytest.mark.filterwarnings("error:The energy that:UserWarning")
@pytest.mark.parametrize("ErrType", ["Strict", "ErrorBased"])
def test_warns_once_where_the_energy_rises(ErrType: str) -> None:
    case = steep_case()
    with pytest.warns(UserWarning, match=rf"energy that {ErrType} descends went from .* eta=0\.1"):
        case.infer(ErrType, eta=0.1, n=30)
    case.infer(ErrType, eta=0.1, n=30)
    steep_case().infer(ErrType, eta="auto", n=30)
    linear_case(4).infer(ErrType, eta=0.01, n=5)


def test_warns_where_the_energy_is_no_number() -> None:
    with pytest.warns(UserWarning, match="went from .* to (nan|inf) in n=400 iterations"):
        steep_case().infer("ErrorBased", eta=5.0, n=400)


@pytest.mark.filterwarnings("error:The energy that:UserWarning")
def test_a_rise_that_comes_in_training_is_seen() -> None:
    """Not in each call, but in calls 1, 8, 64, ... of a model."""
    case = linear_case(8)
    case.infer("ErrorBased", n=5)
    with torch.no_grad():
        for layer in case.model:
            layer.weight.mul_(6)
    for _ in range(6):
        case.infer("ErrorBased", n=30)
    with pytest.warns(UserWarning, match="steps are too long"):
        case.infer("ErrorBased", n=30)


@pytest.mark.filterwarnings("error:The energy that:UserWarning")
def test_it_is_looked_for_ever_more_rarely() -> None:
    case = linear_case(8)
    for _ in range(9):
        case.infer("ErrorBased", n=1)
    with torch.no_grad():
        for layer in case.model:
            layer.weight.mul_(6)
    for _ in range(54):
        case.infer("ErrorBased", n=2)
    with pytest.warns(UserWarning, match="n=2 iterations"):
        case.infer("ErrorBased", n=2)


@pytest.mark.parametrize("ErrType", ["Strict", "ErrorBased"])
def test_the_warning_says_from_where_to_where(ErrType: str) -> None:
    """F as it was last known, which costs nothing; from other beliefs, where it starts is not known."""
    case = steep_case()
    k = 9 if ErrType == "Strict" else 10  # before the last step of beliefs
    v = ITERATIONS[ErrType](*case, 0.1, k).v
    start = case.LossFun(case.model(case.X), case.Y).item()
    end = reference.energy(case.model, case.LossFun, case.Y, v).item()
    said = (
        f"energy that {ErrType} descends went from {start:.3g} to {end:.3g} in n=10 .* eta=0.1, so"
    )
    with pytest.warns(UserWarning, match=re.escape(said).replace(r"\.\*", ".*")):
        case.infer(ErrType, n=10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steep_case().infer(ErrType, n=10, vinit=case.infer("Exact").v)
    case = steep_case()
    with pytest.warns(UserWarning, match="descends went to (nan|inf) in n=400"):
        case.infer(ErrType, eta=5.0, n=400, vinit=case.infer("Exact").v)


@pytest.mark.filterwarnings("error:The energy that:UserWarning")
def test_a_loss_that_is_no_number_is_none_of_the_steps() -> None:
    case = linear_case(3)
    case._replace(Y=case.Y * float("nan")).infer("Strict", n=3)
