"""How a function is traced, and how its graph is compiled and called.

What a graph computes is of no concern here, and what is rewritten in it is in ``rewrites.py``. To import it
takes a second, as it imports the compiler.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch._inductor import config
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.virtualized import V

from torch2pc.compiled.rewrites import (
    clean,
    drop_products_of_zeros,
    hold_units,
    inputs_of,
    sum_small_products,
    taken_apart,
    without_writes,
    writes,
)
from torch2pc.displacement.rules import aten
from torch2pc.graph.autograd import outside_autocast


class Graphed(NamedTuple):
    """A compiled graph, and which of the tensors that it may be given it takes."""

    function: Callable[[list[Any]], Any]
    used: list[int]

    def __call__(self, given: Sequence[Any]) -> Any:
        return self.function([given[k] for k in self.used])


@contextmanager
def collected_apart() -> Iterator[None]:
    """In the body, the garbage collector passes by what was there before.

    To compile makes much garbage, and the modules of PyTorch's compiler alone are much to look through for
    it: a tenth of the time.
    """
    is_free = gc.get_freeze_count() == 0  # nobody else does so
    if is_free:
        gc.freeze()
    try:
        yield
    finally:
        if is_free:
            gc.unfreeze()


def traced(
    function: Callable[..., Any], given: Sequence[Any], options: dict[str, Any]
) -> fx.GraphModule:
    """What ``function`` does, as a graph of operations that PyTorch's compiler takes others apart into."""
    with config.patch(options):
        return taken_apart(function, given)


def compiled(
    graph: fx.GraphModule, given: Sequence[Any], options: dict[str, Any], device: torch.device
) -> Graphed:
    """``graph``, which was traced with what is ``given``, compiled."""
    clean(graph)
    with config.patch(options):
        if without_writes(graph.graph):
            drop_products_of_zeros(graph.graph)
    hold_units(graph.graph)
    sum_small_products(graph.graph)
    # Numbers are kept: sizes are expressed by them.
    unused = [
        k
        for k, node in enumerate(inputs_of(graph))
        if not node.users and isinstance(given[k], Tensor)
    ]
    for node in [inputs_of(graph)[k] for k in unused]:
        graph.graph.erase_node(node)
    used = [k for k in range(len(given)) if k not in unused]
    graph.recompile()
    called = [node for node in graph.graph.nodes if node.op == "call_function"]
    if all([node.target in _CREATES for node in called]):
        for node in called:
            node.target = _CREATES[node.target]
        # (Not by way of ``graph`` itself, which looks for hooks whenever it is called.)
        return Graphed(partial(_unpacked, fx.GraphModule({}, graph.graph).forward), used)
    # What was traced has chosen its types, and would be given others when it is traced again.
    with outside_autocast(device):
        return Graphed(compiled_graph(graph, [given[k] for k in used], options), used)


def compiled_graph(
    graph: fx.GraphModule, given: Sequence[Any], options: dict[str, Any]
) -> Callable[[list[Any]], Any]:
    """``graph``, compiled, as a function of the list of what it is given.

    ``compile_fx`` traces a graph twice more before it compiles it, which takes up to a fifth of the time, and
    wraps what it has compiled, for autograd's sake and to make views of inputs again, which takes as long
    as a small product of matrices in each call. On a CPU both are left out where a graph needs neither.
    """
    is_cpu = all([x.device.type == "cpu" for x in given if isinstance(x, Tensor)])
    with config.patch(options):
        if not is_cpu or not _is_plain(graph.graph):
            whole: Any = compile_fx(graph, given)
            return partial(_unpacked, whole)
        fake_mode: Any = detect_fake_mode(given)
        results = list(graph.graph.nodes)[-1]
        # The results' strides are to be what they are.
        results.meta["user_visible_output_idxs"] = range(len(results.args[0]))
        with V.set_fake_mode(fake_mode), tracing(TracingContext(fake_mode)):
            inside: Any = compile_fx_inner(graph, given, is_inference=True)
    function: Callable[[list[Any]], Any] = inside.current_callable
    return function


def _unpacked(function: Callable[..., Any], given: list[Any]) -> Any:
    return function(*given)


def _is_plain(graph: fx.Graph) -> bool:
    """Whether all results are tensors that it computes, each once, and nothing is written into."""
    (results,) = list(graph.nodes)[-1].args
    own = {x for x in results if isinstance(x, fx.Node) and x.op == "call_function"}
    others = [node.op == "get_attr" or writes(node) for node in graph.nodes]
    return len(own) == len(results) and not any(others)


# The same by shorter names; the operations themselves are called by way of Python.
_CREATES = {
    aten.full.default: torch.full,
    aten.clone.default: torch.clone,
    aten.sym_size.int: aten.sym_size.int,
}
