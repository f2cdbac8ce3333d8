"""follow against the plain algorithms, and what it foretells against what happens."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from torch import Tensor, nn

import torch2pc.steps
from tests import reference
from tests.cases import (
    ERR_TYPES,
    Case,
    assert_close,
    calls_of,
    cases,
    random_beliefs,
    squared_error,
)
from torch2pc import PCInfer, PCInferLatent, Record, follow, follow_latent
from torch2pc.displacement.lines import Displacement
from torch2pc.follow.follow import _state_kept
from torch2pc.follow.outlook import Spectrum, _first
from torch2pc.graph.state import Snapshot
from torch2pc.inference.relax import Relaxation

# The reference starts anew for each row.
few = settings(max_examples=12)
steps = st.integers(1, 5)
etas = st.floats(0.01, 0.3)
places = st.sampled_from(["v", "vhat", "before"])


def follow_case(case: Case, ErrType: str, **options: Any) -> Record:
    return follow(case.model, case.LossFun, case.X, case.Y, ErrType, **options)


def half_square(x: Tensor) -> Tensor:
    return 0.5 * x.square().sum()


def same(found: Any, expected: Any, tolerance: float = 1e-9) -> None:
    """As assert_close; one layer has nothing hidden."""
    assert found.shape == expected.shape
    if expected.numel():
        assert_close(found, expected, tolerance)


def column(numbers: list[Any]) -> Tensor:
    return torch.tensor([float(x) for x in numbers], dtype=torch.float64)


def gradients_of(function: Callable[[list[Tensor]], Tensor], at: list[Tensor]) -> list[Tensor]:
    moving = [x.detach().requires_grad_() for x in at]
    return list(
        torch.autograd.grad(function(moving), moving, allow_unused=True, materialize_grads=True)
    )


def check_updates(record: Record, case: Case, updates: list[dict[nn.Parameter, Tensor]]) -> None:
    """``updates[k-1]``, those after k iterations, against backpropagation's, layer by layer."""
    of_backprop = reference.exact(*case).updates
    for k, found in enumerate(updates, start=1):
        for l, layer in enumerate(case.model, start=1):
            parameters = [p for p in layer.parameters() if p in of_backprop]
            if not parameters:
                assert record.cosine[k, l].isnan() and record.size[k, l].isnan()
                continue
            u = torch.cat([found[p].flatten() for p in parameters])
            g = torch.cat([of_backprop[p].flatten() for p in parameters])
            if g.norm() < 1e-12:
                continue
            same(record.size[k, l], u.norm() / g.norm(), 1e-8)
            if u.norm() > 1e-9 * g.norm():
                cosine = torch.dot(u, g) / (u.norm() * g.norm())
                assert abs(record.cosine[k, l] - cosine) < 1e-7


@pytest.mark.parametrize("at", ["v", "vhat", "before"])
@pytest.mark.parametrize("ErrType", ["Strict", "ErrorBased"])
def test_the_rows_are_those_of_shorter_calls(ErrType: str, at: str) -> None:
    """The updates too, wherever they are taken."""
    whole, part = (
        follow_case(network("tanh", 0), ErrType, n=n, update_at=at, eta=0.2) for n in (5, 3)
    )
    for name in ("energies", "moves", "gradient", "cosine", "size"):
        found, expected = getattr(whole, name)[:4], getattr(part, name)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0, equal_nan=True)


def check_distance(
    record: Record, k: int, gradient: list[Tensor], errors: list[Tensor], sign: int
) -> None:
    """The tables of gradients against those of layers 1..L-1, F's gradient and errors there."""
    L = record.L
    if L == 1:
        assert record.distance[k] == 0
        return
    arriving = [e + sign * g for e, g in zip(errors, gradient, strict=True)]
    lengths = [[x.norm() for x in of] for of in (gradient, errors, arriving)]
    whole = [torch.stack([*of, torch.zeros(()).double()]).norm() for of in lengths]
    same(record.gradient[k, 1:L], column(lengths[0]), 1e-8)
    if max(whole[1:]) > 1e-9:
        same(record.distance[k], whole[0] / max(whole[1:]), 1e-8)
    for l, (off, *sizes) in enumerate(zip(*lengths, strict=True), start=1):
        if max(sizes) > 1e-9:
            same(record.distances[k, l], off / max(sizes), 1e-8)


@given(case=cases(), eta=etas, n=steps, vinit=st.booleans(), at=places)
@few
def test_strict(case: Case, eta: float, n: int, vinit: bool, at: str) -> None:
    beliefs = random_beliefs(case) if vinit else None
    record = follow_case(case, "Strict", eta=eta, n=n, vinit=beliefs, update_at=at)
    L = len(case.model)
    assert (record.n, record.L, record.eta) == (n, L, eta)
    ends = [reference.strict(*case, eta, k, beliefs, at) for k in range(1, n + 1)]
    vhat = reference.feed_forward(case.model, case.X)
    path = [[case.X, *beliefs[1:L], vhat[L]] if beliefs else vhat, *[end.v for end in ends]]

    for k, v in enumerate(path):
        predictions = [f(v_l).detach() for f, v_l in zip(case.model, v, strict=False)]
        errors = [predictions[l - 1] - v[l] for l in range(1, L)]
        loss = case.LossFun(predictions[-1], case.Y).detach()
        same(record.energies[k], column([0, *map(half_square, errors), loss]))
        same(record.F[k], reference.energy(case.model, case.LossFun, case.Y, v))

        def F(hidden: list[Tensor], v: list[Tensor] = v) -> Tensor:
            v = [v[0], *hidden, v[-1]]
            return reference.latent_energy(
                case.model, case.LossFun, case.Y, v, [1.0] * (L - 1), None
            )

        check_distance(record, k, gradients_of(F, v[1:L]) if L > 1 else [], errors, 1)
        if k > 0:
            moves = [(a - b).norm() for a, b in zip(v, path[k - 1], strict=True)]
            same(record.moves[k], column(moves))
    check_updates(record, case, [end.updates for end in ends])


@given(case=cases(), eta=etas, n=steps, vinit=st.booleans())
@few
def test_error_based(case: Case, eta: float, n: int, vinit: bool) -> None:
    beliefs = random_beliefs(case) if vinit else None
    record = follow_case(case, "ErrorBased", eta=eta, n=n, vinit=beliefs)
    L = len(case.model)
    ends = [reference.error_based(*case, eta, k, beliefs) for k in range(1, n + 1)]
    start = reference.at_errors(*case, reference.errors_of(case.model, case.X, beliefs))
    before: list[Tensor] = []
    for k, (_, _, _, v, epsilon, _) in enumerate([start, *ends]):
        errors = epsilon[1:L]
        F = reference.energy_of_errors(*case, [None, *errors]).detach()
        same(record.F[k], F)
        same(record.energies[k, 1:L], column([half_square(e) for e in errors]))
        if L > 1:
            gradient = gradients_of(
                lambda free: reference.energy_of_errors(*case, [None, *free]), errors
            )
            check_distance(record, k, gradient, errors, -1)
        if k > 0:
            moves = [(a - b).norm() for a, b in zip(v[:L], before[:L], strict=True)]
            same(record.moves[k, :L], column(moves), 1e-8)
        before = v
    check_updates(record, case, [end.updates for end in ends])


@given(case=cases(), eta=etas, n=steps)
@few
def test_fixed_pred(case: Case, eta: float, n: int) -> None:
    record = follow_case(case, "FixedPred", eta=eta, n=n)
    L = len(case.model)
    ends = [reference.fixed_pred(*case, eta, k) for k in range(1, n + 1)]
    vhat = reference.feed_forward(case.model, case.X)
    path = [vhat, *[end.v for end in ends]]
    for k, v in enumerate(path):
        errors = [vhat[l] - v[l] for l in range(1, L)]
        same(record.energies[k, 1:L], column([half_square(e) for e in errors]))
        above = [*errors, ends[0].dLdy]
        arriving = [reference.input_vjp(case.model[l], vhat[l], above[l]) for l in range(1, L)]
        off = [a - e for a, e in zip(arriving, errors, strict=True)]
        check_distance(record, k, off, errors, 1)
        if k > 0:
            moves = [(a - b).norm() for a, b in zip(v, path[k - 1], strict=True)]
            same(record.moves[k], column(moves), 1e-8)
    same(record.loss, column([ends[0].Loss] * (n + 1)))
    assert record.rises_at is None  # nothing descends
    check_updates(record, case, [end.updates for end in ends])


@given(case=cases())
@few
def test_exact(case: Case) -> None:
    record = follow_case(case, "Exact")
    expected = reference.exact(*case)
    assert record.n == 1 and record.eta is None and record.stable_eta is None
    energies = [half_square(e) for e in expected.epsilon[1:-1]]
    same(record.energies[1], column([0, *energies, expected.Loss]))
    assert record.distance[1] == 0
    check_updates(record, case, [expected.updates])


@given(case=cases(smooth=True), n=st.integers(1, 6), vinit=st.booleans())
@few
def test_equilibrium(case: Case, n: int, vinit: bool) -> None:
    """Row k is what PCInfer returns for n=k; it ends as PCInfer does."""
    beliefs = random_beliefs(case) if vinit else None
    record = follow_case(case, "Equilibrium", n=n, vinit=beliefs)
    updates = []
    for k in range(1, record.n + 1):
        end = case.infer("Equilibrium", n=k, vinit=beliefs)
        same(record.energies[k, 1:-1], end.energy)
        updates.append({p: p.grad for p in case.model.parameters() if p.grad is not None})
    case.infer("Equilibrium", n=n, vinit=beliefs)
    check_updates(record, case, updates)
    assert record.eta is None and record.rises_at is None


def test_where_equilibrium_goes_back_the_last_row_is_of_where_it_ends() -> None:
    torch.manual_seed(69)  # its second step leads over an edge of F
    first, *others = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
    model = nn.Sequential(first, *[nn.Sequential(nn.ReLU(), x) for x in others]).double()
    arguments = nn.L1Loss(reduction="sum"), torch.randn(4, 3).double(), torch.randn(4, 2).double()
    seen: list[tuple[int, list[Tensor]]] = []
    noted = lambda k, v, _: seen.append((k, copy.deepcopy(v)))  # noqa: E731
    end = PCInfer(model, *arguments, "Equilibrium", n=2, callback=noted)
    assert [k for k, _ in seen] == [1, 2, 2]
    record = follow(model, *arguments, "Equilibrium", n=2)
    same(record.energies[2, 1:-1], end.energy)
    moves = [(a - b).norm() for a, b in zip(end.v, seen[0][1], strict=True)]
    same(record.moves[2, :-1], column(moves[:-1]))


def quadratic(v: list[Tensor]) -> Tensor:
    return torch.stack([0.1 * (l + 1) * v_l.square().sum() for l, v_l in enumerate(v)]).sum()


@given(
    case=cases(),
    eta=st.floats(0.01, 0.2),
    n=steps,
    pi=st.floats(0.1, 3),
    prior=st.sampled_from([None, quadratic]),
)
@few
def test_latent(case: Case, eta: float, n: int, pi: float, prior: Any) -> None:
    model, LossFun, Xinit, Y = case
    L = len(model)
    pis = [pi / (l + 1) for l in range(L - 1)]
    record = follow_latent(model, LossFun, Y, Xinit, eta, n, precision=pis, prior=prior)
    before, updates = None, []
    for k in range(n + 1):
        v = reference.latent(model, LossFun, Y, Xinit, eta, k, pis, prior)

        def F(v: list[Tensor]) -> Tensor:
            return reference.latent_energy(model, LossFun, Y, v, pis, prior)

        errors = [model[l - 1](v[l - 1]).detach() - v[l] for l in range(1, L)]
        hidden = [p * half_square(e) for p, e in zip(pis, errors, strict=True)]
        loss = LossFun(model[-1](v[-1]), Y).detach()
        energies = column([0 if prior is None else prior(v), *hidden, loss])
        same(record.energies[k], energies)
        same(record.F[k], F(v).detach())
        gradient = gradients_of(F, v)
        same(record.gradient[k, :L], column([g.norm() for g in gradient]), 1e-8)
        weighted = [torch.zeros_like(v[0]), *[p * e for p, e in zip(pis, errors, strict=True)]]
        sizes = [
            torch.cat([x.flatten() for x in of]).norm()
            for of in (weighted, [e + g for e, g in zip(weighted, gradient, strict=True)])
        ]
        if max(sizes) > 1e-9:
            off = torch.cat([g.flatten() for g in gradient]).norm()
            same(record.distance[k], off / max(sizes), 1e-8)
        if k > 0:
            moves = [(a - b).norm() for a, b in zip(v, before, strict=True)]
            same(record.moves[k, :L], column(moves), 1e-8)
            PCInferLatent(model, LossFun, Y, Xinit, eta, k, precision=pis, prior=prior)
            updates.append({p: p.grad for p in model.parameters() if p.grad is not None})
        before = v
    check_updates(record, case, updates)


# ------------------------------------------------------------------------ what it foretells


def network(kind: str, seed: int, width: int = 6, depth: int = 4) -> Case:
    torch.manual_seed(seed)
    items: list[nn.Module] = [nn.Linear(5, width)]
    for _ in range(depth - 1):
        linear = nn.Linear(width, width)
        with torch.no_grad():
            linear.weight.mul_(1.7)
        kinds = {"linear": [], "tanh": [nn.Tanh()], "relu": [nn.ReLU()], "gelu": [nn.GELU()]}
        items.append(nn.Sequential(*kinds[kind], linear))
    model = nn.Sequential(*items).double()
    return Case(model, squared_error, torch.randn(8, 5).double(), torch.randn(8, width).double())


def of_latent(v: list[Tensor]) -> Tensor:
    return 0.1 * v[0].square().sum()


def follower(case: Case, ErrType: str) -> Callable[..., Record]:
    """follow or follow_latent, of eta and n alone."""
    if ErrType != "Latent":
        return lambda eta, n: follow_case(case, ErrType, eta=eta, n=n)
    model, LossFun, X, Y = case
    return lambda eta, n: follow_latent(model, LossFun, Y, X, eta, n, prior=of_latent)


STEPPING = ["Strict", "ErrorBased", "Latent"]


@pytest.mark.parametrize("ErrType", STEPPING)
@pytest.mark.parametrize("kind", ["linear", "tanh"])
def test_the_largest_stable_eta_is_two_over_the_hessians_largest_eigenvalue(
    ErrType: str, kind: str
) -> None:
    case = network(kind, seed=0)
    record = follower(case, ErrType)(0.1, 150)
    L = record.L
    if ErrType == "ErrorBased":
        at = case.infer("ErrorBased", eta=0.1, n=150).epsilon[1:-1]
    elif ErrType == "Strict":
        at = case.infer("Strict", eta=0.1, n=150).v[1:-1]
    else:
        model, LossFun, X, Y = case
        at = PCInferLatent(model, LossFun, Y, X, 0.1, 150, prior=of_latent).v[:-1]
    shapes = [x.shape for x in at]

    def F(flat: Tensor) -> Tensor:
        parts = flat.split([shape.numel() for shape in shapes])
        free = [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
        if ErrType == "ErrorBased":
            return reference.energy_of_errors(*case, [None, *free])
        v = free if ErrType == "Latent" else [case.X, *free]
        chosen = of_latent if ErrType == "Latent" else None
        ones = [1.0] * (L - 1)
        return reference.latent_energy(case.model, case.LossFun, case.Y, v, ones, chosen)

    H = torch.autograd.functional.hessian(F, torch.cat([x.flatten() for x in at]))
    limit = 2 / torch.linalg.eigvalsh(H)[-1].item()
    assert limit <= record.stable_eta * (1 + 1e-6)  # an estimate of lambda from below
    assert record.stable_eta < 1.03 * limit


@pytest.mark.parametrize("ErrType", STEPPING)
def test_above_the_largest_stable_eta_F_grows_and_below_it_falls(ErrType: str) -> None:
    run = follower(network("linear", seed=0), ErrType)
    settled = run(0.1, 100)
    limit, lowest, start = settled.stable_eta, settled.F[-1], settled.F[0]
    below, above = run(0.97 * limit, 100), run(1.03 * limit, 200)
    assert below.rises_at is None
    assert below.F[-1] - lowest < 0.02 * (start - lowest)
    falls = above.F[1:] <= above.F[:-1]
    assert above.rises_at is not None
    assert falls[: above.rises_at - 1].all() and not falls[above.rises_at - 1]
    assert above.F[-1] > start
    # The record of the unstable run knows the limit by itself.
    assert 0.99 * limit < above.stable_eta < 1.01 * limit
    assert f"above the largest stable {limit:.2g}: F rises from" in above.verdict[0]


@pytest.mark.parametrize("ErrType", ["Strict", "ErrorBased"])
@pytest.mark.parametrize("kind", ["tanh", "gelu"])
def test_near_the_equilibrium_of_a_nonlinear_network_too(ErrType: str, kind: str) -> None:
    """Further away it may come to rest in a cycle, or find a flatter place."""
    case = network(kind, seed=1)
    settled = case.infer("Equilibrium", n=200)
    limit = follow_case(case, ErrType, eta=1e-3, n=1, vinit=settled.v).stable_eta
    near = [v_l + 1e-4 * torch.randn_like(v_l) for v_l in settled.v]
    below = follow_case(case, ErrType, eta=0.97 * limit, n=60, vinit=near)
    above = follow_case(case, ErrType, eta=1.03 * limit, n=120, vinit=near)
    assert below.rises_at is None
    assert below.distance[-1] < 0.5 * below.distance[0]
    rises = above.rises_at
    assert rises is not None
    grown = above.gradient.norm(dim=1)
    assert grown[-1] > 20 * grown[rises]


def steep(seed: int, kind: str) -> Case:
    """Large weights, inputs and targets: the curvature at the start tells little of that elsewhere."""
    torch.manual_seed(seed)
    activation = {"tanh": nn.Tanh, "relu": nn.ReLU, "gelu": nn.GELU}[kind]
    depth, width = 3 + seed % 6, [8, 16, 32][seed % 3]
    items = [nn.Sequential(nn.Linear(6, width), activation())]
    items += [nn.Sequential(nn.Linear(width, width), activation()) for _ in range(depth - 2)]
    model = nn.Sequential(*items, nn.Linear(width, 4)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 2 + seed % 2
    X, Y = 3 * torch.randn(4, 6).double(), 3 * torch.randn(4, 4).double()
    return Case(model, squared_error, X, Y)


@pytest.mark.parametrize(
    ("ErrType", "seed"), [("Strict", 0), ("Strict", 3), ("ErrorBased", 1), ("ErrorBased", 2)]
)
@pytest.mark.parametrize("kind", ["tanh", "gelu", "relu"])
def test_below_the_largest_stable_eta_F_falls_or_it_is_said_that_it_may_not(
    ErrType: str, kind: str, seed: int
) -> None:
    case = steep(seed, kind)
    record = follow_case(case, ErrType, eta="auto", n=10)
    below = follow_case(case, ErrType, eta=0.9 * record.stable_eta, n=40)
    if record.falls:
        assert below.rises_at is None
        assert f"largest stable eta {record.stable_eta:.3g} along the way" in str(record)
    else:
        assert f"{record.stable_eta:.3g} between edges of F, at which it may rise" in str(record)


@pytest.mark.parametrize("ErrType", [*STEPPING, "FixedPred"])
@pytest.mark.parametrize("kind", ["linear", "tanh"])
def test_the_n_that_is_foretold_is_the_n_that_is_needed(ErrType: str, kind: str) -> None:
    run = follower(network(kind, seed=1), ErrType)
    eta = 0.1 if ErrType == "FixedPred" else 0.4 * run(0.1, 40).stable_eta
    found = run(eta, 300).n_reached
    early = run(eta, max(2, found // 3))
    assert not early.converged
    foretold = early.n_needed
    tolerance = 0 if ErrType == "FixedPred" else 0.15
    assert abs(foretold - found) <= 1 + tolerance * found, (foretold, found)
    assert f"n = {foretold} with this eta" in early.verdict[0]


@pytest.mark.parametrize("ErrType", ["Strict", "ErrorBased"])
@pytest.mark.parametrize("seed", [0, 1])
def test_where_units_switch_no_n_is_foretold_that_is_not_enough(ErrType: str, seed: int) -> None:
    """Between the pieces of a network of ReLUs the descent rattles, and comes no nearer."""
    run = follower(network("relu", seed), ErrType)
    record = run(0.15, 60)
    if (foretold := record.n_needed) is not None:
        assert run(0.15, 2 * foretold).converged
    else:
        assert "1 % takes" not in str(record)


# ----------------------------------------------------------------------- what a call leaves alone


class Noisy(nn.Module):
    """Draws from a generator of its own, and counts in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        noise = torch.rand(x.shape, generator=self.generator, dtype=x.dtype)
        return x + 0.1 * noise


def eventful_case() -> Case:
    """With everything that a call may change: dropout, running statistics, a generator, tied weights."""
    tied = nn.Linear(6, 6)
    model = nn.Sequential(
        nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6)),
        nn.Sequential(nn.ReLU(inplace=True), tied, nn.Dropout(0.3)),
        Noisy(),
        nn.Sequential(nn.Tanh(), tied),
        nn.Linear(6, 3),
    ).double()
    return Case(model, nn.CrossEntropyLoss(), torch.randn(7, 5).double(), torch.randint(3, (7,)))


def state(case: Case) -> tuple[Any, ...]:
    """All that a call might change: tensors themselves, their values and their versions."""
    named = [*case.model.named_parameters(), *case.model.named_buffers()]
    return (
        torch.get_rng_state().tolist(),
        case.model[2].generator.get_state().tolist(),
        [(name, id(x), x.detach().clone().flatten().tolist()) for name, x in named],
        [
            (id(p.grad), None if p.grad is None else p.grad.tolist())
            for p in case.model.parameters()
        ],
        [p._version for p in case.model.parameters()],
        [module.training for module in case.model.modules()],
        (case.X.grad, case.X._version, case.X.tolist(), case.Y.tolist()),
    )


def follow_all(case: Case, ErrType: str, **options: Any) -> Record:
    if ErrType != "Latent":
        return follow_case(case, ErrType, **options)
    prior = options.pop("prior", None)
    return follow_latent(
        case.model, case.LossFun, case.Y, case.X.detach(), 0.1, options.get("n", 4), prior=prior
    )


@pytest.mark.parametrize("ErrType", [*ERR_TYPES, "Latent"])
@pytest.mark.parametrize("grads", [False, True])
def test_a_call_changes_nothing(ErrType: str, grads: bool) -> None:
    case = eventful_case()
    case.X.requires_grad_()
    if grads:
        case.LossFun(case.model(case.X.detach()), case.Y).backward()
    before = state(case)
    with torch.no_grad() if grads else torch.enable_grad():
        first = follow_all(case, ErrType, n=4)
    assert state(case) == before
    again = follow_all(case, ErrType, n=4)
    assert state(case) == before
    assert torch.equal(first.energies, again.energies)


@pytest.mark.parametrize("ErrType", ["FixedPred", "Strict", "Latent"])
def test_a_call_that_raises_changes_nothing(ErrType: str) -> None:
    case = eventful_case()
    failing = case._replace(LossFun=lambda y, Y: y.sum(dim=1))
    before = state(case)
    with pytest.raises(ValueError, match="LossFun must return a scalar"):
        follow_all(failing, ErrType, n=2)
    assert state(case) == before


class ReadOnly(dict[str, Any]):
    def __setitem__(self, name: str, value: Any) -> None:
        raise PermissionError(f"{name} is read-only")


@pytest.mark.parametrize("is_read_only", [False, True])
def test_what_cannot_be_put_back_is_said(is_read_only: bool) -> None:
    module = nn.BatchNorm1d(3)
    if is_read_only:
        module._buffers = ReadOnly(module._buffers)
    before = Snapshot([module], {torch.device("cpu")})
    report = pytest.raises(RuntimeError, match="what the modules hold could not be put back")
    with report if is_read_only else nullcontext() as caught, _state_kept(before):
        del module._buffers["running_mean"]
        module.eval()
    assert module.training
    if is_read_only:
        assert isinstance(caught.value.__context__, PermissionError)
    else:
        assert not module.running_mean.any()


@pytest.mark.parametrize("training", [True, False])
def test_a_graph_that_was_there_before_can_still_be_walked(training: bool) -> None:
    """In eval mode the running statistics are part of it."""
    case = eventful_case()
    case.model.train(training)
    Loss = case.LossFun(case.model(case.X), case.Y)
    if training:
        case.model.eval()
    follow_case(case, "Strict", n=2)
    Loss.backward()


@pytest.mark.parametrize("ErrType", ERR_TYPES)
def test_it_is_the_same_inference_with_the_same_random_numbers(ErrType: str) -> None:
    case = eventful_case()
    case.infer(ErrType, n=4)  # nothing is warned of twice
    torch.manual_seed(5)
    twin = copy.deepcopy(case.model[2].generator.get_state())
    record = follow_case(case, ErrType, n=4)
    torch.manual_seed(5)
    case.model[2].generator.set_state(twin)
    result = case.infer(ErrType, n=4)
    updates = {p: p.grad for p in case.model.parameters()}
    torch.manual_seed(5)
    case.model[2].generator.set_state(twin)
    case.infer("Exact")
    for l, layer in enumerate(case.model, start=1):
        parameters = list(layer.parameters())
        if parameters:
            u = torch.cat([updates[p].flatten() for p in parameters])
            g = torch.cat([p.grad.flatten() for p in parameters])
            same(record.size[-1, l], u.norm() / g.norm(), 1e-8)
    if ErrType in ("Exact", "ErrorBased", "Equilibrium"):
        same(record.energies[-1, 1:-1], result.energy)
    same(record.loss[0], result.Loss)


def test_eta_auto_is_the_step_that_the_call_takes() -> None:
    case = network("tanh", 0)
    for ErrType in ("Strict", "ErrorBased"):
        record = follow_case(case, ErrType, eta="auto", n=5)
        assert 0.3 * record.stable_eta < record.eta < record.stable_eta
        steps = follow_case(case, ErrType, eta=record.eta, n=5)
        assert torch.equal(record.energies, steps.energies)
        assert torch.equal(record.moves, steps.moves)


def test_where_auto_starts_anew_the_record_does_too(monkeypatch: pytest.MonkeyPatch) -> None:
    case = network("linear", 0)
    limit = follow_case(case, "Strict", n=10).stable_eta
    monkeypatch.setattr("torch2pc.inference.steps.safe_step", lambda *_: 3 * limit)
    ks: list[int] = []
    case.infer("Strict", eta="auto", n=20, callback=lambda k, *_: ks.append(k))
    assert ks == [*range(1, 21)] * 2  # the second time with a quarter of it
    record = follow_case(case, "Strict", eta="auto", n=20)
    assert record.n == 20 and record.eta == 0.75 * limit and record.rises_at is None
    again = follow_case(case, "Strict", eta=record.eta, n=20)
    for name in ("energies", "moves", "distances", "size"):
        assert_close(getattr(record, name).nan_to_num(), getattr(again, name).nan_to_num(), 1e-12)
    assert record.stable_eta == again.stable_eta and record.outlook == again.outlook


def test_the_cost_is_linear_in_n(monkeypatch: pytest.MonkeyPatch) -> None:
    case = network("tanh", 0)
    follow_case(case, "Strict", n=1)  # a layer's displacement is checked the first time
    evaluated = calls_of(Displacement, "forward", monkeypatch)
    counts = []
    for n in (0, 10, 20, 30):
        evaluated.clear()
        follow_case(case, "Strict", eta=0.05, n=n + 10)
        counts.append(len(evaluated))
    assert counts[3] - counts[2] == counts[2] - counts[1] == counts[1] - counts[0] <= 10 * 3 * 2


@pytest.mark.parametrize("eta", [0.1, 5.0])
def test_it_waits_for_the_device_only_at_the_end(
    monkeypatch: pytest.MonkeyPatch, eta: float
) -> None:
    """Of what reads a tensor's value, nothing more until the last iteration for 30 of them than for 3."""
    case = network("tanh", 0)
    follow_case(case, "Strict", n=2)
    reads = [0]
    counts = []
    run = Relaxation.run

    def counting(self: Relaxation, n: int) -> None:
        run(self, n)
        counts.append(reads[0])

    monkeypatch.setattr(Relaxation, "run", counting)
    for name in ("item", "tolist", "cpu", "__bool__", "__float__", "__int__", "nonzero"):
        plain = getattr(Tensor, name)

        def counted(self: Tensor, *args: Any, plain: Any = plain, **options: Any) -> Any:
            reads[0] += 1
            return plain(self, *args, **options)

        monkeypatch.setattr(Tensor, name, counted)
    for n in (3, 30):
        reads[0] = 0
        follow_case(case, "Strict", n=n, eta=eta)
        assert reads[0] > counts[-1]
    assert counts[0] == counts[1]


# ------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        (dict(model=nn.Linear(2, 2)), TypeError, "model must be an nn.Sequential"),
        (dict(LossFun="mse"), TypeError, "LossFun must be a callable"),
        (dict(X=[[1.0]]), TypeError, "X must be a torch.Tensor"),
        (dict(ErrType="strict"), ValueError, "ErrType must be one of"),
        (dict(eta="fast"), ValueError, "eta must be a finite number"),
        (dict(eta=float("nan")), ValueError, "eta must be a finite number"),
        (dict(n=0), ValueError, "n must be an int >= 1, got 0"),
        (dict(n=2.0), TypeError, "n must be an int >= 1, got float"),
        (dict(vinit=[None]), ValueError, "vinit must have"),
        (dict(update_at="x"), ValueError, "update_at must be"),
    ],
)
def test_bad_arguments(given: dict[str, Any], error: type[Exception], match: str) -> None:
    case = network("tanh", 0)
    arguments = {**case._asdict(), "ErrType": "Strict", **given}
    with pytest.raises(error, match=match):
        follow(**arguments)


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        (dict(model=nn.Sequential()), ValueError, "model must have at least one layer"),
        (dict(Xinit=torch.ones(2, 5).long()), TypeError, "Xinit must be a floating-point tensor"),
        (dict(precision=-1), ValueError, "precision of layer 1"),
        (dict(prior=3), TypeError, "prior must be a callable"),
        (dict(n=None), TypeError, "n must be an int >= 1"),
        (dict(eta=None), TypeError, "eta must be"),
    ],
)
def test_bad_arguments_of_follow_latent(
    given: dict[str, Any], error: type[Exception], match: str
) -> None:
    model, LossFun, X, Y = network("tanh", 0)
    arguments = dict(model=model, LossFun=LossFun, Y=Y, Xinit=X, eta=0.1, n=3)
    with pytest.raises(error, match=match):
        follow_latent(**{**arguments, **given})


class DistributedDataParallel(nn.Module):
    """What it is known by is its name."""

    def forward(self, *x: Any) -> Tensor:
        return x[0]


def test_modules_whose_gradients_others_take_care_of_are_refused() -> None:
    """In the model, in a loss and in a prior that are modules."""
    model, LossFun, X, Y = network("tanh", 0)
    wrapped = nn.Sequential(DistributedDataParallel())
    refused = pytest.raises(TypeError, match="wrapped in DistributedDataParallel")
    with refused:
        follow(nn.Sequential(*model, wrapped), LossFun, X, Y, "Strict")
    with refused:
        follow(model, wrapped, X, Y, "Strict")
    with refused:
        follow_latent(model, LossFun, Y, X, 0.1, 2, prior=wrapped)


def test_a_transform_is_refused() -> None:
    case = network("tanh", 0)

    def inside(x: Tensor) -> Tensor:
        return follow(case.model, case.LossFun, x, case.Y, "Strict").F[-1]

    with pytest.raises(RuntimeError, match="transform"):
        torch.func.grad(inside)(case.X)


# ---------------------------------------------------------------------------------- what it says


def test_the_advice_on_eta_makes_F_fall() -> None:
    for ErrType in STEPPING:
        run = follower(network("tanh", 1), ErrType)
        record = run(1.5 * run(0.05, 100).stable_eta, 30)
        (advised,) = [said.split("try eta = ")[1] for said in record.verdict if "try eta" in said]
        better = run(float(advised.rstrip(".")), 30)
        assert better.rises_at is None
        assert not any("try" in said for said in better.verdict)


def test_the_advice_on_n_and_eta_converges() -> None:
    case = network("tanh", 1)
    record = follow_case(case, "Strict", eta=0.03, n=60)
    (said,) = [said for said in record.verdict if said.startswith("Not converged")]
    n, eta = said.split("or n = ")[1].rstrip(".").split(" with eta = ")
    better = follow_case(case, "Strict", eta=float(eta), n=int(n))
    assert better.distance[-1] < 0.015
    assert int(n) < record.n_needed / 3


@pytest.mark.parametrize(
    ("n", "now", "is_proposed"),
    [(40, 60, True), (41, 60, False), (40, None, True), (None, 60, False)],
)
def test_another_eta_is_proposed_where_it_saves_a_third(
    n: int | None, now: int | None, is_proposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = follow_case(network("tanh", 1), "Strict", eta=0.03, n=9)
    monkeypatch.setattr(Record, "iterations_to", lambda *_: n)
    monkeypatch.setattr(Record, "n_needed", now)
    assert (record._better_eta() is not None) == is_proposed


def test_no_advice_that_the_record_does_not_support() -> None:
    case = network("linear", 0)
    settled = follow_case(case, "Strict", eta=0.1, n=200)
    assert settled.converged and settled.n_needed == settled.n_reached < 200
    assert settled.verdict[0].startswith("Converged")
    assert not any(word in str(settled) for word in ("try", "Not converged", "rises"))
    exact = follow_case(case, "Exact")
    assert exact.verdict == [
        "The errors are the gradients of the loss: there is nothing to choose."
    ]
    # A latent that stays where it is still has its prior.
    still = follower(case, "Latent")(0.0, 2)
    assert str(still).splitlines()[2].split()[:2] == ["0", "latent"]
    # Steps of nothing, or backwards, lead nowhere, so that no n is foretold.
    still = follow_case(case, "Strict", eta=0.0, n=5)
    assert still.n_needed is None and not still.moves.any()
    backwards = follow_case(case, "Strict", eta=-0.05, n=5)
    assert "below 0" in backwards.verdict[0] and backwards.rises_at is not None
    # Layers that nothing has reached are named.
    short = follow_case(case, "Strict", eta=0.1, n=2)
    assert "No error has reached layers 1 and 2: they do not learn." in short.verdict
    assert any("The update of layer 3 is less than half" in said for said in short.verdict)
    assert short.size[-1, 1] == short.size[-1, 2] == 0 < short.size[-1, 3]


@pytest.mark.parametrize("ErrType", ERR_TYPES)
def test_one_layer_has_no_steps(ErrType: str) -> None:
    X, Y = torch.ones(4, 5).double(), torch.zeros(4, 6).double()
    one = follow(nn.Sequential(nn.Linear(5, 6)).double(), squared_error, X, Y, ErrType, n=2)
    assert one.stable_eta is None and one.outlook is None and one.falls is None
    assert one.n == {"Exact": 1, "Equilibrium": 0}.get(ErrType, 2)
    assert one.resolved == [1, 1] and not one.distance.any()
    assert ("One layer has no beliefs" in one.verdict[0]) == (ErrType != "Exact")


def test_what_is_said_of_the_updates() -> None:
    case = network("tanh", 0)
    unreached = follow_case(case, "FixedPred", eta=1.0, n=3)
    assert "No error has reached layer 1: it does not learn." in unreached.verdict
    settled = follow_case(case, "Strict", n=200)
    cosine = settled.cosine[-1].tolist()
    assert max(cosine[1:]) < 0.9 and min(cosine[1:]) == cosine[4]
    (said,) = [said for said in settled.verdict if "another direction" in said]
    assert said == (
        "The update of layers 1 to 4 has another direction than backprop's, most of all at layer 4: "
        f"cosine {cosine[4]:.2g}."
    )
    # Errors of a loss that hardly counts are near the gradient at once.
    faint = case._replace(LossFun=lambda y, Y: 1e-3 * squared_error(y, Y))
    near = follow_case(faint, "ErrorBased", eta=0.9, n=1)
    least = min(near.cosine[-1].tolist()[1:])
    assert f"Updates are backprop's to within cosines of {least:.4g}." in near.verdict
    assert least > 0.999 and near.n == 1


def test_integer_inputs_and_sparse_gradients() -> None:
    embedding = nn.Embedding(9, 4, sparse=True)
    model = nn.Sequential(embedding, nn.Sequential(nn.Tanh(), nn.Linear(4, 3))).double()
    X, Y = torch.randint(9, (7,)), torch.randint(3, (7,))
    for ErrType in ERR_TYPES:
        record = follow(model, nn.CrossEntropyLoss(), X, Y, ErrType, n=3)
        PCInfer(model, nn.CrossEntropyLoss(), X, Y, ErrType, n=3)
        found = embedding.weight.grad.to_dense()
        PCInfer(model, nn.CrossEntropyLoss(), X, Y, "Exact")
        same(record.size[-1, 1], found.norm() / embedding.weight.grad.to_dense().norm(), 1e-8)


def test_what_is_not_finite_is_said() -> None:
    record = follow_case(network("linear", 0), "Strict", eta=50.0, n=120)
    assert not record.F[-1].isfinite()
    assert "above the largest stable" in record.verdict[0]
    assert record.stable_eta < 1 and record.n_needed is None
    assert str(record) and record._repr_html_()


def test_a_loss_that_starts_at_its_minimum() -> None:
    case = network("tanh", 0)
    still = case._replace(Y=case.model(case.X).detach())
    for ErrType in [*ERR_TYPES, "Latent"]:
        record = follow_all(still, ErrType, n=3)
        assert not record.distance.any() and not record.energies[:, 1:].any()
        assert str(record)
        record.plot(Figure()).draw_without_rendering()
    assert "image/png" in record._repr_html_()


def test_what_float32_would_leave_is_what_the_plain_iteration_loses() -> None:
    """Plain Strict in float32 against float64, layer by layer."""
    torch.manual_seed(0)
    items = [nn.Linear(8, 8), *[nn.Sequential(nn.Tanh(), nn.Linear(8, 8)) for _ in range(5)]]
    model = nn.Sequential(*items).double()
    case = Case(model, nn.MSELoss(), torch.randn(32, 8).double(), torch.randn(32, 8).double())
    record = follow_case(case, "Strict", n=12)
    single = Case(copy.deepcopy(model).float(), case.LossFun, case.X.float(), case.Y.float())
    precise, plain = reference.strict(*case, 0.1, 12), reference.strict(*single, 0.1, 12)
    lost = [
        ((b.double() - a).norm() / a.norm()).item()
        for a, b in zip(precise.epsilon[1:-1], plain.epsilon[1:-1], strict=True)
    ]
    foretold = [1 - share for share in record.resolved[1:-1]]
    assert lost[0] > 0.02 and lost[-1] < 1e-4
    for of_plain, of_record in zip(lost, foretold, strict=True):
        # One rounding, where the iteration makes many.
        assert of_record / 2 < of_plain < 30 * of_record or of_plain > 1


class Branching(nn.Linear):
    """Its operations depend on a value, so that its errors are differences."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() < 1e9 else x


def test_layers_whose_errors_float32_does_not_resolve_are_named() -> None:
    torch.manual_seed(0)
    middle = [Branching(8, 8) for _ in range(8)]
    model = nn.Sequential(nn.Linear(8, 8), *middle, nn.Linear(8, 8))
    X, Y = 30 * torch.randn(32, 8), torch.randn(32, 8)
    record = follow(model, lambda y, Y: 1e-3 * (y - Y).square().mean(), X, Y, "Strict", n=12)
    assert record.differences == list(range(2, 10))
    assert any("are computed as differences" in said for said in record.verdict)


def test_summary_dict_pickle_and_notebook(capsys: pytest.CaptureFixture[str]) -> None:
    record = follow_case(network("tanh", 0), "Strict", n=8)
    record.summary()
    assert capsys.readouterr().out == f"{record}\n"
    assert str(record).startswith("Strict, eta = 0.1, n = 8, 4 layers\nlayer")
    assert all(len(line) < 130 for line in str(record).splitlines())
    _, head, *rows = str(record).splitlines()
    assert head.split() == ["layer", "energy", "distance", "cosine", "size", "float32"]
    for name, values in (("distance", record.distances[-1]), ("cosine", record.cosine[-1])):
        end = head.index(name) + len(name)  # where the numbers below it end too
        for l in range(1, 4 if name == "distance" else 5):
            number = f"{values[l]:.1%}" if name == "distance" else f"{values[l]:.4f}"
            assert rows[l - 1][:end].endswith(f" {number}")
    assert {row.index("model[") for row in rows[:4]} == {len("layer  ")}
    assert "Record of Strict" in repr(record)
    numbers = record.to_dict()
    assert all(type(x) is float for x in numbers.values())
    assert numbers["F"] == record.F[-1] and numbers["cosine/2"] == record.cosine[-1, 2]
    assert numbers["energy/2"] == record.energies[-1, 2]
    assert numbers["distance/2"] == record.distances[-1, 2]
    assert numbers["prior"] == 0 and numbers["n"] == 8
    loaded = pickle.loads(pickle.dumps(record))
    assert str(loaded) == str(record) and loaded.to_dict() == numbers
    shown = record._repr_html_()
    assert shown.count("<tr>") == 5 and "data:image/png;base64," in shown


class Words(HTMLParser):
    """The words of a page, and its tags; an image's data are not read."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: object) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert tag in self.tags

    def handle_data(self, data: str) -> None:
        self.words += data.split()


@pytest.mark.parametrize(
    ("ErrType", "options"),
    [
        ("Strict", dict(eta=0.1, n=2)),
        ("Strict", dict(eta=torch2pc.steps.Descent(0.3, sweep="down"), n=3)),
        ("Equilibrium", dict(n=4)),
        ("Exact", {}),
    ],
    ids=str,
)
def test_a_notebook_shows_what_the_summary_says(ErrType: str, options: dict[str, Any]) -> None:
    record = follow_case(network("tanh", 0), ErrType, **options)
    record.verdict.append("1 < 2 & so on")
    shown = Words(record._repr_html_())
    assert shown.words == str(record).split()
    assert {*shown.tags} == {"p", "b", "table", "tr", "th", "td", "img"}
    given = str(options["eta"]) if ErrType == "Strict" else ""
    assert given in str(record).splitlines()[0]


def test_what_is_unknown_is_no_number_to_log() -> None:
    record = follow_case(network("tanh", 0), "Strict", eta=50.0, n=120)
    assert record.n_needed is None and not record.F[-1].isfinite()
    numbers = record.to_dict()
    assert "n_needed" not in numbers
    assert not any(math.isnan(x) for x in numbers.values())


@pytest.mark.parametrize(
    ("ErrType", "eta"),
    [("Exact", 0.1), ("FixedPred", 0.1), ("Strict", 50.0), ("Equilibrium", 0.1), ("Latent", 0.1)],
)
def test_plots(ErrType: str, eta: float) -> None:
    case = network("tanh", 0)
    record = (
        follower(case, "Latent")(eta, 9)
        if ErrType == "Latent"
        else (follow_case(case, ErrType, eta=eta, n=9))
    )
    figure = Figure()
    assert record.plot(figure) is figure
    figure.draw_without_rendering()
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert len(panels) == 6 and {axes.title.get_fontsize() for axes in panels} == {9}
    lines = {axes.get_title(): axes.get_lines() for axes in panels}
    drawn = lines["energy of each layer"]
    assert len(drawn) in (0, 3)
    for axes in panels:
        assert all(at == round(at) for at in axes.get_xticks())
        for image in axes.get_images():  # one cell for each iteration and layer
            iterations = record.n + 1
            assert image.get_array().shape == (3, iterations)
            assert tuple(image.get_extent()) == (-0.5, iterations - 0.5, 0.5, 3.5)
            assert all(at == round(at) for at in axes.get_yticks())
    shown = lines["size of the update / backprop's"]
    assert len(shown) == 1 + 4  # and the line at 1
    descends = ErrType not in ("Exact", "FixedPred")
    energies = [line.get_label() for line in lines["F, and the loss" if descends else "the loss"]]
    assert energies == ["F"] * descends + ["loss"] + ["prior"] * (ErrType == "Latent")


@pytest.mark.parametrize(
    ("eta", "scale"), [(0.1, "linear"), (1.5, "linear"), (2.0, "log"), (50.0, "log")]
)
def test_the_energy_is_drawn_to_its_logarithm_where_it_rises_a_hundredfold(
    eta: float, scale: str
) -> None:
    record = follow_case(network("tanh", 0), "Strict", eta=eta, n=4)
    assert (record.F.max() > 100 * record.F.min()) == (scale == "log")
    figure = Figure()
    record.plot(figure)
    (axes,) = [axes for axes in figure.axes if axes.get_title() == "F, and the loss"]
    assert axes.get_yscale() == scale


@pytest.mark.parametrize("L", [1, 2, 12, 13])
def test_a_plot_names_its_layers_where_there_are_several_but_not_too_many(L: int) -> None:
    model = nn.Sequential(*[nn.Linear(3, 3) for _ in range(L)])
    record = follow(model, nn.MSELoss(), torch.ones(2, 3), torch.zeros(2, 3), "FixedPred", n=2)
    figure = Figure()
    record.plot(figure)
    shown = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    assert shown == [str(l) for l in range(1, L + 1)] * (1 < L <= 12)


def test_what_is_out_of_reach_is_not_foretold() -> None:
    """Of a mode that does not shrink at all, and of one that does: .9^k = .01 at k = 43.7."""
    for least in (0, 1, 2, 5, 37):
        assert _first(lambda k, least=least: k >= least) == least
    stays, shrinks = (Spectrum(5, (2.0, 1.0), 1, (theta,), (1.0,)) for theta in (0.0, 1.0))
    assert stays.iterations_to(0.01, eta=0.1, now=0.1) is None
    assert shrinks.iterations_to(0.01, eta=0.1, now=0.1) == 6 + 44
    # What has been made counts by how far it has led: 6 steps of .1 are 2 of .3.
    assert shrinks.iterations_to(0.7, eta=0.3, now=0.1) == 2 + 1
    # What was tried is not foretold, unless it is left again.
    came = Spectrum(5, (1.0, 0.5, 0.009, 0.008), 2, (), ())
    assert came.iterations_to(0.01, eta=0.1, now=0.1) == 7
    left = Spectrum(5, (1.0, 0.5, 0.009, 0.02), 2, (), ())
    assert left.iterations_to(0.01, eta=0.1, now=0.1) is None
