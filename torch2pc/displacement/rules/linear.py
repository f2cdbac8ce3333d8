"""Linear operations, which pass a displacement on as it is, and sums and products."""

from __future__ import annotations

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
    belief_dtype,
    given_or_zero,
    if_finite,
    linear_step,
    only_first_moves,
    operations,
    prepares,
    size_now,
    tensors_in,
    unit_of,
)
from torch2pc.displacement.rules.kinks import masked_step

LINEAR_OPERATIONS = operations(
    """
    neg mv sum sum.dim_IntList mean mean.dim cumsum flip roll rot90 index_select gather
    index.Tensor stack repeat tril triu avg_pool1d avg_pool2d avg_pool3d _adaptive_avg_pool2d
    _adaptive_avg_pool3d reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d
    replication_pad2d replication_pad3d upsample_nearest1d upsample_nearest2d upsample_nearest3d
    upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d
    _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d pixel_shuffle
    pixel_unshuffle channel_shuffle native_channel_shuffle im2col col2im constant_pad_nd
    max_unpool2d max_unpool3d _fft_r2c _fft_c2c _fft_c2r
    """
)


@prepares(*LINEAR_OPERATIONS)
def _(call: Call) -> Step | None:
    if any(map(call.moves, tensors_in(call.args[1:]))):
        return None  # the place to gather from moves, say
    if call.func is aten.constant_pad_nd.default:
        call = call._replace(args=call.args[:2])  # pads with zeros
    dtype = call.kwargs.get("dtype")
    if dtype is not None:  # a sum in half precision; its displacement's is taken in float32
        call = call._replace(kwargs={"dtype": belief_dtype(dtype)})
    return linear_step(call)


def _joined(*given: Any) -> tuple[Tensor, list[int]]:
    *d, dim = given
    return torch.cat(d, dim), [d_i.shape[dim] for d_i in d]


JOINED = Rule(_joined, lambda e, sizes, dim: e.split(sizes, dim))


@prepares(aten.cat.default)
def _(call: Call) -> Step:
    (tensors, dim), like = call.arguments, (call.output.dim(), call.output.dtype)
    if all([call.moves(x) and (x.dim(), x.dtype) == like for x in tensors]):
        return Step(JOINED, tuple(tensors), (), (dim,))
    return linear_step(call)


# Passing on.


def _same(d: Tensor, *added: float) -> tuple[Tensor, None]:
    return d, None


SAME = Rule(_same, lambda e, saved, *added: e)


@prepares(aten.detach.default, aten.alias.default, aten.clone.default, aten.lift_fresh.default)
def _(call: Call) -> Step:
    return Step(SAME, (call.args[0],))


def _as_dtype(d: Tensor, dtype: torch.dtype) -> tuple[Tensor, torch.dtype]:
    return d.to(dtype), d.dtype


AS_DTYPE = Rule(_as_dtype, lambda e, before, dtype: e.to(before))


@prepares(aten._to_copy.default, aten.to.dtype)
def _(call: Call) -> Step:
    before, after = call.args[0].dtype, call.output.dtype
    if not (before.is_floating_point and after.is_floating_point):
        return linear_step(call)  # between real and complex numbers
    if belief_dtype(before) == belief_dtype(after):
        return Step(SAME, (call.args[0],))
    return Step(AS_DTYPE, (call.args[0],), (), (belief_dtype(after),))


def _reshaped(d: Tensor, keeps_batch: bool, shape: tuple[int, ...]) -> tuple[Tensor, torch.Size]:
    return d.reshape(d.shape[0], *shape) if keeps_batch else d.reshape(shape), d.shape


RESHAPED = Rule(_reshaped, lambda e, before, *static: e.reshape(before))


@prepares(
    *operations(
        """view _unsafe_view reshape _reshape_alias unsqueeze squeeze squeeze.dim squeeze.dims"""
    )
)
def _(call: Call) -> Step:
    before, after = call.args[0].shape, call.output.shape
    # Another batch size is the same program then.
    keeps_batch = bool(before and after and before[0] == after[0])
    return Step(
        RESHAPED, (call.args[0],), (), (keeps_batch, tuple(after[1:] if keeps_batch else after))
    )


def _permuted(d: Tensor, order: tuple[int, ...], back: tuple[int, ...]) -> tuple[Tensor, None]:
    return d.permute(order), None


PERMUTED = Rule(_permuted, lambda e, saved, order, back: e.permute(back))


@prepares(aten.t.default, aten.transpose.int, aten.permute.default)
def _(call: Call) -> Step:
    order = list(range(call.args[0].dim()))
    if call.func is aten.permute.default:
        order = [k % len(order) for k in call.args[1]]
    elif len(order) > 1:
        i, j = call.args[1:] if call.func is aten.transpose.int else (0, 1)
        order[i], order[j] = order[j], order[i]
    back = sorted(range(len(order)), key=order.__getitem__)
    return Step(PERMUTED, (call.args[0],), (), (tuple(order), tuple(back)))


# Sums and products of numbers.


def _summed(d: Tensor, other: Tensor, alpha: float) -> tuple[Tensor, Any]:
    return torch.add(d, other, alpha=alpha), (d.shape, other.shape)


def _summed_back(e: Tensor, shapes: Any, alpha: float) -> tuple[Tensor, Tensor]:
    of_other = e if alpha == 1 else e * alpha
    return e.sum_to_size(shapes[0]), of_other.sum_to_size(shapes[1])


SUMMED = Rule(_summed, _summed_back)


def _scaled(d: Tensor, alpha: float) -> tuple[Tensor, None]:
    return d * alpha, None


SCALED = Rule(_scaled, lambda e, saved, alpha: e * alpha)


def _expanded(d: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Any]:
    return d.expand(shape), d.shape


EXPANDED = Rule(_expanded, lambda e, before, shape: e.sum_to_size(before))


@prepares(aten.expand.default)
def _(call: Call) -> Step:
    return Step(EXPANDED, (call.args[0],), (), (tuple(call.output.shape),))


@prepares(aten.copy.default)
def _(call: Call) -> Step | None:
    """What is written over a tensor, in that tensor's shape and type."""
    source = call.args[1]
    if not call.moves(source) or belief_dtype(source.dtype) != belief_dtype(call.output.dtype):
        return None
    return Step(EXPANDED, (source,), (), (tuple(call.output.shape),))


ONE = (1,)  # that 1 is added is noted, for softsign


@prepares(aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar)
def _(call: Call) -> Step | None:
    x, y, alpha = call.arguments
    if call.func in (aten.sub.Tensor, aten.sub.Scalar):
        alpha = -alpha
    if not all_float(call):
        return linear_step(call) if call.moves(x) and call.moves(y) else None
    if call.moves(x) and call.moves(y):
        return Step(SUMMED, (x, y), (), (alpha,))
    moving, factor = (x, 1) if call.moves(x) else (y, alpha)
    if moving.shape != call.output.shape:
        return Step(EXPANDED, (moving,), (), (tuple(call.output.shape),)) if factor == 1 else None
    if factor != 1:
        return Step(SCALED, (moving,), (), (factor,))
    return Step(SAME, (moving,), (), ONE if type(y) is int and y == 1 else ())


@prepares(aten.rsub.Scalar)
def _(call: Call) -> Step | None:
    x, _, alpha = call.arguments
    return Step(SCALED, (x,), (), (-alpha,))


@prepares(aten.mul.Scalar, aten.div.Scalar)
def _(call: Call) -> Step | None:
    if not all_float(call):
        return None
    factor = call.args[1] if call.func is aten.mul.Scalar else 1 / call.args[1]
    return Step(SCALED, (call.args[0],), (), (factor,))


def _times(d: Tensor, b: Tensor) -> tuple[Tensor, Any]:
    return d * b, d.shape


def _times_back(e: Tensor, shape: Any, b: Tensor) -> Tensor:
    return (e * b).sum_to_size(shape)


TIMES = Rule(_times, _times_back)


def _product(d: Tensor, other: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Any]:
    x, y = a + d, b + other
    return if_finite(d * y + a * other, x * y - a * b), (x, y)


def _product_back(e: Tensor, saved: Any, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    x, y = saved
    return (e * y).sum_to_size(x.shape), (e * x).sum_to_size(y.shape)


PRODUCT = Rule(_product, _product_back)


@prepares(aten.mul.Tensor)
def _(call: Call) -> Step | None:
    x, y = call.args
    if call.output.is_complex():
        return None if call.moves(x) and call.moves(y) else linear_step(call)
    if not all_float(call):
        return masked_step(call)
    if call.moves(x) and call.moves(y):
        return Step(PRODUCT, (x, y), (base(x), base(y)))
    moving, other = (x, y) if call.moves(x) else (y, x)
    if not isinstance(other, Tensor):
        return Step(SCALED, (moving,), (), (other,))
    return Step(TIMES, (moving,), (base(other),))


def _quotient(d: Tensor, other: Tensor, a: Tensor, b: Tensor, ratio: Tensor) -> tuple[Tensor, Any]:
    x, y = a + d, b + other
    near = (d - ratio * other) / y
    return if_finite(near, x / y - ratio), (x, y)


def _quotient_back(e: Tensor, saved: Any, *bases: Tensor) -> tuple[Tensor, Tensor]:
    x, y = saved
    of_x = e / y
    return of_x.sum_to_size(x.shape), (-of_x * (x / y)).sum_to_size(y.shape)


QUOTIENT = Rule(_quotient, _quotient_back)


def _ratio(other: Tensor, a: Tensor, b: Tensor, ratio: Tensor) -> tuple[Tensor, Any]:
    y = b + other
    return if_finite(-ratio * other / y, a / y - ratio), y


def _ratio_back(e: Tensor, y: Tensor, a: Tensor, b: Tensor, ratio: Tensor) -> Tensor:
    return (-e * a / (y * y)).sum_to_size(y.shape)


RATIO = Rule(_ratio, _ratio_back)


@prepares(aten.div.Tensor)
def _(call: Call) -> Step | None:
    x, y = call.args
    if not all_float(call):
        return None if call.moves(y) else linear_step(call)
    if not call.moves(y):
        if not isinstance(y, Tensor):
            return Step(SCALED, (x,), (), (1 / y,))
        return Step(TIMES, (x,), (1 / base(y),))
    if call.moves(x):
        return Step(QUOTIENT, (x, y), (base(x), base(y), base(call.output)))
    return Step(RATIO, (y,), (base(x), base(y), base(call.output)))


# Products of matrices, and convolutions.


def with_half(product: Callable[[Tensor], Tensor], d: Tensor, w: Tensor) -> Tensor:
    """A ``product`` of ``d`` and ``w``, in w's type, and what comes of it in that of displacements.

    Float16 has few numbers as small as displacements and errors are, and none below 6e-8: they are
    divided by a power of two first.
    """
    if d.dtype == w.dtype:
        return product(d)
    if w.dtype != torch.float16:
        return product(d.to(w.dtype)).to(belief_dtype(w.dtype))
    unit = unit_of(d)
    return product((d / unit).to(w.dtype)).to(belief_dtype(w.dtype)) * unit


def _by_matrix(d: Tensor, w: Tensor) -> tuple[Tensor, torch.dtype]:
    return with_half(lambda d: torch.matmul(d, w), d, w), d.dtype


def _by_matrix_back(e: Tensor, dtype: torch.dtype, w: Tensor) -> Tensor:
    return with_half(lambda e: torch.matmul(e, w.mH), e, w).to(dtype)


def _by_float_matrix(d: Tensor, w: Tensor) -> tuple[Tensor, None]:
    return torch.mm(d, w), None


def _by_float_matrix_back(e: Tensor, saved: None, w: Tensor) -> Tensor:
    return torch.nn.functional.linear(e, w)  # e w^T, without a view made in Python


# A processor takes 40 us to set up a product in half precision, where oneDNN does it, and to convert what
# goes in and comes out: as long as a product in float32 of so many multiplications. The matrix is copied,
# so that it has at most so many entries.
SMALL, SMALL_MATRIX = 2**21, 2**18

BY_MATRIX = Rule(_by_matrix, _by_matrix_back, is_fresh=True)
BY_FLOAT_MATRIX = Rule(_by_float_matrix, _by_float_matrix_back, is_fresh=True)


def _from_left(d: Tensor, w: Tensor) -> tuple[Tensor, torch.dtype]:
    return with_half(lambda d: torch.matmul(w, d), d, w), d.dtype


def _from_left_back(e: Tensor, dtype: torch.dtype, w: Tensor) -> Tensor:
    return with_half(lambda e: torch.matmul(w.mH, e), e, w).to(dtype)


FROM_LEFT = Rule(_from_left, _from_left_back)


def _matrix_product(d: Tensor, other: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Any]:
    x, y = a + d.to(a.dtype), b + other.to(b.dtype)
    first = with_half(lambda d: torch.matmul(d, y), d, y)
    found = first + with_half(lambda d: torch.matmul(a, d), other, a)
    return found.to(d.dtype), (x, y, d.dtype)


def _matrix_product_back(e: Tensor, saved: Any, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    x, y, dtype = saved
    return (
        with_half(lambda e: torch.matmul(e, y.mH), e, y).to(dtype),
        with_half(lambda e: torch.matmul(x.mH, e), e, x).to(dtype),
    )


MATRIX_PRODUCT = Rule(_matrix_product, _matrix_product_back)


def _sum_of_product(*given: Any) -> Tensor:
    # beta c + alpha a b, for matrices or numbers.
    *tensors, product, kinds, beta, alpha = given
    c, x, y = given_or_zero(tensors[:-2], kinds)
    a, b = tensors[-2:]
    found = beta * c
    if kinds[1]:
        found = found + alpha * product(x, b + y)
    return found + alpha * product(a, y) if kinds[2] else found


SUM_OF_PRODUCT = Rule(_sum_of_product)


def _sum_of_product_step(call: Call, product: Any, beta: float, alpha: float) -> Step | None:
    operands = call.args[:3]
    if operands[1].dtype != belief_dtype(operands[1].dtype):
        return None
    kinds = tuple([call.moves(operand) for operand in operands])
    moving = tuple([operand for operand in operands if call.moves(operand)])
    if kinds[0] and operands[0].shape != call.output.shape:
        return None
    bases = (base(operands[1]), base(operands[2]))
    return Step(SUM_OF_PRODUCT, moving, bases, (product, kinds, beta, alpha))


def _is_small(x: Tensor, w: Tensor) -> bool:
    return size_now(x.shape[0]) * w.numel() <= SMALL and w.numel() <= SMALL_MATRIX


@prepares(aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default)
def _(call: Call) -> Step | None:
    *added, x, y = call.args[: 3 if call.func in (aten.addmm.default, aten.baddbmm.default) else 2]
    if call.kwargs or any(call.moves(tensor) for tensor in added):
        return _sum_of_product_step(call, torch.matmul, *call.arguments[3:]) if added else None
    if call.moves(x) and call.moves(y):
        return Step(MATRIX_PRODUCT, (x, y), (x.detach(), y.detach()))
    if call.moves(y):
        return Step(FROM_LEFT, (y,), (x.detach(),))
    w = y.detach()
    if w.dim() == 2 and w.device.type == "cpu" and _is_small(x, w):
        w = base(w)
    is_float32 = w.dtype.is_floating_point and belief_dtype(w.dtype) == w.dtype
    rule = BY_FLOAT_MATRIX if w.dim() == 2 and is_float32 else BY_MATRIX
    return Step(rule, (x,), (w,))


@prepares(aten.addcmul.default)
def _(call: Call) -> Step | None:
    return _sum_of_product_step(call, torch.mul, 1, call.arguments[3])


def _mixed(*given: Any) -> Tensor:
    *tensors, weight, kinds = given
    start, end = given_or_zero(tensors, kinds)
    return start + weight * (end - start)


MIXED = Rule(_mixed)


@prepares(aten.lerp.Scalar, aten.lerp.Tensor)
def _(call: Call) -> Step | None:
    *operands, weight = call.args
    kinds = tuple([call.moves(operand) for operand in operands])
    moving = tuple([operand for operand in operands if call.moves(operand)])
    same = all([operand.shape == call.output.shape for operand in moving])
    if not same or call.moves(weight):
        return None
    if isinstance(weight, Tensor):
        return Step(MIXED, moving, (base(weight),), (kinds,))
    return Step(MIXED, moving, (), (weight, kinds))


def _by_rows(d: Tensor, w: Tensor) -> tuple[Tensor, torch.dtype]:
    return with_half(lambda d: torch.nn.functional.linear(d, w), d, w), d.dtype


def _by_rows_back(e: Tensor, dtype: torch.dtype, w: Tensor) -> Tensor:
    return with_half(lambda e: torch.matmul(e, w.conj()), e, w).to(dtype)


BY_ROWS = Rule(_by_rows, _by_rows_back)


@prepares(aten.linear.default)
def _(call: Call) -> Step | None:
    x, w = call.args[:2]
    return Step(BY_ROWS, (x,), (w.detach(),)) if only_first_moves(call) else None


def _convolved(d: Tensor, w: Tensor, *how: Any) -> tuple[Tensor, Any]:
    # Of the input only shape and layout count on the way back.
    like = d if d.dtype == w.dtype else torch.empty_like(d, dtype=w.dtype)
    return with_half(lambda d: torch.convolution(d, w, None, *how), d, w), (like, d.dtype)


def _convolved_back(e: Tensor, saved: Any, w: Tensor, *how: Any) -> Tensor:
    (like, dtype), only_input = saved, [True, False, False]

    def product(e: Tensor) -> Tensor:
        return aten.convolution_backward.default(e, like, w, None, *how, only_input)[0]

    return with_half(product, e, w).to(dtype)


CONVOLVED = Rule(_convolved, _convolved_back, is_fresh=True)


@prepares(aten.convolution.default)
def _(call: Call) -> Step | None:
    if not only_first_moves(call):
        return None
    x, w, _, *how = call.args
    static = tuple([tuple(value) if isinstance(value, list) else value for value in how])
    return Step(CONVOLVED, (x,), (w.detach(),), static)


@prepares(aten.native_dropout.default)
def _(call: Call) -> Step:
    x, p, train = call.arguments
    if train is False:
        return Step(SAME, (x,))
    kept = 0.0 if p == 1 else 1 / (1 - p)
    return Step(TIMES, (x,), (base(call.output[1].to(x.dtype)) * kept,))
