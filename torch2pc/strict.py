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

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn

from torch2pc.checks import check_vinit_entries, warn_caller
from torch2pc.compiled import Call
from torch2pc.graph import (
    Updates,
    add_updates,
    below,
    check_scalar,
    gradient,
    gradient_of_small,
    has_hooks,
    in_belief_dtype,
    in_float16,
    leaves_between,
    outside_autocast,
    own,
)
from torch2pc.layers import Inference, Layer, Network, detached
from torch2pc.step_size import (
    MOST_TRIES,
    SHRINK,
    Product,
    safe_step,
    second_derivative,
    small_step,
)

# What PCInfer calls after each iteration, with its number, v and epsilon.
Callback = Callable[[int, list[Tensor], list[Tensor | None]], object]


def strict(
    network: Network,
    eta: float | str,
    n: int,
    vinit: Sequence[Any] | None,
    compile: bool,
    update_at: str,
    callback: Callback | None = None,
) -> Inference:
    """Infer by relaxing the beliefs ``n`` times from ``vinit``, or else from the feed-forward pass."""
    call = Call(network, eta, n, vinit, update_at) if compile else None
    make = partial(Relaxation, network, eta, vinit)
    return compiled_or_relaxed(call, make, n, update_at, "Strict", callback)


def compiled_or_relaxed(
    call: Call | None,
    make: Callable[[], Relaxation],
    n: int,
    update_at: str,
    ErrType: str,
    callback: Callback | None,
) -> Inference:
    """What a compiled call infers; where there is none, or it cannot be, what a relaxation does."""
    if call is not None and (found := call.infer()) is not None:
        return found
    relaxation = make()
    if call is not None:
        call.explain(relaxation.why_not_compiled())
    return relax(relaxation, n, update_at, ErrType, callback)


def relax(
    relaxation: Relaxation,
    n: int,
    update_at: str,
    ErrType: str,
    callback: Callback | None = None,
) -> Inference:
    """What ``n`` steps of a relaxation infer."""
    if update_at != "vhat":
        _warn_of_flat_items(relaxation.network, ErrType)
    relaxation.take_updates_at(update_at)
    relaxation.call_back(callback)
    with relaxation.network.replaying():
        relaxation.run(n)
        return relaxation.result()


_warned: WeakSet[nn.Module] = WeakSet()


def _warn_of_flat_items(network: Network, ErrType: str) -> None:
    """Say, once for each model, where updates at v feed themselves.

    A unit j that its item's activation holds at 0 has the belief v_j = -epsilon_j, which is
    -W_j . epsilon_{l+1} at equilibrium. At v, the weights W_j that leave it get the gradient
    v_j epsilon_{l+1}: a step along it lets them grow along epsilon_{l+1}, and the larger they are,
    the larger is the next step.
    """
    if network.model in _warned:
        return
    trains = [layer.has_leaves for layer in network.layers]
    flat = [
        layer.name
        for l, layer in enumerate(network.layers, start=1)
        if layer.ends_flat and any(trains[l:])
    ]
    if flat:
        _warned.add(network.model)
        warn_caller(
            f"{ErrType} takes its updates at v, where those of units that an activation holds at a "
            "constant feed themselves, so that training may blow up. "
            f"Such an activation is the last in {', '.join(flat)}. "
            'Pass update_at="vhat", or cut the model before the activations '
            "(items Linear | ReLU, Linear | ReLU, Linear)"
        )


class Here(NamedTuple):
    """What there is to know of the energy where a relaxation stands."""

    errors: list[Tensor]
    """epsilon_0..epsilon_L; where the input is clamped, the first has no meaning."""
    Loss: Tensor
    prior: Tensor | None
    gradient: list[Tensor]
    """F's gradient in the relaxation's variables, ``free``."""
    arriving: list[Tensor]
    """What arrives at each of them from above; at equilibrium, its error (times its precision)."""


class Relaxation:
    """The iteration, one step at a time; iterating over it yields (v, epsilon) after each step.

    The list epsilon that it yields is its own and changes with the next step: copy what is to be
    kept. Steps and ``updates()`` belong inside ``with network.replaying()``. What ``latent.py`` adds
    to the energy is optional: a first belief that is free, precisions, and a prior. An ``eta`` of
    ``"auto"`` is a number from the first step on.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1))
    >>> network = Network(model, nn.functional.mse_loss, torch.ones(4, 3), torch.zeros(4, 1))
    >>> with network.replaying():
    ...     for k, (v, epsilon) in zip(range(20), Relaxation(network, eta=0.1)):
    ...         error = epsilon[1].norm()
    """

    # Called after each of the steps of ``run`` with how many there have been.
    after_step: Callable[[int], object] | None = None
    update_at = "v"

    def __init__(
        self,
        network: Network,
        eta: float | str,
        vinit: Sequence[Any] | None = None,
        *,
        free_input: bool = False,
        precision: Sequence[float] | None = None,
        prior: Layer | None = None,
    ) -> None:
        self.network, self.eta = network, eta
        self._final: list[Tensor] | None = None
        self._before: list[Tensor] | None = None
        self.vhat, self.Loss, self.dLdy = network.record(free_input)
        self._Loss_here = self.Loss
        # precision[l] weighs the error of layer l; that of the output is in the loss.
        self.precision = [1.0, *(precision or [1.0] * (len(network.layers) - 1)), 1.0]
        self.prior = prior
        # The lowest layer whose input moves: nothing below it is evaluated in a step.
        self._lowest = 1 if free_input else 2
        if vinit is not None:
            check_vinit_entries(vinit, self.vhat)
        self._vinit = vinit
        self._start()
        if prior is not None:
            energy = prior.record(self._free_beliefs())
            check_scalar("prior", energy)
            prior.is_replayable(energy.detach(), self._free_beliefs())
            network.functions.append(prior)

    @torch.no_grad()
    def _start(self) -> None:
        """Set the beliefs to where they start, and the errors to what they are there, or to 0."""
        L = len(self.network.layers)
        # How far each belief has moved from its feed-forward value; the output's stays there.
        self.delta = [torch.zeros_like(in_belief_dtype(vhat_l)) for vhat_l in self.vhat[:-1]]
        self.epsilon = [torch.zeros_like(delta_l) for delta_l in self.delta]
        self.epsilon.append(in_belief_dtype(self.dLdy).clone())
        if self._vinit is not None:
            for l in range(1, L):
                torch.sub(self._vinit[l].detach(), self.vhat[l], out=self.delta[l])
        # The lowest layer that any error has reached. Beliefs that start at their predictions have
        # none, and the output's error climbs down one layer in each step; the layers below it
        # would be evaluated where they were before, to propagate zeros.
        starts_at_rest = self._vinit is None and self.prior is None
        is_linear = all([layer.is_linear for layer in self.network.layers])
        self._reached = L if starts_at_rest and is_linear else 1

    def __iter__(self) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        while True:
            self.step()
            yield self.v, self.epsilon

    @property
    def v(self) -> list[Tensor]:
        """The beliefs, v = vhat + delta."""
        if self._final is not None:
            return self._final
        moved = zip(self.vhat, self.delta, strict=False)
        v = [vhat_l + delta_l for vhat_l, delta_l in moved]
        v.append(in_belief_dtype(self.vhat[-1]).clone())
        if self._lowest > 1:
            v[0] = detached(self.network.X)
        return v

    def run(self, n: int) -> None:
        """``n`` steps.

        With an ``eta`` of ``"auto"``, made anew with a smaller one for as long as they raise the energy.
        """
        if not isinstance(self.eta, str):
            self._steps(n)
            return
        self.eta = self.safe_step()
        before = self._energy()
        slack = round_off(self.vhat[-1].dtype) * before.abs().sum()
        self._steps(n)
        for _ in range(MOST_TRIES):
            is_lower = self._energy().sum() <= before.sum() + slack
            if is_lower | ~before.sum().isfinite():
                break
            self.eta *= SHRINK
            self._start()
            self._steps(n)

    def _steps(self, n: int) -> None:
        for k in range(1, n + 1):
            if self.update_at == "before" and (k == n or self.after_step is not None):
                self._before = [delta_l.clone() for delta_l in self.delta]
            self.step()
            if self.after_step is not None:
                self.after_step(k)

    def call_back(self, callback: Callback | None) -> None:
        """Let ``callback`` be called after each step with (k, v, epsilon)."""
        if callback is None:
            return

        @torch.no_grad()
        def after_step(k: int) -> None:
            callback(k, self.v, [None, *self.epsilon[1:]])

        self.after_step = after_step

    @torch.no_grad()
    def step(self) -> None:
        """Move all beliefs once."""
        if isinstance(self.eta, str):
            self.eta = self.safe_step()
        delta, epsilon, eta, L = self.delta, self.epsilon, self.eta, len(self.network.layers)
        of_prior = self._gradient_of_prior()
        lowest = max(self._lowest, self._reached)
        if lowest == 2 <= L:
            # The input is clamped, and so is its prediction.
            torch.neg(delta[1], out=epsilon[1])
        # Upwards, so that delta_{l-1} can move as soon as layer l has been evaluated there.
        for l in range(lowest, L + 1):
            moved, saved = self._displaced(l, delta[l - 1])
            if l < L:
                torch.sub(moved, delta[l], out=epsilon[l])
            else:
                epsilon[L] = self._output_error(moved)
            del moved
            arriving = self._arriving(l, saved, self._weighted_error(l))
            if l > 1:
                delta[l - 1].add_(epsilon[l - 1], alpha=eta * self.precision[l - 1])
            for descended in (arriving, of_prior[l - 1]):
                if descended is not None:
                    delta[l - 1].sub_(descended, alpha=eta)
            del saved, arriving, descended  # before the next layer makes its own
        self._reached = max(1, self._reached - 1)

    @property
    def free(self) -> list[Tensor]:
        """The variables that F is descended in: how far v_{L-len(free)}..v_{L-1} have moved."""
        return self.delta[self._lowest - 1 :]

    @torch.no_grad()
    def stand_at(self, free: Sequence[Tensor]) -> None:
        """Let the variables be these."""
        self.delta = [*self.delta[: self._lowest - 1], *free]
        self._reached = 1

    @torch.no_grad()
    def here(self) -> Here:
        """The energy and its gradient where the beliefs are, which stay there."""
        delta, L, first = self.delta, len(self.network.layers), self._lowest - 1
        errors = [torch.zeros_like(epsilon_l) for epsilon_l in self.epsilon]
        arriving = [torch.zeros_like(delta_l) for delta_l in delta]
        if self._lowest > L:
            errors[L] = in_belief_dtype(self.dLdy)
        elif first == 1:
            torch.neg(delta[1], out=errors[1])
        for l in range(self._lowest, L + 1):
            moved, saved = self._displaced(l, delta[l - 1])
            errors[l] = moved - delta[l] if l < L else self._output_error(moved)
            found = self._arriving(l, saved, errors[l] * self.precision[l])
            if found is not None:
                arriving[l - 1] += found
        prior = None
        if self.prior is not None:
            prior = self.prior.replay(self._free_beliefs()).detach().reshape(())
            for l, of_prior in enumerate(self._gradient_of_prior()[:L]):
                if of_prior is not None:
                    arriving[l] += of_prior
        gradient = [arriving[l] - (errors[l] * self.precision[l] if l else 0) for l in range(L)]
        return Here(errors, self._Loss_here, prior, gradient[first:], arriving[first:])

    @torch.no_grad()
    def take_errors(self) -> None:
        """Bring ``epsilon`` up to the beliefs as they are now, without moving them."""
        self._take_errors(self.epsilon)

    def _take_errors(self, errors: list[Tensor]) -> None:
        L = len(self.network.layers)
        self._take_hidden_errors(errors)
        if self._lowest <= L:
            errors[L] = self._output_error(self._displaced(L, self.delta[L - 1])[0])

    def _take_hidden_errors(self, errors: list[Tensor]) -> None:
        delta, L = self.delta, len(self.network.layers)
        if self._lowest == 2 <= L:
            torch.neg(delta[1], out=errors[1])
        for l in range(self._lowest, L):
            moved, _ = self._displaced(l, delta[l - 1])
            torch.sub(moved, delta[l], out=errors[l])

    @torch.no_grad()
    def _energy(self) -> Tensor:
        """The terms of F at the beliefs as they are now, one after the other."""
        errors = [torch.empty_like(epsilon_l) for epsilon_l in self.epsilon]
        self._take_errors(errors)
        terms = [self._Loss_here]
        for error, pi in zip(errors[1:-1], self.precision[1:-1], strict=True):
            terms.append(0.5 * pi * torch.linalg.vector_norm(error).square())
        if self.prior is not None:
            terms.append(self.prior.replay(self._free_beliefs()).detach().reshape(()))
        return torch.stack([term.to(terms[0]) for term in terms])

    @torch.no_grad()
    def safe_step(self) -> float:
        """A step size that is stable where the relaxation stands (``step_size.py``)."""
        return safe_step(self._curvature(), self.free) if self.free else 1.0

    def _curvature(self) -> Product:
        """Multiplies with the Hessian of F, but for the second derivatives of the layers.

        It takes u to J_{l+1}^T e_{l+1} - e_l, with the changes of the errors e_l = J_l u_{l-1} - u_l
        and e_L = (d2Loss/dy2) J_L u_{L-1} (Gauss and Newton's approximation).
        """
        L, first, displaced = len(self.network.layers), self._lowest - 1, self._displaced
        fixed, delta, pi = self.delta[:first], self.delta, self.precision
        free = range(first, L)
        before = [0.0 if self._vinit is None else displaced(l + 1, delta[l])[0] for l in free]
        y = in_belief_dtype(self.vhat[-1]) + before[-1]
        of_loss = second_derivative(lambda y: self._loss_at(y[0]), [y])
        of_prior = None
        if self.prior is not None:
            replay = self.prior.replay
            of_prior = second_derivative(lambda v: replay(v).reshape(()), self._free_beliefs())

        def product(u: list[Tensor]) -> list[Tensor]:
            u = [*fixed, *u]
            # The prediction of belief 1 stays where it is if the input does.
            found = [*fixed, *[torch.zeros_like(u_l) for u_l in u[first:]]]
            if first == 1:
                found[1] += pi[1] * u[1]
            for l, before_l in zip(range(first + 1, L + 1), before, strict=True):
                s = self._small_step(l, u[l - 1])
                moved, saved = displaced(l, delta[l - 1] + s * u[l - 1])
                moved = (moved - before_l) / s
                if l < L:
                    e = (moved - u[l]).mul_(pi[l])
                    found[l] -= e
                else:
                    (e,) = of_loss([moved])
                arriving = self._arriving(l, saved, e)
                if arriving is not None:
                    found[l - 1] += arriving
            if of_prior is not None:
                for of_belief, part in zip(found, of_prior(u), strict=True):
                    of_belief += part
            return found[first:]

        return product

    def take_updates_at(self, update_at: str) -> None:
        """Let them be taken at ``"v"``, at ``"vhat"``, or at the beliefs ``"before"`` the last step."""
        self.update_at = update_at

    @property
    def beliefs_of_updates(self) -> list[Tensor]:
        """Where the updates are taken."""
        if self.update_at == "before" and self._before is not None:
            moved = zip(self.vhat, self._before, strict=False)
            return [vhat_l + delta_l for vhat_l, delta_l in moved]
        return self.vhat if self.update_at == "vhat" else self.v

    def _displaced(self, l: int, delta: Tensor) -> tuple[Tensor, Any]:
        """How far layer l's prediction moves if its input does, and what its way back needs."""
        with self._outside_autocast():
            return self.network.layers[l - 1].displacement.forward(delta)

    def _arriving(self, l: int, saved: Any, error: Tensor) -> Tensor | None:
        """J_l^T error, which arrives at layer l's input; None where nothing does."""
        with self._outside_autocast():
            return self.network.layers[l - 1].displacement.backward(saved, error)

    def _small_step(self, l: int, u: Tensor) -> Tensor:
        """How far to go along ``u`` for the derivative of layer l."""
        a, b = self.vhat[l - 1 : l + 1]
        coarser = max(a.dtype, b.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        return small_step([a], [u], coarser)

    def updates(self) -> tuple[Tensor | None, dict[Tensor, Tensor]]:
        """The input's error (if the input requires grad) and the parameters' updates.

        (df_l(a_{l-1})/dtheta_l)^T epsilon_l, with the errors as they were last taken, at the beliefs
        ``beliefs_of_updates``.
        """
        at = self.beliefs_of_updates
        network, L = self.network, len(self.network.layers)
        updates = Updates(network.arrived)
        input_error = None
        for l, layer in enumerate(network.layers, start=1):
            asks_input = l == 1 and network.X.requires_grad
            asks_loss = l == L and network.loss.has_leaves
            if not (layer.has_leaves or asks_input or asks_loss):
                continue
            if l == 1 and network.first is not None:
                (x, prediction), network.first = network.first, None
            else:
                a = at[l - 1] if l >= self._lowest else self.vhat[0]
                x = a.detach().to(self.vhat[l - 1].dtype)
                x.requires_grad_(x.is_floating_point())
                prediction = layer.replay(x)
            leaves, foreign, _ = below(prediction, [x])
            asked = [*leaves, x] if asks_input else leaves
            error = self._weighted_error(l)
            # PyTorch's own backward passes are linear in the error, unless a hook looks at it.
            is_linear = not (foreign or layer.uncovered or layer.own_backward or has_hooks(asked))
            if is_linear and (l > 1 or in_float16(prediction)):
                found = gradient_of_small(prediction, asked, error)
            else:
                found = gradient([prediction], asked, [error.to(prediction.dtype)])
            if asks_input:
                *found, input_error = found
                input_error = torch.zeros_like(x) if input_error is None else input_error
            add_updates(updates, leaves, found)
            if asks_loss:
                output = prediction.detach().requires_grad_()
                _add_own_gradients(updates, network.loss.replay(output, network.Y), [output])
            del x, prediction, asked, foreign
        if self.prior is not None and self.prior.has_leaves:
            beliefs = self._free_beliefs()
            _add_own_gradients(updates, self.prior.replay(beliefs), beliefs)
        return input_error, updates

    def why_not_compiled(self) -> list[str]:
        """What stands in the way of compiling a call like this one."""
        moving = self.network.layers[self._lowest - 1 :]
        why = [(layer.name, layer.uncovered or layer.own_backward) for layer in moving]
        reasons = [f"{name}: {reason}" for name, reason in why if reason]
        for function in (self.network.loss, self.prior):
            if function is not None and not function.is_pure:
                reasons.append(f"{function.name} draws random numbers or changes its buffers")
        return reasons

    def result(self) -> Inference:
        """What was inferred, in tensors that share no memory.

        The beliefs take the place of their displacements, so that no step can follow.
        """
        for layer in self.network.layers:
            layer.__dict__.pop("displacement", None)
        for l in range(self._lowest - 1, len(self.delta)):
            torch.add(self.vhat[l], self.delta[l], out=self.delta[l])
        v = self._final = [*self.delta, in_belief_dtype(self.vhat[-1]).clone()]
        if self._lowest > 1:
            v[0] = detached(self.network.X)
        input_error, updates = self.updates()
        L = len(self.network.layers)
        found = own([*self.epsilon[1:], *updates.values()])
        return Inference(
            self.vhat,
            self.Loss,
            self.dLdy,
            v,
            [input_error, *found[:L]],
            list(zip(updates, found[L:], strict=True)),
        )

    def _weighted_error(self, l: int) -> Tensor:
        error = self.epsilon[l]
        return error if self.precision[l] == 1 else error * self.precision[l]

    def _output_error(self, moved: Tensor) -> Tensor:
        """The loss's gradient where the prediction of the output has moved to."""
        self._Loss_here, error = self._loss_and_gradient(self.vhat[-1].to(moved.dtype) + moved)
        return error

    def _loss_and_gradient(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """The loss for such outputs, and its gradient there."""
        y = y.detach()
        with torch.enable_grad():
            y.requires_grad_()
            Loss = self._loss_at(y)
        (found,) = gradient([Loss], [y])
        return Loss.detach(), torch.zeros_like(y) if found is None else found

    def _loss_at(self, y: Tensor) -> Tensor:
        return self.network.loss.replay(y.to(self.vhat[-1].dtype), self.network.Y).reshape(())

    def _outside_autocast(self) -> AbstractContextManager[Any]:
        # The rules choose the types themselves.
        return outside_autocast(self.network.X.device)

    def _free_beliefs(self) -> list[Tensor]:
        """v_0..v_{L-1} as the prior is given them."""
        return [v_l.detach().requires_grad_() for v_l in self.v[:-1]]

    def _gradient_of_prior(self) -> list[Tensor | None]:
        if self.prior is None:
            return [None] * len(self.vhat)
        beliefs = self._free_beliefs()
        with torch.enable_grad():
            energy = self.prior.replay(beliefs)
        return gradient([energy], beliefs)


def round_off(dtype: torch.dtype) -> float:
    """How much of an energy may be round-off, if the loss is computed in ``dtype``."""
    return min(256 * torch.finfo(dtype).eps, 0.1)


def _add_own_gradients(
    updates: dict[Tensor, Tensor], energy: Tensor, inputs: Sequence[Tensor]
) -> None:
    """Add the gradients of a loss's or a prior's own parameters to ``updates``."""
    leaves = leaves_between(energy, inputs)
    add_updates(updates, leaves, gradient([energy], leaves))
