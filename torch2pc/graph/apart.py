"""Layers that are kept apart from the memory that others still need.

What a layer is handed, its input and the gradient of its output, and what it hands on are needed
afterwards: they are beliefs and errors. PyTorch's own operations leave them as they are. Functions of
a user's (``torch.autograd.Function``, kernels in C++ or Triton) and hooks may write into them, also
without counting up their versions, and may hand out the same memory each time. So a layer that runs such
code is given copies, and what it returns is copied. ``Habits`` are the layers of which that is known; the
first call that finds another one begins anew (``until_guarded``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import Function

from torch2pc.displacement.rules.core import storage
from torch2pc.graph.state import same_values

_T = TypeVar("_T")


class _Apart(Function):
    """A copy, which hands a copy of its gradient on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Tensor | None:
        return None if g is None else g.clone()


# The type of its nodes, by which an output is known to be of a layer that is kept apart.
APART: type = _Apart._backward_cls


def apart(output: Tensor) -> Tensor:
    """A copy of what a layer returns; what it is handed on the way back is a copy too."""
    copy: Tensor = _Apart.apply(output)  # type: ignore[no-untyped-call]
    return copy


def copied(x: Any) -> Any:
    """A copy of a tensor, or of each in a list, that gradients flow through; others as they are."""
    if isinstance(x, Tensor):
        return x.clone()
    return [copied(entry) for entry in x] if isinstance(x, list | tuple) else x


class Habits:
    """What is known of the layers of a model from calls before. Layers are numbered from 0."""

    def __init__(self) -> None:
        # Those that are kept apart.
        self.apart: set[Any] = set()
        # Those that were looked at, and those that have written into their buffers; training or not.
        self.looked_at: set[tuple[Any, Any]] = set()
        self.write_buffers: set[tuple[Any, Any]] = set()
        # Whether they were found to be the same function again in a replay, training or not.
        self.replayable: dict[tuple[Any, Any], bool] = {}
        # Those (1 is the first here) whose outputs somebody else holds as well, to write there, perhaps.
        self.held: set[int] = set()
        # Whether it is to be seen if anybody writes into a gradient that has arrived, and what versions
        # PyTorch itself leaves gradients with.
        self.watches = True
        self.versions: set[tuple[int, ...]] = set()


_habits: WeakKeyDictionary[nn.Module, Habits] = WeakKeyDictionary()


def habits_of(model: nn.Module) -> Habits:
    """What is known of a model."""
    known = _habits.get(model)
    if known is None:
        known = _habits[model] = Habits()
    return known


class UnguardedError(RuntimeError):
    """User code was found at memory that it was not known to touch; from now on it is known."""

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__(
            f"{', '.join(names)} has come to run code of its user's (an autograd.Function, a hook, a "
            "kernel) on memory that it did not touch before; it is kept apart from now on: call again"
        )


# One finds what forward passes do, and one what backward passes do; the rest is for what changes.
_MOST_ATTEMPTS = 4


def until_guarded(attempt: Callable[[], _T]) -> _T:
    """What ``attempt`` returns, begun anew once it is known what has to be kept apart.

    It must leave everything as it was where it raises.
    """
    for k in range(_MOST_ATTEMPTS):
        try:
            return attempt()
        except UnguardedError:
            if k == _MOST_ATTEMPTS - 1:
                raise
    raise AssertionError


def unchanged(tensors: Sequence[Any], copies: Sequence[Any]) -> bool:
    """Whether tensors have the values that they had when they were copied. It waits for the device."""
    pairs = zip(tensors, copies, strict=True)
    return all([_unchanged(a, b) for a, b in pairs if isinstance(a, Tensor)])


def _unchanged(a: Tensor, copy: Tensor) -> bool:
    return a.device.type == "meta" or same_values(a.detach(), copy.detach())


def held_elsewhere(tensors: Sequence[Tensor]) -> list[int]:
    """The places of those whose memory anybody else has too, or which is none of PyTorch's.

    Right once the graphs are gone that hold it.
    """
    # A view holds the tensor that it is a view of.
    known = {id(x): x for tensor in tensors for x in (tensor, tensor._base) if x is not None}
    tensors_at = Counter([storage(x) for x in known.values()])
    return [l for l, x in enumerate(tensors) if _is_held(x, tensors_at[storage(x)])]


def _is_held(x: Tensor, times: int) -> bool:
    if x.layout is not torch.strided:
        return False
    memory = x.untyped_storage()
    # What Python calls the storage is one more. Memory of NumPy's, say, cannot be resized.
    return not memory.resizable() or torch._C._storage_Use_Count(memory._cdata) > times + 1
