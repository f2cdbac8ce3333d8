"""The FixedPred algorithm: Jacobians and predictions stay at the feed-forward values.

With v = vhat at the start and epsilon_L = dLdy, the algorithm repeats n times, all layers at once,

    epsilon_l = vhat_l - v_l
    v_l <- v_l + eta (epsilon_l - J_{l+1}(vhat_l)^T epsilon_{l+1}),    l = 1..L-1

The two lines say that epsilon_l becomes (1 - eta) epsilon_l + eta J_{l+1}^T epsilon_{l+1}: a linear
map with constant coefficients. The gradients g_l = dLoss/dvhat_l satisfy g_l = J_{l+1}^T g_{l+1}, so
errors that start as multiples of them (epsilon_L = 1 g_L, all others 0 g_l) stay multiples of them.
Let epsilon_l = c_{L-l}(k) g_l after k updates. Then

    c_0(k) = 1,    c_m(0) = 0,    c_m(k+1) = (1 - eta) c_m(k) + eta c_{m-1}(k),    m >= 1

which for 0 <= eta <= 1 is the probability that k throws of a coin with bias eta give at least m
heads. So n iterations cost one forward and one backward pass whatever n is, and nothing is lost to
the round-off of subtracting two nearly equal tensors, v_l and vhat_l.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from weakref import WeakSet

import numpy as np
from torch import nn

from torch2pc.graph.warn import warn_caller

# A share of the gradient that this is less than, an optimizer's epsilon and round-off take for none.
LEAST_SHARE = 1e-6

# What eta="auto" is here. All eigenvalues of epsilon -> epsilon - J^T epsilon are 1, whatever the
# weights, so that no step is stabler, nor any faster: the errors are the gradients from n = L on.
AUTO_ETA = 1.0

_warned: WeakSet[nn.Module] = WeakSet()


def warn_of_short_inference(model: nn.Module, eta: float | str, n: int) -> None:
    """Say, the first time for a model, which layers' updates the errors hardly reach.

    Less than ``LEAST_SHARE`` of the gradient arrives there. At least half arrives everywhere after
    n >= 1 + (L-1)/eta iterations, the median of that coin's number of heads. With Strict no more
    arrives at first, and less later on, as its predictions follow the beliefs.
    """
    L = len(model._modules)
    given = eta
    if isinstance(eta, str):
        eta = AUTO_ETA  # Strict's is not known yet, and brings no more
    share = error_factors(eta, n - 1, L)[::-1]
    if min(map(abs, share)) >= LEAST_SHARE or model in _warned:
        return
    short = [
        l
        for l, item in enumerate(model._modules.values(), start=1)
        if item is not None
        and abs(share[l - 1]) < LEAST_SHARE
        and any(p.requires_grad for p in item.parameters())
    ]
    if not short:
        return
    _warned.add(model)
    layers = f"layer {short[0]}" if len(short) == 1 else f"layers {short[0]} to {short[-1]}"
    step = min(eta, 1.0) if eta > 1e-3 else 0.1
    remedy = f"n={1 + math.ceil((L - 1) / step)}" + (f" with eta={step}" if step != eta else "")
    if n >= L:
        remedy += f", or eta={math.ceil(100 * (L - 1) / (n - 1)) / 100:g},"
    warn_caller(
        f"The error hardly reaches {layers} of {L} (model[{short[0] - 1}] to model[{short[-1] - 1}]) "
        f"with eta={given} and n={n}: the share of the gradient that arrives at layer {short[0]} is "
        f"{share[short[0] - 1]:.0e}; {remedy} would bring half of it to layer 1 "
        "(FixedPred; with Strict it takes somewhat longer). Modules nested in one nn.Sequential "
        "count as one layer"
    )


def fixed_pred_factors(eta: float | str, n: int, L: int) -> tuple[Sequence[float], Sequence[float]]:
    """Those of the errors and beliefs after ``n`` iterations, for ``weighted_backpropagation``."""
    if isinstance(eta, str):
        eta = AUTO_ETA
    # epsilon is that of the n-th iteration, computed before the n-th update of v; v_L is not moved.
    before, after = error_factors(eta, n - 1, L), error_factors(eta, n, L)
    return before, [0.0, *after[1:]]


@lru_cache
def error_factors(eta: float, k: int, L: int) -> tuple[float, ...]:
    """c_0(k), ..., c_{L-1}(k): the share of the gradient that has arrived m layers below the loss.

    >>> error_factors(0.1, 19, 3)
    (1.0, 0.8649..., 0.5797...)
    """
    # c(k+1) = A c(k): the k-th power by repeated squaring, in float64. For 0 <= eta <= 1 nothing is
    # subtracted, so that every digit is right.
    A = (1 - eta) * np.eye(L) + eta * np.eye(L, k=-1)
    A[0, 0], start = 1.0, np.eye(L)[0]
    with np.errstate(over="ignore", invalid="ignore"):  # for a divergent eta, as with tensors
        c = np.linalg.matrix_power(A, k) @ start
    c[0] = 1.0
    return tuple(c.tolist())
