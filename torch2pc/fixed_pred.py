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

from functools import lru_cache
from typing import Any

import numpy as np

from torch2pc.exact import weighted_backpropagation
from torch2pc.layers import Inference, Network


def fixed_pred(
    network: Network, eta: float, n: int, vinit: Any, compile: bool, update_at: Any
) -> Inference:
    """Infer by the closed form of ``n`` iterations; the last three arguments have no use here."""
    L = len(network.layers)
    # epsilon is that of the n-th iteration, computed before the n-th update of v; v_L is not moved.
    before, after = error_factors(eta, n - 1, L), error_factors(eta, n, L)
    return weighted_backpropagation(network, before, [0.0, *after[1:]])


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
