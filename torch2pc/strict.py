"""The Strict algorithm: beliefs that descend the energy of their prediction errors.

    F(v) = LossFun(f_L(v_{L-1}), Y) + 1/2 sum_{l<L} ||f_l(v_{l-1}) - v_l||^2,    v_0 = X

by repeating n times, all layers at once,

    epsilon_L = dLossFun(f_L(v_{L-1}), Y) / df_L(v_{L-1})
    epsilon_l = f_l(v_{l-1}) - v_l                                               l = 1..L-1
    v_l <- v_l + eta (epsilon_l - J_{l+1}(v_l)^T epsilon_{l+1})

Each layer needs no more than its own input, its own belief and the error from the layer above, and
that is all that is held at a time: the beliefs and one layer's graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from torch2pc.checks import check_vinit_entries
from torch2pc.layers import (
    Inference,
    Network,
    add_updates,
    belief_like,
    gradient,
    leaves_between,
    own,
)


def strict(network: Network, eta: float, n: int, vinit: Sequence[Any] | None) -> Inference:
    """Infer by relaxing the beliefs ``n`` times from ``vinit``, or else from the feed-forward pass."""
    relaxation = Relaxation(network, eta, vinit)
    with network.replaying():
        for _ in range(n):
            relaxation.step()
        input_error, updates = relaxation.updates()
    found = own([*relaxation.epsilon[1:], *updates.values()])
    L = len(network.layers)
    return Inference(
        relaxation.vhat,
        relaxation.Loss,
        relaxation.dLdy,
        relaxation.v,
        [input_error, *found[:L]],
        dict(zip(updates, found[L:], strict=True)),
    )


class Relaxation:
    """The iteration, one step at a time; iterating over it yields (v, epsilon) after each step.

    The lists that it yields are its own and change with the next step: copy what is to be kept.
    Steps and ``updates()`` belong inside ``with network.replaying()``.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1))
    >>> network = Network(model, nn.functional.mse_loss, torch.ones(4, 3), torch.zeros(4, 1))
    >>> with network.replaying():
    ...     for k, (v, epsilon) in zip(range(20), Relaxation(network, eta=0.1)):
    ...         error = epsilon[1].norm()
    """

    def __init__(self, network: Network, eta: float, vinit: Sequence[Any] | None = None) -> None:
        self.network, self.eta = network, eta
        self.vhat, self.Loss, self.dLdy = network.record()
        self.v = [self.vhat[0].clone(), *(belief_like(vhat_l) for vhat_l in self.vhat[1:])]
        self.epsilon = [torch.zeros_like(v_l) for v_l in self.v]
        self.epsilon[-1].copy_(self.dLdy)
        # The lowest layer that any error has reached. Beliefs that start at their predictions have
        # none, and the output's error climbs down one layer in each step; the layers below it
        # would be evaluated where they were before, to propagate zeros.
        self._reached = len(network.layers)
        if vinit is not None:
            check_vinit_entries(vinit, self.vhat, self.v)
            for v_l, given in zip(self.v[1:-1], vinit[1:-1], strict=True):
                v_l.copy_(given.detach())
            self._reached = 1

    def __iter__(self) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        while True:
            self.step()
            yield self.v, self.epsilon

    def step(self) -> None:
        """Move all beliefs once."""
        v, epsilon, L = self.v, self.epsilon, len(self.network.layers)
        lowest = max(2, self._reached)
        if lowest == 2 <= L:
            epsilon[1] = self.vhat[1] - v[1]  # the input is clamped, and so is its prediction
        # Upwards, so that v_{l-1} can move as soon as layer l has been evaluated there.
        for l in range(lowest, L + 1):
            x = self._input_of(l).requires_grad_()
            prediction = self.network.layers[l - 1].replay(x)
            if l < L:
                epsilon[l] = prediction.detach() - v[l]
                (arriving,) = gradient([prediction], [x], [epsilon[l].to(prediction.dtype)])
            else:
                Loss = self.network.loss.replay(prediction, self.network.Y)
                epsilon_L, arriving = gradient([Loss], [prediction, x])
                epsilon[L] = torch.zeros_like(v[L]) if epsilon_L is None else epsilon_L.to(v[L])
            v[l - 1].add_(epsilon[l - 1], alpha=self.eta)
            if arriving is not None:
                v[l - 1].sub_(arriving, alpha=self.eta)
        self._reached = max(1, self._reached - 1)

    def updates(self) -> tuple[Tensor | None, dict[Tensor, Tensor]]:
        """The input's error (if the input requires grad) and the parameters' updates.

        (df_l(v_{l-1})/dtheta_l)^T epsilon_l, with the beliefs as they are now and the errors of
        the last step.
        """
        network, L = self.network, len(self.network.layers)
        updates: dict[Tensor, Tensor] = {}
        input_error = None
        for l, layer in enumerate(network.layers, start=1):
            asks_input = l == 1 and network.X.requires_grad
            asks_loss = l == L and network.loss.has_leaves
            if not (layer.has_leaves or asks_input or asks_loss):
                continue
            x = self._input_of(l).requires_grad_(asks_input)
            prediction = layer.replay(x)
            leaves = leaves_between(prediction, [x])
            asked = [*leaves, x] if asks_input else leaves
            found = gradient([prediction], asked, [self.epsilon[l].to(prediction.dtype)])
            if asks_input:
                *found, input_error = found
                input_error = torch.zeros_like(x) if input_error is None else input_error
            add_updates(updates, leaves, found)
            if asks_loss:
                output = prediction.detach().requires_grad_()
                Loss = network.loss.replay(output, network.Y)
                leaves = leaves_between(Loss, [output])
                add_updates(updates, leaves, gradient([Loss], leaves))
        return input_error, updates

    def _input_of(self, l: int) -> Tensor:
        """The belief that layer l predicts from, in the type that the layer works in."""
        return (self.v[l - 1] if l > 1 else self.vhat[0]).detach().to(self.vhat[l - 1].dtype)
