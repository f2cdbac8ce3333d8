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
from functools import lru_cache
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor, nn

from torch2pc.graph.autograd import (
    Updates,
    add_updates,
    gradient,
    in_belief_dtype,
    independent_loss,
    leaves_between,
    own,
)
from torch2pc.graph.network import Inference, Network, detached
from torch2pc.graph.nodes import Parents, nodes_from_above, nodes_of, parents_of, steps_above
from torch2pc.graph.warn import warn_caller
from torch2pc.inference.exact import Factors, within
from torch2pc.inference.steps import Descent, Rule

# A share of the gradient that this is less than, an optimizer's epsilon and round-off take for none.
LEAST_SHARE = 1e-6

# What eta="auto" is here. All eigenvalues of epsilon -> epsilon - J^T epsilon are 1, whatever the
# weights, so that no step is stabler, nor any faster: the errors are the gradients from n = L on.
AUTO_ETA = 1.0

_warned: WeakSet[nn.Module] = WeakSet()


def warn_of_short_inference(model: nn.Module, eta: float | str | Rule, n: int) -> None:
    """Say, the first time for a model, which layers' updates the errors hardly reach.

    Less than ``LEAST_SHARE`` of the gradient arrives there, on the shortest way down. At least half
    arrives m layers below the output after n >= 1 + m/eta iterations, the median of that coin's number
    of heads. With Strict no more arrives at first, and less later on, as its predictions follow the
    beliefs.

    In sweeps from the top it goes on without waiting where the coin shows heads, so that there
    are m tosses more, and n >= 1 + m (1 - eta)/eta will do.
    """
    below, given = steps_above(parents_of(model))[1:], eta
    L, farthest = len(below), max(below)
    if nodes_from_above(model):
        return  # errors come from there, too
    down = isinstance(eta, Rule) and eta.down
    if isinstance(eta, Rule):
        eta = float(eta.eta) if type(eta) is Descent else AUTO_ETA
    elif isinstance(eta, str):
        eta = AUTO_ETA  # what Strict's steps will be is not known yet, and brings no more

    def share(m: int) -> float:
        """Of the gradient m layers below the output."""
        if down:
            return error_factors(eta, n - 1 + m, m + 1)[m]
        return error_factors(eta, n - 1, farthest + 1)[m]

    asked = [farthest] if down else range(farthest + 1)
    if min([abs(share(m)) for m in asked]) >= LEAST_SHARE or model in _warned:
        return
    nodes = nodes_of(model)
    short = [
        l
        for l, (node, m) in enumerate(zip(nodes, below, strict=True), start=1)
        if abs(share(m)) < LEAST_SHARE
        and isinstance(node.function, nn.Module)
        and any(p.requires_grad for p in node.function.parameters())
    ]
    if not short:
        return
    _warned.add(model)
    first, last = nodes[short[0] - 1].where, nodes[short[-1] - 1].where
    layers, which = f"layer {short[0]}", first
    if len(short) > 1:
        layers, which = f"layers {short[0]} to {short[-1]}", f"{first} to {last}"
    if len(short) != 1 + short[-1] - short[0]:  # not one after the other, in a graph
        layers, which = f"{len(short)} layers", ", ".join([nodes[l - 1].where for l in short])
    step = min(eta, 1.0) if eta > 1e-3 else 0.1
    tosses = farthest * (1 - step) if down else farthest
    remedy = f"n={1 + math.ceil(tosses / step)}" + (f" with eta={step}" if step != eta else "")
    if down or n > farthest:
        enough = farthest / (n - 1 + farthest) if down else farthest / (n - 1)
        remedy += f", or eta={math.ceil(100 * enough) / 100:g},"
    warn_caller(
        f"The error hardly reaches {layers} of {L} ({which}) "
        f"with eta={given} and n={n}: the share of the gradient that arrives at layer {short[0]} is "
        f"{share(below[short[0] - 1]):.0e}; {remedy} would bring half of it to all "
        "(FixedPred; with Strict it takes somewhat longer). Modules nested in one nn.Sequential "
        "count as one layer"
    )


def fixed_pred_factors(network: Network, eta: float, n: int) -> Factors | None:
    """Those of the errors and beliefs after ``n`` iterations; None where ways differ in length."""
    return _factors(network.parents, network.asks_input, eta, n)


@lru_cache
def _factors(parents: Parents, asks_input: bool, eta: float, n: int) -> Factors | None:
    below, farthest = steps_above(parents), steps_above(parents, farthest=True)
    # Where no error of the input is asked for, nothing goes down to it.
    first = 0 if asks_input else 1
    if below[first:] != farthest[first:]:
        return None
    # epsilon is that of the n-th iteration, computed before the n-th update of v; v_L is not moved.
    before, after = (error_factors(eta, k, farthest[0]) for k in (n - 1, n))
    of_input = before[below[0] - 1]
    hidden = below[1:]
    return Factors(
        (of_input, *[before[m] for m in hidden]),
        (0.0, *[after[m] if m else 0.0 for m in hidden]),
        (of_input, *[before[max(m - 1, 0)] for m in hidden]),
    )


def by_lengths_of_paths(network: Network, eta: float, n: int) -> Inference:
    """The same on any graph: errors that are sums over the lengths m of the ways down to them.

        epsilon_i = sum_m c_m(n-1) g_i^(m),    v_i = vhat_i - sum_m c_m(n) g_i^(m)

    where g_i^(m) is the part of the gradient that arrives along ways of m layers. One pass down that
    carries a tensor for each length; no more products than iterating would take, as no error comes
    further down than one layer in each of the n iterations.
    """
    pieces, (prediction, Loss) = network.pieces()
    L, vhat = len(network.layers), network.vhat
    farthest = steps_above(network.parents, farthest=True)[0]
    before, after = (error_factors(eta, k, farthest) for k in (n - 1, n))
    found = Updates(network.arrived)
    leaves = leaves_between(Loss, [prediction])
    dLdy, *of_leaves = gradient([Loss], [prediction, *leaves])
    if dLdy is None:
        raise independent_loss()
    add_updates(found, leaves, of_leaves)
    arriving: list[dict[int, Tensor]] = [{} for _ in vhat]
    arriving[L] = {0: in_belief_dtype(dLdy)}
    v: list[Any] = [detached(network.X), *[in_belief_dtype(x).clone() for x in vhat[1:]]]
    epsilon: list[Any] = [None] * (L + 1)
    for l in range(L, 0, -1):
        (inputs, output), parts = pieces.pop(), arriving[l]
        error = epsilon[l] = torch.zeros_like(v[l])
        for m, part in parts.items():
            error.add_(part, alpha=within(before[m], part.dtype))
            if m > 0:
                v[l].sub_(part, alpha=within(after[m], part.dtype))
        places = list(zip(network.nodes[l - 1].parents, inputs, strict=True))
        hidden = [(p, x) for p, x in places if p > 0]
        for m, part in parts.items():
            if m < n and hidden:
                asked = [x for _, x in hidden]
                of_hidden = gradient([output], asked, [part.to(output.dtype)], keep_graph=True)
                for (p, _), g in zip(hidden, of_hidden, strict=True):
                    if g is not None:
                        g, kept = in_belief_dtype(g), arriving[p]
                        kept[m + 1] = kept[m + 1] + g if m + 1 in kept else g
        parts.clear()
        leaves = leaves_between(output, inputs)
        given = [x for p, x in places if p == 0 and network.asks_input]
        # A copy, as hooks may write into it.
        arrives = error.to(output.dtype, copy=True)
        of_l = gradient([output], [*leaves, *given], [arrives])
        add_updates(found, leaves, of_l[: len(leaves)])
        for x, g in zip(given, of_l[len(leaves) :], strict=True):
            g = torch.zeros_like(x) if g is None else g
            epsilon[0] = g if epsilon[0] is None else epsilon[0] + g
        del inputs, output, places, hidden, given
    errors = own([*epsilon[1:], *found.values()])
    updates = list(zip(found, errors[L:], strict=True))
    return Inference(vhat, network.Loss, dLdy.clone(), v, [epsilon[0], *errors[:L]], updates)


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
