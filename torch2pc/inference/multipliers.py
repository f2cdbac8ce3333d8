"""The Multipliers algorithm: Strict's energy, with a Lagrange multiplier for each hidden layer.

Backpropagation minimises the loss under the constraint that each belief is its prediction. The augmented
Lagrangian of that,

    L(v, lambda) = F(v) + sum_{l<L} lambda_l . epsilon_l,    epsilon_l = f_l(v_{l-1}) - v_l

with F of ``strict.py``, is descended in the beliefs and ascended in the multipliers. From v = vhat,
lambda = 0, in each of n sweeps from the top down, l = L-1..1,

    v_l <- v_l + eta (epsilon_l + lambda_l - J_{l+1}(v_l)^T (epsilon_{l+1} + lambda_{l+1}))

where epsilon_{l+1} was taken anew once v_{l+1} had moved (epsilon_L is the loss's gradient, lambda_L =
0), and between the sweeps

    lambda_l <- lambda_l + alpha epsilon_l

So what pulls at beliefs, goes down and makes the updates is epsilon_l + lambda_l, which is what is told
of as the layer's error. Where it comes to rest every epsilon_l is 0 and v = vhat, and lambda_l is what
arrives from above, J_{l+1}^T lambda_{l+1}: backpropagation's gradients, where Strict's errors are those
of beliefs that have moved. Each belief needs no more than in Strict, and each multiplier its own layer's
error alone.

A layer's precision multiplies both, pi_l (epsilon_l + lambda_l). The larger it is, the heavier is the
penalty beside the loss; where it is too light for second derivatives of the layers, lambda_l times these,
beliefs and multipliers swing about each other for ever.

Source: J. Seely and J. Gould, Augmented Lagrangian predictive coding, arXiv:2605.31022 (2026), where all
beliefs move at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch2pc.energy.factors import USUAL, Terms
from torch2pc.graph.network import Network
from torch2pc.inference.relax import Relaxation
from torch2pc.inference.steps import Rule, rule_of
from torch2pc.inference.strict import strict

# How fast the multipliers grow where nothing else is said: as the method of multipliers has it, by what the
# penalty itself pulls. With less they lag behind, and beliefs and multipliers swing about each other.
ALPHA = 1.0


def multipliers(
    network: Network,
    eta: Any,
    vinit: Sequence[Any] | None = None,
    update_at: str = "v",
    terms: Terms = USUAL,
) -> Relaxation:
    """The relaxation of a batch, from the beliefs ``vinit`` or else from the feed-forward pass.

    A number for ``eta`` is that of sweeps from the top: all at once, beliefs and multipliers need many
    hundred iterations where they come to rest at all.
    """
    rule = eta if isinstance(eta, Rule) else rule_of(eta, "down")
    alpha = ALPHA if terms.alpha is None else terms.alpha
    return strict(network, rule, vinit, update_at, terms._replace(alpha=alpha))
