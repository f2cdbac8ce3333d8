"""Strict in 60 digits, for small fully connected networks: the oracle for what float64 cannot resolve.

The plain iteration, whose errors are differences of nearly equal numbers, with so many digits that
enough of them are left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import mpmath
import numpy as np
from torch import Tensor, nn

DIGITS = 60
Array = np.ndarray[Any, np.dtype[np.object_]]

# Each function and its derivative.
FUNCTIONS: dict[type[nn.Module], tuple[Any, Any]] = {
    nn.Tanh: (mpmath.tanh, lambda x: mpmath.sech(x) ** 2),
    nn.Sigmoid: (
        lambda x: 1 / (1 + mpmath.exp(-x)),
        lambda x: 1 / (2 + mpmath.exp(x) + mpmath.exp(-x)),
    ),
    nn.Softplus: (lambda x: mpmath.log1p(mpmath.exp(x)), lambda x: 1 / (1 + mpmath.exp(-x))),
    nn.GELU: (
        lambda x: x * mpmath.ncdf(x),
        lambda x: mpmath.ncdf(x) + x * mpmath.npdf(x),
    ),
    nn.ReLU: (lambda x: max(x, mpmath.mpf(0)), lambda x: mpmath.mpf(1 if x > 0 else 0)),
    nn.Identity: (lambda x: x, lambda x: mpmath.mpf(1)),
}


class Precise(NamedTuple):
    """What was inferred; the entries for l = 0 are None."""

    epsilon: list[Any]
    delta: list[Any]
    """v_l - vhat_l"""
    updates: list[tuple[Array, Array] | None]
    """of each layer's weight and bias"""


def precisely(tensor: Tensor) -> Array:
    return np.vectorize(mpmath.mpf, otypes=[object])(tensor.detach().double().numpy())


def each(function: Any, x: Array) -> Array:
    return np.frompyfunc(function, 1, 1)(x)  # type: ignore[no-any-return]


def strict(
    model: nn.Sequential,
    mean: bool,
    X: Tensor,
    Y: Tensor,
    eta: float,
    n: int,
    vinit: Sequence[Tensor] | None = None,
) -> Precise:
    """As ``reference.strict``; the loss is the squared error, averaged (``mean``) or summed.

    Each item of ``model`` is a Sequential of an nn.Linear and one of FUNCTIONS.
    """
    with mpmath.workdps(DIGITS):
        W = [None, *(precisely(item[0].weight) for item in model)]
        b = [None, *(precisely(item[0].bias) for item in model)]
        f = [None, *(FUNCTIONS[type(item[1])] for item in model)]
        target, step, L = precisely(Y), mpmath.mpf(eta), len(model)

        def inside(l: int, v: Array) -> Array:
            return v.dot(W[l].T) + b[l]

        def predict(l: int, v: Array) -> Array:
            return each(f[l][0], inside(l, v))

        def back(l: int, v: Array, e: Array) -> Array:
            return e * each(f[l][1], inside(l, v))

        # Below the layers that errors have reached nothing moves: what is known of them is not computed anew.
        known: list[Any] = [(None, None)] * (L + 1)

        def predicted(l: int) -> Array:
            if known[l][0] is not v[l - 1]:
                known[l] = v[l - 1], predict(l, v[l - 1])
            return known[l][1]

        vhat = [precisely(X)]
        for l in range(1, L + 1):
            vhat.append(predict(l, vhat[-1]))
        v = list(vhat)
        if vinit is not None:
            v[1:L] = [precisely(belief) for belief in vinit[1:L]]
        epsilon: list[Any] = [None] * (L + 1)
        for _ in range(n):
            for l in range(1, L):
                epsilon[l] = predicted(l) - v[l]
            epsilon[L] = 2 * (predicted(L) - target) / (target.size if mean else 1)
            v[1:L] = [
                v[l] + step * (epsilon[l] - back(l + 1, v[l], epsilon[l + 1]).dot(W[l + 1]))
                if epsilon[l].any() or epsilon[l + 1].any()
                else v[l]
                for l in range(1, L)
            ]
        updates: list[Any] = [None]
        for l in range(1, L + 1):
            arriving = back(l, v[l - 1], epsilon[l])
            updates.append((arriving.T.dot(v[l - 1]), arriving.sum(axis=0)))
        return Precise(
            epsilon, [v_l - vhat_l for v_l, vhat_l in zip(v, vhat, strict=True)], updates
        )


def relative_error(found: Tensor, right: Array) -> float:
    """||found - right|| / ||right||"""
    with mpmath.workdps(DIGITS):
        off = precisely(found) - right
        size = mpmath.sqrt((right * right).sum())
        return float(mpmath.sqrt((off * off).sum()) / size) if size else float((off * off).sum())


def size_of(right: Array) -> float:
    return float(mpmath.sqrt((right * right).sum()))
