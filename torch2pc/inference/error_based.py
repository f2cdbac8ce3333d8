"""The ErrorBased algorithm: errors that descend the energy, instead of beliefs.

    F(epsilon) = LossFun(f_L(v_{L-1}), Y) + 1/2 sum_{l<L} ||epsilon_l||^2

with the beliefs that the errors make, from the input up: v_0 = X, v_l = f_l(v_{l-1}) - epsilon_l. The
gradient goes through this chain: where g_l arrives at layer l when the loss's gradient e_L at the
output of the perturbed pass is carried down it, g_l = (J_L ... J_{l+1})^T e_L, it is epsilon_l - g_l.
From 0, or from the errors of given beliefs, n times, all layers at once,

    epsilon_l <- epsilon_l - eta (epsilon_l - g_l)                              l = 1..L-1

An error reaches all layers in the first iteration, whatever the depth, at the price of a pass through
the whole network: the updates of the parameters are local, the inference is not. In epsilon the
Hessian of F is the identity plus a matrix of the rank of the outputs, where in v it is as badly
conditioned as the network is deep. The stationary points are those of Strict.

As in ``strict.py``, what is computed is how far each belief has moved from its feed-forward value,

    delta_l = d_l(delta_{l-1}) - epsilon_l

so that no layer runs again, and beliefs that hardly move are not rounded to ones that do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch2pc.energy import Errors
from torch2pc.energy.factors import USUAL, Terms, factors_of
from torch2pc.graph.network import Network
from torch2pc.inference.relax import Relaxation
from torch2pc.inference.start import check_vinit_entries
from torch2pc.inference.steps import rule_of


def error_based(
    network: Network,
    eta: Any,
    vinit: Sequence[Any] | None = None,
    update_at: str = "v",
    terms: Terms = USUAL,
) -> Relaxation:
    """The relaxation of a batch, from the errors of the beliefs ``vinit`` or else from 0.

    Between the steps v and epsilon belong together: ``epsilon_l = f_l(v_{l-1}) - v_l``, and
    ``epsilon_L`` is the loss's gradient at f_L(v_{L-1}).
    """
    energy = errors_of(network, vinit, terms)
    return Relaxation(network, energy, rule_of(eta), place_of(update_at))


def errors_of(network: Network, vinit: Sequence[Any] | None, terms: Terms = USUAL) -> Errors:
    """The energy in the errors."""
    network.record()
    check_vinit_entries(vinit, network.vhat)
    return Errors(factors_of(network, terms), network.vhat, network.free, vinit)


def place_of(update_at: str) -> str:
    """The errors belong to the beliefs that they have made: there is no other place before a step."""
    return "v" if update_at == "before" else update_at
