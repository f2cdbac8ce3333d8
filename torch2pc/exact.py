"""The Exact algorithm: prediction errors that are the gradients of the loss, as in backpropagation.

    epsilon_l = dLoss/dvhat_l,    v_l = vhat_l - epsilon_l

and the update of layer l's parameters is (df_l/dtheta_l)^T epsilon_l, which is their gradient.
``fixed_pred.py`` builds on the same pass with other weights for the errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch2pc.layers import Inference, Network, detached, in_belief_dtype, own


def exact(network: Network, eta: Any, n: Any, vinit: Any, compile: bool) -> Inference:
    """Infer by one forward and one backward pass; the other arguments have no use here."""
    ones = [1.0] * len(network.layers)
    return weighted_backpropagation(network, ones, ones)


def weighted_backpropagation(
    network: Network, c_epsilon: Sequence[float], c_v: Sequence[float]
) -> Inference:
    """Errors and beliefs that are multiples of the gradients g_l = dLoss/dvhat_l:

        epsilon_l = c_epsilon[L-l] g_l,    v_l = vhat_l - c_v[L-l] g_l

    The update of layer l's parameters is c_epsilon[L-l] times their gradient.
    """
    graph, L = network.feed_forward(), len(c_epsilon)
    # c[l] is layer l's; the input's error arrives through layer 1, and the loss's own parameters
    # get their gradient as it is.
    c = [c_epsilon[L - 1], *reversed(c_epsilon), 1.0]
    is_scaled = any(c_l != 1 for c_l in c)
    shares = is_scaled and graph.shares_leaves
    g, gradients = graph.backpropagate(keep_graph=shares)

    vhat = [vhat_l.detach() for vhat_l in graph.vhat]
    dLdy, epsilon_0 = g[-1].clone(), None if g[0] is None else g[0] * c[0]
    errors = [in_belief_dtype(g_l) for g_l in g[1:]]
    v = [
        torch.sub(vhat_l, error, alpha=c_l)
        for vhat_l, error, c_l in zip(vhat[1:], errors, reversed(c_v), strict=True)
    ]
    leaves = [leaf for _, leaf, _ in gradients]
    if shares:
        epsilon, updates = own(errors), own(graph.weighted_gradients(g, leaves, c))
    else:
        found = own([*errors, *[of_leaf for _, _, of_leaf in gradients]])
        epsilon, updates = found[:L], found[L:]
    if is_scaled:
        _scale(epsilon, c[1:])
        if not shares:
            _scale(updates, [c[l] for l, _, _ in gradients])
    return Inference(
        vhat,
        graph.Loss.detach().clone(),
        dLdy,
        [detached(network.X), *v],
        [epsilon_0, *epsilon],
        dict(zip(leaves, updates, strict=True)),
    )


def _scale(tensors: Sequence[Tensor], factors: Sequence[float]) -> None:
    """Multiply in place, so that tensors must be ours; ``factors`` may go on behind the last."""
    # Factors that are tensors of the same type are twice as fast as numbers. Half precision would
    # lose a small factor.
    dtypes = {tensor.dtype for tensor in tensors}
    of_dtype = {
        dtype: torch.tensor(factors, dtype=torch.float64 if dtype.itemsize < 4 else dtype).unbind()
        for dtype in dtypes
    }
    for i, tensor in enumerate(tensors):
        if factors[i] != 1:
            tensor.mul_(of_dtype[tensor.dtype][i])
