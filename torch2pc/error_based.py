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

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from torch2pc.compiled import run_plainly
from torch2pc.layers import Inference, Network
from torch2pc.strict import Relaxation, relax


def error_based(
    network: Network,
    eta: float,
    n: int,
    vinit: Sequence[Any] | None,
    compile: bool,
    update_at: str,
) -> Inference:
    """Infer by relaxing the errors ``n`` times, from those of ``vinit`` or else from 0."""
    return relax(ErrorRelaxation(network, eta, vinit), n, compile, update_at, "ErrorBased")


class ErrorRelaxation(Relaxation):
    """The iteration, one step at a time; iterating over it yields (v, epsilon) after each step.

    Between the steps v and epsilon belong together: ``epsilon_l = f_l(v_{l-1}) - v_l``, and
    ``epsilon_L`` is the loss's gradient at f_L(v_{L-1}).

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1))
    >>> network = Network(model, nn.functional.mse_loss, torch.ones(4, 3), torch.zeros(4, 1))
    >>> with network.replaying():
    ...     for k, (v, epsilon) in zip(range(20), ErrorRelaxation(network, eta=0.1)):
    ...         error = epsilon[1].norm()
    """

    def __init__(self, network: Network, eta: float, vinit: Sequence[Any] | None = None) -> None:
        super().__init__(network, eta, vinit)
        self._starts_from_beliefs = vinit is not None
        # What each layer saves on the way up, for the way down.
        self._saved: list[Any] | None = None
        # Where the output is that the errors make, and the loss there.
        self.output, self.loss_here = self.vhat[-1], self.Loss

    def run(self, n: int, compile: bool = False) -> None:
        """``n`` steps."""
        self._say_if_compiled(compile)
        for _ in range(n):
            self.step()
        self._saved = None

    @torch.no_grad()
    def step(self) -> None:
        """Move all errors once, and the beliefs with them."""
        if self._saved is None:
            self.start()
        for l, g_l in self.arriving():
            if g_l is None:
                self.epsilon[l].mul_(1 - self.eta)
            else:
                self.epsilon[l].lerp_(g_l, self.eta)
            del g_l
        self.climb()

    def start(self) -> None:
        """Bring errors and beliefs together before the first step."""
        if self._starts_from_beliefs:
            self._take_hidden_errors()
        self.climb()

    def climb(self) -> None:
        """Take the beliefs that the errors make, and the output's error there."""
        self._saved = []
        L = len(self.network.layers)
        if L > 1:
            torch.neg(self.epsilon[1], out=self.delta[1])
        for l in range(2, L + 1):
            with self._outside_autocast():
                moved, saved = self.network.layers[l - 1].displacement.forward(self.delta[l - 1])
            self._saved.append(saved)
            if l < L:
                torch.sub(moved, self.epsilon[l], out=self.delta[l])
            else:
                self.output = self.vhat[-1].to(moved.dtype) + moved
                self.loss_here, self.epsilon[L] = self._loss_at(self.output)

    def arriving(self) -> Iterator[tuple[int, Tensor | None]]:
        """(l, g_l) for l = L-1..1: what the output's error brings down to where the beliefs are.

        None where nothing arrives. It uses up what ``climb`` has saved.
        """
        g: Tensor | None = self.epsilon[-1]
        assert self._saved is not None
        for l in range(len(self.network.layers) - 1, 0, -1):
            saved = self._saved.pop()
            if g is not None:
                with self._outside_autocast():
                    g = self.network.layers[l].displacement.backward(saved, g)
            yield l, g

    def _say_if_compiled(self, compile: bool) -> None:
        if compile:
            run_plainly(self.network.model, "only Strict's iterations are compiled")

    def _take_hidden_errors(self) -> None:
        """The errors of the beliefs as they are."""
        for l in range(1, len(self.delta)):
            if l == 1:
                torch.neg(self.delta[1], out=self.epsilon[1])
                continue
            with self._outside_autocast():
                moved, _ = self.network.layers[l - 1].displacement.forward(self.delta[l - 1])
            torch.sub(moved, self.delta[l], out=self.epsilon[l])
