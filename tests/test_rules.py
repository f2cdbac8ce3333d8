"""Each rule's displacement against a difference that is right: mpmath for functions of one number,
float64 for the rest, down to displacements that float32 could not subtract."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import mpmath
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from mpmath import mpf
from torch import Tensor, nn
from torch.nn import functional

from tests.cases import Does, assert_close
from torch2pc.displacement.lines import Displacement
from torch2pc.displacement.recorder import Recorder
from torch2pc.displacement.rules.axes import ROOT_MEAN_SQUARE
from torch2pc.displacement.rules.core import DIFFERENCE
from torch2pc.displacement.rules.linear import BY_ROWS


def displacement_of(function: Callable[[Tensor], Tensor], a: Tensor) -> Displacement:
    x = a.clone().requires_grad_(a.is_floating_point())
    recorder = Recorder(x)
    with recorder:
        output = function(x)
    return recorder.displacement(output)


# Functions of one number.


def sigmoid(x: mpf) -> mpf:
    return 1 / (1 + mpmath.exp(-x))


def softplus(x: mpf) -> mpf:
    return mpmath.log1p(mpmath.exp(x)) if x < 200 else x + mpmath.exp(-x)


def clamp(x: mpf, low: float, high: float) -> mpf:
    return min(max(x, mpf(low)), mpf(high))


def elu(x: mpf) -> mpf:
    return x if x > 0 else mpmath.expm1(x)


def gelu_tanh(x: mpf) -> mpf:
    u = mpmath.sqrt(2 / mpmath.pi) * (x + mpf(0.044715) * x**3)
    return x * (1 + mpmath.tanh(u)) / 2


# With its value, and the places where its slope jumps, or has no bound.
POINTWISE: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[mpf], mpf], tuple[float, ...]]] = {
    "ReLU": (nn.ReLU(), lambda x: max(x, mpf(0)), (0,)),
    "ReLU6": (nn.ReLU6(), lambda x: clamp(x, 0, 6), (0, 6)),
    "LeakyReLU": (nn.LeakyReLU(0.25), lambda x: x if x > 0 else x / 4, (0,)),
    "PReLU": (nn.PReLU(), lambda x: x if x > 0 else x / 4, (0,)),
    "RReLU": (nn.RReLU(0.125, 0.375).eval(), lambda x: x if x > 0 else x / 4, (0,)),
    "Hardtanh": (nn.Hardtanh(), lambda x: clamp(x, -1, 1), (-1, 1)),
    "Hardsigmoid": (nn.Hardsigmoid(), lambda x: clamp(x + 3, 0, 6) / 6, (-3, 3)),
    "Hardswish": (nn.Hardswish(), lambda x: x * clamp(x + 3, 0, 6) / 6, (-3, 3)),
    "Hardshrink": (nn.Hardshrink(0.5), lambda x: x if abs(x) > 0.5 else mpf(0), (-0.5, 0.5)),
    "Softshrink": (nn.Softshrink(0.5), lambda x: x - clamp(x, -0.5, 0.5), (-0.5, 0.5)),
    "clamp": (lambda x: x.clamp(-1.0, 0.5), lambda x: clamp(x, -1, 0.5), (-1, 0.5)),
    "clamp min": (lambda x: x.clamp(min=0.5), lambda x: max(x, mpf(0.5)), (0.5,)),
    "clamp max": (lambda x: x.clamp(max=0.5), lambda x: min(x, mpf(0.5)), (0.5,)),
    "Threshold": (nn.Threshold(0.5, 2.0), lambda x: x if x > 0.5 else mpf(2), (0.5,)),
    "abs": (torch.abs, abs, (0,)),
    "Tanh": (nn.Tanh(), mpmath.tanh, ()),
    "Sigmoid": (nn.Sigmoid(), sigmoid, ()),
    "Softplus": (nn.Softplus(), softplus, ()),
    "LogSigmoid": (nn.LogSigmoid(), lambda x: -softplus(-x), ()),
    "SiLU": (nn.SiLU(), lambda x: x * sigmoid(x), ()),
    "Mish": (nn.Mish(), lambda x: x * mpmath.tanh(softplus(x)), ()),
    "GELU": (nn.GELU(), lambda x: x * mpmath.ncdf(x), ()),
    "GELU tanh": (nn.GELU("tanh"), gelu_tanh, ()),
    "ELU": (nn.ELU(), elu, ()),
    "SELU": (
        nn.SELU(),
        lambda x: mpf(1.0507009873554805) * (x if x > 0 else mpf(1.6732632423543772) * elu(x)),
        (0,),
    ),
    "CELU": (nn.CELU(0.5), lambda x: x if x > 0 else mpmath.expm1(2 * x) / 2, ()),
    "Tanhshrink": (nn.Tanhshrink(), lambda x: x - mpmath.tanh(x), ()),
    "Softsign": (nn.Softsign(), lambda x: x / (1 + abs(x)), ()),
    "square": (torch.square, lambda x: x * x, ()),
    "cube": (lambda x: x**3, lambda x: x**3, ()),
    "fourth power": (lambda x: x**4, lambda x: x**4, ()),
    "exp": (torch.exp, mpmath.exp, ()),
    "erf": (torch.erf, mpmath.erf, ()),
    "expm1": (torch.expm1, mpmath.expm1, ()),
    "log": (torch.log, lambda x: mpmath.log(x) if x > 0 else mpf("nan"), ()),
    "log1p": (torch.log1p, lambda x: mpmath.log1p(x) if x > -1 else mpf("nan"), (-1,)),
    "sqrt": (torch.sqrt, lambda x: mpmath.sqrt(x) if x >= 0 else mpf("nan"), ()),
    "rsqrt": (torch.rsqrt, lambda x: 1 / mpmath.sqrt(x) if x > 0 else mpf("nan"), ()),
    "clamp_max": (lambda x: torch.ops.aten.clamp_max(x, 0.5), lambda x: min(x, mpf(0.5)), (0.5,)),
    "reciprocal": (torch.reciprocal, lambda x: 1 / x if x else mpf("inf"), ()),
}

# d g(a + d) + a (g(a + d) - g(a)), whose parts cancel where the slope is 0, and where d takes a unit
# from far below 0 to 0.
GATES = ("SiLU", "Mish", "GELU", "GELU tanh", "Hardswish")
# Whose values jump at the kinks, too.
JUMPS = ("Hardshrink", "Threshold")

sizes = st.floats(-30, 3).map(lambda exponent: 10**exponent)
numbers = st.builds(math.copysign, st.just(0.0) | sizes, st.sampled_from([-1, 1]))
ordinary = st.floats(-6, 6, width=32)
pairs = st.lists(st.tuples(numbers | ordinary, numbers | ordinary), min_size=1, max_size=8)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.float64, 1e-12)],
    ids=["float32", "float64"],
)
@pytest.mark.parametrize("name", POINTWISE)
@given(pairs=pairs)
@example(pairs=[(0.0, 0.0095), (0.0, 0.095), (0.3, 0.24), (1e-4, -0.24)])  # the ends of series
@example(pairs=[(0.0, 0.039), (0.0, -0.041), (0.0, 0.29), (0.0, -0.31)])
@example(pairs=[(-7.5, -1.0), (8.0, -0.25), (-8.9, 0.2), (5.0, 0.01)])  # in the tails
@example(pairs=[(1.94e-10, -1.0), (-1.0, 1.94e-10), (3.0, -3.9999998)])  # to where log1p ends
def test_a_function_of_one_number(
    name: str, dtype: torch.dtype, tolerance: float, pairs: list[tuple[float, float]]
) -> None:
    """Its displacement relative to itself, and the derivative at a + d, whatever a and d are."""
    function, value, kinks = POINTWISE[name]
    nearly = 1e-2 if name == "log1p" else 1e-5
    function = copy.deepcopy(function).to(dtype) if isinstance(function, nn.Module) else function
    a, d = torch.tensor(pairs, dtype=dtype).T.contiguous().unbind()
    recorded = displacement_of(function, a)
    assert all(line.rule is not DIFFERENCE for line in recorded.lines)
    with torch.no_grad():
        found, saved = recorded.forward(d.clone())
        (slopes,) = recorded.backward(saved, torch.ones_like(found))
        before = function(a)
        plain = function(a + d) - before
    x = (a.double() + d.double()).requires_grad_()
    (right_slopes,) = torch.autograd.grad(
        copy.deepcopy(function).double()(x).sum()
        if isinstance(function, nn.Module)
        else function(x).sum(),
        x,
    )
    with mpmath.workdps(60):
        for k in range(len(pairs)):
            start, moved = mpf(a[k].item()), mpf(d[k].item())
            exact = value(start + moved) - value(start)
            if not mpmath.isfinite(exact) or abs(exact) > 1e38 or not before[k].isfinite():
                continue
            near_kink = any(
                abs(x[k].item() - kink)
                <= nearly * (abs(pairs[k][0]) + abs(pairs[k][1]) + abs(kink))
                for kink in kinks
            )
            if near_kink and name in JUMPS:
                continue
            off = float(abs(mpf(found[k].item()) - exact))
            # Below 1e-37, float32 has fewer digits.
            allowed = tolerance * float(abs(exact)) + 1e-37
            # What is cancelled: at a kink numbers of its size, in a gate what passes it.
            cancelled = max(map(abs, kinks), default=0.0)
            if name in GATES:
                passing = [abs(value(x) / x) if x else 1 for x in (start, start + moved)]
                cancelled += 4 * float(abs(moved) * max(passing))
            allowed += 4 * torch.finfo(dtype).eps * cancelled
            assert off <= allowed, (
                a[k],
                d[k],
                found[k],
                exact,
                plain[k],
            )
            if not near_kink and abs(right_slopes[k]) < 1e37:
                slope = right_slopes[k].item()
                # As right as PyTorch's own derivative, which subtracts in the tails.
                assert abs(slopes[k].item() - slope) <= 1e-5 * abs(slope) + 1e-6


@pytest.mark.parametrize("name", [name for name, (*_, kinks) in POINTWISE.items() if kinks])
def test_the_derivative_at_a_kink_is_pytorchs(name: str) -> None:
    function, _, kinks = POINTWISE[name]
    x = torch.tensor(kinks, dtype=torch.float32, requires_grad=True)
    (expected,) = torch.autograd.grad(function(x).sum(), x)
    recorded = displacement_of(function, x.detach())
    with torch.no_grad():
        found, saved = recorded.forward(torch.zeros_like(x))
        assert torch.equal(*recorded.backward(saved, torch.ones_like(found)), expected)


extremes = [0.0, -0.0, 1.0, -1.0, 1e-30, 1e3, -1e3, 1e30, -1e30, math.inf, -math.inf, math.nan]


@pytest.mark.parametrize("name", POINTWISE)
def test_never_nan_where_the_plain_difference_is_not(name: str) -> None:
    function, _, _ = POINTWISE[name]
    a, d = torch.cartesian_prod(torch.tensor(extremes), torch.tensor(extremes)).T.contiguous()
    with torch.no_grad():
        found, _ = displacement_of(function, a).forward(d.clone())
        plain = function(a + d) - function(a)
    assert not (found.isnan() & ~plain.isnan()).any()
    # A broken displacement has to be seen, unless the function itself hides it.
    assert not (found.isfinite() & plain.isnan() & d.isnan()).any()


OF_TWO: dict[str, Callable[[Tensor], Tensor]] = {
    "MaxPool2d": nn.MaxPool2d((1, 2)),
    "MaxPool2d overlapping": nn.MaxPool2d((1, 2), (1, 1)),
    "ReLU, MaxPool2d": nn.Sequential(nn.ReLU(), nn.MaxPool2d((1, 2))),
    "max": lambda x: x.max(-1)[0],
    "min": lambda x: x.min(-1)[0],
    "amax": lambda x: x.amax(-1),
    "amin": lambda x: x.amin(-1),
    "maximum": lambda x: torch.maximum(x[..., 0], x[..., 1]),
    "minimum": lambda x: torch.minimum(x[..., 0], x[..., 1]),
    "logsumexp": lambda x: x.logsumexp(-1),
    "softmax": nn.Softmax(-1),
    "log_softmax": nn.LogSoftmax(-1),
    "norm": lambda x: torch.linalg.vector_norm(x, 2, -1),
    "product": lambda x: x[..., 0] * x[..., 1],
    "quotient": lambda x: x[..., 0] / x[..., 1],
    "GLU": nn.GLU(-1),
}


@pytest.mark.parametrize("name", OF_TWO)
def test_functions_of_two_numbers_at_their_extremes(name: str) -> None:
    """No NaN where the plain difference has none, and none that a displacement brings gets lost."""
    function, some = OF_TWO[name], torch.tensor(extremes[::2] + extremes[-3:])
    a, d = torch.cartesian_prod(some, some, some, some).view(1, 1, -1, 2, 2).unbind(3)
    with torch.no_grad():
        found, _ = displacement_of(function, a.contiguous()).forward(d.clone())
        after = function(a + d)
        plain = after - function(a)
    assert not (found.isnan() & ~plain.isnan()).any()
    brought = (d.isnan() & ~a.isnan()).any(-1).view(-1, 1)
    lost = (~found.isnan() & after.isnan()).view(len(brought), -1)
    assert not (lost & brought).any()


@pytest.mark.parametrize("pool", [nn.MaxPool2d((1, 2)), nn.MaxPool2d((1, 2), (1, 1))])
def test_a_maximum_over_infinity_less_infinity_is_no_number(pool: nn.Module) -> None:
    a, d = torch.tensor([[[[-math.inf, 1.0]]]]), torch.tensor([[[[math.inf, 0.0]]]])
    with torch.no_grad():
        assert displacement_of(pool, a).forward(d.clone())[0].isnan().all()
        assert torch.equal(displacement_of(pool, a).forward(d.flip(-1))[0], d.flip(-1)[..., 1:])


# All others.


def attention(x: Tensor, project: nn.Module, **options: Any) -> Tensor:
    q, k, v = project(x).chunk(3, -1)
    return functional.scaled_dot_product_attention(q, k, v, **options)


def encoder_layer(**options: Any) -> nn.Module:
    options = {"dropout": 0.0, "batch_first": True, **options}
    return nn.TransformerEncoderLayer(8, 2, 16, **options)


def in_place(x: Tensor) -> Tensor:
    y = x * 2
    y.add_(x.sin())
    y.mul_(3)
    return y.exp_()


def heads(x: Tensor, project: nn.Module, **options: Any) -> Tensor:
    """Attention of two heads, which PyTorch computes by one operation."""
    q, k, v = project(x).view(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
    return functional.scaled_dot_product_attention(q, k, v, **options)


def spectral(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], nn.Module]:
    """A function of a sequence's frequencies (2, 5, 5), and of complex weights (5, 5)."""

    def in_frequencies(x: Tensor) -> Tensor:
        weights = torch.linspace(-1.0, 2.0, 50).to(x).sin().view(5, 5, 2)
        return torch.fft.irfft(function(torch.fft.rfft(x), torch.view_as_complex(weights)))

    return lambda: Does(in_frequencies)


VECTOR, SEQUENCE, IMAGE, VOLUME = (4, 6), (2, 5, 8), (3, 4, 8, 8), (2, 2, 4, 4, 4)
MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear": (lambda: nn.Linear(6, 3), VECTOR),
    "Linear of sequences": (lambda: nn.Linear(8, 3, bias=False), SEQUENCE),
    "Conv1d": (lambda: nn.Conv1d(5, 3, 3, padding=1), SEQUENCE),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, groups=2, dilation=2), IMAGE),
    "Conv2d reflect": (lambda: nn.Conv2d(4, 3, 3, padding=1, padding_mode="reflect"), IMAGE),
    "Conv3d": (lambda: nn.Conv3d(2, 3, 2), VOLUME),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(5, 3, 3, stride=2), SEQUENCE),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 3, 3, output_padding=1, stride=2), IMAGE),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(2, 2, 2), VOLUME),
    "Flatten": (nn.Flatten, IMAGE),
    "Unflatten": (lambda: nn.Unflatten(1, (2, 3)), VECTOR),
    "Identity": (nn.Identity, VECTOR),
    "another type": (lambda: Does(lambda x: x.double().sin().to(x.dtype)), VECTOR),
    "MaxPool1d": (lambda: nn.MaxPool1d(2), SEQUENCE),
    "MaxPool2d": (lambda: nn.MaxPool2d(2), IMAGE),
    "MaxPool2d overlapping": (lambda: nn.MaxPool2d(3, 2, 1), IMAGE),
    "MaxPool2d ceil": (lambda: nn.MaxPool2d(3, ceil_mode=True), IMAGE),
    "MaxPool2d floor": (lambda: nn.MaxPool2d(3), IMAGE),
    "ReLU, MaxPool2d": (lambda: nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)), IMAGE),
    "ReLU, MaxPool2d overlapping": (
        lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)),
        IMAGE,
    ),
    "Conv2d, ReLU, MaxPool2d, Conv2d": (  # what is free to be written into
        lambda: nn.Sequential(
            nn.Conv2d(4, 4, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 3, 1), nn.ReLU()
        ),
        IMAGE,
    ),
    "ReLU, twice used": (
        lambda: Does(lambda x: functional.max_pool2d(x.relu(), 3, 1, 1) * x.relu()),
        IMAGE,
    ),
    "MaxPool2d, one number": (lambda: nn.MaxPool2d((2,)), IMAGE),
    "MaxPool3d": (lambda: nn.MaxPool3d(2), VOLUME),
    "MaxPool3d, one number": (lambda: nn.MaxPool3d((3,), (2,), (1,)), VOLUME),
    "AdaptiveMaxPool1d": (lambda: nn.AdaptiveMaxPool1d(3), SEQUENCE),
    "AdaptiveMaxPool2d": (lambda: nn.AdaptiveMaxPool2d(3), IMAGE),
    "AdaptiveMaxPool3d": (lambda: nn.AdaptiveMaxPool3d(2), VOLUME),
    "AvgPool1d": (lambda: nn.AvgPool1d(2), SEQUENCE),
    "AvgPool2d": (lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False), IMAGE),
    "AvgPool3d": (lambda: nn.AvgPool3d(2), VOLUME),
    "AdaptiveAvgPool1d": (lambda: nn.AdaptiveAvgPool1d(3), SEQUENCE),
    "AdaptiveAvgPool2d": (lambda: nn.AdaptiveAvgPool2d(3), IMAGE),
    "global pooling": (lambda: nn.AdaptiveAvgPool2d(1), IMAGE),
    "AdaptiveAvgPool3d": (lambda: nn.AdaptiveAvgPool3d(2), VOLUME),
    "Dropout": (nn.Dropout, VECTOR),
    "dropout in one": (lambda: Does(lambda x: torch.native_dropout(x, 0.4, True)[0]), VECTOR),
    "dropout in one, eval": (
        lambda: Does(lambda x: torch.native_dropout(x, 0.4, False)[0]),
        VECTOR,
    ),
    "Dropout1d": (nn.Dropout1d, SEQUENCE),
    "Dropout2d": (nn.Dropout2d, IMAGE),
    "Dropout3d": (nn.Dropout3d, VOLUME),
    "AlphaDropout": (nn.AlphaDropout, VECTOR),
    "FeatureAlphaDropout": (nn.FeatureAlphaDropout, IMAGE),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(6), VECTOR),
    "BatchNorm1d eval": (lambda: nn.BatchNorm1d(6).eval(), VECTOR),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(4), IMAGE),
    "BatchNorm2d eval": (lambda: nn.BatchNorm2d(4).eval(), IMAGE),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(2), VOLUME),
    "LayerNorm": (lambda: nn.LayerNorm(8), SEQUENCE),
    "LayerNorm of images": (lambda: nn.LayerNorm((8, 8), elementwise_affine=False), IMAGE),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), IMAGE),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(5), SEQUENCE),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(4, affine=True), IMAGE),
    "InstanceNorm2d eval": (lambda: nn.InstanceNorm2d(4, track_running_stats=True).eval(), IMAGE),
    "InstanceNorm3d": (lambda: nn.InstanceNorm3d(2), VOLUME),
    "RMSNorm": (lambda: nn.RMSNorm(8), SEQUENCE),
    "LocalResponseNorm": (lambda: nn.LocalResponseNorm(2), IMAGE),
    "Softmax": (lambda: nn.Softmax(-1), SEQUENCE),
    "Softmin": (lambda: nn.Softmin(-1), SEQUENCE),
    "LogSoftmax": (lambda: nn.LogSoftmax(-1), SEQUENCE),
    "Softmax2d": (nn.Softmax2d, IMAGE),
    "GLU": (nn.GLU, SEQUENCE),
    "PReLU": (lambda: nn.PReLU(4), IMAGE),
    "Upsample": (lambda: nn.Upsample(scale_factor=2, mode="bilinear"), IMAGE),
    "PixelShuffle": (lambda: nn.PixelShuffle(2), IMAGE),
    "ConstantPad2d": (lambda: nn.ConstantPad2d(1, 3.0), IMAGE),
    "Unfold": (lambda: nn.Unfold(2), IMAGE),
    "spectral_norm": (
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)).eval(),
        VECTOR,
    ),
    "weight_norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)), VECTOR),
    "nested": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.Sequential(nn.ReLU(), nn.Linear(5, 4))),
        VECTOR,
    ),
    "in place": (lambda: Does(in_place), VECTOR),
    "residual": (lambda: Does(lambda x, f: x + f(x).tanh(), nn.Linear(6, 6)), VECTOR),
    "concatenation": (lambda: Does(lambda x: torch.cat([x, x * x, x.tanh()], -1)), SEQUENCE),
    "product": (lambda: Does(lambda x: x.sin() * x.exp()), VECTOR),
    "quotient": (lambda: Does(lambda x: x / (1 + x * x)), VECTOR),
    "gate": (
        lambda: Does(
            lambda x, f: x * f(x.mean((2, 3))).sigmoid()[:, :, None, None], nn.Linear(4, 4)
        ),
        IMAGE,
    ),
    "matrix product": (lambda: Does(lambda x: x @ x.mT), SEQUENCE),
    "einsum": (lambda: Does(lambda x: torch.einsum("bij,bkj->bik", x, x)), SEQUENCE),
    "standardised": (lambda: Does(lambda x: (x - x.mean(0)) / (x.std(0) + 0.1)), VECTOR),
    "normalize": (lambda: Does(lambda x: functional.normalize(x, dim=-1)), SEQUENCE),
    "max": (lambda: Does(lambda x: x.max(1)[0]), SEQUENCE),
    "max of ReLU": (lambda: Does(lambda x: x.relu().max(1)[0]), SEQUENCE),
    "min": (lambda: Does(lambda x: x.min(1, keepdim=True)[0] * x), SEQUENCE),
    "amin": (lambda: Does(lambda x: x.amin(1, keepdim=True) * x), SEQUENCE),
    "amax": (lambda: Does(lambda x: x.amax((1, 2))), SEQUENCE),
    "logsumexp": (lambda: Does(lambda x: x.logsumexp(1)), SEQUENCE),
    "maximum": (lambda: Does(lambda x: torch.maximum(x, x.sin())), VECTOR),
    "minimum": (lambda: Does(lambda x: torch.minimum(x, x.exp() - 1.5)), VECTOR),
    "one divisor for several": (
        lambda: Does(lambda x: torch.arange(1.0, 7.0).to(x) / (1 + x[:, :1].square())),
        VECTOR,
    ),
    "masked_fill": (lambda: Does(lambda x: x.masked_fill(torch.arange(6) > 2, 2.0)), VECTOR),
    "ratio": (lambda: Does(lambda x: torch.arange(1.0, 7.0) / (x * x + 1)), VECTOR),
    "numbers": (lambda: Does(lambda x: 3 - (2 / (x.exp() + 1) - 1) / 4 * 5), VECTOR),
    "softsign of another": (lambda: Does(lambda x: x / (1 + x.sin().abs())), VECTOR),
    "transposed": (lambda: Does(lambda x: x.t() * x.sum()), VECTOR),
    "matrix on the left": (lambda: Does(lambda x: torch.ones(3, 4).tril().to(x) @ x), VECTOR),
    "matrices on the left": (
        lambda: Does(lambda x: torch.ones(2, 3, 5).tril().to(x) @ x),
        SEQUENCE,
    ),
    "addmm": (lambda: Does(lambda x: torch.addmm(x, x[:, :4], x)), VECTOR),
    "addmm, weighted": (
        lambda: Does(lambda x: torch.addmm(x, torch.ones(4, 4).to(x), x, beta=0.5, alpha=2)),
        VECTOR,
    ),
    "baddbmm": (
        lambda: Does(lambda x: torch.baddbmm(torch.ones(5, 8).to(x), x[..., :5], x, beta=3)),
        SEQUENCE,
    ),
    "addcmul": (lambda: Does(lambda x: torch.addcmul(x, x, x.cos(), value=0.5)), VECTOR),
    "var": (lambda: Does(lambda x: x.var(-1, correction=2, keepdim=True) * x), SEQUENCE),
    "std of all": (lambda: Does(lambda x: x + x.std()), SEQUENCE),
    "cosine": (lambda: Does(lambda x: x.cos() + x.pow(3.0)), VECTOR),
    "where": (lambda: Does(lambda x: torch.where(x > 0, x, 0.1 * x * x)), VECTOR),
    "indexing": (lambda: Does(lambda x: x[:, [0, 2, 2]] + x[:, 1:4]), VECTOR),
    "lerp": (lambda: Does(lambda x: torch.lerp(x, x * x, 0.3)), VECTOR),
    "lerp by a tensor": (
        lambda: Does(lambda x: torch.lerp(x, x * x, torch.linspace(0.1, 0.6, 6).to(x))),
        VECTOR,
    ),
    "rotary": (
        lambda: Does(lambda x: x * 0.8 + 0.6 * torch.cat([-x[..., 4:], x[..., :4]], -1)),
        SEQUENCE,
    ),
    "Fourier mixing": (lambda: Does(lambda x: torch.fft.fft2(x).real), SEQUENCE),
    "frequencies by a matrix": (spectral(lambda z, w: z @ w), SEQUENCE),
    "frequencies of the first, by a matrix": (spectral(lambda z, w: z[0] @ w), SEQUENCE),
    "frequencies by a matrix on the left": (spectral(lambda z, w: w @ z), SEQUENCE),
    "frequencies by rows": (spectral(lambda z, w: functional.linear(z, w, w[0])), SEQUENCE),
    "frequencies, multiplied": (spectral(lambda z, w: z @ z.mT @ (z + z)), SEQUENCE),
    "frequencies, weighted": (spectral(lambda z, w: w * z / w.T * 1j), SEQUENCE),
    "frequencies, joined": (spectral(lambda z, w: torch.cat([z, w[None], z - z.mT])), SEQUENCE),
    "attention": (lambda: Does(attention, nn.Linear(8, 24)), SEQUENCE),
    "causal attention": (
        lambda: Does(lambda x, f: attention(x, f, is_causal=True), nn.Linear(8, 24)),
        SEQUENCE,
    ),
    "masked attention": (
        lambda: Does(
            lambda x, f: attention(x, f, attn_mask=torch.tensor([[True] * 3 + [False] * 2] * 5)),
            nn.Linear(8, 24),
        ),
        SEQUENCE,
    ),
    "attention of heads": (lambda: Does(heads, nn.Linear(8, 24)), SEQUENCE),
    "causal attention of heads": (
        lambda: Does(lambda x, f: heads(x, f, is_causal=True, scale=0.3), nn.Linear(8, 24)),
        SEQUENCE,
    ),
    "masked attention of heads": (
        lambda: Does(lambda x, f: heads(x, f, attn_mask=torch.eye(5)), nn.Linear(8, 24)),
        SEQUENCE,
    ),
    "MultiheadAttention": (
        lambda: Does(lambda x, f: f(x, x, x)[0], nn.MultiheadAttention(8, 2, batch_first=True)),
        SEQUENCE,
    ),
    "TransformerEncoderLayer": (encoder_layer, SEQUENCE),
    "TransformerEncoderLayer eval": (lambda: encoder_layer(dropout=0.1).eval(), SEQUENCE),
    "TransformerEncoderLayer, norm first": (
        lambda: encoder_layer(norm_first=True, activation="gelu", dropout=0.2),
        SEQUENCE,
    ),
    "TransformerEncoder": (lambda: nn.TransformerEncoder(encoder_layer(), 2), SEQUENCE),
}


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("name", MODULES)
def test_a_module(name: str) -> None:
    """Float32 displacements and vector-Jacobian products against float64, for d from 1 to 1e-30."""
    make, shape = MODULES[name]
    module, a = make(), torch.randn(shape)
    for parameter in module.parameters():
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
    right = Right(copy.deepcopy(module), a)
    recorded = displacement_of(module, a)
    assert all(
        line.rule is not DIFFERENCE or line.static[0] is torch.ops.aten.gt.Scalar
        for line in recorded.lines
    )
    for size in (1.0, 1e-3, 1e-7, 1e-12, 1e-30):
        d = size * torch.randn(shape)
        with torch.no_grad():
            found, saved = recorded.forward(d.clone())
            e = torch.randn_like(found)
            (back,) = recorded.backward(saved, e)
        expected, expected_back = right.displacement(d.double()), right.vjp(d.double(), e.double())
        assert (found - expected).norm() <= 2e-6 * expected.norm()
        assert (back - expected_back).norm() <= 2e-6 * expected_back.norm()


class Right:
    """The same in float64: the difference where it is right, else the derivative along d."""

    def __init__(self, module: nn.Module, a: Tensor) -> None:
        self.module, self.a = module.double(), a.double()
        self.random = torch.get_rng_state()
        self.buffers = [buffer.clone() for buffer in self.module.buffers()]

    def __call__(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for buffer, value in zip(self.module.buffers(), self.buffers, strict=True):
                buffer.copy_(value)
        now = torch.get_rng_state()
        torch.set_rng_state(self.random)
        # The operations for attention in one have no second derivative.
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            output = self.module(x)
        torch.set_rng_state(now)
        return output

    def displacement(self, d: Tensor) -> Tensor:
        if d.abs().max() > 1e-8:
            with torch.no_grad():
                return self(self.a + d) - self(self.a)
        x = self.a.clone().requires_grad_()
        output = self(x)
        e = torch.zeros_like(output, requires_grad=True)
        (back,) = torch.autograd.grad(output, x, e, create_graph=True)
        return torch.autograd.grad(back, e, d)[0]

    def vjp(self, d: Tensor, e: Tensor) -> Tensor:
        x = (self.a + d).requires_grad_()
        return torch.autograd.grad(self(x), x, e)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MODULES)
def test_broken_inputs_stay_visible(name: str, dtype: torch.dtype) -> None:
    """A NaN in the displacement reaches the output, as it does in a plain difference."""
    make, shape = MODULES[name]
    module, a = make().to(dtype), torch.randn(shape, dtype=dtype)
    recorded = displacement_of(module, a)
    with torch.no_grad():
        found, _ = recorded.forward(torch.full(shape, math.nan, dtype=dtype))
    assert found.isnan().any()


# PyTorch has these in no half precision on a CPU.
NO_HALF = ("AvgPool3d", "LocalResponseNorm", "Fourier", "frequencies")
HALF = [name for name in MODULES if not name.startswith(NO_HALF)]


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", HALF)
def test_displacements_of_half_precision_are_float32(name: str, dtype: torch.dtype) -> None:
    make, shape = MODULES[name]
    module, a = make().to(dtype), torch.randn(shape, dtype=dtype)
    recorded = displacement_of(module, a)
    with torch.no_grad():
        found, saved = recorded.forward(1e-3 * torch.randn(shape))
        (back,) = recorded.backward(saved, torch.randn_like(found))
    assert found.dtype == back.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "is_small"), [(20, True), (30, False)])
def test_small_products_of_half_precision_are_taken_in_float32(
    rows: int, is_small: bool, dtype: torch.dtype
) -> None:
    """2^21 multiplications are as many as half precision takes to begin. Larger ones are rounded."""
    layer = nn.Linear(300, 300).to(dtype)
    w, d, e = layer.weight.detach().double(), torch.randn(rows, 300), torch.randn(rows, 300)
    recorded = displacement_of(layer, torch.randn(rows, 300, dtype=dtype))
    with torch.no_grad():
        found, saved = recorded.forward(d.clone())
        (back,) = recorded.backward(saved, e.clone())
    for product, expected in [(found, d.double() @ w.T), (back, e.double() @ w)]:
        error = (product - expected).norm() / expected.norm()
        assert (error < 1e-6) == is_small
        assert error < 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bounds_are_not_rounded_to_half_precision(dtype: torch.dtype) -> None:
    """How far a number is from the bounds -1 and 1 has more digits than either has."""
    a = torch.tensor([0.0012, 0.0012, 3.14], dtype=dtype)
    d = torch.tensor([-3.0, 3.0, -2.2])
    recorded = displacement_of(nn.Hardtanh(), a)
    with torch.no_grad():
        found, _ = recorded.forward(d.clone())
    expected = (a.double() + d).clamp(-1, 1) - a.double().clamp(-1, 1)
    torch.testing.assert_close(found, expected.float(), rtol=1e-6, atol=0)


FIXED = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)).double()


def in_heads(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """Attention of one example, whose heads are as wide as 2."""
    q, k, v = (each.view(1, 4, -1, 2).transpose(1, 2) for each in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v, **options)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: functional.prelu(x, x.square().mean().reshape(1)),
        lambda x: x[x.argmax(1)],
        lambda x: functional.scaled_dot_product_attention(x, x, x, attn_mask=x @ x.T),
        lambda x: x * (x > 0).mean(dtype=x.dtype),
        lambda x: x + (x.sin() - x).detach(),
        lambda x: functional.batch_norm(x, None, None, x.mean(0).exp(), training=True),
        lambda x: functional.layer_norm(x, (4,), x.mean(0)),
        lambda x: functional.group_norm(x[..., None], 2, x.mean(0)),
        lambda x: functional.softplus(x, threshold=0.5),
        lambda x: torch.linalg.vector_norm(x, 3, 1),
        lambda x: torch.linalg.vector_norm(x) * x,
        lambda x: torch.ones(2, 4, 4) - x,
        lambda x: torch.add(FIXED, x, alpha=0.3) + torch.ones(2, 4, 4),
        lambda x: in_heads(x, x[:, :2], x[:, :2], enable_gqa=True),
        lambda x: in_heads(x, FIXED, FIXED) * in_heads(FIXED, x, FIXED),
        lambda x: in_heads(FIXED, FIXED, x) * in_heads(x, FIXED, x),
        lambda x: torch.addmm(x[0], x, FIXED),
        lambda x: torch.addmm(FIXED[0], x, x, beta=2.0, alpha=0.5),
        lambda x: torch.lerp(x, FIXED, x.sigmoid()),
        lambda x: torch.lerp(x[0], FIXED, 0.3),
    ],
)
def test_what_is_a_constant_elsewhere_may_move(function: Callable[[Tensor], Tensor]) -> None:
    a, d = torch.randn(4, 4).double(), torch.randn(4, 4).double()
    recorded = displacement_of(function, a)
    with torch.no_grad():
        found, saved = recorded.forward(d.clone())
    x = (a + d).requires_grad_()
    assert_close(found, (function(x) - function(a)).detach(), 1e-12)
    e = torch.randn_like(found)
    (expected,) = torch.autograd.grad(function(x), x, e)
    assert_close(*recorded.backward(saved, e.clone()), expected, 1e-12)


def test_the_deviation_of_numbers_that_are_or_become_equal() -> None:
    """As of units that are 0 for a whole batch."""
    a = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 3.0, 2.0], [0.0, 0.0, 3.0, 4.0]]).double()
    d = torch.zeros_like(a)
    d[:, 1], d[:, 2], d[:, 3] = torch.tensor([0.1, -0.2, 0.05]), 3 - a[:, 2], 1e-9 * a[:, 3]
    recorded = displacement_of(lambda x: x.std(0), a)
    e, x = torch.randn(4).double(), (a + d).requires_grad_()
    with torch.no_grad():
        found, saved = recorded.forward(d.clone())
    assert_close(found, (x.std(0) - a.std(0)).detach(), 1e-12)
    assert_close(*recorded.backward(saved, e.clone()), *torch.autograd.grad(x.std(0), x, e), 1e-12)


def test_attention_whose_mask_moves_has_no_rule() -> None:
    """(PyTorch's operation has no derivative in it, so that the layer is evaluated again.)"""
    a = torch.randn(4, 4).double()
    recorded = displacement_of(lambda x: in_heads(x, x, x, attn_mask=(x @ x.T).detach()), a)
    assert DIFFERENCE in [line.rule for line in recorded.lines]


@pytest.mark.parametrize("bias", [True, False])
def test_linear_where_autograd_has_not_taken_it_apart(bias: bool) -> None:
    """As on some devices."""
    module, x, d = nn.Linear(3, 2, bias), torch.randn(4, 3), torch.randn(4, 3)
    recorder = Recorder(x)
    with recorder, torch._C._AutoDispatchBelowAutograd():
        output = module(x)
    recorded = recorder.displacement(output)
    assert [line.rule for line in recorded.lines] == [BY_ROWS]
    with torch.no_grad():
        found, (saved,) = recorded.forward(d.clone())
        e = torch.randn_like(found)
        assert_close(found, module(x + d) - output, 1e-6)
        (line,) = recorded.lines
        back = line.rule.backward(e, saved, *line.tensors, *line.static)
        assert_close(back, e @ module.weight, 1e-6)


@pytest.mark.skipif(not hasattr(torch.ops.aten, "_fused_rms_norm"), reason="an older PyTorch")
@pytest.mark.parametrize("weighted", [True, False])
def test_root_mean_square_as_one_operation(weighted: bool) -> None:
    """As GPUs have it."""
    module = nn.RMSNorm(6, eps=1e-3, elementwise_affine=weighted).double()
    if weighted:
        nn.init.uniform_(module.weight, 0.5, 1.5)
    a = torch.randn(4, 6).double()
    recorder = Recorder(a)
    with recorder, torch._C._AutoDispatchBelowAutograd():
        output, _ = torch.ops.aten._fused_rms_norm(a, [6], module.weight, 1e-3)
    recorded = recorder.displacement(output)
    assert [line.rule for line in recorded.lines] == [ROOT_MEAN_SQUARE]
    for size in (3.0, 1e-2, 1e-9):
        d = size * torch.randn_like(a)
        x = (a + d).requires_grad_()
        (line,) = recorded.lines
        with torch.no_grad():
            found, (saved,) = recorded.forward(d.clone())
            e = torch.randn_like(found)
            back = line.rule.backward(e, saved, *line.tensors, *line.static)
        (expected,) = torch.autograd.grad(module(x), x, e)
        difference, least = (module(x) - module(a)).detach(), 1e-14
        assert (found - difference).norm() <= 1e-12 * difference.norm() + least
        assert_close(back, expected, 1e-12)


def test_log_softmax_where_the_likeliest_falls() -> None:
    """log1p(-1 + little) has no digits, however small the displacement of an entry is."""
    a, d = torch.tensor([[14.0, 0.0, 1.0]]), torch.tensor([[-40.0, 0.5, 0.0]])
    with torch.no_grad():
        found, _ = displacement_of(nn.LogSoftmax(-1), a).forward(d.clone())
    expected = (a + d).double().log_softmax(-1) - a.double().log_softmax(-1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


def test_a_product_that_overflows_where_the_difference_does_not() -> None:
    a, d = torch.tensor([-2.0, 0.5e38]), torch.tensor([4.0, 0.5e38])
    with torch.no_grad():
        found, _ = displacement_of(lambda x: x[0] * x[1], a).forward(d.clone())
    torch.testing.assert_close(found, torch.tensor(3e38))


def test_a_ratio_that_overflows_where_the_difference_does_not() -> None:
    a, d = torch.tensor([1e38, 0.5]), torch.tensor([0.0, 4.0])
    with torch.no_grad():
        found, _ = displacement_of(lambda x: x[0] / x[1], a).forward(d.clone())
    torch.testing.assert_close(found, torch.tensor(1e38 / 4.5 - 2e38))


def test_other_outputs_of_an_operation_are_not_taken_for_its_first() -> None:
    def normalised(x: Tensor) -> Tensor:
        y, mean, deviation = torch.native_layer_norm(x, (6,), None, None, 1e-5)
        return y + mean * deviation

    a, d = torch.randn(4, 6), torch.randn(4, 6)
    with torch.no_grad():
        found, _ = displacement_of(normalised, a).forward(d.clone())
    torch.testing.assert_close(found, normalised(a + d) - normalised(a))


def test_what_no_one_else_needs_is_written_into() -> None:
    def written(*layers: nn.Module) -> list[bool]:
        """Whether each line writes into what it is given."""
        recorded = displacement_of(nn.Sequential(*layers), torch.randn(2, 4, 3, 3))
        d, found = torch.randn(2, 4, 3, 3), []
        for line in recorded.lines:
            before = d.clone()
            with torch.no_grad():
                after = line.rule.forward(d, *line.tensors, *line.static)[0]
            found.append(not torch.equal(d, before))
            d = after
        return found

    conv = nn.Conv2d(4, 4, 1)
    assert written(nn.ReLU(), conv, nn.ReLU(), conv) == [False, False, True, False]
    assert not any(written(nn.Flatten(), nn.ReLU(), nn.Flatten()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_sum_in_half_precision_moves_in_float32(dtype: torch.dtype) -> None:
    recorded = displacement_of(lambda x: x.sum(1, dtype=dtype), torch.randn(4, 6))
    d = 1e-3 * torch.randn(4, 6)
    found, _ = recorded.forward(d.clone())
    assert found.dtype == torch.float32
    assert_close(found, d.sum(1), 1e-6)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.cat([x.square(), x > 0], 1),
        lambda x: (x > 0).sum(1, dtype=x.dtype),
        lambda x: torch.complex(x, x).mul(x > 0).real,
        lambda x: torch.complex(x, x).add(x > 0).real,
        lambda x: (x > 0) / torch.complex(x.detach() * 0 + 1, torch.ones(())),
        lambda x: (x > 0).to(torch.complex64).real,
    ],
)
def test_flags_among_numbers(function: Callable[[Tensor], Tensor]) -> None:
    """Of a flag its new value is known, which is no displacement."""
    a, d = torch.randn(4, 6), torch.randn(4, 6)
    found, _ = displacement_of(function, a).forward(d.clone())
    assert_close(found, function(a + d) - function(a), 1e-6)
