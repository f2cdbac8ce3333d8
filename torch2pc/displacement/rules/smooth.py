"""Smooth functions of one number. Each has an identity for f(a + d) - f(a) that holds for any d."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch2pc.displacement.rules.core import (
    Call,
    Rule,
    Step,
    aten,
    base,
    if_finite,
    prepares,
)
from torch2pc.displacement.rules.kinks import (
    ABSOLUTE,
    below_moved,
    relu_bases,
    relu_moved,
)
from torch2pc.displacement.rules.linear import (
    ONE,
    SAME,
)


class Smooth(NamedTuple):
    """e f'(x), and f(a + d) - f(a) from what is prepared at a.

    ``prepare(a, y, *static)`` with y = f(a) gives the tensors that ``displace(d, *prepared, *static)``
    takes. ``value`` is needed where that can overflow: the plain difference stands in for it then.
    """

    derivative: Callable[..., Tensor]
    prepare: Callable[..., tuple[Tensor, ...]]
    displace: Callable[..., Tensor]
    value: Callable[..., Tensor] | None = None


def smooth_rule(f: Smooth) -> Rule:
    """The rule of a smooth function of one number."""

    def forward(d: Tensor, a: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        static, prepared = _split(rest)
        x = a + d
        found = f.displace(d, *prepared, *static)
        if f.value is not None:
            found = if_finite(found, f.value(x, *static) - f.value(a, *static))
        return found, x

    def backward(e: Tensor, x: Tensor, a: Tensor, *rest: Any) -> Tensor:
        return f.derivative(e, x, *_split(rest)[0])

    return Rule(forward, backward)


def _split(rest: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """(static, tensors) of what a rule is given after the displacement."""
    count = sum([isinstance(value, Tensor) for value in rest])
    return rest[count:], rest[:count]


def _as_they_are(a: Tensor, y: Tensor, *static: Any) -> tuple[Tensor, ...]:
    return a, y


# tanh(a + d) - tanh(a) = tanh(d) (1 - tanh(a) tanh(a + d)). With h = |tanh a|, s = +-1 the sign of a
# and q = sigmoid(-2 s (a + d)) the bracket is (1 - h) + 2 h q, which has no differences, and the
# derivative at a + d is 4 q (1 - q). And sigmoid(a) = (1 + tanh(a / 2)) / 2.


def tanh_bases(a: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(-2 s, -2 |a|, 1 - h, 2 h)"""
    towards = torch.where(a < 0, 2.0, -2.0).to(a.dtype)
    start = -2 * a.abs()
    return towards, start, 2 * torch.sigmoid(start), 2 * torch.tanh(-start / 2)


def sigmoid_bases(a: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same for a / 2, so that tanh(d / 2) times the bracket is sigmoid's displacement."""
    towards, start, rest, h = tanh_bases(a / 2)
    return towards / 2, start, rest / 2, h / 2


def _tanh(d: Tensor, towards: Tensor, start: Tensor, rest: Tensor, h: Tensor) -> Any:
    q = torch.sigmoid(torch.addcmul(start, towards, d))
    return torch.tanh(d).mul_(torch.addcmul(rest, h, q)), q


def _tanh_back(e: Tensor, q: Tensor, *bases: Tensor) -> Tensor:
    return aten.sigmoid_backward.default(e, q).mul_(4)


def _sigmoid(d: Tensor, towards: Tensor, start: Tensor, rest: Tensor, h: Tensor) -> Any:
    q = torch.sigmoid(torch.addcmul(start, towards, d))
    return torch.tanh(d / 2).mul_(torch.addcmul(rest, h, q)), q


def _sigmoid_back(e: Tensor, q: Tensor, *bases: Tensor) -> Tensor:
    return aten.sigmoid_backward.default(e, q)


TANH = Rule(_tanh, _tanh_back)
SIGMOID = Rule(_sigmoid, _sigmoid_back)


@prepares(aten.tanh.default)
def _(call: Call) -> Step:
    return Step(TANH, (call.args[0],), tanh_bases(base(call.args[0])))


@prepares(aten.sigmoid.default)
def _(call: Call) -> Step:
    return Step(SIGMOID, (call.args[0],), sigmoid_bases(base(call.args[0])))


def exp_moved(d: Tensor, a: Tensor) -> Tensor:
    """exp(a + d) - exp(a), from the larger of the two, so that neither factor overflows."""
    grown = torch.copysign(-torch.expm1(-d.abs()), d)
    return torch.exp(torch.maximum(a, a + d)) * grown


def _elu_prepared(
    a: Tensor, y: Tensor, alpha: float, scale: float, input_scale: float
) -> tuple[Tensor, ...]:
    return relu_bases(a)


def _elu(
    d: Tensor, lack: Tensor, top: Tensor, alpha: float, scale: float, input_scale: float
) -> Tensor:
    above, _ = relu_moved(d, lack, top)
    curved = exp_moved(input_scale * below_moved(d, lack, top), -input_scale * lack)
    return scale * above + (scale * alpha) * curved


def _elu_derivative(e: Tensor, x: Tensor, alpha: float, scale: float, input_scale: float) -> Tensor:
    return aten.elu_backward.default(e, alpha, scale, input_scale, False, x)


# softplus(a) = max(a, 0) + log(1 + exp(-|a|)).


def softplus_bases(a: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(relu(-a), relu(a), -|a|, 1 + exp(-|a|))"""
    size = -a.abs()
    return *relu_bases(a), size, 1 + torch.exp(size)


def softplus_moved(d: Tensor, lack: Tensor, top: Tensor, size: Tensor, start: Tensor) -> Tensor:
    """softplus(a + d) - softplus(a)"""
    above, _ = relu_moved(d, lack, top)
    # exp(-|x|) moves as -|x| does, by below - above, one of which is 0 unless the sign changes.
    moved = exp_moved(below_moved(d, lack, top) - above, size)
    return above + torch.log1p(moved / start)


def _softplus_prepared(a: Tensor, y: Tensor, beta: float, threshold: float) -> tuple[Tensor, ...]:
    return softplus_bases(beta * a)


def _softplus(d: Tensor, *rest: Any) -> Tensor:
    *bases, beta, _ = rest
    return softplus_moved(beta * d, *bases) / beta


def _softplus_derivative(e: Tensor, x: Tensor, beta: float, threshold: float) -> Tensor:
    return aten.softplus_backward.default(e, x, beta, threshold)


# silu, mish and gelu are a gate(a), and move by d gate(a + d) + a times what the gate moves by.


def _silu(d: Tensor, a: Tensor, *bases: Tensor) -> Tensor:
    moved, _ = _sigmoid(d, *bases)
    return d * torch.sigmoid(a + d) + a * moved


def _mish_prepared(a: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    softplus = _softplus_of(a)
    return a, *softplus_bases(a), *tanh_bases(softplus)


def _softplus_of(x: Tensor) -> Tensor:
    return x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))


def _mish(d: Tensor, a: Tensor, *bases: Tensor) -> Tensor:
    moved, _ = _tanh(softplus_moved(d, *bases[:4]), *bases[4:])
    return d * torch.tanh(_softplus_of(a + d)) + a * moved


# The mean of f over [a, a + d], by three points of Gauss and Legendre, exact up to the fifth power.
GAUSS_LEGENDRE = ((5 / 18, 0.5 - math.sqrt(0.15)), (8 / 18, 0.5), (5 / 18, 0.5 + math.sqrt(0.15)))


def moved_along(
    d: Tensor, a: Tensor, slope: Callable[[Tensor], Tensor], f: Callable[[Tensor], Tensor]
) -> Tensor:
    """f(a + d) - f(a): the mean slope for as far as it is right, the rest as a difference.

    That is as far as slopes like exp(-x^2) change by less than a factor of about 2.
    """
    within = (0.25 if d.dtype == torch.float32 else 0.01) / (a.abs() / 1.6).clamp(min=1)
    c = torch.minimum(torch.maximum(d, -within), within)
    slopes = [weight * slope(torch.add(a, c, alpha=place)) for weight, place in GAUSS_LEGENDRE]
    return c * (slopes[0] + slopes[1] + slopes[2]) + (f(a + d) - f(a + c))


def _erf_slope(x: Tensor) -> Tensor:
    return (2 / math.sqrt(math.pi)) * torch.exp(-x * x)


def _erf(d: Tensor, a: Tensor) -> Tensor:
    # Next to 1, erf has no digits of its own, but 1 - erf has; and erf is odd.
    sign = torch.ones_like(a).copysign(a)
    return sign * moved_along(sign * d, a.abs(), _erf_slope, lambda x: -torch.erfc(x))


def _normal(x: Tensor) -> Tensor:
    """Phi(x), the share of a normal distribution below x."""
    return torch.erfc(x * -math.sqrt(0.5)) / 2


def _normal_slope(x: Tensor) -> Tensor:
    return torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


# gelu's gate is Phi; its approximation's is (1 + tanh u(a)) / 2 = sigmoid(2 u(a)).
U = 2 * math.sqrt(2 / math.pi)
CUBIC = 0.044715


def _gelu_prepared(a: Tensor, y: Tensor, approximate: str) -> tuple[Tensor, ...]:
    if approximate == "none":
        return (a,)
    return a, *sigmoid_bases(U * (a + CUBIC * a**3))


def _gelu(d: Tensor, a: Tensor, *rest: Any) -> Tensor:
    *bases, approximate = rest
    x = a + d
    if approximate == "none":
        return d * _normal(x) + a * moved_along(d, a, _normal_slope, _normal)
    moved, _ = _sigmoid(U * d * (1 + CUBIC * (3 * a * x + d * d)), *bases)
    return d * torch.sigmoid(U * (x + CUBIC * x**3)) + a * moved


def _gelu_value(x: Tensor, approximate: str) -> Tensor:
    return torch.nn.functional.gelu(x, approximate=approximate)


def _gelu_derivative(e: Tensor, x: Tensor, approximate: str) -> Tensor:
    return aten.gelu_backward.default(e, x, approximate=approximate)


def _log_moved(d: Tensor, a: Tensor) -> Tensor:
    return torch.where(d > -a / 2, torch.log1p(d / a), torch.log((a + d) / a))


def _log1p_moved(d: Tensor, start: Tensor, a: Tensor) -> Tensor:
    """``start`` is 1 + a. What rounding takes from a + d is what is left of it where d is near -1."""
    s = a + d
    lost = (a - (s - (s - a))) + (d - (s - a))
    below = torch.log(((1 + s) + lost) / start)
    return torch.where(d > -start / 2, torch.log1p(d / start), below)


def _power(d: Tensor, a: Tensor, y: Tensor, p: float) -> Tensor:
    if p == 2:
        return d * (2 * a + d)
    if p == 3:
        return d * (3 * a * (a + d) + d * d)
    near = y * torch.expm1(p * torch.log1p(d / a))
    return torch.where(d.abs() < a.abs() / 4, near, torch.pow(a + d, p) - y)


SMOOTH: dict[Any, Smooth] = {
    aten.elu.default: Smooth(_elu_derivative, _elu_prepared, _elu),
    aten.softplus.default: Smooth(_softplus_derivative, _softplus_prepared, _softplus),
    aten.log_sigmoid_forward.default: Smooth(
        lambda e, x: e * torch.sigmoid(-x),
        lambda a, y: softplus_bases(-a),
        lambda d, *bases: -softplus_moved(-d, *bases),
    ),
    aten.silu.default: Smooth(
        lambda e, x: aten.silu_backward.default(e, x),
        lambda a, y: (a, *sigmoid_bases(a)),
        _silu,
    ),
    aten.mish.default: Smooth(lambda e, x: aten.mish_backward.default(e, x), _mish_prepared, _mish),
    aten.gelu.default: Smooth(_gelu_derivative, _gelu_prepared, _gelu, _gelu_value),
    aten.erf.default: Smooth(
        lambda e, x: e * _erf_slope(x),
        lambda a, y: (a,),
        _erf,
    ),
    aten.exp.default: Smooth(
        lambda e, x: e * torch.exp(x), lambda a, y: (a,), exp_moved, torch.exp
    ),
    aten.expm1.default: Smooth(
        lambda e, x: e * torch.exp(x), lambda a, y: (a,), exp_moved, torch.expm1
    ),
    aten.log.default: Smooth(lambda e, x: e / x, lambda a, y: (a,), _log_moved, torch.log),
    aten.log1p.default: Smooth(
        lambda e, x: e / (1 + x), lambda a, y: (1 + a, a), _log1p_moved, torch.log1p
    ),
    aten.sqrt.default: Smooth(
        lambda e, x: e / (2 * torch.sqrt(x)),
        _as_they_are,
        lambda d, a, y: d / (torch.sqrt(a + d) + y),
        torch.sqrt,
    ),
    aten.rsqrt.default: Smooth(
        lambda e, x: -e / (2 * x * torch.sqrt(x)),
        _as_they_are,
        lambda d, a, y: -d * y / (torch.sqrt(a + d) * (torch.sqrt(a + d) + torch.sqrt(a))),
        torch.rsqrt,
    ),
    aten.reciprocal.default: Smooth(
        lambda e, x: -e / (x * x),
        _as_they_are,
        lambda d, a, y: -d * y / (a + d),
        torch.reciprocal,
    ),
    aten.sin.default: Smooth(
        lambda e, x: e * torch.cos(x),
        lambda a, y: (a,),
        lambda d, a: 2 * torch.sin(d / 2) * torch.cos(a + d / 2),
    ),
    aten.cos.default: Smooth(
        lambda e, x: -e * torch.sin(x),
        lambda a, y: (a,),
        lambda d, a: -2 * torch.sin(d / 2) * torch.sin(a + d / 2),
    ),
    aten.pow.Tensor_Scalar: Smooth(
        lambda e, x, p: e * (p * torch.pow(x, p - 1)), _as_they_are, _power, torch.pow
    ),
}
_SMOOTH_RULES = {operation: smooth_rule(f) for operation, f in SMOOTH.items()}


def smooth_step(x: Tensor, y: Tensor, operation: Any, static: tuple[Any, ...]) -> Step:
    """The step of a smooth function, at ``x`` with the value ``y``."""
    a = base(x)
    prepared = SMOOTH[operation].prepare(a, base(y), *static)
    return Step(_SMOOTH_RULES[operation], (x,), (a, *prepared), static)


@prepares(*SMOOTH)
def _(call: Call) -> Step | None:
    x, *static = call.arguments
    y = call.output[0] if isinstance(call.output, tuple) else call.output
    if not x.dtype.is_floating_point:
        return None
    if call.func is aten.softplus.default and static[1] < 20:
        return None  # it is cut where it is not straight yet
    return smooth_step(x, y, call.func, tuple(static))


@prepares(aten.celu.default)
def _(call: Call) -> Step:
    x, alpha = call.arguments
    return smooth_step(x, call.output, aten.elu.default, (alpha, 1.0, 1 / alpha))


def _glu(d: Tensor, a: Tensor, gate: Tensor, *rest: Any) -> tuple[Tensor, Any]:
    *bases, dim = rest
    x, _ = a.chunk(2, dim)
    of_x, of_y = d.chunk(2, dim)
    moved, _ = _sigmoid(of_y, *bases)
    return of_x * (gate + moved) + x * moved, a + d


GLU = Rule(_glu, lambda e, x, *rest: aten.glu_backward.default(e, x, rest[-1]))


@prepares(aten.glu.default)
def _(call: Call) -> Step:
    x, dim = call.arguments
    a = base(x)
    y = a.chunk(2, dim)[1]
    return Step(GLU, (x,), (a, torch.sigmoid(y), *sigmoid_bases(y)), (dim,))


# Two that PyTorch makes of other operations, whose rules would subtract nearly equal numbers.


COMPOSING = {aten.sub.Tensor, aten.div.Tensor}


def composed_step(call: Call, made_by: Callable[[Any], Step | None]) -> Step | None:
    """The step of tanhshrink or softsign, if ``call`` is the last operation of one.

    ``made_by`` gives the step that computed a tensor.
    """
    if len(call.args) != 2 or call.kwargs:
        return None
    x, step = call.args[0], made_by(call.args[1])
    if step is None or not call.moves(x):
        return None
    if call.func is aten.sub.Tensor and step.rule is TANH and step.inputs[0] is x:
        return Step(TANH_SHRINK, (x,), (base(x),))
    if call.func is aten.div.Tensor and step.rule is SAME and step.static == ONE:
        absolute = made_by(step.inputs[0])
        if absolute is not None and absolute.rule is ABSOLUTE and absolute.inputs[0] is x:
            return Step(SOFT_SIGN, (x,), (base(x),))
    return None


def _tanh_shrink(d: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    # d - tanh(d) + tanh(d) tanh(a) tanh(a + d), from the identity for tanh.
    t, x = torch.tanh(d), torch.tanh(a + d)
    square = d * d
    series = 1 / 3 + square * (-2 / 15 + square * (17 / 315 + square * (-62 / 2835)))
    # As far as what is left out of the series is less than the difference is off by.
    within = 0.3 if d.dtype == torch.float32 else 0.04
    remainder = torch.where(d.abs() < within, d * square * series, d - t)
    return remainder + t * torch.tanh(a) * x, x


TANH_SHRINK = Rule(_tanh_shrink, lambda e, x, a: e * (x * x))


def _soft_sign(d: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    # (d + x |a| - a |x|) / ((1 + |a|) (1 + |x|)), where the two products are equal or opposite.
    x = a + d
    start, end = 1 + a.abs(), 1 + x.abs()
    crossed = (x / end) * (a.abs() / start) - (a / start) * (x.abs() / end)
    near = d / start / end + torch.where((a < 0) == (x < 0), 0.0, crossed)
    return if_finite(near, x / end - a / start), end


SOFT_SIGN = Rule(_soft_sign, lambda e, end, a: e / (end * end))
