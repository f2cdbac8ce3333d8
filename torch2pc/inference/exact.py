"""The Exact algorithm: prediction errors that are the gradients of the loss, as in backpropagation.

    epsilon_l = dLoss/dvhat_l,    v_l = vhat_l - epsilon_l

and the update of layer l's parameters is (df_l/dtheta_l)^T epsilon_l, which is their gradient.
``fixed_pred.py`` builds on the same pass with other weights for the errors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from torch2pc.graph.autograd import in_belief_dtype, own
from torch2pc.graph.network import Inference, Network, detached


class Factors(NamedTuple):
    """What the gradients g_l = dLoss/dvhat_l, l = 0..L, are multiplied by."""

    epsilon: tuple[float, ...]
    """``epsilon_l = epsilon[l] g_l``; that of the input is the one of the layers that it feeds."""
    v: tuple[float, ...]
    """``v_l = vhat_l - v[l] g_l``; the first is not used."""
    above: tuple[float, ...]
    """The factor of the errors above l, of which what arrives at l is made."""


def exact_factors(network: Network) -> Factors:
    """Those of Exact: errors are the gradients themselves."""
    ones = (1.0,) * (len(network.layers) + 1)
    return Factors(ones, ones, ones)


def weighted_backpropagation(network: Network, factors: Factors) -> Inference:
    """Errors and beliefs that are multiples of the gradients.

    The update of layer l's parameters is the multiple of their gradient that its error is of g_l.
    """
    graph, L = network.feed_forward(), len(network.layers)
    # The loss's own parameters get their gradient as it is.
    c = (*factors.epsilon, 1.0)
    is_scaled = any([c_l != 1 for c_l in c])
    shares = is_scaled and graph.shares_leaves
    told = None if shares else network.arrived

    def arrived(leaf: Tensor, l: int, of_leaf: Tensor) -> None:
        if told is not None:
            told(leaf, of_leaf if c[l] == 1 else of_leaf * c[l])

    g, of_leaves = graph.backpropagate(shares, None if told is None else arrived)
    leaves = [leaf for leaf, _, _ in of_leaves]
    updates = [u for _, _, u in of_leaves]
    if shares:
        updates = graph.weighted_gradients(g, leaves, c, factors.above)

    vhat = graph.values()
    dLdy, epsilon_0 = g[-1].clone(), None if g[0] is None else g[0] * c[0]
    errors = [in_belief_dtype(g_l) for g_l in g[1:]]
    v = [detached(network.X), *_subtract(vhat[1:], errors, factors.v[1:])]
    found = own([*errors, *updates])
    if is_scaled:
        l_of = [*range(1, L + 1), *([] if shares else [l for _, l, _ in of_leaves])]
        _scale(found, l_of, c)
    epsilon, updates = [epsilon_0, *found[:L]], found[L:]
    Loss = graph.Loss.detach().clone()
    return Inference(vhat, Loss, dLdy, v, epsilon, list(zip(leaves, updates, strict=True)))


def _subtract(a: list[Tensor], b: list[Tensor], c: Sequence[float]) -> Sequence[Tensor]:
    """a[i] - c[i] b[i] for each i."""
    if all([c_i == 1 for c_i in c]):
        return torch._foreach_sub(a, b)
    if not all([abs(c_i) < 1e38 for c_i in c]):
        c = [within(c_i, b_i.dtype) for c_i, b_i in zip(c, b, strict=True)]
    return [torch.sub(*of_i, alpha=c_i) for *of_i, c_i in zip(a, b, c, strict=True)]


def within(c: float, dtype: torch.dtype) -> float:
    """``c``, or infinity where it is beyond the type, for which PyTorch would raise an error."""
    return c if not abs(c) > torch.finfo(dtype).max else math.copysign(math.inf, c)


def _scale(tensors: Sequence[Tensor], l_of: Sequence[int], c: tuple[float, ...]) -> None:
    """Multiply tensor i by c[l_of[i]], in place, so that it must be ours; ``l_of`` may end early."""
    dtypes = {tensor.dtype for tensor in tensors}
    factors = {dtype: _scalar_tensors(c, dtype) for dtype in dtypes}
    scaled = [(t, factors[t.dtype][l]) for t, l in zip(tensors, l_of, strict=False) if c[l] != 1]
    torch._foreach_mul_(*map(list, zip(*scaled, strict=True)))


@lru_cache
def _scalar_tensors(c: tuple[float, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Factors for tensors of this type, which they multiply three times as fast as numbers do."""
    # Half precision would lose a small factor.
    kept = torch.float64 if dtype.itemsize < 4 else dtype
    return torch.tensor(c, dtype=torch.float64, device="cpu").to(kept).unbind()
