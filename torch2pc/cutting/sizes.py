"""Where a layer finds the sizes of tensors that it does not use otherwise.

``n, tokens, _ = x.shape`` at the top of a forward, and ``y.reshape(n, tokens, -1)`` further down: no error
goes from y to x because of that, so that x is to be no parent of what y feeds. The layer reads the sizes
from its parents instead. Which size of which parent is the same one shows when the record is run on inputs
of other sizes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from torch2pc.cutting.forward import Forward

_ATTRIBUTES = "shape", "ndim", "dtype", "device"
_NEW = "new_zeros", "new_ones", "new_full", "new_empty"


class Read(NamedTuple):
    """What a node reads of a tensor, besides its values."""

    tensor: fx.Node
    attribute: str
    """Or a method that makes a tensor of the same type on the same device."""
    place: int | None
    """Which of its sizes; None: all."""


def read_by(node: fx.Node) -> Read | None:
    """What a node reads, if it does nothing else."""
    args = node.args
    if not args or not isinstance(args[0], fx.Node):
        return None
    source = args[0]
    name = str(args[1] if node.target is getattr else node.target)
    if node.op == "call_method" or node.target is getattr:
        if not isinstance(source.meta["value"], Tensor):
            return None
        if name == "size":
            place = args[1] if len(args) > 1 else node.kwargs.get("dim")
            return Read(source, "shape", place if isinstance(place, int) else None)
        name = {"dim": "ndim"}.get(name, name)
        return Read(source, name, None) if name in (*_ATTRIBUTES, *_NEW) else None
    if getattr(node.target, "__name__", "") == "getitem" and isinstance(args[1], int):
        whole = read_by(source)
        if whole is not None and whole.attribute == "shape" and whole.place is None:
            return whole._replace(place=args[1])
    return None


class Sizes:
    """The sizes of all tensors in a model's forward, for inputs of several sizes."""

    def __init__(self, forward: Forward, X: Tensor) -> None:
        self._forward, self._X = forward, X
        # The expressions that are found, which are no part of the record.
        self._scratch = fx.Graph()
        self._runs: list[dict[fx.Node, tuple[int, ...]]] = []

    def found_at(self, node: fx.Node, entries: Sequence[fx.Node]) -> Any:
        """What a node reads, read from one of ``entries`` instead; None if that cannot be."""
        read = read_by(node)
        if read is None or not entries:
            return None
        if read.attribute != "shape":
            return self._attribute_at(node, read, entries)
        if not self._runs:
            self._runs = list(self._run())
        rank = len(self._runs[0][read.tensor])
        if read.place is not None:
            return self._size_at(read.tensor, read.place % rank, entries)
        sizes = [self._size_at(read.tensor, d, entries) for d in range(rank)]
        if any(size is None for size in sizes):
            return None
        return self._scratch.call_function(torch.Size, (tuple(sizes),))

    def _attribute_at(self, node: fx.Node, read: Read, entries: Sequence[fx.Node]) -> Any:
        names = ("dtype", "device") if read.attribute in _NEW else (read.attribute,)
        for entry in entries:
            pairs = [(getattr(e.meta["value"], n) for e in (entry, read.tensor)) for n in names]
            if all(one == other for one, other in pairs):
                arguments = (entry, *node.args[1:])
                return self._scratch.create_node(node.op, node.target, arguments, node.kwargs)
        return None

    def _size_at(self, tensor: fx.Node, d: int, entries: Sequence[fx.Node]) -> Any:
        wanted = [run[tensor][d] for run in self._runs]
        places = [(e, k) for e in entries for k in range(len(self._runs[0][e]))]
        # That at the same place is the likelier one.
        for entry, k in sorted(places, key=lambda place: place[1] != d):
            if [run[entry][k] for run in self._runs] == wanted:
                return self._scratch.call_method("size", (entry, k))
        return wanted[0] if len(set(wanted)) == 1 else None

    def _run(self) -> Iterator[dict[fx.Node, tuple[int, ...]]]:
        """The shapes of all tensors, for X and for whatever other sizes the model takes."""
        yield _shapes(self._forward, self._X)
        X, axes = self._X, range(self._X.dim())
        for changed in [*([d] for d in axes), [*axes[2:]]]:
            for larger in (True, False):
                other = X
                for d in changed:
                    half = max(1, X.shape[d] // 2)
                    other = torch.cat([other, other], d) if larger else other.narrow(d, 0, half)
                if other.shape == X.shape:
                    continue
                try:
                    yield _shapes(self._forward, other)
                    break
                except Exception:  # a size that the model does not take
                    continue


def _shapes(forward: Forward, X: Tensor) -> dict[fx.Node, tuple[int, ...]]:
    """The shapes of all tensors in the forward on X, in eval mode."""
    run = _Run(forward.root, graph=forward.graph)
    for module in forward.root.modules():
        module.training = False
    with torch.no_grad():
        run.run(X.clone())
    return run.shapes


class _Run(fx.Interpreter):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n] = tuple(value.shape)
        return value
