"""The Strict algorithm: beliefs that descend the energy of their prediction errors.

    F(v) = LossFun(f_L(v_{L-1}), Y) + 1/2 sum_{l<L} ||f_l(v_{l-1}) - v_l||^2,    v_0 = X

by repeating n times, all layers at once,

    epsilon_L = dLossFun(f_L(v_{L-1}), Y) / df_L(v_{L-1})
    epsilon_l = f_l(v_{l-1}) - v_l                                               l = 1..L-1
    v_l <- v_l + eta (epsilon_l - J_{l+1}(v_l)^T epsilon_{l+1})

The errors are small differences of predictions and beliefs, of which float32 would keep few digits
in the upper layers and none in the lower ones. So what is iterated is how far each belief has moved,
delta_l = v_l - vhat_l. With the displacement d_l(delta) = f_l(vhat_{l-1} + delta) - f_l(vhat_{l-1}) of
layer l's prediction (``displacement.py``), which is not computed as a difference, it is the same
iteration, term by term:

    epsilon_L = dLossFun(y, Y) / dy  at  y = vhat_L + d_L(delta_{L-1})
    epsilon_l = d_l(delta_{l-1}) - delta_l                                       l = 1..L-1
    delta_l <- delta_l + eta (epsilon_l - J_{l+1}(v_l)^T epsilon_{l+1})

Each layer needs no more than its own input, its own belief and the error from the layer above. Held
are the beliefs, what the layers' displacements were prepared with, what one of them saves, and the
graph of layer 1, whose input does not move, for its update at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch2pc.energy import Beliefs
from torch2pc.energy.factors import USUAL, Terms, factors_of
from torch2pc.graph.network import Network
from torch2pc.inference.relax import Relaxation
from torch2pc.inference.start import check_vinit_entries
from torch2pc.inference.steps import rule_of


def strict(
    network: Network,
    eta: Any,
    vinit: Sequence[Any] | None = None,
    update_at: str = "v",
    terms: Terms = USUAL,
) -> Relaxation:
    """The relaxation of a batch, from the beliefs ``vinit`` or else from the feed-forward pass.

    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1))
    >>> network = Network(model, nn.functional.mse_loss, torch.ones(4, 3), torch.zeros(4, 1))
    >>> relaxation = strict(network, eta=0.1)
    >>> with network.replaying():
    ...     for k, (v, epsilon) in zip(range(20), relaxation):
    ...         error = epsilon[1].norm()
    """
    network.record()
    check_vinit_entries(vinit, network.vhat)
    energy = Beliefs(factors_of(network, terms), network.vhat, network.free, vinit)
    return Relaxation(network, energy, rule_of(eta), update_at)


def latent(network: Network, eta: Any, terms: Terms) -> Relaxation:
    """The same with a first belief that is free too, precisions, and the network's prior.

    Its errors are those at the final beliefs.
    """
    network.record()
    energy = Beliefs(factors_of(network, terms), network.vhat, network.free)
    return Relaxation(network, energy, rule_of(eta), takes_errors=True)
