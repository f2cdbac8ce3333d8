"""What is rewritten in a traced graph before it is compiled; what it computes stays the same.

What makes no difference is taken away, small products become sums, and what is written into memory becomes
another tensor. It uses what PyTorch's compiler has for itself: into what it takes operations apart, which it
has code for, and ``realize``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.lowering import lowerings
from torch._inductor.test_operators import realize as _realize  # noqa: F401  (it defines the operator)
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

from torch2pc.displacement.rules import aten


def taken_apart(function: Callable[..., Any], given: Sequence[Any]) -> fx.GraphModule:
    """What ``function`` does, as a graph of operations that PyTorch's compiler takes no further apart."""
    table = {**select_decomp_table()}
    del table[
        aten.zero_.default
    ]  # as zeros that are copied; ``without_writes`` makes zeros alone of it
    graph: fx.GraphModule = make_fx(function, table)(*given)
    return graph


def clean(graph: fx.GraphModule) -> None:
    """Take away what makes no difference to the values."""
    for node in graph.graph.nodes:
        # What only autograd knew apart is the same; then much is used no more.
        if node.target in (aten.detach.default, aten.alias.default):
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
    is_exact = a.dtype == b.dtype and a.dtype in (torch.float32, torch.float64)
    if a.device.type != "cpu" or not is_exact or not _is_fixed(a, b):
        return False
    return a.shape[0] * b.numel() <= FEW


def _is_fixed(*tensors: Tensor) -> bool:
    """Whether all sizes are known: that of a batch may be any, once there was another one."""
    return all([isinstance(size, int) for x in tensors for size in x.shape])


def drop_products_of_zeros(graph: fx.Graph) -> None:
    """Let products of zeros be zeros, in a graph that writes nothing: what begins as zeros may be filled."""
    for node in graph.find_nodes(op="call_function", target=aten.mm.default):
        value = node.meta["val"]
        if _is_fixed(value) and any(map(_is_zeros, node.all_input_nodes)):
            kind = dict(dtype=value.dtype, device=value.device, pin_memory=False)
            with graph.inserting_before(node):
                zeros = graph.call_function(aten.full.default, (list(value.shape), 0), kind)
            zeros.meta["val"] = value
            node.replace_all_uses_with(zeros)
            graph.erase_node(node)


def _is_zeros(node: Any) -> bool:
    while is_view(node) or node.target is aten.clone.default:
        node = node.args[0]
    return node.target is aten.full.default and bool(node.args[1] == 0)


def hold_units(graph: fx.Graph) -> None:
    """Let the powers of two that errors are divided by (``gradient_of_small``) be computed once.

    They would be computed again for every few entries of what is multiplied by them, by slow functions.
    """
    for node in graph.find_nodes(op="call_function", target=aten.pow.Scalar):
        with graph.inserting_after(node):
            held = graph.call_function(torch.ops._inductor_test.realize.default, (node,))
        node.replace_all_uses_with(held, delete_user_cb=partial(_is_other, held))


def _is_other(node: fx.Node, user: fx.Node) -> bool:
    return user is not node


def without_writes(graph: fx.Graph) -> bool:
    """Let what is written into memory that the graph has made be another tensor; whether no write is left.

    Where nothing else reads that memory afterwards.
    """
    same: dict[fx.Node, set[fx.Node]] = {}  # what shares memory with a node
    for node in list(graph.nodes):
        same[node] = {node}
        if node.op != "call_function":
            continue
        if not writes(node):
            if is_view(node.args[0] if node.target is getitem else node):
                for source in node.all_input_nodes:
                    same[node] |= same[source]
                for other in same[node]:
                    same[other] = same[node]
            continue
        function, out = _writing_nothing(node.target)
        written = node.args[0] if out is None else node.kwargs[out]
        others = same[written] - {written}
        kwargs = {name: x for name, x in node.kwargs.items() if name != out}
        if function is None or any([isinstance(x, fx.Node) for x in kwargs.values()]):
            return False
        if written.op != "call_function" or not all([_is_read_before(node, x) for x in others]):
            return False
        with graph.inserting_before(node):
            found = _call(graph, partial(function, **kwargs), node.args)
        if found.meta["val"].dtype != _value(written).dtype:
            return False
        written.replace_all_uses_with(found, delete_user_cb=partial(_is_after, node))
        node.replace_all_uses_with(found)
        graph.erase_node(node)
        same[found] = {found}
    graph.eliminate_dead_code()
    return True


def _call(graph: fx.Graph, function: Any, args: Any) -> fx.Node:
    """The result of ``function`` in a graph, taken apart if it has to be."""
    if function.func in lowerings:
        found = graph.call_function(function.func, args, function.keywords)
        found.meta["val"] = function(*fx.map_arg(args, _value))
        return found
    part = taken_apart(function, fx.map_arg(args, _value))
    given = dict(zip(inputs_of(part), tree_leaves(args), strict=True))
    copied: Any = graph.graph_copy(part.graph, given)
    return copied


def _is_read_before(node: fx.Node, x: fx.Node) -> bool:
    """Whether nothing after ``node`` reads ``x``, which the graph has made."""
    return x.op == "call_function" and not any([_is_after(node, user) for user in x.users])


def _value(node: fx.Node) -> Any:
    return node.meta["val"]


def _is_after(node: fx.Node, user: fx.Node) -> bool:
    return user > node


def is_view(node: Any) -> bool:
    """Whether it is another view of the memory of what it is given."""
    return getattr(node.target, "is_view", False)


def writes(node: fx.Node) -> bool:
    """Whether it may write into what it is given."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    return isinstance(node.target, torch._ops.HigherOrderOperator)


@cache
def _writing_nothing(operation: Any) -> tuple[Any, str | None]:
    """The operation that returns what this one writes; and by which name, if not the first, it is given
    where to. None if there is no such operation.
    """
    schema = getattr(operation, "_schema", None)
    if schema is None or operation.namespace != "aten":
        return None, None
    written = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
    out = [a.name for a in schema.arguments if a.is_out]
    if len(written) != 1 or written not in (out, [schema.arguments[0].name]):
        return None, None
    table = select_decomp_table()
    packet = getattr(aten, schema.name.removeprefix("aten::").removesuffix("_"))
    given = [(a.name, str(a.type)) for a in schema.arguments if not a.is_out]
    for other in [getattr(packet, name) for name in packet.overloads()]:
        same = [(a.name, str(a.type)) for a in other._schema.arguments] == given
        if same and not other._schema.is_mutable and (other in lowerings or other in table):
            return other, next(iter(out), None)
    return None, None


def inputs_of(graph: fx.GraphModule) -> list[fx.Node]:
    return [node for node in graph.graph.nodes if node.op == "placeholder"]
