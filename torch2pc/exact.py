"""The Exact algorithm: prediction errors that are the gradients of the loss, as in backpropagation.

    epsilon_l = dLoss/dvhat_l,    v_l = vhat_l - epsilon_l

and the update of layer l's parameters is (df_l/dtheta_l)^T epsilon_l, which is their gradient.
``fixed_pred.py`` builds on the same pass with other weights for the errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from torch2pc.layers import (
    Graph,
    Inference,
    Network,
    belief_dtype,
    own,
)


def exact(network: Network, eta: Any, n: Any, vinit: Any) -> Inference:
    """Infer by one forward and one backward pass; ``eta``, ``n`` and ``vinit`` have no use here."""
    ones = [1.0] * len(network.layers)
    return weighted_backpropagation(network.feed_forward(), ones, ones)


def weighted_backpropagation(
    graph: Graph, c_epsilon: Sequence[float], c_v: Sequence[float]
) -> Inference:
    """Errors and beliefs that are multiples of the gradients g_l = dLoss/dvhat_l:

        epsilon_l = c_epsilon[L-l] g_l,    v_l = vhat_l - c_v[L-l] g_l

    The update of layer l's parameters is c_epsilon[L-l] times their gradient.
    """
    L = len(c_epsilon)
    # c[l] is layer l's; the input's error arrives through layer 1, and the loss's own parameters
    # get their gradient as it is.
    c = [c_epsilon[L - 1], *reversed(c_epsilon), 1.0]
    is_scaled = any(c_l != 1 for c_l in c)
    shares = is_scaled and graph.shares_leaves
    g, gradients = graph.backpropagate(keep_graph=shares)

    vhat = [x.detach() for x in graph.vhat]
    v, epsilon = [vhat[0].clone()], []
    for vhat_l, g_l, c_v_l, c_l in zip(vhat[1:], g[1:], reversed(c_v), c[1:-1], strict=True):
        g_l = g_l.to(belief_dtype(vhat_l))
        v.append(torch.sub(vhat_l, g_l, alpha=c_v_l))
        epsilon.append(g_l if c_l == 1 else g_l * c_l)

    leaves = [leaf for _, leaf, _ in gradients]
    if shares:
        updates = own(graph.weighted_gradients(g, leaves, c))
        epsilon = own(epsilon)
    else:
        found = own([*epsilon, *(of_leaf for _, _, of_leaf in gradients)])
        epsilon, updates = found[:L], found[L:]
        if updates and is_scaled:
            torch._foreach_mul_(updates, [c[l] for l, _, _ in gradients])
    epsilon_0 = None if g[0] is None else g[0] * c[0]
    return Inference(
        vhat,
        graph.Loss.detach(),
        g[-1].clone(),
        v,
        [epsilon_0, *epsilon],
        dict(zip(leaves, updates, strict=True)),
    )
