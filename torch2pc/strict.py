"""The Strict algorithm: beliefs that descend the energy of their prediction errors.

    F(v) = LossFun(f_L(v_{L-1}), Y) + 1/2 sum_{l<L} ||f_l(v_{l-1}) - v_l||^2,    v_0 = X

by repeating n times, all layers at once,

    epsilon_L = dLossFun(f_L(v_{L-1}), Y) / df_L(v_{L-1})
    epsilon_l = f_l(v_{l-1}) - v_l                                               l = 1..L-1
    v_l <- v_l + eta (epsilon_l - J_{l+1}(v_l)^T epsilon_{l+1})

Each layer needs no more than its own input, its own belief and the error from the layer above, and
that is all that is held at a time: the beliefs, one layer's graph, and that of layer 1, whose input
does not move, for its update at the end.

The errors are small differences of predictions: a belief moves by far less than the 1/256 of its
value that bfloat16 resolves. So this algorithm runs outside autocast, in the parameters' own type.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from torch2pc.checks import check_vinit_entries
from torch2pc.compiled import compiled_steps, run_plainly, schedule
from torch2pc.layers import (
    Inference,
    Layer,
    Network,
    add_updates,
    check_scalar,
    detached,
    gradient,
    in_belief_dtype,
    leaves_between,
    outside_autocast,
    own,
)


def strict(
    network: Network, eta: float, n: int, vinit: Sequence[Any] | None, compile: bool
) -> Inference:
    """Infer by relaxing the beliefs ``n`` times from ``vinit``, or else from the feed-forward pass."""
    with outside_autocast(network.X.device):
        relaxation = Relaxation(network, eta, vinit)
        with network.replaying():
            relaxation.run(n, compile)
            return relaxation.result()


class Relaxation:
    """The iteration, one step at a time; iterating over it yields (v, epsilon) after each step.

    The lists that it yields are its own and change with the next step: copy what is to be kept.
    Steps and ``updates()`` belong inside ``with network.replaying()``. What ``latent.py`` adds to
    the energy is optional: a first belief that is free, precisions, and a prior.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1))
    >>> network = Network(model, nn.functional.mse_loss, torch.ones(4, 3), torch.zeros(4, 1))
    >>> with network.replaying():
    ...     for k, (v, epsilon) in zip(range(20), Relaxation(network, eta=0.1)):
    ...         error = epsilon[1].norm()
    """

    def __init__(
        self,
        network: Network,
        eta: float,
        vinit: Sequence[Any] | None = None,
        *,
        free_input: bool = False,
        precision: Sequence[float] | None = None,
        prior: Layer | None = None,
    ) -> None:
        self.network, self.eta = network, eta
        # A clamped input makes the first evaluation of layer 1 its last: its update needs no other.
        self.vhat, self.Loss, self.dLdy = network.record(keep_first=not free_input)
        v_0 = in_belief_dtype(self.vhat[0]).clone() if free_input else detached(network.X)
        self.v = [v_0, *[in_belief_dtype(vhat_l).clone() for vhat_l in self.vhat[1:]]]
        self.epsilon = [torch.zeros_like(v_l) for v_l in self.v]
        self.epsilon[-1].copy_(self.dLdy)
        # precision[l] weighs the error of layer l; that of the output is in the loss.
        self.precision = [1.0, *(precision or [1.0] * (len(network.layers) - 1)), 1.0]
        self.prior = prior
        # The lowest layer whose input moves: nothing below it is evaluated in a step.
        self._lowest = 1 if free_input else 2
        # The lowest layer that any error has reached. Beliefs that start at their predictions have
        # none, and the output's error climbs down one layer in each step; the layers below it
        # would be evaluated where they were before, to propagate zeros.
        self._reached = len(network.layers)
        if prior is not None:
            check_scalar("prior", prior.record(self._free_beliefs()))
            self._reached = 1
        if vinit is not None:
            check_vinit_entries(vinit, self.vhat, self.v)
            for v_l, given in zip(self.v[1:-1], vinit[1:-1], strict=True):
                v_l.copy_(given.detach())
            self._reached = 1

    def __iter__(self) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        while True:
            self.step()
            yield self.v, self.epsilon

    def run(self, n: int, compile: bool = False) -> None:
        """``n`` steps, compiled if that is asked for and can be done."""
        done = self._run_compiled(n) if compile else 0
        for _ in range(n - done):
            self.step()

    def step(self) -> None:
        """Move all beliefs once."""
        v, epsilon, eta, L = self.v, self.epsilon, self.eta, len(self.network.layers)
        of_prior = self._gradient_of_prior()
        lowest = max(self._lowest, self._reached)
        if lowest == 2 <= L:
            # The input is clamped, and so is its prediction.
            torch.sub(self.vhat[1], v[1], out=epsilon[1])
        # Upwards, so that v_{l-1} can move as soon as layer l has been evaluated there.
        for l in range(lowest, L + 1):
            x = self._input_of(l).requires_grad_()
            prediction = self.network.layers[l - 1].replay(x)
            if l < L:
                torch.sub(prediction.detach(), v[l], out=epsilon[l])
                (arriving,) = gradient([prediction], [x], [self._weighted_error(l, prediction)])
            else:
                arriving = self._take_output_error(prediction, x)
            if l > 1:
                v[l - 1].add_(epsilon[l - 1], alpha=eta * self.precision[l - 1])
            for descended in (arriving, of_prior[l - 1]):
                if descended is not None:
                    v[l - 1].sub_(descended, alpha=eta)
            del x, prediction, arriving, descended  # before the next layer makes its own
        self._reached = max(1, self._reached - 1)

    def take_errors(self) -> None:
        """Bring ``epsilon`` up to the beliefs as they are now, without moving them."""
        L = len(self.network.layers)
        for l, layer in enumerate(self.network.layers, start=1):
            prediction = layer.replay(self._input_of(l))
            if l < L:
                torch.sub(prediction.detach(), self.v[l], out=self.epsilon[l])
            else:
                self._take_output_error(prediction.detach().requires_grad_(), None)

    def updates(self) -> tuple[Tensor | None, dict[Tensor, Tensor]]:
        """The input's error (if the input requires grad) and the parameters' updates.

        (df_l(v_{l-1})/dtheta_l)^T epsilon_l, with the beliefs as they are now and the errors as
        they were last taken.
        """
        network, L = self.network, len(self.network.layers)
        updates: dict[Tensor, Tensor] = {}
        input_error = None
        for l, layer in enumerate(network.layers, start=1):
            asks_input = l == 1 and network.X.requires_grad
            asks_loss = l == L and network.loss.has_leaves
            if not (layer.has_leaves or asks_input or asks_loss):
                continue
            if l == 1 and network.first is not None:
                (x, prediction), network.first = network.first, None
            else:
                x = self._input_of(l)
                x.requires_grad_(x.is_floating_point())
                prediction = layer.replay(x)
            leaves = leaves_between(prediction, [x])
            asked = [*leaves, x] if asks_input else leaves
            found = gradient([prediction], asked, [self._weighted_error(l, prediction)])
            if asks_input:
                *found, input_error = found
                input_error = torch.zeros_like(x) if input_error is None else input_error
            add_updates(updates, leaves, found)
            if asks_loss:
                output = prediction.detach().requires_grad_()
                _add_own_gradients(updates, network.loss.replay(output, network.Y), [output])
            del x, prediction, asked
        if self.prior is not None and self.prior.has_leaves:
            beliefs = self._free_beliefs()
            _add_own_gradients(updates, self.prior.replay(beliefs), beliefs)
        return input_error, updates

    def result(self) -> Inference:
        """What was inferred, in tensors that share no memory."""
        input_error, updates = self.updates()
        L = len(self.network.layers)
        found = own([*self.epsilon[1:], *updates.values()])
        return Inference(
            self.vhat,
            self.Loss,
            self.dLdy,
            self.v,
            [input_error, *found[:L]],
            list(zip(updates, found[L:], strict=True)),
        )

    def _run_compiled(self, n: int) -> int:
        """Try to run ``n`` compiled steps; the number of steps that were done, 0 or n."""
        network, like = self.network, self.v[-1]
        functions = [*network.layers, network.loss, *([] if self.prior is None else [self.prior])]
        run_steps = compiled_steps(network.model)
        if run_steps is None:
            return 0
        for function in functions:
            if not function.is_pure:
                reason = f"{function.name} draws random numbers or changes its buffers"
                run_plainly(network.model, reason)
                return 0
        is_free = self._lowest == 1
        v, epsilon = self.v, self.epsilon
        arguments = (
            [layer.function for layer in network.layers],
            [layer.copies_input for layer in network.layers],
            [vhat_l.dtype for vhat_l in self.vhat],
            network.loss.function,
            None if self.prior is None else self.prior.function,
            network.Y,
            None if is_free else self.vhat[1],
            [None if pi == 1 else like.new_full((), pi) for pi in self.precision],
        )
        with torch.no_grad():
            for part in schedule(
                n, float(self.eta), self._reached, len(v), like.dtype, like.device
            ):
                try:
                    v, epsilon = run_steps(*arguments, v, *part)
                except Exception as error:
                    if v is not self.v:
                        raise
                    # Whatever it was: the same steps without compilation say it plainly.
                    run_plainly(network.model, error, for_good=True)
                    return 0
        self.v[:], self.epsilon[:] = [self.v[0] if not is_free else v[0], *v[1:]], epsilon
        return n

    def _input_of(self, l: int) -> Tensor:
        """The belief that layer l predicts from, in the type that the layer works in."""
        belief = self.v[l - 1] if l >= self._lowest else self.vhat[0]
        return belief.detach().to(self.vhat[l - 1].dtype)

    def _weighted_error(self, l: int, prediction: Tensor) -> Tensor:
        error = self.epsilon[l].to(prediction.dtype)
        return error if self.precision[l] == 1 else error * self.precision[l]

    def _take_output_error(self, prediction: Tensor, x: Tensor | None) -> Tensor | None:
        """Set epsilon_L to the loss's gradient at ``prediction``; returns that at ``x``."""
        Loss = self.network.loss.replay(prediction, self.network.Y)
        inputs = [prediction] if x is None else [prediction, x]
        epsilon_L, *arriving = gradient([Loss], inputs)
        self.epsilon[-1] = (
            torch.zeros_like(self.v[-1]) if epsilon_L is None else epsilon_L.to(self.v[-1].dtype)
        )
        return arriving[0] if arriving else None

    def _free_beliefs(self) -> list[Tensor]:
        """v_0..v_{L-1} as the prior is given them."""
        return [v_l.detach().requires_grad_() for v_l in self.v[:-1]]

    def _gradient_of_prior(self) -> list[Tensor | None]:
        if self.prior is None:
            return [None] * len(self.v)
        beliefs = self._free_beliefs()
        return gradient([self.prior.replay(beliefs)], beliefs)


def _add_own_gradients(
    updates: dict[Tensor, Tensor], energy: Tensor, inputs: Sequence[Tensor]
) -> None:
    """Add the gradients of a loss's or a prior's own parameters to ``updates``."""
    leaves = leaves_between(energy, inputs)
    add_updates(updates, leaves, gradient([energy], leaves))
