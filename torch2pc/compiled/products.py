"""Matrix products of compiled calls on a CPU: by MKL, or by oneDNN where that is clearly faster.

PyTorch leaves products of float32 matrices to MKL, which on some processors takes twice as long as
oneDNN does. Both come with PyTorch. Which one is faster is measured, once for each size, when a graph is
compiled. To import this file takes a second, as it imports the compiler: do so where something is compiled.
"""

from __future__ import annotations

import time
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph
from torch.library import Library, register_fake
from torch.utils._python_dispatch import _disable_current_modes

from torch2pc.displacement.rules.core import size_now

# Entries of b. To multiply by smaller matrices takes less than oneDNN needs to begin.
SMALLEST = 128 * 128
# What oneDNN may take of MKL's time to be chosen: what is measured is off by some, and PyTorch's own products
# need no memory of their own.
MARGIN = 0.8


def by_mkl(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a b, or a b + bias, for a of shape (m, k), b of shape (k, n) and bias (n,) or (m, n)."""
    return torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)


def by_onednn(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same, rounded otherwise."""
    multiply = torch.ops.mkldnn._linear_pointwise
    if bias is not None and bias.dim() == 2:
        return multiply.binary(a, bias, b.t(), None, "add")
    return multiply(a, b.t(), bias, "none", [], "")


@cache
def is_onednn_faster(
    shape_a: tuple[int, ...],
    shape_b: tuple[int, ...],
    stride_b: tuple[int, ...],
    bias_dim: int,
    threads: int,
) -> bool:
    """Whether it clearly is, for matrices like these and as many threads as there are."""
    kind: Any = dict(dtype=torch.float32, device="cpu")
    seconds = {by_mkl: float("inf"), by_onednn: float("inf")}
    with _disable_current_modes():  # a graph is compiled on tensors without values
        a, b = (
            torch.ones(shape_a, **kind),
            torch.empty_strided(shape_b, stride_b, **kind).fill_(1.0),
        )
        bias = torch.ones((shape_a[0], shape_b[1])[-bias_dim:], **kind) if bias_dim else None
        for _ in range(20):
            for multiply in seconds:
                start = time.perf_counter()
                multiply(a, b, bias)
                seconds[multiply] = min(seconds[multiply], time.perf_counter() - start)
    return seconds[by_onednn] < MARGIN * seconds[by_mkl]


# What stands for ``by_onednn`` in compiled code. The operator is there for as long as the library.
_library = Library("torch2pc", "DEF")  # type: ignore[no-untyped-call]
_library.define("by_onednn(Tensor a, Tensor b, Tensor? bias=None) -> Tensor")  # type: ignore[no-untyped-call]
_library.impl("by_onednn", by_onednn, "CPU")  # type: ignore[no-untyped-call]
register_fake(
    "torch2pc::by_onednn", lambda a, b, bias=None: a.new_empty(a.shape[0], b.shape[1]), lib=_library
)


class ReplaceProducts(CustomGraphPass):
    """Puts ``by_onednn`` into a graph in the place of PyTorch's products of matrices, where it is faster."""

    def __call__(self, graph: Graph) -> None:
        for node in graph.nodes:
            if node.target is torch.ops.aten.mm.default and not node.kwargs:
                bias, (a, b) = None, node.args
            elif node.target is torch.ops.aten.addmm.default and not node.kwargs:
                bias, a, b = node.args
            else:
                continue
            if not (_is_whole(bias, node) and _can_choose(a.meta["val"], b.meta["val"])):
                continue
            like = [
                tuple(map(size_now, x))
                for x in (a.meta["val"].shape, b.meta["val"].shape, b.meta["val"].stride())
            ]
            bias_dim = 0 if bias is None else bias.meta["val"].dim()
            if is_onednn_faster(*like, bias_dim, torch.get_num_threads()):
                node.target, node.args = torch.ops.torch2pc.by_onednn.default, (a, b, bias)

    def uuid(self) -> Any:
        return get_hash_for_files((__file__,))


def _is_whole(bias: Any, node: Any) -> bool:
    """Whether a bias is a row or a matrix of the product's shape, not a number to be spread."""
    if bias is None:
        return True
    shape, whole = bias.meta["val"].shape, node.meta["val"].shape
    return bool(shape == whole[1:] or shape == whole)


def _can_choose(a: Tensor, b: Tensor) -> bool:
    return a.device.type == "cpu" and a.dtype == torch.float32 and b.numel() >= SMALLEST


def fast_products() -> dict[str, Any]:
    """Options with which ``torch.compile`` multiplies by the faster library.

    Not where results must be the same in every run: the two round differently.
    """
    has_both = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    if not has_both or torch.are_deterministic_algorithms_enabled():
        return {}
    return {"post_grad_custom_post_pass": ReplaceProducts()}
