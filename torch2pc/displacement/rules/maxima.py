"""Maxima: the displacement at the place of the new one, and the way there from the old one."""

from __future__ import annotations

import math
from collections.abc import Callable
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
    prepares,
    unsqueezed,
)
from torch2pc.displacement.rules.kinks import RELU, relu_bases, select

# (The backward operations take no more than the shape from the input.)


def _pool_moved(
    d: Tensor, a: Tensor, before: Tensor, pool: Any, back: Any, axes: int, *how: Any
) -> tuple[Tensor, Any]:
    _, places = pool(a + d, *how)
    flat = places.flatten(-axes)
    there = a.flatten(-axes).gather(-1, flat).view_as(places)
    moved = d.flatten(-axes).gather(-1, flat).view_as(places)
    return moved.add_(there - before), places


def _pool_moved_back(
    e: Tensor, places: Tensor, a: Tensor, before: Tensor, pool: Any, back: Any, axes: int, *how: Any
) -> Tensor:
    # The adaptive kind finds its windows from the shapes.
    return back(e, a, *(how if len(how) > 1 else ()), places)


MAX_POOL = Rule(_pool_moved, _pool_moved_back, is_fresh=True)


def _tiled_pool_moved(d: Tensor, short: Tensor, pool: Any, back: Any, *how: Any) -> Any:
    # short = a - max a: where windows do not overlap, what a number lacks is one number.
    return pool(d + short, *how)


def _tiled_pool_moved_(d: Tensor, short: Tensor, pool: Any, back: Any, *how: Any) -> Any:
    return pool(d.add_(short), *how)


def _tiled_pool_moved_back(
    e: Tensor, places: Tensor, short: Tensor, pool: Any, back: Any, *how: Any
) -> Tensor:
    return back(e, short, *how, places)


TILED_MAX_POOL = Rule(
    _tiled_pool_moved, _tiled_pool_moved_back, True, _tiled_pool_moved_, _tiled_pool_moved_back
)
# The number of axes that are pooled, and the backward operation.
_POOLS = {
    aten.max_pool2d_with_indices.default: (2, aten.max_pool2d_with_indices_backward.default),
    aten.max_pool3d_with_indices.default: (3, aten.max_pool3d_with_indices_backward.default),
    aten.adaptive_max_pool2d.default: (2, aten.adaptive_max_pool2d_backward.default),
    aten.adaptive_max_pool3d.default: (3, aten.adaptive_max_pool3d_backward.default),
}


@prepares(*_POOLS)
def _pool_step(call: Call) -> Step:
    x = call.args[0]
    axes, back = _POOLS[call.func]
    kernel = tuple(call.args[1])
    how: tuple[Any, ...] = ()
    if "adaptive" not in call.func._schema.name:
        _, _, stride, padding, dilation, ceil_mode = call.arguments
        # One number stands for every axis.
        sizes = kernel, stride or kernel, padding, dilation
        kernel, stride, padding, dilation = [(*size,) * (axes // len(size)) for size in sizes]
        how = stride, padding, dilation, ceil_mode
        if how[:3] == (kernel, (0,) * axes, (1,) * axes):
            short = _short_of_maximum(base(x), base(call.output[0]), kernel)
            return Step(TILED_MAX_POOL, (x,), (short,), (call.func, back, kernel, *how))
    return Step(
        MAX_POOL, (x,), (base(x), base(call.output[0])), (call.func, back, axes, kernel, *how)
    )


def pooled_before_relu(
    call: Call, made_by: Callable[[Any], Step | None]
) -> tuple[Step, Tensor, Step] | None:
    """The steps of relu(max(a)) for a ``call`` that is max(relu(a)), and the tensor between them.

    They are the same, and a maximum leaves fewer numbers to do the rest with.
    """
    relu = made_by(call.args[0])
    if call.func not in _POOLS or relu is None or relu.rule is not RELU:
        return None
    (x,) = relu.inputs
    pooled = call.func(x.detach(), *call.args[1:], **call.kwargs)
    first = _pool_step(call._replace(args=(x, *call.args[1:]), output=pooled))
    return first, pooled[0], Step(RELU, (pooled[0],), relu_bases(pooled[0], call.output[0]))


def _short_of_maximum(a: Tensor, maxima: Tensor, kernel: tuple[int, ...]) -> Tensor:
    """``a`` less the maximum of its window; what lies in no window stays as it is."""
    spread, inside = maxima, [slice(None)] * a.dim()
    for axis, size in enumerate(kernel, start=a.dim() - len(kernel)):
        spread = spread.repeat_interleave(size, axis).narrow(
            axis, 0, min(a.shape[axis], size * maxima.shape[axis])
        )
        inside[axis] = slice(0, spread.shape[axis])
    short = a.clone()
    # Where an infinite maximum is reached nothing is lacking; inf - inf would be NaN.
    short[tuple(inside)].sub_(spread).nan_to_num_(0.0, math.inf, -math.inf)
    return short


def _extreme(d: Tensor, a: Tensor, before: Tensor, dim: int, keepdim: bool, sign: int) -> Tensor:
    with torch.no_grad():
        x = a + d
        places = (x if sign > 0 else -x).argmax(dim, keepdim=True)
    moved, there = d.gather(dim, places), a.gather(dim, places)
    if not keepdim:
        moved, there = moved.squeeze(dim), there.squeeze(dim)
    return moved + (there - before)


EXTREME = Rule(_extreme)


@prepares(aten.max.dim, aten.min.dim)
def _(call: Call) -> Step:
    x, dim, keepdim = call.arguments
    sign = 1 if call.func is aten.max.dim else -1
    return Step(EXTREME, (x,), (base(x), base(call.output[0])), (dim, keepdim, sign))


def _highest(
    d: Tensor, a: Tensor, before: Tensor, dim: Any, keepdim: bool, sign: int
) -> tuple[Tensor, Any]:
    x = a + d
    highest = x.amax(dim, keepdim=True) if sign > 0 else x.amin(dim, keepdim=True)
    # Ties share the error; what they have moved by is the same but for rounding. (Others may be infinite.)
    lower = x != highest
    shares = torch.ones_like(x).masked_fill_(lower, 0)
    shares = shares / shares.sum(dim, keepdim=True)
    moved = (d.masked_fill(lower, 0) * shares).sum(dim, keepdim=True)
    there = (a.masked_fill(lower, 0) * shares).sum(dim, keepdim=True)
    found = moved + (there - before)
    return (found if keepdim else found.squeeze(dim)), shares


def _highest_back(
    e: Tensor, shares: Tensor, a: Tensor, before: Tensor, dim: Any, keepdim: bool, sign: int
) -> Tensor:
    return shares * (e if keepdim else unsqueezed(e, dim))


HIGHEST = Rule(_highest, _highest_back)


@prepares(aten.amax.default, aten.amin.default)
def _(call: Call) -> Step:
    x, dim, keepdim = call.arguments
    a = base(x)
    dim = tuple([k % a.dim() for k in dim]) or tuple(range(a.dim()))
    before = base(call.output)
    before = before if keepdim else unsqueezed(before, dim)
    sign = 1 if call.func is aten.amax.default else -1
    return Step(HIGHEST, (x,), (a, before), (dim, keepdim, sign))


def _larger(d: Tensor, other: Tensor, a: Tensor, b: Tensor, before: Tensor, sign: int) -> Tensor:
    x, y = a + d, b + other
    first = (x > y if sign > 0 else x < y) | x.isnan()
    # At a tie each takes half of the error, as in the operation itself.
    even = x == y
    found = select(first, d, other, a, b, before)
    return torch.where(even, (d + other) / 2 + ((a + b) / 2 - before), found)


LARGER = Rule(_larger)


@prepares(aten.maximum.default, aten.minimum.default)
def _(call: Call) -> Step | None:
    x, y = call.args
    if not (call.moves(x) and call.moves(y) and all_float(call)):
        return None
    sign = 1 if call.func is aten.maximum.default else -1
    return Step(LARGER, (x, y), (base(x), base(y), base(call.output)), (sign,))
