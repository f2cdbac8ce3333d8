"""The step size "auto": the eigenvalue, the products with the Hessian, and that nothing diverges."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian

from tests import reference
from tests.cases import Case, assert_close, cases, random_beliefs, squared_error
from torch2pc import PCInfer, PCInferLatent
from torch2pc.energy.curvature import (
    alternating,
    largest_eigenvalue,
    safe_step,
    second_derivative,
    small_step,
)
from torch2pc.energy.curvature import (
    hessian as product_with_hessian,
)
from torch2pc.energy.factors import Terms
from torch2pc.graph.network import Network
from torch2pc.inference.error_based import error_based
from torch2pc.inference.relax import Relaxation
from torch2pc.inference.steps import MOST_TRIES, SHRINK, Safe
from torch2pc.inference.strict import latent, strict


def step_of(relaxation: Relaxation) -> float:
    """The safe step size where a relaxation stands."""
    energy = relaxation.energy
    x = energy.variables
    return safe_step(largest_eigenvalue(product_with_hessian(energy), x) if x else 0.0)


def matrix_product(A: Tensor, sizes: list[int]) -> Any:
    """Multiplies with a matrix whose vectors are split into parts."""
    return lambda u: list((A @ torch.cat(u)).split(sizes))


@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    passes=st.integers(1, 20),
    shift=st.sampled_from([-3.0, 0.0, 3.0]),
)
def test_the_largest_eigenvalue(sizes: list[int], passes: int, shift: float) -> None:
    size = sum(sizes)
    A = torch.randn(size, size).double()
    A = A + A.T + shift * torch.eye(size)
    like = [torch.empty(n).double() for n in sizes]
    found = largest_eigenvalue(matrix_product(A, sizes), like, passes)
    expected = torch.linalg.eigvalsh(A)[-1].item()
    assert found <= expected + 1e-9 * A.norm()
    if passes >= size:
        assert found == pytest.approx(expected, abs=1e-6 * A.norm().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_few_products_suffice_for_a_safe_step(dtype: torch.dtype) -> None:
    """With as many as are made by default, 1 / lambda is far from unstable."""
    torch.manual_seed(0)
    A = torch.randn(400, 400, dtype=dtype)
    A = A @ A.T
    expected = torch.linalg.eigvalsh(A)[-1].item()
    eta = safe_step(largest_eigenvalue(matrix_product(A, [100, 300]), [A[0, :100], A[0, 100:]]))
    assert 1 <= eta * expected < 1.5


def test_a_matrix_of_zeros_and_one_that_is_none() -> None:
    like = [torch.empty(3)]
    assert largest_eigenvalue(lambda u: [0 * u[0]], like) == 0
    assert safe_step(largest_eigenvalue(lambda u: [0 * u[0]], like)) == 1
    assert safe_step(largest_eigenvalue(lambda u: [-u[0]], like)) == 1
    assert safe_step(largest_eigenvalue(lambda u: [u[0] / 4], like)) == pytest.approx(4)
    assert math.isnan(largest_eigenvalue(lambda u: [u[0] / 0], like))
    assert largest_eigenvalue(lambda u: [2 * u[0]], like, passes=9) == pytest.approx(2)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_what_couples_neighbours_is_left_out(count: int) -> None:
    """Of a matrix that couples each variable to the next alone, the blocks of each stay."""
    sizes = [2 + k for k in range(count)]
    place = torch.arange(count).repeat_interleave(torch.tensor(sizes))
    apart = (place[:, None] - place).abs()
    A = torch.randn(len(place), len(place)).double() * (apart <= 1)
    u = torch.randn(len(place)).double()
    found = alternating(matrix_product(A, sizes))(list(u.split(sizes)))
    assert_close(torch.cat(found), (A * (apart == 0)) @ u, 1e-12)


class Quartic(torch.autograd.Function):
    """A sum of fourth powers whose gradient looks like a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x**4).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, e: Tensor) -> Tensor:
        return 4 * e * ctx.saved_tensors[0] ** 3


class Raising(torch.autograd.Function):
    """Another one, whose gradient says so when it is differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x**4).sum()

    @staticmethod
    def backward(ctx: Any, e: Tensor) -> Tensor:
        return Raising4.apply(ctx.saved_tensors[0]) * e


class Raising4(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 4 * x**3

    @staticmethod
    def backward(ctx: Any, e: Tensor) -> Tensor:
        raise RuntimeError("not differentiable twice")


@pytest.mark.parametrize(
    ("other", "second"),
    [
        (lambda y: y.sum(), 0.0),
        (lambda y: 3 * y.square().sum(), 6.0),
        (lambda y: torch.zeros(()), 0.0),
    ],
    ids=["linear", "square", "unused"],
)
@pytest.mark.parametrize(
    "function", [Quartic.apply, Raising.apply, lambda x: (x**4).sum()], ids=["once", "no", "yes"]
)
def test_second_derivatives(
    function: Callable[[Tensor], Tensor], other: Callable[[Tensor], Tensor], second: float
) -> None:
    x, y = torch.randn(5).double(), torch.randn(3).double()
    u = [torch.randn(5).double(), torch.randn(3).double()]
    product = second_derivative(lambda z: function(z[0]) + other(z[1]), [x, y])
    assert_close(list(product(u)), [12 * x**2 * u[0], second * u[1]], 1e-5)
    # A second time, too.
    assert_close(list(product([2 * u[0], u[1]])), [24 * x**2 * u[0], second * u[1]], 1e-5)


def test_the_second_derivative_of_a_constant_is_0() -> None:
    x = [torch.randn(5), torch.randn(3)]
    product = second_derivative(lambda z: torch.zeros(()), x)
    assert_close(list(product(x)), [torch.zeros(5), torch.zeros(3)], 0)


def test_the_second_derivative_of_what_can_be_differentiated_is_exact() -> None:
    """No difference is taken, whose error would be larger than a part of the answer."""
    at, u = [torch.tensor([1e-8, 1.0])], [torch.tensor([1.0, 1.0])]
    product = second_derivative(lambda z: (z[0] ** 3).sum(), at)
    torch.testing.assert_close(product(u)[0], torch.tensor([6e-8, 6.0]))


def gauss_newton(
    case: Case, v: list[Tensor], first: int, pi: list[float], prior: Any = None
) -> Tensor:
    """The matrix that multiplies v_first..v_{L-1}, from the Jacobians of the errors, by autograd."""
    L = len(case.model)
    sizes = [v_l.numel() for v_l in v[first:L]]

    def beliefs(flat: Tensor) -> list[Tensor]:
        parts = flat.split(sizes)
        moved = [part.view(v_l.shape) for part, v_l in zip(parts, v[first:L], strict=True)]
        return [*v[:first], *moved]

    def errors(flat: Tensor) -> Tensor:
        b = beliefs(flat)
        found = [
            math.sqrt(pi[l - 1]) * (case.model[l - 1](b[l - 1]) - b[l]).flatten()
            for l in range(1, L)
        ]
        return torch.cat(found)

    def output(flat: Tensor) -> Tensor:
        return case.model[-1](beliefs(flat)[-1])

    at = torch.cat([v_l.flatten() for v_l in v[first:L]]).detach()
    result = torch.zeros(len(at), len(at), dtype=at.dtype)
    if L > 1:
        J = jacobian(errors, at)
        result += J.T @ J
    y = output(at)
    J = jacobian(output, at).reshape(y.numel(), -1)
    of_loss = hessian(lambda y: case.LossFun(y, case.Y).reshape(()), y.detach())
    result = result + J.T @ of_loss.reshape(y.numel(), -1) @ J
    if prior is not None:
        result = result + hessian(lambda flat: prior(beliefs(flat)), at)
    return result.detach()


def check_product(relaxation: Relaxation, like: list[Tensor], expected: Tensor, off: float) -> None:
    product = product_with_hessian(relaxation.energy)
    u = [torch.randn_like(x) for x in like]
    with torch.no_grad():
        found = product(u)
    flat = torch.cat([part.flatten() for part in u])
    assert_close(torch.cat([part.flatten() for part in found]), expected @ flat, off)


@given(case=cases(max_layers=4, smooth=True), vinit=st.booleans(), k=st.integers(0, 5))
def test_the_product_is_that_with_the_gauss_newton_matrix(case: Case, vinit: bool, k: int) -> None:
    """Before the first step and after any other, where some layers may not have been reached."""
    if len(case.model) == 1:
        return
    beliefs = random_beliefs(case) if vinit else None
    network = Network(case.model, case.LossFun, case.X, case.Y)
    relaxation = strict(network, 0.1, beliefs)
    with network.replaying():
        for _ in range(k):
            relaxation.step()
        v, L = relaxation.v, len(case.model)
        expected = gauss_newton(case, v, 1, [1.0] * (L - 1))
        check_product(relaxation, v[1:L], expected, 1e-4 if vinit or k else 1e-6)


@given(case=cases(max_layers=4), ErrType=st.sampled_from(["Strict", "ErrorBased"]))
def test_the_safe_step_after_some_steps_is_the_one_from_those_beliefs(
    case: Case, ErrType: str
) -> None:
    kind = strict if ErrType == "Strict" else error_based
    network = Network(case.model, case.LossFun, case.X, case.Y)
    relaxation = kind(network, 0.1)
    with network.replaying():
        for _ in range(len(case.model) + 1):
            found, v = step_of(relaxation), relaxation.v
            anew = Network(case.model, case.LossFun, case.X, case.Y)
            with anew.replaying():
                expected = step_of(kind(anew, 0.1, v))
            assert found == pytest.approx(expected, rel=1e-3)
            relaxation.step()


def quadratic(v: list[Tensor]) -> Tensor:
    return 2 * v[0].square().sum() + (v[0].sum() * v[-1].sum())


@given(
    case=cases(max_layers=3, smooth=True),
    prior=st.sampled_from([None, quadratic]),
    k=st.integers(0, 4),
)
def test_the_product_with_a_free_input_precisions_and_a_prior(
    case: Case, prior: Any, k: int
) -> None:
    L = len(case.model)
    pi = [0.3 + l for l in range(L - 1)]
    network = Network(case.model, case.LossFun, case.X, case.Y, free_input=True, prior=prior)
    relaxation = latent(network, 0.1, Terms(pi))
    with network.replaying():
        for _ in range(k):
            relaxation.step()
        v = relaxation.v
        expected = gauss_newton(case, v, 0, pi, prior)
        check_product(relaxation, v[:L], expected, 1e-4 if k else 1e-6)


class Uncovered(nn.Tanh):
    """A layer whose operations are not followed."""

    def forward(self, x: Tensor) -> Tensor:
        assert float(x.detach().sum()) is not None
        return super().forward(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_layers_that_are_evaluated_and_subtracted(dtype: torch.dtype) -> None:
    def model(kind: type[nn.Module]) -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(4, 6), nn.Sequential(kind(), nn.Linear(6, 6)), nn.Linear(6, 3)
        ).to(dtype)

    found = []
    for kind in (Uncovered, nn.Tanh):
        torch.manual_seed(1)
        X, Y = torch.randn(5, 4, dtype=dtype), torch.randn(5, 3, dtype=dtype)
        network = Network(model(kind), nn.MSELoss(), X, Y)
        relaxation = strict(network, "auto")
        assert (network.layers[1].uncovered is not None) == (kind is Uncovered)
        with network.replaying():
            found.append(step_of(relaxation))
    assert found[0] == pytest.approx(found[1], rel=1e-2)


# Nothing diverges.


def mlp(depth: int, width: int, activation: type[nn.Module], cut_before: bool) -> nn.Sequential:
    """``depth`` items from 6 inputs to 4 outputs."""
    linear = [nn.Linear(6 if l == 0 else width, width) for l in range(depth - 1)]
    last = nn.Linear(width, 4)
    if cut_before:
        above = [nn.Sequential(activation(), module) for module in [*linear[1:], last]]
        return nn.Sequential(linear[0], *above)
    return nn.Sequential(*[nn.Sequential(module, activation()) for module in linear], last)


def conv(activation: type[nn.Module]) -> nn.Sequential:
    return nn.Sequential(
        nn.Sequential(nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, 3, padding=1)),
        nn.Sequential(nn.BatchNorm2d(4), activation(), nn.Conv2d(4, 4, 3, padding=1)),
        nn.Sequential(activation(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4, 4)),
    )


def batch_norm(activation: type[nn.Module]) -> nn.Sequential:
    items = [
        nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), activation(), nn.Dropout(0.1))
        for _ in range(4)
    ]
    return nn.Sequential(*items, nn.Linear(6, 4))


def one_hot_error(y: Tensor, Y: Tensor) -> Tensor:
    return squared_error(y, nn.functional.one_hot(Y, 4))


NETWORKS: dict[str, Callable[[type[nn.Module]], nn.Sequential]] = {
    **{
        f"{depth} items, cut {'before' if before else 'after'}": (
            lambda activation, depth=depth, before=before: mlp(depth, 12, activation, before)
        )
        for depth in (3, 8, 20)
        for before in (True, False)
    },
    "convolutions": conv,
    "batch norm": batch_norm,
}
LOSSES: list[Callable[[Tensor, Tensor], Tensor]] = [
    nn.CrossEntropyLoss(),
    nn.CrossEntropyLoss(reduction="sum"),
    lambda y, Y: one_hot_error(y, Y) / y.numel(),
    one_hot_error,
]


@pytest.mark.filterwarnings("ignore:Strict takes its updates at v")
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.GELU])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_energy_falls(name: str, activation: type[nn.Module]) -> None:
    """For weights of a tenth to ten times the usual size, at the first try."""
    for k, scale in enumerate((0.1, 1.0, 4.0, 10.0)):
        LossFun = LOSSES[(k + [*NETWORKS].index(name)) % 4]
        torch.manual_seed(k)
        model = NETWORKS[name](activation).double()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter *= scale
        X, Y = torch.randn(8, 6).double(), torch.randint(4, (8,))
        network = Network(model, LossFun, X, Y)
        relaxation = strict(network, "auto")
        with network.replaying():
            eta, before = step_of(relaxation), relaxation.energy.terms().sum()
            relaxation.run(20)
            after = relaxation.energy.terms().sum()
        assert relaxation.rule.eta == eta
        assert after <= before, (scale, LossFun)


def steep_case() -> Case:
    """Weights as they are after long training: a step of .1 is far too long."""
    torch.manual_seed(0)
    model = mlp(5, 30, nn.ReLU, cut_before=True).double()
    with torch.no_grad():
        for item in model:
            for parameter in item.parameters():
                parameter *= 8
    return Case(model, nn.CrossEntropyLoss(), torch.randn(8, 6).double(), torch.randint(4, (8,)))


def energies(case: Case, **options: Any) -> tuple[Tensor, Tensor]:
    """Before and after."""
    result = case.infer("Strict", **options)
    start = options.get("vinit") or result.vhat
    return tuple(  # type: ignore[return-value]
        reference.energy(case.model, case.LossFun, case.Y, [case.X, *v[1:]])
        for v in (start, result.v)
    )


def test_where_the_default_diverges() -> None:
    before, after = energies(steep_case())
    assert after > 1e3 * before
    before, after = energies(steep_case(), eta="auto")
    assert after < before


@given(case=cases(), vinit=st.booleans(), n=st.integers(1, 30))
def test_it_ends_no_higher_than_it_starts(case: Case, vinit: bool, n: int) -> None:
    beliefs = random_beliefs(case) if vinit else None
    if vinit:
        beliefs = [belief.detach() for belief in beliefs or []]
    before, after = energies(case, eta="auto", n=n, vinit=beliefs)
    assert after <= before + 1e-9 * before.abs()


def found_eta(case: Case, n: int = 20, **options: Any) -> float:
    model = copy.deepcopy(case.model)
    network = Network(model, case.LossFun, case.X, case.Y)
    relaxation = strict(network, "auto", **options)
    with network.replaying():
        relaxation.run(n)
    assert isinstance(relaxation.rule.eta, float)
    return relaxation.rule.eta


@given(case=cases(), vinit=st.booleans(), update_at=st.sampled_from(["v", "vhat", "before"]))
def test_it_is_the_same_as_that_number(case: Case, vinit: bool, update_at: str) -> None:
    options: dict[str, Any] = dict(vinit=random_beliefs(case) if vinit else None)
    eta = found_eta(case, **options)
    options["update_at"] = update_at
    found = case.infer("Strict", eta="auto", **options)
    gradients = case.gradients()
    expected = case.infer("Strict", eta=eta, **options)
    assert_close(list(found), list(expected), 0)
    assert_close(gradients, case.gradients(), 0)


def test_a_step_that_raises_the_energy_is_shortened(monkeypatch: pytest.MonkeyPatch) -> None:
    case = steep_case()
    safe = found_eta(case)
    tries: list[float] = []
    choose = Safe.choose

    def counted(self: Safe) -> None:
        choose(self)
        tries.append(self.eta)

    monkeypatch.setattr(Safe, "choose", counted)
    monkeypatch.setattr("torch2pc.inference.steps.safe_step", lambda *_: 100 * safe)
    before, after = energies(case, eta="auto")
    assert after < before
    assert len(tries) > 1
    assert tries == [100 * safe * SHRINK**k for k in range(len(tries))]
    found, gradients = case.infer("Strict", eta="auto"), case.gradients()
    expected = case.infer("Strict", eta=tries[-1])
    assert_close(list(found), list(expected), 0)
    assert_close(gradients, case.gradients(), 0)
    # From other beliefs, each try starts there anew.
    beliefs = [v_l.detach() for v_l in random_beliefs(case)]
    tries.clear()
    found = case.infer("Strict", eta="auto", vinit=beliefs)
    eta = tries[-1]
    assert len(tries) > 1
    assert_close(list(found), list(case.infer("Strict", eta=eta, vinit=beliefs)), 0)


def test_values_that_are_no_numbers_pass_through() -> None:
    case = steep_case()
    case.X[0, 0] = math.nan
    result = case.infer("Strict", eta="auto")
    assert result.Loss.isnan()
    assert case.model[0].weight.grad.isnan().any()


@pytest.mark.parametrize("scale", [1e30, math.inf])
def test_a_loss_beyond_all_bounds_ends(scale: float) -> None:
    model = mlp(3, 5, nn.Tanh, True)
    case = Case(
        model, lambda y, Y: scale * squared_error(y, Y), torch.randn(2, 6), torch.ones(2, 4)
    )
    case.infer("Strict", eta="auto")
    assert MOST_TRIES < 50


def test_nothing_is_carried_from_call_to_call() -> None:
    case, other = steep_case(), steep_case()
    other = other._replace(X=10 * other.X)
    random = torch.get_rng_state()
    expected = case.infer("Strict", eta="auto")
    assert torch.equal(torch.get_rng_state(), random)
    other._replace(model=case.model).infer("Strict", eta="auto")
    torch.rand(3)
    assert_close(list(case.infer("Strict", eta="auto")), list(expected), 0)


def test_one_call_is_one_forward_pass() -> None:
    model = batch_norm(nn.Tanh)
    twin = copy.deepcopy(model)
    X, Y = torch.randn(8, 6), torch.randint(4, (8,))
    torch.manual_seed(3)
    PCInfer(model, nn.CrossEntropyLoss(), X, Y, "Strict", eta="auto")
    random = torch.get_rng_state()
    torch.manual_seed(3)
    twin(X)
    assert torch.equal(torch.get_rng_state(), random)
    assert_close(dict(model.named_buffers()), dict(twin.named_buffers()), 1e-6)


@pytest.mark.parametrize("ErrType", ["Strict", "FixedPred"])
def test_a_single_layer_gets_its_gradient(ErrType: str) -> None:
    case = Case(nn.Sequential(nn.Linear(3, 2)), nn.MSELoss(), torch.randn(4, 3), torch.randn(4, 2))
    case.infer("Exact")
    expected = case.gradients()
    case.infer(ErrType, eta="auto")
    assert_close(case.gradients(), expected)


@given(case=cases())
def test_fixed_pred_brings_the_whole_gradient(case: Case) -> None:
    case.infer("Exact")
    expected = case.gradients()
    case.infer("FixedPred", eta="auto", n=None)
    assert_close(case.gradients(), expected)


@pytest.mark.parametrize("ErrType", ["Strict", "FixedPred"])
def test_the_warning_of_a_short_inference_does_not_name_a_number(ErrType: str) -> None:
    model = mlp(5, 4, nn.Tanh, True)
    X, Y = torch.randn(2, 6), torch.randint(4, (2,))
    with pytest.warns(UserWarning, match=r"layer 1 of 5 .* with eta=auto and n=4.*; n=5 would"):
        PCInfer(model, nn.CrossEntropyLoss(), X, Y, ErrType, eta="auto", n=4)


def test_in_half_precision_it_is_as_good() -> None:
    torch.manual_seed(0)
    model = mlp(4, 16, nn.Tanh, True)
    X, Y = torch.randn(8, 6), torch.randint(4, (8,))
    steps = []
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            network = Network(model, nn.CrossEntropyLoss(), X, Y)
            relaxation = strict(network, "auto")
            with network.replaying():
                relaxation.run(20)
        steps.append(relaxation.rule.eta)
    assert steps[0] == pytest.approx(steps[1], rel=0.05)


# Without labels.


@given(case=cases(smooth=True), weight=st.sampled_from([None, 0.1, 100.0]))
def test_latent_energies_fall(case: Case, weight: float | None) -> None:
    def prior(v: list[Tensor]) -> Tensor:
        assert weight is not None
        return weight * v[0].square().sum()

    of_v = None if weight is None else prior
    L = len(case.model)
    pi = [0.1 + 3 * l for l in range(L - 1)]
    result = PCInferLatent(
        case.model, case.LossFun, case.Y, case.X, "auto", 20, precision=pi, prior=of_v
    )
    before, after = [
        reference.latent_energy(case.model, case.LossFun, case.Y, v, pi, of_v)
        for v in (result.vhat, result.v)
    ]
    assert after <= before + 1e-9 * before.abs()
    if weight == 100:
        # That the prior's curvature is seen; a step of .1 would go to and fro farther each time.
        assert result.v[0].norm() < case.X.norm()


@pytest.mark.parametrize("scale", [1e-8, 1e-3, 1.0, 1e6])
def test_a_difference_is_taken_as_far_away_however_long_the_direction(scale: float) -> None:
    at, u = [torch.randn(4).double(), torch.randn(2, 3).double()], [torch.ones(4).double()]
    u.append(torch.zeros(2, 3).double())
    expected = small_step(at, u)
    assert_close(scale * small_step(at, [scale * u_i for u_i in u]), expected, 1e-12)
    size = sum(x.square().sum() for x in at).sqrt()
    assert_close(expected * 2, torch.finfo(torch.float64).eps ** 0.5 * size, 1e-12)
