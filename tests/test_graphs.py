"""Models whose layers are connected as a graph: every algorithm, and what a call promises."""

from __future__ import annotations

import copy
import inspect
import itertools
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from torch import Tensor, nn

from benchmarks import graphs as bench
from benchmarks.memory import peak_memory
from benchmarks.nets import make_case
from tests import reference
from tests.cases import (
    ERR_TYPES,
    ITERATIONS,
    Add,
    Attend,
    Case,
    Gate,
    Join,
    Readout,
    assert_close,
    calls_of,
    cases,
    check_against_reference,
    graphs,
    random_beliefs,
    squared_error,
)
from tests.test_compiled import infer_compiled
from torch2pc import PCGraph, PCInfer, PCInferLatent, follow, steps
from torch2pc.displacement.lines import Displacement
from torch2pc.graph.network import Network
from torch2pc.inference import RELAXATIONS
from torch2pc.inference.fixed_pred import by_lengths_of_paths
from torch2pc.inference.strict import strict

err_types = pytest.mark.parametrize("ErrType", ERR_TYPES)
iterations = st.integers(1, 8)
places = st.sampled_from(["v", "vhat"])


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


@pytest.mark.parametrize("ErrType", ITERATIONS)
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
    expected = ITERATIONS[ErrType](*case, eta, n, beliefs, update_at)
    case.X.requires_grad_(dX)
    result = case.infer(ErrType, eta=eta, n=n, vinit=beliefs, update_at=update_at)
    assert_close(result.v, expected.v)
    assert_close(result.epsilon[1:], expected.epsilon[1:])
    assert_close(updates_of(case), expected.updates)
    if dX:
        assert_close(result.epsilon[0], expected.epsilon[0])
        assert_close(case.X.grad, expected.epsilon[0])


@err_types
@given(case=graphs(random=True), update_at=places)
def test_a_layer_is_one_function_during_a_call(ErrType: str, case: Case, update_at: str) -> None:
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
    case = residual(3)
    case.infer("Strict")  # the first call holds the layers against their rules
    evaluated = calls_of(Displacement, "forward", monkeypatch)
    case.infer("Strict", n=4)
    # out; then b2; then a2 and b1, whose beliefs b2 has moved; then a1 and b0.
    assert len(evaluated) == 1 + 2 + 4 + 6


@given(case=graphs())
def test_the_iterator_and_the_callback_follow_one_relaxation(case: Case) -> None:
    network = Network(case.model, case.LossFun, case.X, case.Y)
    seen: list[Any] = []
    case.infer("Strict", n=4, callback=lambda k, v, e: seen.append((v, copy.deepcopy(e))))
    with network.replaying():
        for (v, epsilon), (v_seen, e_seen) in zip(strict(network, 0.1), seen, strict=False):
            assert_close(v, v_seen, tolerance=0)
            assert_close(epsilon[1:], e_seen[1:], tolerance=0)


@pytest.mark.parametrize("ErrType", ["Strict", "ErrorBased"])
@given(case=graphs(random=True), update_at=places)
def test_differences_equal_the_iteration_too(ErrType: str, case: Case, update_at: str) -> None:
    check_against_reference(case, ErrType, n=5, update_at=update_at, precise=False)


def test_differences_are_made_by_no_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """And lose in float32 what the rules keep."""
    case = residual(4)
    right = case.infer("Strict", n=6)
    case = case._replace(model=case.model.float(), X=case.X.float(), Y=case.Y.float())

    def off(result: Any) -> float:
        pairs = [(result.epsilon[l], right.epsilon[l]) for l in range(4, 9)]
        return max(float((found - e).norm() / e.norm()) for found, e in pairs)

    by_rules = off(case.infer("Strict", n=6))

    def refused(*_: Any) -> Any:
        raise AssertionError("a rule was used")

    monkeypatch.setattr(Displacement, "forward", refused)
    assert by_rules < 1e-5
    assert off(case.infer("Strict", n=6, precise=False)) > 10 * by_rules
    with pytest.raises(TypeError, match="precise must be True or False, got int"):
        case.infer("Strict", precise=0)
    with pytest.raises(ValueError, match="precise must be True with compile=True"):
        case.infer("Strict", precise=False, compile=True)


def test_a_belief_of_many_children_does_not_hold_as_many_gradients() -> None:
    """A step of a densely connected graph needs no more memory than a plain one by autograd."""
    build = partial(bench.dense, 64, 16)
    case = make_case("dense", "graph", build, (64, 64), torch.device("cpu"))  # type: ignore[arg-type]
    mine, plain = (
        peak_memory(bench.ten(step(case)), torch.device("cpu"))
        for step in (bench.library, bench.plain)
    )
    assert mine < 1.2 * plain


def test_a_plain_step_is_a_step_of_strict() -> None:
    """What a step's time is measured against."""
    for name, (build, shape, _) in bench.GRAPHS.items():
        case = make_case(name, "graph", build, (2, *shape[1:]), torch.device("cpu"))  # type: ignore[arg-type]
        case.model.double()
        case = replace(case, X=case.X.double())
        expected = PCInfer(case.model, case.LossFun, case.X, case.Y, "Strict", eta=bench.ETA, n=3).v
        step = bench.plain(case)
        for _ in range(3):
            step()
        beliefs = inspect.getclosurevars(step).nonlocals["v"]
        assert_close([v.detach() for v in beliefs[1:]], expected[1:-1])


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
    # After so few evaluations Equilibrium is still on its way, which round-off turns.
    assert (found - right).norm() < (0.1 if ErrType == "Equilibrium" else 0.05) * right.norm()


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


# Compiled calls.


@pytest.mark.usefixtures("traced")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "error:compile=True")
@pytest.mark.parametrize("ErrType", ["Strict", "ErrorBased"])
def test_compiled_relaxations_equal_plain_ones(ErrType: str) -> None:
    """Whatever n is: from the feed-forward pass, a step moves what the errors have reached by then."""
    case = residual(1)
    settings: list[dict[str, Any]] = [dict(n=n) for n in (1, 2, 3, 4, 9)]
    settings += [dict(n=4, vinit=random_beliefs(case)), dict(n=5, eta=steps.Momentum(0.1, 0.9))]
    for options in settings:
        plain = case.infer(ErrType, **options)
        gradients = case.gradients()
        found = infer_compiled(case, options["n"] not in (1, 5), ErrType, **options)
        assert_close(list(found), list(plain))
        assert_close(case.gradients(), gradients)


# follow.


def of_layer(case: Case, name: str, updates: dict[Tensor, Tensor]) -> Tensor:
    """The updates of a layer's parameters, as one vector."""
    found = [updates[p].flatten() for p in case.model.get_submodule(name).parameters()]
    return torch.cat(found) if found else torch.zeros(0)


@err_types
@pytest.mark.parametrize("make", [residual, attention, ladder])
def test_follow_has_the_iterations_of_the_call(ErrType: str, make: Callable[[], Case]) -> None:
    case = make()
    case.infer("Exact")
    exact = updates_of(case)
    record = follow(*case, ErrType, eta=0.2, n=5)
    assert record.names == case.model.names
    before = None
    for k in range(1, record.n + 1):
        result, updates = case.infer(ErrType, eta=0.2, n=k), updates_of(case)
        for l, name in enumerate(case.model.names[1:], start=1):
            update, right = of_layer(case, name, updates), of_layer(case, name, exact)
            if len(update):
                close = partial(pytest.approx, rel=1e-6, abs=1e-6)
                assert record.size[k, l] == close(float(update.norm() / right.norm()))
                if update.norm() > 1e-12 * right.norm():  # a tied one's may be round-off
                    assert record.cosine[k, l] == close(
                        float(update @ right / (update.norm() * right.norm()))
                    )
            if ErrType in ("Strict", "FixedPred") and l < record.L:
                moved = result.v[l] - (result.vhat if before is None else before.v)[l]
                assert record.moves[k, l] == pytest.approx(moved.norm().item(), rel=1e-6, abs=1e-12)
        before = result


@pytest.mark.parametrize("make", [residual, ladder])
def test_follow_foretells_fixed_pred(make: Callable[[], Case]) -> None:
    """Its distance is that of the iteration, and is 1 % from the n on that it says."""
    case = make()
    record = follow(*case, "FixedPred", eta=0.3, n=4)
    for k in range(4):
        epsilon = reference.fixed_pred(*case, 0.3, k + 1).epsilon
        above = reference.arriving(case.model, reference.feed_forward(case.model, case.X), epsilon)
        parts = [(epsilon[l], above[l]) for l in range(1, record.L)]
        off = sum((e - a).square().sum() for e, a in parts).sqrt()
        sizes = [
            sum(x.square().sum() for x in of_all).sqrt() for of_all in zip(*parts, strict=True)
        ]
        assert record.distance[k] == pytest.approx((off / max(sizes)).item(), rel=1e-9)
    needed = record.n_needed
    assert needed is not None and needed > 4
    longer = follow(*case, "FixedPred", eta=0.3, n=needed)
    assert longer.distance[-1] <= 0.01 < longer.distance[-2]


# Pictures.


def test_a_graph_shows_itself_with_arrows_around_what_lies_between() -> None:
    """Each box and each arrow is there once, inside of the picture, and no skip crosses a box."""
    model = attention().model
    picture = ElementTree.fromstring(model._repr_svg_())
    width, height = float(picture.get("width", 0)), float(picture.get("height", 0))
    tag = "{http://www.w3.org/2000/svg}"
    boxes = {
        text.text: [float(rect.get(key, 0)) for key in ("x", "y", "width", "height")]
        for rect, text in zip(picture.iter(f"{tag}rect"), picture.iter(f"{tag}text"), strict=True)
    }
    assert list(boxes) == model.names
    texts = [float(text.get("x", 0)) for text in picture.iter(f"{tag}text")]
    for (x, y, w, h), middle in zip(boxes.values(), texts, strict=True):
        assert min(x, y) >= 0 and x + w <= width and y + h <= height
        assert (w, h, middle) == (96, 28, x + 48)
    # Those of a level are side by side, and levels above one another.
    assert boxes["k"][0] - boxes["q"][0] == boxes["v"][0] - boxes["k"][0] == 110
    assert boxes["x"][:2] == [boxes["k"][0], boxes["stem"][1] + 60]
    assert boxes["q"][:2] == [7, boxes["stem"][1] - 60] and boxes["q"][1] == boxes["v"][1]
    assert height == 60 * 9 and boxes["x"][1] == height - 30 - 14
    arrows = [path for path in picture.iter(f"{tag}path") if path.get("marker-end")]
    pairs = [(p, l) for l, ps in enumerate(model.parents, start=1) for p in ps]
    for path, (p, l) in zip(arrows, pairs, strict=True):
        numbers = [float(x) for x in re.findall(r"-?\d+", path.get("d", ""))]
        ends = torch.tensor(numbers).reshape(4, 2)
        t = torch.linspace(0, 1, 101)[:, None]
        curve = sum(
            c * t**k * (1 - t) ** (3 - k) * ends[k] for k, c in enumerate((1.0, 3.0, 3.0, 1.0))
        )
        assert bool((curve >= 0).all() and (curve[:, 0] <= width).all())
        below, above = boxes[model.names[p]], boxes[model.names[l]]
        assert curve[0, 1] == below[1] and curve[-1, 1] == above[1] + above[3] + 1
        assert (curve[0, 0], curve[-1, 0]) == (below[0] + 48, above[0] + 48)
        if (model.names[p], model.names[l]) == ("stem", "added"):  # past q, k, v and heads
            edge = boxes["v"][0] + boxes["v"][2] + 6 * 4
            assert abs(curve[50, 0] - edge) < 1 and width == edge + 8
        elif len(model.parents[l - 1]) == 1 and below[0] == above[0]:
            assert (curve[:, 0] - curve[0, 0]).abs().max() < 0.01
        # Evenly upwards.
        assert abs(curve[50, 1] - (curve[0, 1] + curve[-1, 1]) / 2) < 1


def test_a_picture_without_skips_is_as_wide_as_its_boxes() -> None:
    model = PCGraph(a=(nn.Linear(2, 2), "x"), thirteen_long=(nn.Linear(2, 2), "a"))
    picture = model._repr_svg_()
    assert 'width="110" height="180"' in picture and "textLength" not in picture
    model = PCGraph(fourteen_long_=(nn.Linear(2, 2), "x"))
    assert 'textLength="88"' in model._repr_svg_()


def test_second_predictions_are_dashed_arrows_beside_the_others() -> None:
    """From the edge of the parent's box to that of the belief's, whichever is above."""
    above = {"x": (nn.Linear(2, 2), "a"), "b": (nn.Linear(2, 2), "x")}
    model = PCGraph(
        a=(nn.Linear(2, 2), "x"), b=(nn.Linear(2, 2), "a"), c=(nn.Linear(2, 2), "b"), above=above
    )
    dashed = re.findall(r'd="(M\S+ L\S+)"[^>]*dasharray', model._repr_svg_())
    assert dashed == ["M71,164 L71,196", "M71,196 L71,104"]


def test_names_are_escaped_in_the_picture() -> None:
    model = PCGraph(**{"<a>": (nn.Linear(2, 2), "x")})
    assert "&lt;a&gt;" in model._repr_svg_() and "<a>" not in model._repr_svg_()


def test_a_record_draws_the_graph() -> None:
    case = attention()
    figure = follow(*case, "ErrorBased", n=3).plot(Figure(figsize=(10, 5.6), layout="constrained"))
    first = figure.axes[0]
    assert [text.get_text() for text in first.texts if text.get_text()] == case.model.names
    arrows = [text for text in first.texts if not text.get_text()]
    assert len(arrows) == sum(map(len, case.model.parents))
    colours = {
        t.get_text(): t.get_bbox_patch().get_facecolor() for t in first.texts if t.get_text()
    }
    assert colours["x"] == colours["out"] != colours["block"] != colours["stem"]
    (legend,) = figure.legends
    # Those that have parameters have updates.
    assert [text.get_text() for text in legend.get_texts()] == [
        *("stem", "q", "k", "v", "added", "hidden", "mlp", "out")
    ]
    figure.draw_without_rendering()


# Graphs themselves, and what is none.


def test_a_graph_says_what_it_is() -> None:
    model = residual().model
    assert model.names == ["x", "stem", "a0", "b0", "a1", "b1", "out"]
    assert model.parents == [(0,), (1,), (2, 1), (3,), (4, 3), (5,)]
    assert len(model) == 6
    assert model.extra_repr().splitlines() == [
        *("stem <- x", "a0 <- stem", "b0 <- a0, stem", "a1 <- b0", "b1 <- a1, b0", "out <- b1")
    ]
    X = torch.randn(2, 5, dtype=torch.float64)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(X), model(X)) and twin.names == model.names
        twin.load_state_dict(model.state_dict())


def test_a_layer_without_a_signature_is_taken_at_its_word() -> None:
    class Builtin(nn.Module):
        forward = staticmethod(torch.sub)

    model = PCGraph(a=(nn.Linear(2, 2), "x"), out=(Builtin(), "x", "a"))
    X = torch.randn(3, 2)
    assert torch.equal(model(X), X - model.a(X))


def test_its_forward_hands_copies_to_layers_that_work_in_place() -> None:
    model = PCGraph(
        a=(nn.ReLU(inplace=True), "x"), b=(nn.ReLU(inplace=True), "a"), out=(Add(), "a", "b", "x")
    )
    X = torch.tensor([[-1.0, 2.0]])
    assert torch.equal(model(X), torch.tensor([[-1.0, 6.0]]))
    assert torch.equal(X, torch.tensor([[-1.0, 2.0]]))


linear = nn.Linear(2, 2)
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no layers": ({}, ValueError, r"at least one layer, as name=\(module, \*parents\)"),
    "no pair": ({"a": linear}, TypeError, r"layer 'a' must be \(module, .*got Linear"),
    "no parents": ({"a": (linear,)}, TypeError, r"layer 'a' must be \(module, \*names"),
    "no module": ({"a": ("x", linear)}, TypeError, "layer 'a' must be .*got str"),
    "a function": ({"a": (torch.tanh, "x")}, TypeError, "layer 'a' must be .*got builtin"),
    "a place": ({"a": (linear, 0)}, TypeError, r"layer 'a' must be .*got Linear and \[0\]"),
    "itself": ({"a": (Add(), "x", "a")}, ValueError, "'a' must come after .*'a' is itself.*circle"),
    "a circle": (
        {"a": (Add(), "x", "b"), "b": (linear, "a")},
        ValueError,
        "'a' must come after its parents, but 'b' comes later: the graph must have no circle",
    ),
    "unknown": (
        {"a": (linear, "y")},
        ValueError,
        r"'a' has an unknown parent 'y'; there are \['x'\]",
    ),
    "two outputs": (
        {"a": (linear, "x"), "b": (linear, "x"), "c": (linear, "a")},
        ValueError,
        "each place but the last must be a parent .*no layer takes 'b'",
    ),
    "the input's name": ({"x": (linear, "x")}, ValueError, "name 'x' of a layer is taken"),
    "a method's name": (
        {"forward": (linear, "x")},
        ValueError,
        "name 'forward' of a layer is taken",
    ),
    "an attribute's": (
        {"parents": (linear, "x")},
        ValueError,
        "name 'parents' of a layer is taken",
    ),
    "a dot": ({"a.b": (linear, "x")}, ValueError, r"name 'a\.b' of a layer must .* dot"),
    "empty": ({"": (linear, "x")}, ValueError, "name '' of a layer must not be empty"),
    "too many": (
        {"a": (linear, "x"), "b": (linear, "a", "x")},
        TypeError,
        r"'b' must take as many inputs as it has parents \(2: a, x\), but Linear",
    ),
    "too few": (
        {"a": (nn.Bilinear(2, 2, 2), "x")},
        TypeError,
        r"'a' must take .* \(1: x\), but Bilin",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_graph_is_named(name: str) -> None:
    layers, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        PCGraph(**layers)


def test_what_is_found_in_a_call_is_named() -> None:
    case = residual()
    with pytest.raises(ValueError, match=r"vinit must have len\(model\) \+ 1 = 7 entries"):
        case.infer("Strict", vinit=[None] * 6)
    vinit = case.infer("Exact").v
    vinit[3] = vinit[3][:, :2]
    with pytest.raises(ValueError, match=r"vinit\[3\] must be a tensor of shape \(6, 4\)"):
        case.infer("Strict", vinit=vinit)
    with pytest.raises(ValueError, match=r"precision must have len\(model\) - 1 = 5 entries"):
        PCInferLatent(case.model, squared_error, case.Y, case.X, 0.1, 2, precision=[1.0])

    class Pair(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Any:
            return a, b

    case.model.b1 = Pair()
    for ErrType in ERR_TYPES:
        with pytest.raises(TypeError, match=r"model\.b1 \(Pair\) must return one floating-point"):
            case.infer(ErrType)
    for name in case.model.names[1:]:
        model = copy.deepcopy(case.model)
        delattr(model, name)
        with pytest.raises(ValueError, match=f"layer '{name}' of a PCGraph must not be taken away"):
            case._replace(model=model).infer("Exact")

    class Own(PCGraph):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    with pytest.raises(TypeError, match="model must use PCGraph's forward, got Own"):
        PCInfer(Own(a=(nn.Linear(5, 3), "x")).double(), *case[1:], "Exact")


@pytest.mark.filterwarnings("error:The error hardly reaches")
def test_a_short_inference_is_one_whose_ways_are_long() -> None:
    """An error takes the shortest way: through the skips of 5 blocks it comes, but not into them."""
    residual(12).infer("FixedPred", eta=0.5, n=20)
    case = residual(5)
    case.model.b0.requires_grad_(False)
    which = r"3 layers of 12 \(model\.stem, model\.a0, model\.a1\)"
    with pytest.warns(UserWarning, match=f"hardly reaches {which}.* n=13 would bring half"):
        case.infer("Strict", eta=0.5, n=5)
