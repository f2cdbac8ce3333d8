"""The terms of the energy, each of which pulls at the beliefs that it depends on.

A factor is one layer's: its prediction f of the belief at its place from its parents' beliefs. It holds the
error of that prediction as it was last taken. ``x`` is a list with, for each place, how far the belief has
moved; a parent that is clamped does not move, and is no parent here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from torch2pc.displacement.closed import Gradient
from torch2pc.energy.divergences import LayerEnergy
from torch2pc.graph.autograd import gradient, in_belief_dtype
from torch2pc.graph.network import Network

# A number, or in a compiled call a tensor without dimensions.
Number = Any


def is_one(c: Number) -> bool:
    """Whether a factor need not be multiplied by. (A tensor's value is not looked at.)"""
    return type(c) is float and c == 1.0


# A gradient as a sum of coefficient times tensor. They are never copied, so nobody may write into them.
Parts = list[tuple[Tensor, Number]]


class Displaced(Protocol):
    """A layer as a displacement of its inputs (``torch2pc.displacement``)."""

    def forward(self, *deltas: Tensor) -> tuple[Tensor, Any]:
        """How far the output moves, and what ``backward`` needs, which uses it up."""

    def backward(self, saved: Any, e: Tensor) -> Sequence[Tensor | None]:
        """J^T e for each input, where the inputs have moved to."""


class Factor(Protocol):
    """One term of the energy."""

    @property
    def target(self) -> int | None:
        """The place of the belief that it predicts, if any."""

    @property
    def beliefs(self) -> frozenset[int]:
        """The places of those that it depends on."""

    @property
    def is_awake(self) -> bool:
        """Whether it pulls although none of its beliefs has moved.

        Another one is asleep till then: its error is 0, and nothing is evaluated.
        """

    def pulls(self, x: Sequence[Any], down: bool) -> Iterable[tuple[int, Parts]]:
        """Its gradient in each belief, the target's first.

        ``down``: the target is moved as soon as its part is handed out, and the error is taken again
        before it goes on down.
        """

    def retake(self, x: Sequence[Any]) -> None:
        """Take its error anew, where the beliefs are now."""

    def energy(self, x: Sequence[Any]) -> Tensor:
        """The term itself, where its error was last taken, which is where the beliefs are."""


class _OfLayer:
    """What the factors of layers share: how the layer's prediction moves, and what arrives at its parents."""

    error: Tensor

    def __init__(self, d: Displaced | None, parents: tuple[int, ...]) -> None:
        self.d, self.parents = d, parents

    def displaced(self, x: Sequence[Any]) -> tuple[Tensor | None, Any]:
        """How far the prediction has moved, None if it does not, and what its way back needs."""
        return (None, None) if self.d is None else self.d.forward(*[x[p] for p in self.parents])

    def take(self, moved: Tensor | None, x: Sequence[Any]) -> None:
        """Take the error of a prediction that has moved so far."""
        raise NotImplementedError

    def retake(self, x: Sequence[Any]) -> None:
        """Take the error anew."""
        self.take(self.displaced(x)[0], x)

    def arriving(self, saved: Any, error: Tensor) -> dict[int, Tensor]:
        """J^T error at each parent where anything arrives."""
        found: dict[int, Tensor] = {}
        if self.d is not None:
            for p, g in zip(self.parents, self.d.backward(saved, error), strict=True):
                if g is not None:  # a layer may be given the same belief twice
                    found[p] = found[p] + g if p in found else g
        return found


class Prediction(_OfLayer):
    """pi/2 ||e||^2 with e = d(delta_parents) - delta_target: a hidden layer and its belief."""

    def __init__(
        self,
        d: Displaced | None,
        parents: tuple[int, ...],
        target: int,
        vhat: Tensor,
        precision: Number = 1.0,
        is_awake: bool = False,
    ) -> None:
        super().__init__(d, parents)
        self.is_awake = is_awake
        self.target, self.precision = target, precision
        self.beliefs = frozenset([*parents, target])
        self.error = torch.zeros_like(in_belief_dtype(vhat))

    def rest(self) -> None:
        """Nothing has moved yet."""
        self.error.zero_()

    def take(self, moved: Tensor | None, x: Sequence[Any]) -> None:
        """Take the error of a prediction that has moved so far."""
        if moved is None:
            torch.neg(x[self.target], out=self.error)
        else:
            torch.sub(moved, x[self.target], out=self.error)

    def pulls(self, x: Sequence[Any], down: bool) -> Iterator[tuple[int, Parts]]:
        """-pi e at the target, and pi J^T e at the parents."""
        moved, saved = self.displaced(x)
        self.take(moved, x)
        yield self.target, self.own()
        if down:
            self.take(moved, x)
        del moved
        yield from _plain(self.arriving(saved, self.weighted()))

    def own(self) -> Parts:
        """What pulls at the target."""
        return [(self.error, -self.precision)]

    def weighted(self) -> Tensor:
        """pi e, which goes down, and which the layer's update is made of."""
        return self.error if is_one(self.precision) else self.error * self.precision

    @property
    def difference(self) -> Tensor:
        """Prediction minus belief."""
        return self.error

    def energy(self, x: Sequence[Any]) -> Tensor:
        """pi/2 ||e||^2"""
        return 0.5 * self.precision * torch.linalg.vector_norm(self.difference).square()


class Multiplied(Prediction):
    """pi/2 ||e||^2 + pi lambda . e: a prediction that is held to its belief, by a Lagrange multiplier.

    Its error is ``e + lambda``, which is what pulls, goes down and makes the update. From sweep to sweep
    lambda grows by ``alpha e``, e as it was last taken, for as long as prediction and belief differ.
    """

    def __init__(
        self,
        d: Displaced | None,
        parents: tuple[int, ...],
        target: int,
        vhat: Tensor,
        precision: Number,
        is_awake: bool,
        alpha: float,
    ) -> None:
        super().__init__(d, parents, target, vhat, precision, is_awake)
        self.alpha, self.multiplier = alpha, torch.zeros_like(self.error)

    def rest(self) -> None:
        """Nothing has moved yet."""
        super().rest()
        self.multiplier.zero_()

    def take(self, moved: Tensor | None, x: Sequence[Any]) -> None:
        """Take e + lambda."""
        super().take(moved, x)
        self.error.add_(self.multiplier)

    @property
    def difference(self) -> Tensor:
        """e"""
        return self.error - self.multiplier

    def raise_multiplier(self) -> None:
        """lambda <- lambda + alpha e"""
        self.multiplier.lerp_(self.error, self.alpha)


class Above(Prediction):
    """pi/2 ||e||^2 with e = e0 + d(delta_parents) - delta_target: a second prediction of a belief.

    The first error ``e0`` is taken once; what moves is small beside it or not, and subtracted from nothing.
    """

    def __init__(
        self,
        d: Displaced | None,
        parents: tuple[int, ...],
        target: int,
        first: Tensor,
        precision: Number = 1.0,
        is_clamped: bool = False,
    ) -> None:
        super().__init__(d, parents, target, first, precision, is_awake=True)
        if is_clamped:
            self.beliefs = frozenset(parents)
        self.first = first
        self.rest()

    def rest(self) -> None:
        """Nothing has moved yet."""
        self.error.copy_(self.first)

    def take(self, moved: Tensor | None, x: Sequence[Any]) -> None:
        """Take the error of a prediction that has moved so far."""
        self.rest()
        if x[self.target] is not None:
            self.error.sub_(x[self.target])
        if moved is not None:
            self.error.add_(moved)

    def energy_at_first(self) -> Tensor:
        """pi/2 ||e0||^2"""
        return 0.5 * self.precision * torch.linalg.vector_norm(self.first).square()


class Between(Prediction):
    """pi E(f, v), another energy between a hidden layer's prediction and its belief.

    Its error is dE/df, which for half the squared difference is the difference itself.
    """

    def __init__(
        self,
        d: Displaced | None,
        parents: tuple[int, ...],
        target: int,
        vhat: Tensor,
        precision: Number,
        is_awake: bool,
        between: LayerEnergy,
    ) -> None:
        super().__init__(d, parents, target, vhat, precision, is_awake)
        self.vhat, self.between = in_belief_dtype(vhat), between
        self.rest()

    def rest(self) -> None:
        """Nothing has moved yet."""
        self.error = torch.zeros_like(self.error)
        self.of_belief = torch.zeros_like(self.error)
        """dE/dv"""

    def slopes(self, df: Tensor, dv: Tensor) -> tuple[Tensor, Tensor]:
        """dE/df and dE/dv, where the two have moved so far."""
        return self.between.slopes(self.vhat, df, dv)

    def take(self, moved: Tensor | None, x: Sequence[Any]) -> None:
        """Take both slopes."""
        own = x[self.target]
        df = torch.zeros_like(own) if moved is None else moved
        self.error, self.of_belief = self.slopes(df, own)

    def own(self) -> Parts:
        """What pulls at the target."""
        return [(self.of_belief, self.precision)]

    def energy(self, x: Sequence[Any]) -> Tensor:
        """pi E, where the beliefs are."""
        moved, own = self.displaced(x)[0], x[self.target]
        df = torch.zeros_like(own) if moved is None else moved
        return self.precision * self.between.value(self.vhat, df, own)


class Output(_OfLayer):
    """beta LossFun of the output layer's prediction, whose place the target of the loss has taken."""

    target, is_awake = None, True

    def __init__(
        self,
        d: Displaced | None,
        parents: tuple[int, ...],
        vhat: Tensor,
        Loss: Tensor,
        dLdy: Tensor,
        loss: Callable[[Tensor], Tensor],
        beta: Number = 1.0,
        loss_gradient: Gradient | None = None,
    ) -> None:
        super().__init__(d, parents)
        self.beliefs = frozenset(parents)
        self.vhat, self.loss, self.beta, self._gradient = vhat, loss, beta, loss_gradient
        self._Loss: Tensor | None
        self._Loss, self.error = self._times_beta(Loss, in_belief_dtype(dLdy).clone())
        self.y = vhat
        """The output, as it was last taken."""

    @property
    def Loss(self) -> Tensor:
        """beta times the loss, where the output was last taken."""
        if self._Loss is None:
            with torch.no_grad():
                self._Loss = self.beta * self.loss(self.y)
        return self._Loss

    def take(self, moved: Tensor | None, x: Sequence[Any]) -> None:
        """Take the loss's gradient as the error, and the loss with it where it comes by the way."""
        if moved is not None:
            self.y = self.vhat.to(moved.dtype) + moved
            self._Loss, self.error = self.loss_gradient(self.y)

    def loss_gradient(self, y: Tensor) -> tuple[Tensor | None, Tensor]:
        """beta times the loss for such outputs, where it comes by the way, and its gradient there."""
        if self._gradient is not None:
            return self._times_beta(None, self._gradient(y))
        y = y.detach()
        with torch.enable_grad():
            y.requires_grad_()
            Loss = self.loss(y)
        (found,) = gradient([Loss], [y])
        return self._times_beta(Loss.detach(), torch.zeros_like(y) if found is None else found)

    def _times_beta(self, Loss: Tensor | None, error: Tensor) -> tuple[Tensor | None, Tensor]:
        # After the gradient is taken, which half precision may limit.
        if is_one(self.beta):
            return Loss, error
        return None if Loss is None else self.beta * Loss, self.beta * error

    def pulls(self, x: Sequence[Any], down: bool) -> list[tuple[int, Parts]]:
        """J^T e at the parents."""
        moved, saved = self.displaced(x)
        self.take(moved, x)
        del moved
        return _plain(self.arriving(saved, self.error))

    def weighted(self) -> Tensor:
        """What goes down, and what the layer's update is made of."""
        return self.error

    def energy(self, x: Sequence[Any]) -> Tensor:
        """beta times the loss."""
        return self.Loss


class Prior:
    """An energy of all beliefs that no layer computes."""

    target, is_awake = None, True

    def __init__(self, prior: Callable[[list[Tensor]], Tensor], vhat: Sequence[Tensor]) -> None:
        self.prior, self._vhat = prior, vhat[:-1]
        self.beliefs = frozenset(range(len(self._vhat)))

    def given(self, x: Sequence[Any]) -> list[Tensor]:
        """The beliefs v_0..v_{L-1} as the prior is given them."""
        pairs = zip(self._vhat, x, strict=False)
        return [(vhat_i + x_i).detach().requires_grad_() for vhat_i, x_i in pairs]

    def gradient(self, x: Sequence[Any]) -> list[Tensor | None]:
        """dE/dv at each belief."""
        beliefs = self.given(x)
        with torch.enable_grad():
            energy = self.prior(beliefs)
        return gradient([energy], beliefs)

    def pulls(self, x: Sequence[Any], down: bool) -> list[tuple[int, Parts]]:
        """Its gradient at each belief."""
        return _plain({i: g for i, g in enumerate(self.gradient(x)) if g is not None})

    def retake(self, x: Sequence[Any]) -> None:
        """It has no error."""

    def energy(self, x: Sequence[Any]) -> Tensor:
        """The energy."""
        return self.prior(self.given(x)).detach()


def _plain(arriving: dict[int, Tensor]) -> list[tuple[int, Parts]]:
    """What arrives at each belief, as parts of its gradient."""
    return [(i, [(g, 1.0)]) for i, g in arriving.items()]


class Terms(NamedTuple):
    """What the terms of the energy are, where they are not the usual ones."""

    precision: Sequence[Number] | None = None
    """One number for each hidden layer, in their order, then for each prediction from above; 1 if None."""
    beta: Number = 1.0
    """What the loss is multiplied by."""
    between: Mapping[int, LayerEnergy] = {}
    """By their places, the energies of layers that have another one than half the squared difference."""
    alpha: float | None = None
    """How fast each hidden layer's multiplier grows; None where they have none."""


USUAL = Terms()


def factors_of(network: Network, terms: Terms = USUAL) -> list[Factor]:
    """The terms of the energy of a recorded network, from the top down."""
    found: list[Factor] = []
    if network.prior is not None:
        found.append(Prior(network.prior_at, network.vhat))
    L = len(network.layers)
    for k, part in enumerate(network.from_above):
        d = part.layer.displacement if part.moving else None
        pi = 1.0 if terms.precision is None else terms.precision[L - 1 + k]
        is_clamped = part.target not in network.free
        found.append(Above(d, part.moving, part.target, part.first, pi, is_clamped))
    for l in range(L, 0, -1):
        parents, vhat = network.moving(l), network.vhat[l]
        d = network.layers[l - 1].displacement if parents else None
        if l == L:
            at_vhat, gradient = (network.Loss, network.dLdy), network.loss_gradient
            found.append(Output(d, parents, vhat, *at_vhat, network.loss_at, terms.beta, gradient))
        else:
            pi = 1.0 if terms.precision is None else terms.precision[l - 1]
            # A way back that is not linear may hand down something although the error is 0.
            is_awake = not network.layers[l - 1].is_linear and bool(parents)
            between = terms.between.get(l)
            if terms.alpha is not None:
                found.append(Multiplied(d, parents, l, vhat, pi, is_awake, terms.alpha))
            elif between is None:
                found.append(Prediction(d, parents, l, vhat, pi, is_awake))
            else:
                is_awake |= not between.is_at_rest
                found.append(Between(d, parents, l, vhat, pi, is_awake, between))
    return found
