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
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torch2pc.compiled import Call
from torch2pc.graph import in_belief_dtype
from torch2pc.layers import Inference, Network
from torch2pc.step_size import Product, second_derivative
from torch2pc.strict import Callback, Here, Relaxation, compiled_or_relaxed


def error_based(
    network: Network,
    eta: float | str,
    n: int,
    vinit: Sequence[Any] | None,
    compile: bool,
    update_at: str,
    callback: Callback | None = None,
) -> Inference:
    """Infer by relaxing the errors ``n`` times, from those of ``vinit`` or else from 0."""
    at = _place_of(update_at)
    call = Call(network, eta, n, vinit, at, relaxes_errors=True) if compile else None
    make = partial(ErrorRelaxation, network, eta, vinit)
    return compiled_or_relaxed(call, make, n, update_at, "ErrorBased", callback)


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

    output: Tensor
    """The outputs that the errors make, as they were last taken."""

    def _start(self) -> None:
        super()._start()
        # Whether errors and beliefs belong together yet.
        self._is_ready = False
        # What each layer saves on the way up, for the way down.
        self._saved: list[Any] | None = None

    def _steps(self, n: int) -> None:
        super()._steps(n)
        self._saved = None

    @torch.no_grad()
    def step(self) -> None:
        """Move all errors once, and the beliefs with them."""
        self._get_ready()
        if isinstance(self.eta, str):
            self.eta = self.safe_step()
        if self._saved is None:
            self.climb()
        for l, g_l in self.arriving():
            if g_l is None:
                self.epsilon[l].mul_(1 - self.eta)
            else:
                self.epsilon[l].lerp_(g_l, self.eta)
            del g_l
        # In one step an error reaches all layers.
        self._reached = 1
        self.climb()

    def take_updates_at(self, update_at: str) -> None:
        super().take_updates_at(_place_of(update_at))

    @property
    def free(self) -> list[Tensor]:
        """The variables that F is descended in, epsilon_1..epsilon_{L-1}."""
        return self.epsilon[1:-1]

    @torch.no_grad()
    def stand_at(self, free: Sequence[Tensor]) -> None:
        """Let the errors be these, and the beliefs follow."""
        self.epsilon[1:-1] = free
        self._reached = 1
        self.climb()
        self._is_ready = True

    @torch.no_grad()
    def here(self) -> Here:
        """The energy and its gradient where the errors are, which stay there."""
        self._get_ready()
        if self._saved is None:
            self.climb()
        found = self.all_arriving()
        self._saved = None
        gradient = [e - g_l for e, g_l in zip(self.free, found, strict=True)]
        return Here(list(self.epsilon), self._Loss_here, None, gradient, found)

    def _get_ready(self) -> None:
        """Bring errors and beliefs together, before the first step."""
        if self._is_ready:
            return
        if self._vinit is not None:
            self._take_hidden_errors(self.epsilon)
        self.climb()
        self._is_ready = True

    def climb(self) -> None:
        """Take the beliefs that the errors make, and the output's error there."""
        self._saved = []
        L = len(self.network.layers)
        if L > 1:
            torch.neg(self.epsilon[1], out=self.delta[1])
        for l in range(2, L + 1):
            moved, saved = self._displaced(l, self.delta[l - 1])
            self._saved.append(saved)
            if l < L:
                torch.sub(moved, self.epsilon[l], out=self.delta[l])
            else:
                self.output = self.vhat[-1].to(moved.dtype) + moved
                self._Loss_here, self.epsilon[L] = self._loss_and_gradient(self.output)

    def arriving(self) -> Iterator[tuple[int, Tensor | None]]:
        """(l, g_l) for l = L-1..1: what the output's error brings down to where the beliefs are.

        None where nothing arrives. It uses up what ``climb`` has saved.
        """
        g: Tensor | None = self.epsilon[-1]
        assert self._saved is not None
        for l in range(len(self.network.layers) - 1, 0, -1):
            saved = self._saved.pop()
            if g is not None:
                g = self._arriving(l + 1, saved, g)
            yield l, g

    def all_arriving(self) -> list[Tensor]:
        """g_1..g_{L-1}, with zeros where nothing arrives."""
        found = [torch.zeros_like(e) for e in self.free]
        for l, g_l in self.arriving():
            if g_l is not None:
                found[l - 1] = g_l.to(found[l - 1])
        return found

    @torch.no_grad()
    def _energy(self) -> Tensor:
        """The terms of F at the errors as they are now, one after the other."""
        self._get_ready()
        Loss = in_belief_dtype(self._Loss_here)
        lengths = [torch.linalg.vector_norm(error) for error in self.free]
        return torch.stack([Loss, *[0.5 * length.square().to(Loss) for length in lengths]])

    def _curvature(self) -> Product:
        """Multiplies with the Hessian of F in the errors, but for second derivatives of the layers.

        Moving the errors by u moves the beliefs by w_l = J_l w_{l-1} - u_l and the output by J_L w_{L-1}.
        What the change of the loss's gradient there brings down to u_l is subtracted from it.
        """
        L, delta, displaced = len(self.network.layers), self.delta, self._displaced
        self._get_ready()
        before = [
            displaced(l, delta[l - 1])[0] if self._may_be_away(l - 1) else 0.0
            for l in range(2, L + 1)
        ]
        of_loss = second_derivative(lambda y: self._loss_at(y[0]), [self.output])

        def product(u: list[Tensor]) -> list[Tensor]:
            w, found, kept = -u[0], list(u), []
            for l, before_l in enumerate(before, start=2):
                s = self._small_step(l, w)
                moved, saved = displaced(l, delta[l - 1] + s * w)
                kept.append(saved)
                w = (moved - before_l) / s
                if l < L:
                    w = w - u[l - 1]
            e: Tensor | None
            (e,) = of_loss([w])
            for l in range(L, 1, -1):
                e = self._arriving(l, kept.pop(), e)
                if e is None:
                    break
                found[l - 2] = u[l - 2] - e
            return found

        return product


def _place_of(update_at: str) -> str:
    """The errors belong to the beliefs that they have made: there is no other place before a step."""
    return "v" if update_at == "before" else update_at
