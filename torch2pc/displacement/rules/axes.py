"""Functions of all numbers along some axes: softmax, normalisation, attention."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from torch2pc.displacement.rules.core import (
    Call,
    Rule,
    Step,
    aten,
    base,
    given_or_zero,
    if_finite,
    only_first_moves,
    operations,
    prepares,
    unsqueezed,
)
from torch2pc.displacement.rules.linear import (
    TIMES,
)

# Softmax.


def _softmax(d: Tensor, a: Tensor, p: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    grown = torch.expm1(d)
    mean = (p * grown).sum(dim, keepdim=True)
    near = p * (grown - mean) / (1 + mean)
    far = torch.softmax(a + d, dim) - p
    found = torch.where((d.abs().amax(dim, keepdim=True) < 1) & near.isfinite(), near, far)
    return found, p + found


def _softmax_back(e: Tensor, p: Tensor, a: Tensor, before: Tensor, dim: int) -> Tensor:
    return p * (e - (p * e).sum(dim, keepdim=True))


SOFTMAX = Rule(_softmax, _softmax_back)


@prepares(aten._softmax.default, aten._safe_softmax.default)
def _(call: Call) -> Step:
    x, dim = call.args[:2]
    return Step(SOFTMAX, (x,), (base(x), base(call.output)), (dim,))


def _log_softmax(d: Tensor, a: Tensor, y: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    near = d - torch.log1p((torch.exp(y) * torch.expm1(d)).sum(dim, keepdim=True))
    far = torch.log_softmax(a + d, dim) - y
    found = torch.where((d.abs().amax(dim, keepdim=True) < 1) & near.isfinite(), near, far)
    return found, y + found


def _log_softmax_back(e: Tensor, y: Tensor, a: Tensor, before: Tensor, dim: int) -> Tensor:
    return e - torch.exp(y) * e.sum(dim, keepdim=True)


LOG_SOFTMAX = Rule(_log_softmax, _log_softmax_back)


@prepares(aten._log_softmax.default)
def _(call: Call) -> Step:
    x, dim = call.args[:2]
    return Step(LOG_SOFTMAX, (x,), (base(x), base(call.output)), (dim,))


def _log_sum_exp(
    d: Tensor, a: Tensor, p: Tensor, before: Tensor, dim: Any, keepdim: bool
) -> tuple[Tensor, Tensor]:
    near = torch.log1p((p * torch.expm1(d)).sum(dim, keepdim=keepdim))
    x = a + d
    after = torch.logsumexp(x, dim, keepdim=keepdim)
    is_near = d.abs().amax(dim, keepdim=keepdim) < 1
    shares = torch.exp(x - (after if keepdim else unsqueezed(after, dim)))
    return torch.where(is_near & near.isfinite(), near, after - before), shares


def _log_sum_exp_back(e: Tensor, shares: Tensor, *rest: Any) -> Tensor:
    *_, dim, keepdim = rest
    return shares * (e if keepdim else unsqueezed(e, dim))


LOG_SUM_EXP = Rule(_log_sum_exp, _log_sum_exp_back)


@prepares(aten.logsumexp.default)
def _(call: Call) -> Step:
    x, dim, keepdim = call.arguments
    a = base(x)
    dim = tuple([k % a.dim() for k in dim])
    before = base(call.output)
    p = torch.exp(a - (before if keepdim else unsqueezed(before, dim)))
    return Step(LOG_SUM_EXP, (x,), (a, p, before), (dim, keepdim))


class SoftmaxMoved(torch.autograd.Function):
    """The displacement of a softmax over the last axis, for rules that autograd differentiates."""

    @staticmethod
    def forward(ctx: Any, d: Tensor, a: Tensor, p: Tensor) -> Tensor:
        found, after = _softmax(d, a, p, -1)
        ctx.save_for_backward(after)
        return found

    @staticmethod
    def backward(ctx: Any, e: Tensor) -> Any:
        (after,) = ctx.saved_tensors
        return _softmax_back(e, after, e, e, -1), None, None


# Normalisation.


def _normalised(
    d: Tensor,
    c: Tensor,
    s: Tensor,
    *rest: Any,
) -> tuple[Tensor, Any]:
    *weight, axes = rest
    # With c = a - mean a, s^2 = var a + eps: what the mean square of c + dc has grown by is
    # mean((2 c + dc) dc), and 1/s' - 1/s = -(s'^2 - s^2) / (s s' (s + s')).
    moved = d.reshape(c.shape)
    dc = moved - moved.mean(axes, keepdim=True)
    dvar = ((2 * c + dc) * dc).mean(axes, keepdim=True)
    after = torch.sqrt((s * s + dvar).clamp(min=0))
    found = dc / after - c * (dvar / (s * after * (s + after)))
    normal = (c + dc) / after
    found = found.reshape(d.shape)
    return (found * weight[0] if weight else found), (normal, after)


def _normalised_back(e: Tensor, saved: Any, c: Tensor, s: Tensor, *rest: Any) -> Tensor:
    *weight, axes = rest
    normal, after = saved
    weighted = (e * weight[0] if weight else e).reshape(c.shape)
    centred = weighted - weighted.mean(axes, keepdim=True)
    along = (weighted * normal).mean(axes, keepdim=True)
    return ((centred - normal * along) / after).reshape(e.shape)


NORMALISED = Rule(_normalised, _normalised_back)


def normalised_step(
    x: Tensor, weight: Tensor | None, eps: float, grouped: tuple[int, ...], axes: tuple[int, ...]
) -> Step:
    """The step of a normalisation of ``x``, seen in the shape ``grouped``, over ``axes``.

    ``weight`` has a shape that x can be multiplied by.
    """
    a = base(x).reshape(grouped)
    c = a - a.mean(axes, keepdim=True)
    s = torch.sqrt((c * c).mean(axes, keepdim=True) + eps)
    tensors = (c, s) if weight is None else (c, s, base(weight))
    return Step(NORMALISED, (x,), tensors, (axes,))


def of_channels(values: Tensor, x: Tensor) -> Tensor:
    """One number for each channel, in a shape that ``x`` can be multiplied by."""
    return values.reshape(1, -1, *[1] * (x.dim() - 2))


@prepares(
    *operations(
        """native_batch_norm cudnn_batch_norm _batch_norm_with_update _batch_norm_no_update
        _native_batch_norm_legit _native_batch_norm_legit.no_stats
        _native_batch_norm_legit_no_training"""
    )
)
def _(call: Call) -> Step | None:
    if not only_first_moves(call):
        return None
    given = call.named
    x, weight = call.args[0], given["weight"]
    training = given.get("training", call.func is aten._batch_norm_with_update.default)
    eps = given["eps"] if "eps" in given else given["epsilon"]
    if training or given.get("running_mean") is None:
        axes = tuple([k for k in range(x.dim()) if k != 1])
        scale = None if weight is None else of_channels(weight, x)
        return normalised_step(x, scale, eps, tuple(x.shape), axes)
    scale = 1 / torch.sqrt(base(given["running_var"]) + eps)
    return Step(TIMES, (x,), (of_channels(scale if weight is None else scale * base(weight), x),))


@prepares(aten.native_layer_norm.default)
def _(call: Call) -> Step | None:
    x, shape, weight, _, eps = call.args
    if not only_first_moves(call):
        return None
    axes = tuple(range(x.dim() - len(shape), x.dim()))
    return normalised_step(x, weight, eps, tuple(x.shape), axes)


@prepares(aten.native_group_norm.default)
def _(call: Call) -> Step | None:
    x, weight, _, batch, _, _, groups, eps = call.args
    if not only_first_moves(call):
        return None
    scale = None if weight is None else of_channels(weight, x)
    return normalised_step(x, scale, eps, (batch, groups, -1), (2,))


def _root_mean_square(d: Tensor, a: Tensor, s: Tensor, *rest: Any) -> tuple[Tensor, Any]:
    *weight, axes = rest
    dsquare = ((2 * a + d) * d).mean(axes, keepdim=True)
    after = torch.sqrt((s * s + dsquare).clamp(min=0))
    found = d / after - a * (dsquare / (s * after * (s + after)))
    return (found * weight[0] if weight else found), ((a + d) / after, after)


def _root_mean_square_back(e: Tensor, saved: Any, a: Tensor, s: Tensor, *rest: Any) -> Tensor:
    *weight, axes = rest
    normal, after = saved
    weighted = e * weight[0] if weight else e
    return (weighted - normal * (weighted * normal).mean(axes, keepdim=True)) / after


ROOT_MEAN_SQUARE = Rule(_root_mean_square, _root_mean_square_back)


def _rms_norm(call: Call) -> Step | None:
    x, shape, weight, eps = call.arguments
    if not only_first_moves(call):
        return None
    axes = tuple(range(x.dim() - len(shape), x.dim()))
    a = base(x)
    s = torch.sqrt(
        (a * a).mean(axes, keepdim=True) + (torch.finfo(x.dtype).eps if eps is None else eps)
    )
    tensors = (a, s) if weight is None else (a, s, base(weight))
    return Step(ROOT_MEAN_SQUARE, (x,), tensors, (axes,))


if hasattr(aten, "_fused_rms_norm"):  # since PyTorch 2.8
    prepares(aten._fused_rms_norm.default)(_rms_norm)


def _length(
    d: Tensor, a: Tensor, before: Tensor, dim: tuple[int, ...], keepdim: bool
) -> tuple[Tensor, Any]:
    grown = ((2 * a + d) * d).sum(dim, keepdim=True)
    x = a + d
    after = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    found = if_finite(grown / (after + before), after - before)
    return (found if keepdim else found.squeeze(dim)), (x, after)


def _length_back(e: Tensor, saved: Any, *rest: Any) -> Tensor:
    (x, after), (dim, keepdim) = saved, rest[-2:]
    return (x / after.masked_fill(after == 0, 1)) * (e if keepdim else unsqueezed(e, dim))


LENGTH = Rule(_length, _length_back)


@prepares(aten.linalg_vector_norm.default)
def _(call: Call) -> Step | None:
    x, order, dim, keepdim, _ = call.arguments
    if order != 2 or not dim:
        return None
    dim = tuple([k % x.dim() for k in dim])
    before = base(call.output)
    before = before if keepdim else unsqueezed(before, dim)
    return Step(LENGTH, (x,), (base(x), before), (dim, keepdim))


def _variance(d: Tensor, a: Tensor, dim: Any, correction: float, keepdim: bool) -> Tensor:
    c, dc = a - a.mean(dim, keepdim=True), d - d.mean(dim, keepdim=True)
    count = math.prod([a.shape[k] for k in dim])
    return ((2 * c + dc) * dc).sum(dim, keepdim=keepdim) / (count - correction)


VARIANCE = Rule(_variance)


def _spread(d: Tensor, a: Tensor, before: Tensor, dim: Any, *rest: Any) -> Tensor:
    grown = _variance(d, a, dim, *rest)
    square = before * before + grown
    # Of equal numbers it is 0, and so is its slope, as PyTorch has it.
    both = torch.sqrt(square.masked_fill(square <= 0, 0)) + before
    return grown / both.masked_fill(both == 0, 1)


SPREAD = Rule(_spread)


@prepares(aten.var.correction, aten.std.correction)
def _(call: Call) -> Step | None:
    x, dim, correction, keepdim = call.arguments
    dims = tuple(range(x.dim())) if not dim else tuple(dim)
    static = (dims, 1 if correction is None else correction, keepdim)
    if call.func is aten.var.correction:
        return Step(VARIANCE, (x,), (base(x),), static)
    return Step(SPREAD, (x,), (base(x), base(call.output)), static)


# Attention in one operation.


def _attention(*given: Any) -> Tensor:
    # softmax(scale q k^T + mask) v, from the displacement of the scores on.
    *tensors, scale, kinds = given
    q, k, v, scores, p = tensors[-5:]
    d_q, d_k, d_v = given_or_zero(tensors[:-5], kinds)
    found = p @ d_v if kinds[2] else 0.0
    if kinds[0] or kinds[1]:
        d_scores = d_q @ (k + d_k).mT if kinds[0] else 0.0
        d_scores = (d_scores + q @ d_k.mT if kinds[1] else d_scores) * scale
        d_p = SoftmaxMoved.apply(d_scores, scores, p)  # type: ignore[no-untyped-call]
        found = found + d_p @ (v + d_v)
    return found  # type: ignore[return-value]


ATTENTION = Rule(_attention)
_ATTENTIONS = [
    getattr(aten, name).default
    for name in (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    )
    if hasattr(aten, name)
]


@prepares(*_ATTENTIONS)
def _(call: Call) -> Step | None:
    given = call.named
    tensors = call.args[:3]
    mask = given.get("attn_mask", given.get("attn_bias"))
    q, k, v = [base(tensor) for tensor in tensors]
    same_heads = q.shape[:-2] == k.shape[:-2] == v.shape[:-2]
    if given.get("dropout_p") or call.moves(mask) or not same_heads:
        return None
    scale = given.get("scale")
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = (q @ k.mT) * scale
    if mask is not None:
        scores = scores + base(mask)
    if given.get("is_causal"):
        above = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(above, -math.inf)
    kinds = tuple([call.moves(tensor) for tensor in tensors])
    moving = tuple([tensor for tensor in tensors if call.moves(tensor)])
    p = torch.softmax(scores, -1)
    return Step(ATTENTION, moving, (q, k, v, scores, p), (scale, kinds))
