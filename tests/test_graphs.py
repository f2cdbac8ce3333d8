"""Models whose layers are connected as a graph: every algorithm, and what a call promises."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests import reference
from tests.cases import (
    ERR_TYPES,
    Add,
    Attend,
    Case,
    Gate,
    Join,
    Readout,
    assert_close,
    cases,
    check_against_reference,
    graphs,
    random_beliefs,
    squared_error,
)
from torch2pc import PCGraph, PCInfer, PCInferLatent
from torch2pc.displacement.recorder import Displacement
from torch2pc.graph.layers import Network
from torch2pc.inference import RELAXATIONS
from torch2pc.inference.fixed_pred import by_lengths_of_paths
from torch2pc.inference.strict import strict

err_types = pytest.mark.parametrize("ErrType", ERR_TYPES)
iterations = st.integers(1, 8)


def updates_of(case: Case) -> dict[Tensor, Tensor]:
    return {p: p.grad for p in case.model.parameters() if p.grad is not None}


def residual(blocks: int = 2) -> Case:
    """A residual network with beliefs inside its blocks."""
    layers: dict[str, Any] = {"stem": (nn.Linear(5, 4), "x")}
    last = "stem"
    for b in range(blocks):
        layers[f"a{b}"] = nn.Sequential(nn.Tanh(), nn.Linear(4, 4)), last
        layers[f"b{b}"] = Join(4), f"a{b}", last
        last = f"b{b}"
    layers["out"] = nn.Linear(4, 3), last
    model = PCGraph(**layers).double()
    X, Y = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    return Case(model, squared_error, X, Y)


def attention() -> Case:
    """A transformer's block with beliefs at q, k, v, the attention's output and the hidden layer."""
    model = PCGraph(
        stem=(nn.Linear(5, 4), "x"),
        q=(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)), "stem"),
        k=(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)), "stem"),
        v=(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)), "stem"),
        heads=(Attend(), "q", "k", "v"),
        added=(Join(4), "heads", "stem"),
        hidden=(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 8), nn.GELU()), "added"),
        mlp=(nn.Linear(8, 4), "hidden"),
        block=(Add(), "mlp", "added"),
        out=(Readout(4, 3), "block"),
    ).double()
    X, Y = torch.randn(6, 3, 5, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    return Case(model, squared_error, X, Y)


def ladder() -> Case:
    """Branches of equal length between the input and the output, and a parameter in two of them."""
    tied = nn.Linear(4, 4)
    model = PCGraph(
        stem=(nn.Linear(5, 4), "x"),
        left=(nn.Sequential(nn.Tanh(), tied), "stem"),
        right=(nn.Linear(4, 4), "stem"),
        top=(Gate(), "left", "right"),
        last=(tied, "top"),
        out=(nn.Linear(4, 3), "last"),
    ).double()
    X, Y = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    return Case(model, squared_error, X, Y)


# The algorithms against their plain forms.


@given(case=graphs(random=True), dX=st.booleans())
def test_exact_is_backward_to_the_bit(case: Case, dX: bool) -> None:
    twin, X = copy.deepcopy(case.model), case.X.clone().requires_grad_(dX)
    case.X.requires_grad_(dX)
    torch.manual_seed(3)
    Loss = case.LossFun(twin(X), case.Y)
    Loss.backward()
    random = torch.get_rng_state()
    torch.manual_seed(3)
    result = case.infer("Exact")
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(result.Loss, Loss)
    expected = {name: p.grad for name, p in twin.named_parameters()}
    assert_close(case.gradients(), expected, tolerance=0)
    assert_close(case.model.state_dict(), twin.state_dict(), tolerance=0)
    if dX:
        assert_close(case.X.grad, X.grad, tolerance=0)


@given(case=graphs())
def test_exact_has_the_error_of_each_layer_alone(case: Case) -> None:
    """Also where a layer returns its input, which has other children."""
    expected, result = reference.exact(*case), case.infer("Exact")
    assert_close(result.epsilon[1:], expected.epsilon[1:])
    assert_close(result.v, expected.v)
    assert_close(updates_of(case), expected.updates)


@given(
    case=graphs(),
    eta=st.one_of(st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.floats(-0.5, 1.5)),
    n=iterations,
    dX=st.booleans(),
)
def test_fixed_pred_equals_the_iteration(case: Case, eta: float, n: int, dX: bool) -> None:
    expected = reference.fixed_pred(*case, eta, n)
    case.X.requires_grad_(dX)
    result = case.infer("FixedPred", eta=eta, n=n)
    assert_close(result.v, expected.v, 1e-10)
    assert_close(result.epsilon[1:], expected.epsilon[1:], 1e-10)
    assert_close(updates_of(case), expected.updates)
    assert torch.equal(result.epsilon[-1], result.dLdy)
    if dX:
        assert_close(result.epsilon[0], expected.epsilon[0], 1e-10)
        assert_close(case.X.grad, expected.epsilon[0], 1e-10)


def products(case: Case, n: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """How often FixedPred goes down through a layer to the beliefs below it."""
    from torch2pc.inference import fixed_pred

    found, of_layer = [], fixed_pred.gradient

    def counted(*arguments: Any, **options: Any) -> Any:
        found.append(options.get("keep_graph", False))
        return of_layer(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(fixed_pred, "gradient", counted)
        by_lengths_of_paths(Network(case.model, case.LossFun, case.X, case.Y), 0.1, n)
    return sum(found)


@pytest.mark.parametrize("n", [1, 2, 5, 30])
def test_fixed_pred_makes_no_more_products_than_iterating(
    n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for case in (residual(4), attention(), ladder()):
        inner = [parents for parents in case.model.parents if any(parents)]
        found = products(case, n, monkeypatch)
        assert found <= n * len(inner)
        if n == 30:
            # For each layer, one for each length of the ways down to it.
            lengths: list[set[int]] = [set() for _ in case.model.names]
            lengths[-1] = {0}
            for i, parents in reversed([*enumerate(case.model.parents, start=1)]):
                for p in parents:
                    lengths[p] |= {m + 1 for m in lengths[i]}
            expected = [
                len(lengths[i]) for i, parents in enumerate(case.model.parents, 1) if any(parents)
            ]
            assert found == sum(expected)
            assert (found == len(inner)) == (max(expected) == 1)


def test_fixed_pred_makes_one_pass_where_all_ways_are_as_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On chains and layered graphs, and where only the input is skipped to."""
    from torch2pc import pcinfer

    def refused(*_: Any) -> Any:
        raise AssertionError("the ways were told apart")

    monkeypatch.setattr(pcinfer, "by_lengths_of_paths", refused)
    skipped = PCGraph(
        a=(nn.Linear(5, 5), "x"), b=(nn.Tanh(), "a"), out=(nn.Bilinear(5, 5, 3), "b", "x")
    ).double()
    for case in (ladder(), ladder()._replace(model=skipped)):
        expected = reference.fixed_pred(*case, 0.1, 4)
        result = case.infer("FixedPred", n=4)
        assert_close(result.epsilon[1:], expected.epsilon[1:])
        assert_close(updates_of(case), expected.updates)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_divergent_eta_gives_infinities(dtype: torch.dtype) -> None:
    case = residual(4)
    model, X, Y = case.model.to(dtype), case.X.to(dtype), case.Y.to(dtype)
    for eta, n in [(3.0, 200), (-50.0, 400)]:
        result = PCInfer(model, squared_error, X, Y, "FixedPred", eta=eta, n=n)
        assert result.v[1].isfinite().all() != (dtype != torch.float64 or eta < 0)
        assert result.epsilon[-1].isfinite().all()


@pytest.mark.parametrize("ErrType", ["Strict", "ErrorBased"])
@given(
    case=graphs(),
    eta=st.floats(0, 0.3),
    n=iterations,
    vinit=st.booleans(),
    dX=st.booleans(),
    update_at=st.sampled_from(["v", "vhat", "before"]),
)
def test_relaxations_equal_the_iteration(
    ErrType: str, case: Case, eta: float, n: int, vinit: bool, dX: bool, update_at: str
) -> None:
    beliefs = random_beliefs(case) if vinit else None
    plain = {"Strict": reference.strict, "ErrorBased": reference.error_based}[ErrType]
    expected = plain(*case, eta, n, beliefs, update_at)
    case.X.requires_grad_(dX)
    result = case.infer(ErrType, eta=eta, n=n, vinit=beliefs, update_at=update_at)
    assert_close(result.v, expected.v)
    assert_close(result.epsilon[1:], expected.epsilon[1:])
    assert_close(updates_of(case), expected.updates)
    if dX:
        assert_close(result.epsilon[0], expected.epsilon[0])
        assert_close(case.X.grad, expected.epsilon[0])


@pytest.mark.parametrize("update_at", ["v", "vhat"])
@err_types
@given(case=graphs(random=True))
def test_a_layer_is_one_function_during_a_call(ErrType: str, update_at: str, case: Case) -> None:
    """Masks are drawn once, statistics move once, layers work in place on copies."""
    options = {} if ErrType in ("Exact", "FixedPred") else {"update_at": update_at}
    twin = copy.deepcopy(case.model)
    check_against_reference(case, ErrType, n=5, **options)
    torch.manual_seed(1)
    twin(case.X)
    random = torch.get_rng_state()
    torch.manual_seed(1)
    found = copy.deepcopy(case)
    found.model.load_state_dict(twin.state_dict())
    assert_close(case.model.state_dict(), twin.state_dict(), tolerance=1e-12)
    found.infer(ErrType, n=3)
    assert torch.equal(torch.get_rng_state(), random)


@err_types
@given(case=graphs(random=True, integers=True))
def test_integers_as_the_input(ErrType: str, case: Case) -> None:
    check_against_reference(case, ErrType, n=4)


@given(case=graphs(max_layers=4), n=iterations, has_prior=st.booleans())
def test_latents_equal_descent_by_autograd(case: Case, n: int, has_prior: bool) -> None:
    def prior(v: list[Tensor]) -> Tensor:
        return 0.1 * sum(((k + 1) * v_k.square().sum() for k, v_k in enumerate(v)), v[0].sum())

    pi = [0.5 + 0.3 * l for l in range(len(case.model) - 1)]
    given_prior = prior if has_prior else None
    expected = reference.latent(case.model, case.LossFun, case.Y, case.X, 0.05, n, pi, given_prior)
    result = PCInferLatent(
        *(case.model, case.LossFun, case.Y, case.X, 0.05, n), precision=pi, prior=given_prior
    )
    assert_close(result.v[:-1], expected)


def test_a_latent_that_a_layer_is_given_twice() -> None:
    model = PCGraph(a=(nn.Bilinear(5, 5, 4), "x", "x"), out=(nn.Linear(4, 3), "a")).double()
    case = residual()._replace(model=model)
    result = PCInferLatent(model, squared_error, case.Y, case.X, 0.05, 5)
    expected = reference.latent(model, squared_error, case.Y, case.X, 0.05, 5, [1.0])
    assert_close(result.v[:-1], expected)


@given(case=cases(max_layers=5), vinit=st.booleans(), n=iterations)
def test_a_chain_gives_what_the_sequential_gives_to_the_bit(
    case: Case, vinit: bool, n: int
) -> None:
    names = ["x", *(f"l{l}" for l in range(len(case.model)))]
    items = zip(names[1:], case.model, names[:-1], strict=True)
    graph = PCGraph(**{name: (item, parent) for name, item, parent in items})
    beliefs = random_beliefs(case) if vinit else None
    case.X.requires_grad_()
    for ErrType in ERR_TYPES:
        results = []
        for model in (case.model, graph):
            result = case._replace(model=model).infer(ErrType, n=n, vinit=beliefs)
            results.append([*result, [p.grad for p in model.parameters()], case.X.grad])
        assert_close(results[1], results[0], tolerance=0)


@given(case=graphs(), n=iterations)
def test_vinit_equal_to_vhat_is_the_default(case: Case, n: int) -> None:
    """So to skip the layers that no error has reached changes nothing."""
    expected = case.infer("Strict", n=n)
    found = case.infer("Strict", n=n, vinit=expected.vhat)
    assert_close(list(found), list(expected), tolerance=1e-12)


def test_layers_that_no_error_has_reached_are_not_evaluated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An error takes the shortest way: in step k it has come through k layers."""
    case, counts = residual(3), []
    case.infer("Strict")  # the first call holds the layers against their rules
    forward = Displacement.forward

    def counted(self: Displacement, *deltas: Tensor) -> Any:
        counts.append(self)
        return forward(self, *deltas)

    with monkeypatch.context() as patch:
        patch.setattr(Displacement, "forward", counted)
        case.infer("Strict", n=4)
    # out; then b2; then a2 and b1, whose beliefs b2 has moved; then a1 and b0.
    assert len(counts) == 1 + 2 + 4 + 6


@given(case=graphs())
def test_the_iterator_and_the_callback_follow_one_relaxation(case: Case) -> None:
    network = Network(case.model, case.LossFun, case.X, case.Y)
    seen: list[Any] = []
    case.infer("Strict", n=4, callback=lambda k, v, e: seen.append((v, copy.deepcopy(e))))
    with network.replaying():
        for (v, epsilon), (v_seen, e_seen) in zip(strict(network, 0.1), seen, strict=False):
            assert_close(v, v_seen, tolerance=0)
            assert_close(epsilon[1:], e_seen[1:], tolerance=0)


# Equilibrium.


@pytest.mark.parametrize("make", [residual, attention, ladder])
def test_equilibrium_is_where_another_minimiser_ends(make: Callable[[], Case]) -> None:
    case = make()
    expected, result = reference.equilibrium(*case), case.infer("Equilibrium", n=400)
    assert_close(result.v[1:-1], expected.v[1:-1], 1e-6)
    assert_close(result.epsilon[1:], expected.epsilon[1:], 1e-6)
    assert bool((result.distance < 1e-7).all())


@pytest.mark.parametrize("make", [residual, attention, ladder])
def test_examples_are_separate_problems_where_nothing_mixes_them(
    make: Callable[[], Case],
) -> None:
    case = make()
    whole = case.infer("Equilibrium", n=400)
    assert whole.distance.shape == (6,)
    for k in range(2):
        alone = case._replace(X=case.X[k : k + 1], Y=case.Y[k : k + 1])
        for found, of_all in zip(alone.infer("Equilibrium", n=400).v, whole.v, strict=True):
            assert_close(found, of_all[k : k + 1], 1e-6)


class AcrossExamples(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + torch.tanh(b.flip(0))


def test_a_side_way_that_mixes_examples_is_seen() -> None:
    model = PCGraph(
        a=(nn.Linear(5, 4), "x"),
        b=(nn.Tanh(), "a"),
        mixed=(AcrossExamples(), "b", "a"),
        out=(nn.Linear(4, 3), "mixed"),
    ).double()
    case = residual()._replace(model=model)
    result = case.infer("Equilibrium", n=100)
    assert result.distance.shape == (1,)
    assert_close(result.v[1:-1], reference.equilibrium(*case).v[1:-1], 1e-6)


# What a call promises.


@err_types
def test_results_are_memory_of_their_own(ErrType: str) -> None:
    case = attention()
    case.X.requires_grad_()
    result = case.infer(ErrType)
    lists = [result.vhat, result.v[1:], result.epsilon, [result.dLdy], [case.X.grad], [case.X]]
    lists.append([*updates_of(case).values()])
    storages = [{x.untyped_storage().data_ptr() for x in of_list} for of_list in lists]
    assert all(a.isdisjoint(b) for a, b in itertools.combinations(storages, 2))
    assert not any(x.requires_grad for x in [*result.vhat, *result.v, *result.epsilon])


class Faulty(nn.Module):
    """Raises an error from some evaluation on, after it has drawn and counted."""

    count: Tensor

    def __init__(self, last: int) -> None:
        super().__init__()
        self.last = last
        self.register_buffer("count", torch.zeros(()))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        self.count += 1
        if self.count > self.last:
            raise ArithmeticError("on purpose")
        return a + b * torch.rand(())


@err_types
def test_after_an_error_all_is_as_it_was(ErrType: str) -> None:
    model = PCGraph(
        a=(nn.Linear(5, 4), "x"),
        b=(nn.BatchNorm1d(4), "a"),
        join=(Faulty(0), "b", "a"),
        out=(nn.Linear(4, 3), "join"),
    ).double()
    case = residual()._replace(model=model)
    model.a.weight.grad = torch.ones_like(model.a.weight)
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with pytest.raises(ArithmeticError, match="on purpose"):
        case.infer(ErrType)
    assert_close(model.state_dict(), before, tolerance=0)
    assert torch.equal(torch.get_rng_state(), random)
    assert bool((model.a.weight.grad == 1).all()) and model.out.weight.grad is None


class Writes(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a.mul_(2) + b


@err_types
def test_a_layer_that_writes_into_an_input_unasked_is_named(ErrType: str) -> None:
    case = residual()
    case.model.b0 = Writes()
    with pytest.raises(RuntimeError, match=r"model\.b0 \(Writes\) wrote into its input"):
        case.infer(ErrType)


@err_types
def test_hooks_of_the_graph_fire_once(ErrType: str) -> None:
    case, seen = attention(), []
    expected = case.infer(ErrType, n=3)
    gradients = copy.deepcopy(case.gradients())
    case.model.register_forward_pre_hook(lambda module, x: seen.append((module, x[0].shape)))
    case.model.register_forward_hook(lambda module, x, y: seen.append((module, y.shape)))
    assert_close(list(case.infer(ErrType, n=3)), list(expected), tolerance=0)
    assert_close(case.gradients(), gradients, tolerance=0)
    assert seen == [(case.model, case.X.shape), (case.model, (6, 3))]


@err_types
def test_autocast(ErrType: str) -> None:
    case = attention()
    case = case._replace(model=case.model.float(), X=case.X.float(), Y=case.Y.float())
    plain = case.infer(ErrType, n=5)
    expected = copy.deepcopy(case.gradients())
    with torch.autocast("cpu", torch.bfloat16):
        result = case.infer(ErrType, n=5)
    assert {result.vhat[case.model.names.index("q")].dtype} == {torch.bfloat16}
    assert {x.dtype for x in [*result.v, *result.epsilon[1:]]} == {torch.float32}
    assert (result.v[1] - plain.v[1]).norm() < 0.05 * plain.v[1].norm()
    found, right = (
        torch.cat([g.flatten() for g in x.values()]) for x in (case.gradients(), expected)
    )
    assert (found - right).norm() < 0.05 * right.norm()


@err_types
def test_frozen_tied_and_unused_parameters(ErrType: str) -> None:
    case = ladder()
    case.model.right.requires_grad_(False)
    case.model.spare = nn.Linear(2, 2).double()
    case.model.spare.weight.grad = torch.ones(2, 2).double()
    case.model.right.weight.grad = torch.ones(4, 4).double()
    check_against_reference(case, ErrType, n=6)
    assert case.model.spare.weight.grad is None and case.model.right.weight.grad is None


def test_accumulates_and_works_without_gradients() -> None:
    case = attention()
    for ErrType in ERR_TYPES:
        case.infer(ErrType, n=3)
        once = copy.deepcopy(case.gradients())
        with torch.no_grad():
            case.infer(ErrType, n=3, accumulate=True)
        assert_close(case.gradients(), {k: 2 * g for k, g in once.items()}, 1e-12)


@pytest.mark.parametrize("ErrType", ["Strict", "ErrorBased"])
@pytest.mark.parametrize("make", [residual, attention, ladder])
def test_a_step_size_that_is_found(ErrType: str, make: Callable[[], Case]) -> None:
    """F ends no higher than it was, and the result is that of the number that was found."""
    case = make()
    network = Network(case.model, case.LossFun, case.X, case.Y)
    relaxation = RELAXATIONS[ErrType](network, "auto")
    with network.replaying():
        before = relaxation.energy.terms().sum()
        relaxation.run(20)
        assert relaxation.energy.terms().sum() <= before
    found, expected = (case.infer(ErrType, eta=eta, n=20) for eta in ("auto", relaxation.rule.eta))
    assert_close(list(found), list(expected), tolerance=0)
