"""Layers that are kept apart from the memory that others still need.

What a layer is handed, its input and the gradient of its output, and what it hands on are needed
afterwards: they are beliefs and errors. PyTorch's own operations leave them as they are. Functions of
a user's (``torch.autograd.Function``, kernels in C++ or Triton) and hooks may write into them, also
without counting up their versions, and may hand out the same memory each time. So a layer with such
code in its graph is given copies, and what it returns is copied: ``apart`` is the wall on either side.

Whether a layer needs it is read off its graph in each call, by the types of the nodes; what no graph
shows, a forward pass that writes into its input without being counted or that returns the same memory
again, is looked for by value the first time that a layer is met. ``Habits`` holds what was found.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction, Function
from torch.nn.modules._functions import BackwardHookFunction


class Apart(Function):
    """A copy, which hands a copy of its gradient on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Tensor | None:
        return None if g is None else g.clone()


def apart(x: Any) -> Any:
    """A copy of a tensor, or of each in a list, whose gradient is copied on its way back."""
    if isinstance(x, list):
        return [apart(entry) for entry in x]
    return Apart.apply(x)  # type: ignore[no-untyped-call]


def copied(x: Any) -> Any:
    """The same without a copy of the gradient, which costs less."""
    return [entry.clone() for entry in x] if isinstance(x, list) else x.clone()


_OURS: type = Apart._backward_cls
# Functions in Python that write into nothing that they are given: the wall itself; what calls the
# hooks of a module's backward pass, which are watched as all hooks are; and ``torch.cond`` and its like.
_HARMLESS = {_OURS, BackwardHookFunction._backward_cls}
_HARMLESS_MODULE = "torch._higher_order_ops."
# The type of the nodes of functions that are written in C++ outside PyTorch.
_CPP = "CppFunction"


def is_foreign(kind: type) -> bool:
    """Whether nodes of this type run code that is not PyTorch's, in Python or in C++."""
    if not issubclass(kind, BackwardCFunction):
        return kind.__name__ == _CPP
    made_in = getattr(getattr(kind, "_forward_cls", None), "__module__", "")
    return kind not in _HARMLESS and not made_in.startswith(_HARMLESS_MODULE)


# Types of nodes that were found not to be foreign, of PyTorch's own alone, which do not go.
_native: set[type] = set()


def any_foreign(nodes: Iterable[Any]) -> bool:
    """Whether any of these nodes is foreign."""
    others = set(map(type, nodes)).difference(_native)
    if not others:
        return False
    _native.update([k for k in others if not (issubclass(k, BackwardCFunction) or is_foreign(k))])
    return any(map(is_foreign, others))


def is_apart(x: Tensor) -> bool:
    """Whether a tensor was handed out through the wall."""
    return type(x.grad_fn) is _OURS


class Habits:
    """How the layers of a model treat memory, as far as it is known. Layers are numbered from 0."""

    def __init__(self) -> None:
        # Those that are kept apart from now on.
        self.apart: set[Any] = set()
        # Those whose outputs somebody else holds as well, to write there again, perhaps.
        self.kept: set[int] = set()
        # Those that were looked at, training or not.
        self.looked_at: set[tuple[Any, Any]] = set()
        # Those that have written into their buffers, training or not.
        self.write_buffers: set[tuple[Any, Any]] = set()
        # Whether the gradients of the next backward pass are to be held against copies.
        self.watches = True
        # For gradients, by their places, versions other than 0 that PyTorch itself leaves them with.
        self.versions: set[tuple[int, int]] = set()


_habits: WeakKeyDictionary[nn.Module, Habits] = WeakKeyDictionary()


def habits_of(model: nn.Module) -> Habits:
    """What is known of a model."""
    known = _habits.get(model)
    if known is None:
        known = _habits[model] = Habits()
    return known


class UnguardedError(RuntimeError):
    """User code was found at memory that it was not known to touch, too late to keep it apart.

    Once everything is as it was the call can be made again, as it is known then.
    """

    def __init__(self, name: str) -> None:
        super().__init__(
            f"{name} has come to run code of its user's (an autograd.Function, a hook, a kernel) on "
            "memory that it did not touch before; it is kept apart from now on: call again"
        )


def storage(tensor: Tensor) -> int:
    """The same for tensors that share memory."""
    try:
        return tensor.untyped_storage()._cdata
    except NotImplementedError:  # a sparse tensor
        return id(tensor)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether all entries are equal, or both not a number. It waits for the device."""
    if a.layout is not torch.strided or a.device.type == "meta":
        return True
    return bool(((a == b) | ((a != a) & (b != b))).all())


class Arrivals:
    """The gradients of a backward pass, copied as they arrive: what is written later shows."""

    def __init__(self) -> None:
        self._copies: dict[int, Tensor] = {}

    def copy(self, i: int, g: Tensor) -> Tensor:
        """The copy of gradient ``i``."""
        self._copies[i] = g.clone()
        return self._copies[i]

    def changed(self, found: Sequence[Tensor | None]) -> dict[int, Tensor]:
        """Those that are others at the end, as they arrived."""
        pairs = [(i, copy, found[i]) for i, copy in self._copies.items()]
        return {i: copy for i, copy, now in pairs if now is not None and not same(copy, now)}


def held_elsewhere(tensors: Sequence[Tensor]) -> list[int]:
    """Those whose memory anybody else has a tensor of too, or which is none of PyTorch's."""
    # A view holds the tensor that it is a view of.
    known = {id(x): x for tensor in tensors for x in (tensor, tensor._base) if x is not None}
    tensors_at = Counter([storage(x) for x in known.values()])
    return [i for i, x in enumerate(tensors) if _is_held(x, tensors_at[storage(x)])]


def _is_held(x: Tensor, times: int) -> bool:
    if x.layout is not torch.strided:
        return False
    memory = x.untyped_storage()
    # What Python calls the storage is one more. Memory of NumPy's, say, cannot be resized.
    return not memory.resizable() or torch._C._storage_Use_Count(memory._cdata) > times + 1
