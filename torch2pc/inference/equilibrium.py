"""The Equilibrium algorithm: the errors at which the energy is least, near the feed-forward pass.

It minimises the same energy as ``error_based.py``, in the same errors,

    F(epsilon) = LossFun(f_L(v_{L-1}), Y) + 1/2 sum_{l<L} ||epsilon_l||^2,    v_l = f_l(v_{l-1}) - epsilon_l

but by a quasi-Newton method (L-BFGS) in place of gradient descent. The Hessian in epsilon is the
identity plus a matrix of the rank of the outputs, so that an approximation that starts at the identity
has all of it after a few evaluations of F and its gradient, one pass up and one down each.

The examples of a batch are separate problems, unless a layer or the loss mixes them. So each has its
own approximation and its own steps, all of them evaluated together. A step is kept only by the examples
whose F it lowers. LossFun returns one number for all of them, but its gradient at the outputs has a
row for each; so an example's own loss changes by the integral of that gradient along the straight
line from the old output to the new one. That takes a few evaluations of the loss alone, and subtracts
no two nearly equal numbers. Examples that are mixed are one problem, which all of this holds for as well.

Where the errors have precisions, it is sqrt(pi_l) epsilon_l that it searches in: its squares are pi_l times
the errors', so that nothing else changes. Second predictions of beliefs (``PCGraph(above=...)``) add the
squares of their errors, which are functions of the beliefs as the outputs are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from torch2pc.displacement.lines import Displacement
from torch2pc.energy import Errors
from torch2pc.energy.factors import USUAL, Above, Output, Terms
from torch2pc.graph.network import Inference, Network
from torch2pc.graph.warn import warn_caller
from torch2pc.inference.error_based import errors_of, place_of
from torch2pc.inference.relax import Relaxation
from torch2pc.inference.steps import Descent

# How many steps the approximation of the Hessian remembers.
PAIRS = 8
# Steps along which the gradient changes by less than this times their length are left out of it:
# where F is convex, its curvature is at least 1.
LEAST_CURVATURE = 0.1
# A step must lower F by this much of what its slope promised.
LEAST_FALL = 1e-4
# A gradient that is larger than this, in units of the errors, is far from equilibrium.
FAR = 0.1
# The share of its fall that an energy which still falls has fallen in the last quarter of the evaluations.
STILL_FALLS = 0.05
# Nodes and weights of Gauss and Legendre's rule on [0, 1].
NODES = (0.5 - 0.15**0.5, 5 / 18), (0.5, 8 / 18), (0.5 + 0.15**0.5, 5 / 18)

_warned: WeakSet[nn.Module] = WeakSet()
# For each model, by the operations of its layers, whether they mix the examples.
_mixing: WeakKeyDictionary[nn.Module, dict[int, bool]] = WeakKeyDictionary()


def equilibrium(
    network: Network,
    eta: Any,
    vinit: Sequence[Any] | None = None,
    update_at: str = "v",
    terms: Terms = USUAL,
) -> Search:
    """The search for a batch, from the errors of the beliefs ``vinit`` or else from 0.

    ``eta`` has no use here.
    """
    return Search(network, errors_of(network, vinit, terms), place_of(update_at))


class Point(NamedTuple):
    """Where the examples stand, a row for each.

    ``y`` holds the outputs, ``above`` the errors of second predictions, times the roots of their precisions.
    """

    epsilon: Tensor
    gradient: Tensor
    y: Tensor
    above: Tensor

    def where(self, chosen: Tensor, other: Point) -> Point:
        """Each example's row of this where it is chosen, and of ``other`` where it is not."""
        pairs = zip(self, other, strict=True)
        return Point(*[torch.where(chosen[:, None], mine, its) for mine, its in pairs])


class Search(Relaxation):
    """The minimisation; after ``run`` the errors and the beliefs are those that it came to.

    Within it the errors of all layers, times the roots of their precisions, are one matrix, with a row for
    each separate problem.
    """

    energy: Errors

    def __init__(self, network: Network, energy: Errors, update_at: str = "v") -> None:
        super().__init__(network, energy, Descent(0.0), update_at)
        self._shapes = [e.shape for e in energy.variables]
        self._roots = [energy.predictions[i].precision ** 0.5 for i in energy.free]
        errors = self.epsilon[1:]
        self._dtype = max((e.dtype for e in errors), key=lambda dtype: dtype.itemsize)
        # In half precision that is what limits the gradient, whatever the errors are held in.
        self._eps = torch.finfo(self.vhat[-1].dtype).eps
        of_all = [*errors, *[factor.error for factor in energy.above]]
        sizes = {e.shape[:1].numel() for e in of_all}  # (1 of a tensor without dimensions)
        self._rows = max(sizes.pop(), 1) if len(sizes) == 1 else 1
        self.distance: Tensor = errors[-1].new_zeros(self._rows)
        """For each row the gradient's size at the last evaluation, in units of the errors."""
        # The lowest energy before the first, and after each evaluation.
        self._energies: list[Tensor] = []

    @torch.no_grad()
    def run(self, n: int) -> None:
        """Evaluate F at most ``n`` times. It waits for the device each time, to know when to stop."""
        if not self._shapes:
            return
        at = self._first_point()
        lowest = self.energy.terms().sum(), at.epsilon
        self._energies = [lowest[0]]
        history, step = History(), -at.gradient
        for self.evaluations in range(1, n + 1):
            # Squares of small errors would underflow: all is measured in units of the row's largest.
            unit = largest(at.epsilon, at.gradient)
            errors, gradient = at.epsilon / unit, at.gradient / unit
            size, off = torch.maximum(norm(errors), norm(errors - gradient)), norm(gradient)
            self.distance = torch.where(off == 0, off, off / size)
            goes_on = ~(off <= self._eps**0.5 * size)
            if not bool(goes_on.any()):
                break
            step = torch.where(goes_on[:, None], step, 0.0)
            # After the last evaluation it only matters whether to take the step: a pass up tells.
            is_last = self.evaluations == n
            trial = self._evaluate(at.epsilon + step, with_gradient=not is_last)
            if bool((F := self.energy.terms().sum()) < lowest[0]):
                lowest = F, trial.epsilon
            self._energies.append(lowest[0])
            slope, (rise, terms) = dot(gradient, step / unit), self._rise(at, trial, unit)
            falls = rise <= LEAST_FALL * slope + 4 * self._eps * terms
            falls |= ~off.isfinite()  # no other step would do
            before, at = at, trial.where(falls, at)
            if self.after_step is not None:
                self._move_to(at.epsilon)
                self.after_step(self.evaluations)
            if is_last:
                break
            history.add(step, trial.gradient - before.gradient)
            # Where F rose, the step becomes shorter: to the minimum of a parabola through what is known.
            share = (slope / (2 * (slope - rise))).nan_to_num(0.1).clamp(0.1, 0.5)
            step = torch.where(
                falls[:, None], history.direction(at.gradient), share[:, None] * step
            )
        self._move_to(at.epsilon)
        # How the loss changes is not found exactly where the loss itself has kinks.
        if bool(self.energy.terms().sum() > lowest[0] + 8 * self._eps * lowest[0].abs()):
            self._move_to(lowest[1])
            if self.after_step is not None:
                self.after_step(max(1, self.evaluations))
        for i, factor in self.energy.predictions.items():
            own = factor.error.clone(memory_format=torch.contiguous_format)
            factor.error = self.energy.x[i] = own

    def _warn_if_far(self) -> None:
        """Say, once for each model, if a larger n would have come nearer to equilibrium.

        That is where the energy still fell. Where units switch it has edges, at which its gradient
        is no measure of how far the minimum is.
        """
        far, F = self.distance > FAR, self._energies
        if 2 * int(far.sum()) <= len(far) or self.network.model in _warned:
            return
        before = F[3 * (len(F) - 1) // 4]
        if bool(before - F[-1] > STILL_FALLS * (F[0] - F[-1])):
            _warned.add(self.network.model)
            warn_caller(
                f"Equilibrium stopped after n={self.evaluations} evaluations while the energy still fell "
                f"and its gradient was above {FAR:.0%} of the errors in {int(far.sum())} of {len(far)} "
                f"examples (the median is {self.distance.median().item():.0%}): a larger n comes closer"
            )

    def result(self) -> Inference:
        """What was found, and how far it came."""
        self._warn_if_far()
        found = super().result()
        return found._replace(distance=self.distance, evaluations=self.evaluations)

    def _first_point(self) -> Point:
        """The first evaluation, and whether the examples are separate problems."""
        displacements = [factor.d for factor in self.energy.factors if factor.d is not None]
        known = _mixing.setdefault(self.network.model, {})
        key = None
        if all([isinstance(displacement, Displacement) for displacement in displacements]):
            key = hash(tuple([displacement.key for displacement in displacements]))
        if key is not None and known.get(key):
            self._rows = 1
        found = zip(self.energy.variables, self._roots, strict=True)
        errors = [e if root == 1 else e * root for e, root in found]
        at = self._evaluate(self._joined(errors))
        if self._rows == 1:
            return at
        mixes = self._loss_mixes()
        if not mixes and key not in known:
            mixes = self._layers_mix()
            if key is not None:
                known[key] = mixes
        if not mixes:
            return at
        self._rows = 1
        return self._evaluate(self._joined(errors))

    def _loss_mixes(self) -> bool:
        """Whether the loss's gradient for an example changes with the outputs for others."""
        chosen, drawn = self._some()
        output = self.energy.output
        size = output.y.square().mean().sqrt()
        moved = output.y + torch.where(chosen, drawn * torch.where(size > 0, size, 1.0), 0.0)
        before, (_, after) = output.error, output.loss_gradient(moved)
        change = torch.where(chosen, 0.0, after - before).abs().max()
        return not bool(change <= self._eps**0.5 * before.abs().max())

    def _layers_mix(self) -> bool:
        """Whether an error of the outputs of some examples arrives at others."""
        chosen, drawn = self._some()
        sent: dict[Output | Above, Tensor] = {self.energy.output: torch.where(chosen, drawn, 0.0)}
        for factor in self.energy.above:
            rows, numbers = self._some(factor.error)
            sent[factor] = torch.where(rows, numbers, 0.0)
        arriving = [g for _, g in self.energy.descend(sent) if g is not None]
        return any([bool(g[~chosen.flatten()].any()) for g in arriving])

    def _some(self, like: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Which half of the examples to try, shaped like the outputs or ``like``, and numbers for each."""
        generator = torch.Generator("cpu").manual_seed(0)
        like = self.energy.output.y if like is None else like
        order = torch.randperm(self._rows, generator=generator, device="cpu")
        chosen = (order < (self._rows + 1) // 2).reshape(-1, *[1] * (like.dim() - 1))
        drawn = torch.randn(like.shape, generator=generator, dtype=like.dtype, device="cpu")
        return chosen.to(like.device), drawn.to(like.device)

    def _evaluate(self, epsilon: Tensor, with_gradient: bool = True) -> Point:
        self._move_to(epsilon)
        y, gradient = self.energy.output.y.reshape(self._rows, -1), epsilon
        if with_gradient:
            found = zip(self.energy.gradient(), self._roots, strict=True)
            gradient = self._joined([g if root == 1 else g / root for g, root in found])
        above = [factor.error * factor.precision**0.5 for factor in self.energy.above]
        return Point(epsilon, gradient, y, self._joined(above))

    def _rise(self, at: Point, trial: Point, unit: Tensor) -> tuple[Tensor, Tensor]:
        """By how much F is higher at ``trial``, for each row, and the size of what that is a sum of.

        Both are in squares of ``unit``.
        """
        step, mean = (trial.epsilon - at.epsilon) / unit, (trial.epsilon + at.epsilon) / (2 * unit)
        rise, terms = dot(step, mean), norm(step) * norm(mean)
        y, d = norm(at.y / unit), trial.y - at.y
        for place, weight in NODES:
            y_between = (at.y + place * d).reshape(self.vhat[-1].shape)
            _, e = self.energy.output.loss_gradient(y_between)
            e = e.reshape(self._rows, -1) / unit
            rise = rise + weight * dot(e, d / unit)
            terms = terms + weight * norm(e) * y  # as y is rounded, d is off by that of y
        step, mean = (trial.above - at.above) / unit, (trial.above + at.above) / (2 * unit)
        return rise + dot(step, mean), terms + norm(mean) * norm(mean)

    def _joined(self, tensors: Sequence[Tensor]) -> Tensor:
        like = self.epsilon[-1]
        parts = [e.reshape(self._rows, -1).to(like.device, self._dtype) for e in tensors]
        return torch.cat(parts or [like.new_zeros(self._rows, 0)], dim=1)

    def _move_to(self, epsilon: Tensor) -> None:
        """Let the errors, times the roots, be these, and the beliefs follow."""
        sizes = [shape.numel() // self._rows for shape in self._shapes]
        now = self.energy.variables
        split = torch.split(epsilon, sizes, dim=1)
        parts = zip(split, self._roots, self._shapes, now, strict=True)
        self.energy.stand_at(
            [
                (part if root == 1 else part / root).reshape(shape).to(e)
                for part, root, shape, e in parts
            ]
        )


class History:
    """The last steps and how the gradient changed along them, for each row: what is known of H."""

    def __init__(self) -> None:
        self._pairs: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=PAIRS)

    def add(self, step: Tensor, change: Tensor) -> None:
        """A step, and by how much the gradient is different at its end."""
        # Only their ratio matters, and products of small steps would underflow.
        unit = largest(step)
        step, change = step / unit, change / unit
        curvature, square = dot(step, change), dot(step, step)
        counts = (curvature > LEAST_CURVATURE * square) & curvature.isfinite()
        change = torch.where(counts[:, None], change, 0.0)
        self._pairs.append((step, change, torch.where(counts, 1 / curvature, 0.0)))

    def direction(self, gradient: Tensor) -> Tensor:
        """-H^-1 gradient, with the identity for what is not known of H."""
        q, shares = -gradient, []
        for step, change, weight in reversed(self._pairs):
            share = weight * dot(step, q)
            q = q - share[:, None] * change
            shares.append(share)
        for (step, change, weight), share in zip(self._pairs, reversed(shares), strict=True):
            q = q + (share - weight * dot(change, q))[:, None] * step
        return q


def largest(*tensors: Tensor) -> Tensor:
    """The largest entry of each row, as a column; 1 for rows of zeros."""
    if tensors[0].shape[1] == 0:  # an empty batch
        return tensors[0].new_ones(len(tensors[0]), 1)
    sizes = [torch.linalg.vector_norm(x, torch.inf, dim=1, keepdim=True) for x in tensors]
    size = sizes[0] if len(sizes) == 1 else torch.maximum(*sizes)
    return torch.where(size > 0, size, 1.0)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """The inner product of each row."""
    return (a * b).sum(dim=1)


def norm(a: Tensor) -> Tensor:
    """The length of each row."""
    return torch.linalg.vector_norm(a, dim=1)
