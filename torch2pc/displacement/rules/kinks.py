"""Functions of one number with kinks or jumps: ReLU and its kind, clamping, thresholds, branches."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from torch2pc.displacement.rules.core import (
    Call,
    Rule,
    Step,
    all_float,
    aten,
    base,
    given_or_zero,
    if_finite,
    only_first_moves,
    prepares,
)

# Piecewise linear functions of one number.


# relu(a + d) - relu(a) = max(d + min(a, 0), -relu(a)), with ``lack`` = relu(-a) and ``top`` = relu(a),
# of which the second is often at hand: it is the layer's output. What is saved is relu(a + d), or
# something negative. (threshold_backward is several times as fast as masked_fill.)


def relu_moved(d: Tensor, lack: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    """The displacement of relu(a), and what tells where its slope is 1."""
    return _relu_moved(lack - d, top)


def _relu_moved_(d: Tensor, lack: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    return _relu_moved(torch.sub(lack, d, out=d), top)


def _relu_moved(lacking: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    moved = torch.minimum(lacking, top).neg_()
    return moved, torch.sub(top, lacking, out=lacking)


def _relu_back(e: Tensor, x: Tensor, lack: Tensor, top: Tensor) -> Tensor:
    return aten.threshold_backward.default(e, x, 0)


def _relu_back_(e: Tensor, x: Tensor, lack: Tensor, top: Tensor) -> Tensor:
    return aten.threshold_backward.grad_input(e, x, 0, grad_input=e)


RELU = Rule(relu_moved, _relu_back, True, _relu_moved_, _relu_back_)


def relu_bases(a: Tensor, output: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(relu(-a), relu(a)); the second is ``output`` where it is given."""
    a = base(a)
    return (-a).relu_(), a.relu() if output is None else base(output)


def below_moved(d: Tensor, lack: Tensor, top: Tensor) -> Tensor:
    """The displacement of min(a, 0), the mirror image."""
    return torch.minimum(d + top, lack)


@prepares(aten.relu.default)
def _(call: Call) -> Step:
    return Step(RELU, (call.args[0],), relu_bases(call.args[0], call.output))


# clamp(a + d) - clamp(a) with c = clamp(a) is clamp(d + (a - c), low - c, high - c): nothing nearly
# equal is subtracted where a lies inside.


class Clamp:
    """The rule for clamp(a, low, high); ``with_ends``: whether the slope at the ends is 1."""

    @staticmethod
    def between(
        d: Tensor, beyond: Tensor, low: Tensor, high: Tensor, with_ends: bool
    ) -> tuple[Tensor, Tensor]:
        free = d + beyond
        return torch.minimum(torch.maximum(free, low), high), free

    @staticmethod
    def between_back(
        e: Tensor, free: Tensor, beyond: Tensor, low: Tensor, high: Tensor, with_ends: bool
    ) -> Tensor:
        flat = (free < low) | (free > high) if with_ends else (free <= low) | (free >= high)
        return e.masked_fill(flat, 0)


CLAMP = Rule(Clamp.between, Clamp.between_back)


def clamp_bases(a: Tensor, low: float, high: float) -> tuple[Tensor, Tensor, Tensor]:
    """(a - c, low - c, high - c) for c = clamp(a, low, high)."""
    a = base(a)
    c = a.clamp(low, high)
    # An infinite a is as far beyond as it is; inf - inf would be NaN.
    return torch.where(a == c, 0.0, a - c), low - c, high - c


@prepares(aten.hardtanh.default, aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default)
def _(call: Call) -> Step | None:
    x, low, high = (*call.arguments, None)[:3]
    if call.func is aten.clamp_max.default:
        low, high = None, low
    if not x.dtype.is_floating_point:
        return None
    low, high = -math.inf if low is None else low, math.inf if high is None else high
    return Step(CLAMP, (x,), clamp_bases(x, low, high), (call.func is not aten.hardtanh.default,))


def _hard_sigmoid(d: Tensor, *bases: Tensor) -> tuple[Tensor, Tensor]:
    beyond, low, high = bases
    found, free = Clamp.between(d, beyond, low, high, False)
    return found / 6, free


def _hard_sigmoid_back(e: Tensor, free: Tensor, *bases: Tensor) -> Tensor:
    beyond, low, high = bases
    return Clamp.between_back(e, free, beyond, low, high, False) / 6


HARD_SIGMOID = Rule(_hard_sigmoid, _hard_sigmoid_back)


@prepares(aten.hardsigmoid.default)
def _(call: Call) -> Step:
    x = call.args[0]
    return Step(HARD_SIGMOID, (x,), clamp_bases(x, -3.0, 3.0))


def _hard_swish(d: Tensor, a: Tensor, *bases: Tensor) -> tuple[Tensor, Tensor]:
    # a h(a) with h(a) = clamp(a + 3, 0, 6) / 6
    x = a + d
    h, _ = _hard_sigmoid(d, *bases)
    near = d * torch.nn.functional.hardsigmoid(x) + a * h
    hardswish = torch.nn.functional.hardswish
    return if_finite(near, hardswish(x) - hardswish(a)), x


def _hard_swish_back(e: Tensor, x: Tensor, *bases: Tensor) -> Tensor:
    return aten.hardswish_backward.default(e, x)


HARD_SWISH = Rule(_hard_swish, _hard_swish_back)


@prepares(aten.hardswish.default)
def _(call: Call) -> Step:
    x = call.args[0]
    return Step(HARD_SWISH, (x,), (base(x), *clamp_bases(x, -3.0, 3.0)))


def _leaky(d: Tensor, lack: Tensor, top: Tensor, slope: Any, *static: Any) -> tuple[Tensor, Tensor]:
    above, x = relu_moved(d, lack, top)
    return above + slope * below_moved(d, lack, top), x


def _leaky_back(
    e: Tensor, x: Tensor, lack: Tensor, top: Tensor, slope: Any, *static: Any
) -> Tensor:
    if isinstance(slope, Tensor):
        return aten._prelu_kernel_backward.default(e, x, slope)[0]
    return aten.leaky_relu_backward.default(e, x, slope, False)


LEAKY_RELU = Rule(_leaky, _leaky_back)


@prepares(aten.leaky_relu.default)
def _(call: Call) -> Step | None:
    x, slope = call.arguments
    return Step(LEAKY_RELU, (x,), relu_bases(x), (slope,))


@prepares(aten._prelu_kernel.default)
def _(call: Call) -> Step | None:
    x, slope = call.args
    return None if call.moves(slope) else Step(LEAKY_RELU, (x,), (*relu_bases(x), base(slope)))


@prepares(aten.rrelu_with_noise.default)
def _(call: Call) -> Step | None:
    x, noise, low, high, training, _ = call.arguments
    if not training:
        return Step(LEAKY_RELU, (x,), relu_bases(x), ((low + high) / 2,))
    # No slope was drawn for a unit that was above zero: the mean one is its, should it sink below.
    return Step(
        LEAKY_RELU,
        (x,),
        (*relu_bases(x), torch.where(x > 0, (low + high) / 2, base(noise)).detach()),
    )


# Where one of two branches is taken: what the branch now taken has moved by, and the way from the
# branch that was taken at a.


def select(condition: Tensor, d: Any, other: Any, a: Any, b: Any, before: Tensor) -> Tensor:
    return torch.where(condition, d, other) + (torch.where(condition, a, b) - before)


def _threshold(
    d: Tensor, a: Tensor, before: Tensor, threshold: float, value: float
) -> tuple[Tensor, Tensor]:
    above = ~(a + d <= threshold)
    return select(above, d, 0.0, a, value, before), above


def _masked_back(e: Tensor, taken: Tensor, *bases: Any) -> Tensor:
    return e.masked_fill(~taken, 0)


THRESHOLD = Rule(_threshold, _masked_back)


@prepares(aten.threshold.default)
def _(call: Call) -> Step:
    x, threshold, value = call.args
    return Step(THRESHOLD, (x,), (base(x), base(call.output)), (threshold, value))


def _hard_shrink(d: Tensor, a: Tensor, before: Tensor, lambd: float) -> tuple[Tensor, Tensor]:
    x = a + d
    kept = ~((x >= -lambd) & (x <= lambd))
    return select(kept, d, 0.0, a, 0.0, before), kept


HARD_SHRINK = Rule(_hard_shrink, _masked_back)


@prepares(aten.hardshrink.default)
def _(call: Call) -> Step:
    x, lambd = call.arguments
    return Step(HARD_SHRINK, (x,), (base(x), base(call.output)), (lambd,))


def _soft_shrink(d: Tensor, beyond: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    # a - clamp(a, -lambd, lambd)
    inside, free = Clamp.between(d, beyond, low, high, True)
    return d - inside, (free >= low) & (free <= high)


SOFT_SHRINK = Rule(_soft_shrink, lambda e, flat, *bases: e.masked_fill(flat, 0))


@prepares(aten.softshrink.default)
def _(call: Call) -> Step:
    x, lambd = call.arguments
    return Step(SOFT_SHRINK, (x,), clamp_bases(x, -lambd, lambd))


def _absolute(d: Tensor, a: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    x = a + d
    return select(x >= 0, d, -d, a, -a, before), x


ABSOLUTE = Rule(_absolute, lambda e, x, *bases: e * x.sign())


@prepares(aten.abs.default)
def _(call: Call) -> Step | None:
    x = call.args[0]
    return Step(ABSOLUTE, (x,), (base(x), base(call.output))) if all_float(call) else None


def _where(*given: Any) -> Tensor:
    # Each of the condition and the two branches may move or not.
    *tensors, before, kinds = given
    moved, (condition, a, b) = tensors[:-3], tensors[-3:]
    new_condition, d, other = given_or_zero(moved, kinds)
    condition = new_condition if kinds[0] else condition
    return select(condition, d, other, a, b, before)


WHERE = Rule(_where)


def branch_step(call: Call, condition: Tensor, x: Any, y: Any) -> Step:
    """The step of an operation that takes ``x`` where the condition holds, and ``y`` elsewhere."""
    before = base(call.output)
    a, b = [base(v) if isinstance(v, Tensor) else before.new_full((), v) for v in (x, y)]
    kinds = tuple(map(call.moves, (condition, x, y)))
    moving = tuple(filter(call.moves, (condition, x, y)))
    return Step(WHERE, moving, (condition.detach(), a, b, before), (kinds,))


@prepares(aten.where.self)
def _(call: Call) -> Step | None:
    return branch_step(call, *call.args) if call.output.dtype.is_floating_point else None


def _masked_fill(d: Tensor, mask: Tensor) -> tuple[Tensor, None]:
    return d.masked_fill(mask, 0), None


MASKED_FILL = Rule(_masked_fill, lambda e, saved, mask: e.masked_fill(mask, 0))


def masked_step(call: Call) -> Step | None:
    """The step of a product with a mask that moves; None if it is another product."""
    for mask, x in (call.args, call.args[::-1]):
        if call.moves(mask) and mask.dtype == torch.bool and call.output.is_floating_point():
            return branch_step(call, mask, x, 0.0)
    return None


@prepares(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def _(call: Call) -> Step | None:
    x, mask, value = call.args
    if call.moves(mask) and not call.moves(value):
        return branch_step(call, mask, value, x)
    same = only_first_moves(call) and x.shape == call.output.shape
    return Step(MASKED_FILL, (x,), (mask.detach(),)) if same else None
