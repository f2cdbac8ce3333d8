"""A traced graph: what is taken away and rewritten in it, and how it is compiled and called.

What a graph computes is of no concern here. This file alone uses what PyTorch's compiler has for itself
(``realize``, and the graph without its wrapper). To import it takes a second, as it imports the compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.test_operators import realize as _realize  # noqa: F401  (it defines the operator)

from torch2pc.displacement.rules import aten
from torch2pc.graph.autograd import outside_autocast


class Graphed(NamedTuple):
    """A compiled graph, and which of the tensors that it may be given it takes."""

    function: Callable[[list[Any]], Any]
    used: list[int]

    def __call__(self, given: Sequence[Any]) -> Any:
        return self.function([given[k] for k in self.used])


def compiled(
    graph: fx.GraphModule, given: Sequence[Any], options: dict[str, Any], device: torch.device
) -> Graphed:
    """``graph``, which was traced with what is ``given``, compiled."""
    clean(graph)
    # Numbers are kept: sizes are expressed by them.
    unused = [
        k
        for k, node in enumerate(inputs_of(graph))
        if not node.users and isinstance(given[k], Tensor)
    ]
    for node in [inputs_of(graph)[k] for k in unused]:
        graph.graph.erase_node(node)
    used = [k for k in range(len(given)) if k not in unused]
    _hold_units(graph.graph)
    sum_small_products(graph.graph)
    graph.recompile()
    called = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    if _CREATES.issuperset(called):
        # (Not by way of ``graph`` itself, which looks for hooks whenever it is called.)
        return Graphed(partial(_unpacked, fx.GraphModule({}, graph.graph).forward), used)
    # What was traced has chosen its types, and would be given others when it is traced again.
    with outside_autocast(device):
        return Graphed(compiled_graph(graph, [given[k] for k in used], options), used)


def compiled_graph(
    graph: fx.GraphModule, given: Sequence[Any], options: dict[str, Any]
) -> Callable[[list[Any]], Any]:
    """``graph``, compiled, as a function of the list of what it is given.

    What PyTorch wraps around each compiled graph, for autograd's sake and to make views of inputs again,
    takes as long as a small product of matrices. On a CPU it is left out where the graph inside has the
    same inputs and results, and writes into none of what it is given, which would have to be counted.
    """
    inside: list[Any] = []

    def compile_inner(inner: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        is_same = _shape_of(inner) == _shape_of(graph) and _is_plain(inner)
        found = compile_fx_inner(inner, *args, **kwargs)
        inside.append(found if is_same else None)
        return found

    whole: Any = compile_fx(graph, given, compile_inner, config_patches=dict(options))
    is_cpu = all([x.device.type == "cpu" for x in given if isinstance(x, Tensor)])
    if is_cpu and len(inside) == 1 and inside[0] is not None:
        return inside[0].current_callable
    return partial(_unpacked, whole)


def _unpacked(function: Callable[..., Any], given: list[Any]) -> Any:
    return function(*given)


def _shape_of(graph: fx.GraphModule) -> tuple[int, int]:
    """How many inputs a graph has, and how many results."""
    return len(inputs_of(graph)), len(_results_of(graph))


def _results_of(graph: fx.GraphModule) -> Sequence[Any]:
    (results,) = list(graph.graph.nodes)[-1].args
    return results


def _is_plain(graph: fx.GraphModule) -> bool:
    """Whether all results are tensors that it computes, each once, and nothing is written into."""
    results = _results_of(graph)
    own = {x for x in results if isinstance(x, fx.Node) and x.op == "call_function"}
    called = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    writes = [isinstance(f, torch._ops.OpOverload) and f._schema.is_mutable for f in called]
    return len(own) == len(results) and not any(writes)


_CREATES = {aten.zeros_like.default, aten.clone.default, aten.sym_size.int}


def clean(graph: fx.GraphModule) -> None:
    """Take away what makes no difference to the values."""
    for node in graph.graph.nodes:
        # What only autograd knew apart is the same; then much is used no more.
        if node.target in (aten.detach.default, aten.alias.default) or (
            node.target is aten.zero_.default and node.args[0].target is aten.zeros_like.default
        ):
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()


# Multiplications that take no longer than a library of products of matrices needs to begin, 2 us.
FEW = 2**14


def sum_small_products(graph: fx.Graph) -> None:
    """Let products of few multiplications on a CPU be sums, compiled together with what is around them."""
    for target in (aten.mm.default, aten.addmm.default):
        for node in graph.find_nodes(op="call_function", target=target):
            *added, a, b = node.args
            if node.kwargs or not _is_small(a.meta["val"], b.meta["val"]):
                continue
            with graph.inserting_before(node):
                sides = [
                    graph.call_function(aten.unsqueeze.default, side) for side in ((a, 2), (b, 0))
                ]
                found = graph.call_function(aten.mul.Tensor, tuple(sides))
                found = graph.call_function(aten.sum.dim_IntList, (found, [1]))
                if added:
                    found = graph.call_function(aten.add.Tensor, (added[0], found))
            found.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(found)
            graph.erase_node(node)


def _is_small(a: Tensor, b: Tensor) -> bool:
    # (The size of a batch may be any, once there was another one.)
    is_known = all([isinstance(size, int) for size in (*a.shape, *b.shape)])
    is_exact = a.dtype == b.dtype and a.dtype in (torch.float32, torch.float64)
    return a.device.type == "cpu" and is_known and is_exact and a.shape[0] * b.numel() <= FEW


def _hold_units(graph: fx.Graph) -> None:
    """Let the powers of two that errors are divided by (``gradient_of_small``) be computed once.

    They would be computed again for every few entries of what is multiplied by them, by slow functions.
    """
    for node in graph.find_nodes(op="call_function", target=aten.pow.Scalar):
        with graph.inserting_after(node):
            held = graph.call_function(torch.ops._inductor_test.realize.default, (node,))
        node.replace_all_uses_with(held, delete_user_cb=partial(_is_other, held))


def _is_other(node: fx.Node, user: fx.Node) -> bool:
    return user is not node


def inputs_of(graph: fx.GraphModule) -> list[fx.Node]:
    return [node for node in graph.graph.nodes if node.op == "placeholder"]
