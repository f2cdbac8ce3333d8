"""Operations that decide: comparisons, places of maxima, rounding.

Their values jump. What they are given at a + d is not always what the layer itself has there: the largest
of some numbers may differ by round-off from each of them, so that none equals it. In a comparison with
chance neighbours that hardly ever matters; where numbers are equal by construction it always does. There
the decision is taken on values that are computed anew, by the operations of the layer itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch2pc.displacement.rules import axes, linear
from torch2pc.displacement.rules.core import (
    LINEAR,
    WRITES_ASIDE,
    Call,
    Rule,
    belief_dtype,
    evaluate,
    is_float,
    operations,
    template,
)

# Functions of numbers that are constant between jumps, or that jump.
_JUMPS = operations(
    """
    round round.decimals floor ceil trunc frac sign sgn heaviside fmod.Scalar fmod.Tensor
    remainder.Scalar remainder.Tensor floor_divide floor_divide.Scalar div.Tensor_mode
    div.Scalar_mode
    """
)

# Rules whose outputs are equal to a number, or to one another, by chance alone, if their inputs are.
GENERIC = {
    LINEAR,
    axes.NORMALISED,
    linear.SAME,
    linear.JOINED,
    linear.AS_DTYPE,
    linear.RESHAPED,
    linear.PERMUTED,
    linear.SCALED,
    linear.EXPANDED,
    linear.TIMES,
    linear.BY_MATRIX,
    linear.BY_FLOAT_MATRIX,
    linear.FROM_LEFT,
    linear.BY_ROWS,
    linear.CONVOLVED,
}


def decides(func: Any, output: Tensor) -> bool:
    """Whether what an operation returns jumps."""
    return not is_float(output) or func in _JUMPS


class Again(NamedTuple):
    """What an operation is given to be evaluated at other values."""

    places: tuple[int, ...]
    constant: tuple[Tensor, ...]
    static: tuple[Any, ...]


class Noted(NamedTuple):
    """An operation as it was called; ``call.place`` has the tensors that move, as they were then."""

    call: Call
    item: int | None
    """Which of its outputs is meant."""
    versions: list[int]
    """Those of its constant tensors when it was called."""

    @property
    def is_repeatable(self) -> bool:
        """Whether it can be evaluated again: it draws nothing and writes nothing."""
        func = self.call.func
        if func is None or func in WRITES_ASIDE or func._schema.is_mutable:
            return False
        return torch.Tag.nondeterministic_seeded not in func.tags

    def again(self) -> Again | None:
        """How it is evaluated again; None if what it used has been changed."""
        moving, constant, shape = template(self.call)
        if [tensor._version for tensor in constant] != self.versions:
            return None
        places = tuple([self.call.place[id(tensor)] for tensor in moving])
        return Again(places, tuple(constant), (*shape, self.item))


def _no_error(e: Tensor, *rest: Any) -> None:
    return None


def _moved_value(d: Tensor, a: Tensor) -> tuple[Tensor, None]:
    return (a.to(d.dtype) + d).to(a.dtype), None


MOVED_VALUE = Rule(_moved_value, _no_error)
"""a + d"""


def _value(*given: Any) -> tuple[Tensor, None]:
    *tensors, func, args, names, values, item = given
    found = evaluate(tensors, func, args, names, values)
    return (found if item is None else found[item]), None


VALUE = Rule(_value, _no_error)
"""What the operation gives at other values, which are its inputs."""


def _jump(*given: Any) -> Tensor:
    *tensors, func, args, names, values, item, kinds = given
    count = len(kinds)
    d, at, (before, *constant) = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
    # The values, with the derivative of their displacements.
    moving = [
        _with_slope(x, d_i) if floats else x for x, d_i, floats in zip(at, d, kinds, strict=True)
    ]
    found = evaluate([*moving, *constant], func, args, names, values)
    found = found if item is None else found[item]
    dtype = belief_dtype(before.dtype)
    return found.to(dtype) - before.to(dtype)


def _with_slope(x: Tensor, d: Tensor) -> Tensor:
    # (inf - inf would be NaN)
    return x + (d - d.detach()).nan_to_num(0.0, 0.0, 0.0).to(x.dtype)


JUMP = Rule(_jump)
"""By how much a value that jumps is another one, from the displacements and the values of its inputs."""


def kinds_of(tensors: Sequence[Tensor]) -> tuple[bool, ...]:
    return tuple(map(is_float, tensors))
