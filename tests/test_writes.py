"""How traced graphs are compiled: writes into memory that a graph has made itself; garbage meanwhile."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from tests.cases import run_as_traced

graphs = pytest.importorskip("torch2pc.compiled.graphs", reason="no compiler")
rewrites = pytest.importorskip("torch2pc.compiled.rewrites", reason="no compiler")

Results = Sequence[Tensor]


def into_a_clone(a: Tensor, b: Tensor) -> Results:
    x = a.clone()
    before = x * 3
    x.add_(b, alpha=2).mul_(b)
    return [before, x, x + 1]


def with_a_view_before(a: Tensor, b: Tensor) -> Results:
    x = a + b
    y = x.t() @ b
    x.neg_()
    return [x.t() @ y]


def into_a_view(a: Tensor, b: Tensor) -> Results:
    x = (a @ b).t()
    return [x.mul_(b), b]


def one_of_several(a: Tensor, b: Tensor) -> Results:
    mantissa, exponent = torch.frexp(a)
    return [mantissa.mul_(b), exponent + 1]


def by_name(a: Tensor, b: Tensor) -> Results:
    x, y = a.clone(), torch.empty_like(a)
    torch.sub(b, x, alpha=3, out=y)
    torch.ops.aten.threshold_backward.grad_input(y, a, 0, grad_input=x)
    return [x, y]


def taken_apart(a: Tensor, b: Tensor) -> Results:
    x, y, z = a.clone(), a * 2, a * 2
    x.lerp_(b, 0.25).lerp_(a, b)
    torch.clamp(b, 0.1, 0.5, out=y)
    return [x, y, z.clamp_(-0.1, 0.5)]


def in_places(a: Tensor, b: Tensor) -> Results:
    return [a.clone().index_put_([torch.tensor([0, 2])], b[:2]), a.clone().copy_(b[0])]


def of_another_type(a: Tensor, b: Tensor) -> Results:
    return [a.clone().add_(b.double())]


def with_a_view_after(a: Tensor, b: Tensor) -> Results:
    x = a.clone()
    y = x[0]
    return [x.add_(b), y * 2]


def through_a_view(a: Tensor, b: Tensor) -> Results:
    x = a.clone()
    x[0].add_(b[0])
    return [x]


def through_one_of_two(a: Tensor, b: Tensor) -> Results:
    x = a.clone()
    first, second = x.split(2)
    first.add_(b[:2])
    return [x, second]


def through_what_was_seen_twice(a: Tensor, b: Tensor) -> Results:
    x = a.clone()
    y, z = x.t(), x[1]
    y[0].add_(b[0])
    return [z + 1]


def into_what_is_given(a: Tensor, b: Tensor) -> Results:
    return [a.add_(b), b + 1]


def into_a_view_of_it(a: Tensor, b: Tensor) -> Results:
    a[0].add_(b[0])
    return [b + 1]


def into_two(a: Tensor, b: Tensor) -> Results:
    x, y = a.clone(), torch.zeros(3, 3, dtype=torch.int32)
    torch.frexp(b, out=(x, y))
    return [x, y]


def by_a_size(a: Tensor, b: Tensor) -> Results:
    return [a.clone().add_(b, alpha=a.shape[0])]


ALL = [
    into_a_clone,
    with_a_view_before,
    into_a_view,
    one_of_several,
    by_name,
    taken_apart,
    in_places,
]
LEFT = [
    *[of_another_type, with_a_view_after, through_a_view, through_one_of_two],
    *[through_what_was_seen_twice, into_what_is_given, into_a_view_of_it, into_two, by_a_size],
]


@pytest.mark.parametrize("function", [*ALL, *LEFT], ids=lambda f: f.__name__)
def test_without_writes_a_graph_computes_the_same(function: Callable[..., Results]) -> None:
    torch.manual_seed(0)
    given = [torch.randn(3, 3), torch.randn(3, 3)]

    def fresh() -> list[Tensor]:
        return [x.clone() for x in given]

    graph = make_fx(function, tracing_mode="symbolic" if function is by_a_size else "fake")(
        *fresh()
    )
    assert writes_in(graph)
    with rewrites.inputs_of(graph)[0].meta["val"].fake_mode:
        is_all = rewrites.without_writes(graph.graph)
    assert is_all == (function in ALL) == (not writes_in(graph))
    graph.recompile()
    found_given, expected_given = fresh(), fresh()
    found, expected = graph(*found_given), function(*expected_given)
    torch.testing.assert_close([*found, *found_given], [*expected, *expected_given])


def zeros_filled_in_part(a: Tensor, b: Tensor) -> Results:
    x = torch.zeros_like(a)
    x[:, :2] = b[:, 1:]
    return [x @ b, x.t() @ a]


def zeros_filled_and_emptied(a: Tensor, b: Tensor) -> Results:
    x = torch.zeros_like(a)
    x.t().copy_(b)
    return [x.zero_() + b, x @ b]


def zeros_that_stay(a: Tensor, b: Tensor) -> Results:
    x, y = torch.empty_like(a).zero_(), torch.ones_like(a)
    return [x @ b, a @ y.zero_(), a @ b]


@pytest.mark.parametrize(
    "function",
    [zeros_filled_in_part, zeros_filled_and_emptied, zeros_that_stay],
    ids=lambda f: f.__name__,
)
def test_what_begins_as_zeros_may_be_filled(
    function: Callable[..., Results], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_as_traced(monkeypatch)
    torch.manual_seed(0)
    given = [torch.randn(3, 3), torch.randn(3, 3)]
    with FakeTensorMode() as mode:
        like = [mode.from_tensor(x) for x in given]
        graph = graphs.traced(function, like, {})
        run = graphs.compiled(graph, like, {}, torch.device("cpu"))
    torch.testing.assert_close(run(given), function(*given))


def writes_in(graph: fx.GraphModule) -> list[Any]:
    called = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    return [f for f in called if isinstance(f, torch._ops.OpOverload) and f._schema.is_mutable]


@pytest.mark.parametrize("is_frozen", [False, True])
def test_what_was_there_is_collected_again_after_a_compilation(is_frozen: bool) -> None:
    gc.collect()
    if is_frozen:
        gc.freeze()
    before = gc.get_freeze_count()
    try:
        with pytest.raises(KeyError), graphs.collected_apart():
            assert gc.get_freeze_count() > 0
            raise KeyError
        assert gc.get_freeze_count() == before
    finally:
        gc.unfreeze()
    assert (before > 0) == is_frozen
