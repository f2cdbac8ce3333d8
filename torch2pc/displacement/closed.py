"""Losses whose gradient needs no graph: PyTorch's cross-entropies and squared errors, and multiples of them.

A loss that is linear in the log-softmax of the output y, with whatever weights, targets and smoothing, or in
PyTorch's squared error, has the gradient

    dLoss/dy = g - softmax(y) sum(g)    or    dLoss/dy = 2 g (y - target)

where g, the loss's derivative in the log-softmax or in the squared error, does not depend on y. So it is
taken once, and then the operation's own way back gives the gradient anywhere, to the last bit. Whether a loss
is such a one is read off the operations that it runs, so that neither its name nor its class matters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from torch2pc.displacement.recorder import Kind, Watch
from torch2pc.displacement.rules.core import aten, operations, tensors_in
from torch2pc.displacement.vjp import vjp

_LOG_SOFTMAX, _SQUARED = aten._log_softmax.default, aten.mse_loss.default
# By the names of autograd's nodes.
_NODES = {"LogSoftmaxBackward0": _LOG_SOFTMAX, "MseLossBackward0": _SQUARED}
# Affine in their first argument, if no other one depends on y.
_AFFINE = operations(
    """
    nll_loss_forward nll_loss2d_forward sum sum.dim_IntList mean mean.dim neg mul.Tensor mul.Scalar
    div.Tensor div.Scalar add.Tensor add.Scalar sub.Tensor sub.Scalar masked_fill.Scalar
    masked_fill_.Scalar view detach
    """
)
# In their second one as well.
_AFFINE_IN_BOTH = {aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor}


class Gradient(NamedTuple):
    """dLoss/dy as a function of y."""

    func: Any
    constants: tuple[Any, ...]
    """The other arguments of ``func``."""
    g: Tensor
    dtypes: tuple[torch.dtype, ...]
    """Those that y is converted to, one after the other, as the loss is given it and computes it."""

    def __call__(self, y: Tensor) -> Tensor:
        """The gradient, in y's own type."""
        x = y
        for dtype in self.dtypes:
            x = x.to(dtype)
        if self.func is _SQUARED:
            e = aten.mse_loss_backward.default(self.g, x, *self.constants)
        else:
            dim = self.constants[0]
            p = torch.log_softmax(x, dim)
            e = torch._log_softmax_backward_data(self.g, p, dim, x.dtype)
        for dtype in self.dtypes[-2::-1]:
            e = e.to(dtype)
        return e.to(y.dtype)


class LossWatch(Watch):  # type: ignore[no-untyped-call]
    """Notes besides whether what its body computes of ``y`` is affine in one operation on it."""

    def __init__(self, y: Tensor) -> None:
        super().__init__(sees_exits=True)
        self._tensors = [y]
        # y, converted to one type after the other, and all that depends on it.
        self._y, self._moving = [y], {id(y)}
        self._is_affine = True
        self._head: tuple[Any, tuple[Any, ...]] | None = None

    def is_read(self, tensor: Tensor) -> None:
        """The numbers of a tensor go where no operation is seen."""
        if id(tensor) in self._moving:
            self._is_affine = False

    def dispatch(self, func: Any, kind: Kind, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run one operation, and note what it makes of y."""
        output = super().dispatch(func, kind, args, kwargs)
        given = tensors_in([*args, *kwargs.values()])
        moving = [x for x in given if id(x) in self._moving]
        if moving:
            self._is_affine = self._is_affine and self._goes_on(func, args, kwargs, moving, output)
            self._moving.update(map(id, tensors_in(output)))
        return output

    def _goes_on(
        self, func: Any, args: Any, kwargs: dict[str, Any], moving: list[Tensor], output: Any
    ) -> bool:
        """Whether it still is after this operation."""
        x, *others = moving
        if x is self._y[-1] and not others and self._head is None:
            if func is aten._to_copy.default and [*kwargs] == ["dtype"]:
                self._y.append(output)
                return True
            if func is _SQUARED:
                target = args[1] if x is args[0] else args[0]
                self._head = func, (target, args[2] if len(args) > 2 else 1)
                return True
            if func is _LOG_SOFTMAX and not args[2]:
                self._head = func, args[1:2]
                return True
        if not {id(a) for a in moving}.isdisjoint(map(id, self._y)):
            return func is aten.detach.default
        if others:
            return func is aten.add.Tensor
        is_second = func in _AFFINE_IN_BOTH and x is args[1]
        return func in _AFFINE and bool(args) and (x is args[0] or is_second)

    def gradient(self, Loss: Tensor, nodes: Sequence[Any]) -> Gradient | None:
        """That of ``Loss``, of whose graph ``nodes`` are; None where it has no such form."""
        if self._head is None or not self._is_affine or id(Loss) not in self._moving:
            return None
        func, constants = self._head
        heads = [node for node in nodes if _NODES.get(type(node).__name__) is func]
        if len(heads) != 1:
            return None
        (g,) = vjp([Loss], [GradientEdge(heads[0], 0)])
        return (
            None if g is None else Gradient(func, constants, g, tuple([y.dtype for y in self._y]))
        )
