"""The energy as a sum of factors, in two sets of variables, and the one sweep through it.

In the beliefs (``Beliefs``) each factor pulls at its target and at its parents, so that a gradient is made
of what the neighbours say: it is local. In the errors (``Errors``) the beliefs follow from them, from the
input up,

    v_i = f_i(v_parents) - e_i

and what arrives at an error comes all the way down from the output,

    dF/de_i = pi_i e_i - sum over children c of J_c^T (what arrives at c)

where the loss's gradient arrives at the output. A second prediction g_t of belief t (``Above``), whose error
is a function of the beliefs here, sends pi_t e_t down to its parents and -pi_t e_t to t.

Either way a sweep goes through the factors from the top down. A belief's children come before its own
factor, so that its gradient is whole there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from torch2pc.energy.factors import (
    Above,
    Multiplied,
    Number,
    Output,
    Parts,
    Prediction,
    Prior,
    is_one,
)
from torch2pc.graph.autograd import in_belief_dtype, outside_autocast

# What a sweep tells of each variable: its place, and the gradient there. Whoever is told may move the
# variable there and then, in ``x``.
Move = Callable[[int, Parts], object]


class Energy:
    """What the two sets of variables share. ``x[i]`` is variable i, None where place i has none.

    ``start``: the beliefs to start from, if they are others than the feed-forward values.
    """

    def __init__(
        self,
        factors: Sequence[Any],
        vhat: Sequence[Tensor],
        free: Collection[int],
        start: Sequence[Any] | None = None,
    ) -> None:
        self.factors, self.vhat, self.free, self.start = list(factors), vhat, sorted(free), start
        self.x: list[Any] = [None] * len(vhat)
        self.multiplied = [f for f in self.factors if isinstance(f, Multiplied)]
        """The factors with multipliers. With them F is no function that is descended."""
        self.restart()

    @property
    def output(self) -> Output:
        """The factor of the loss."""
        return next(factor for factor in self.factors if isinstance(factor, Output))

    @property
    def predictions(self) -> dict[int, Prediction]:
        """The factors of the hidden layers, by the beliefs that they predict."""
        own = [f for f in self.factors if isinstance(f, Prediction) and not isinstance(f, Above)]
        return {f.target: f for f in own}

    @property
    def above(self) -> list[Above]:
        """The factors of second predictions, which are made of other beliefs than the layers' are."""
        return [f for f in self.factors if isinstance(f, Above)]

    @property
    def epsilon(self) -> list[Any]:
        """The errors as they were last taken: None for the input, then those of the layers."""
        of = self.predictions
        return [None, *[of[i].error for i in range(1, len(self.vhat) - 1)], self.output.error]

    @property
    def weighted(self) -> list[Any]:
        """The same, times their precisions: what the updates are made of."""
        of = self.predictions
        return [
            None,
            *[of[i].weighted() for i in range(1, len(self.vhat) - 1)],
            self.output.weighted(),
        ]

    @property
    def variables(self) -> list[Tensor]:
        """Those that F is descended in."""
        return [self.x[i] for i in self.free]

    def outside_autocast(self) -> AbstractContextManager[Any]:
        """The rules choose the types themselves; the loss and a prior enter autocast again."""
        return outside_autocast(self.vhat[-1].device)

    def sweep(self, move: Move, down: bool = False) -> None:
        """Go through the factors once, telling ``move`` of each variable's gradient."""
        raise NotImplementedError

    def raise_multipliers(self) -> None:
        """Before a sweep that moves the variables: by the errors that the one before has left."""
        for factor in self.multiplied:
            factor.raise_multiplier()

    @contextmanager
    def still(self) -> Iterator[None]:
        """The body sweeps without moving anything."""
        yield

    @torch.no_grad()
    def gradient(self) -> list[Tensor]:
        """dF/dx where the variables are, which stay there. It takes the errors anew."""
        found = {i: torch.zeros_like(self.x[i]) for i in self.free}

        def add(i: int, parts: Parts) -> None:
            for part, c in parts:
                found[i].add_(part, alpha=c)

        with self.still():
            self.sweep(add)
        return list(found.values())

    @contextmanager
    def aside(self) -> Iterator[None]:
        """The same, and afterwards the errors are as they were last taken before."""
        kept = [(factor, dict(vars(factor))) for factor in self.factors]
        for factor in [*self.predictions.values(), *self.above]:
            factor.error = factor.error.clone()
        try:
            with self.still():
                yield
        finally:
            for factor, state in kept:
                vars(factor).update(state)

    def wake(self) -> None:
        """Let no factor sleep from now on: something else than their gradients may move the variables."""

    def settle(self) -> None:
        """Bring errors and beliefs together after a sweep, where they are variables of one another."""

    def stand_at(self, variables: Sequence[Tensor]) -> None:
        """Let the variables be these tensors."""
        raise NotImplementedError

    def restart(self) -> None:
        """Go back to where it started."""
        raise NotImplementedError

    @torch.no_grad()
    def retake(self) -> None:
        """Take the errors that are no variables where the beliefs are now."""

    def terms(self) -> Tensor:
        """The terms of F where the variables are, one after the other."""
        raise NotImplementedError

    def last(self) -> Tensor:
        """F by the errors as they were last taken, without a prior."""
        return self._terms(
            [factor for factor in self.factors if not isinstance(factor, Prior)]
        ).sum()

    def _terms(self, factors: Sequence[Any]) -> Tensor:
        with torch.no_grad():
            found = [in_belief_dtype(factor.energy(self.delta).reshape(())) for factor in factors]
            return torch.stack([term.to(found[0]) for term in found])

    delta: list[Any]
    """How far each belief has moved from its feed-forward value; None for one that is clamped."""

    def beliefs(self) -> list[Tensor]:
        """v = vhat + delta."""
        moved = zip(self.vhat, self.delta, strict=True)
        v = [vhat if d is None else vhat + d for vhat, d in moved]
        return [*v[:-1], in_belief_dtype(v[-1]).clone()]

    @torch.no_grad()
    def finish(self) -> list[Tensor]:
        """The beliefs, in the place of their displacements; nothing can be evaluated after it."""
        for factor in self.factors:
            factor.d = None
        for i in self.free:
            torch.add(self.vhat[i], self.delta[i], out=self.delta[i])
        v = [vhat if d is None else d for vhat, d in zip(self.vhat, self.delta, strict=True)]
        return [*v[:-1], in_belief_dtype(v[-1]).clone()]


class Beliefs(Energy):
    """F in the beliefs: ``x[i]`` is how far belief i has moved."""

    @cached_property
    def _order(self) -> list[tuple[Any, list[int]]]:
        """Each factor, with the beliefs that no later one pulls at."""
        last = {i: k for k, factor in enumerate(self.factors) for i in factor.beliefs}
        return [(f, [i for i in last if last[i] == k]) for k, f in enumerate(self.factors)]

    @property
    def delta(self) -> list[Any]:  # type: ignore[override]
        """The same as the variables."""
        return self.x

    @torch.no_grad()
    def restart(self) -> None:
        """Put the beliefs where they start."""
        for i in self.free:
            like = in_belief_dtype(self.vhat[i])
            self.x[i] = torch.zeros_like(like)
            if self.start is not None:
                torch.sub(self.start[i].detach(), self.vhat[i], out=self.x[i])
        for factor in [*self.predictions.values(), *self.above]:
            factor.rest()
        # The beliefs that are no more at their feed-forward values. A factor of none of which any has
        # moved has no error yet: it would be evaluated where it was before, to propagate zeros.
        self.moved = set(self.free if self.start is not None else [])

    def wake(self) -> None:
        """Let no factor sleep from now on: something else than their gradients may move the beliefs."""
        self.moved = set(self.free)

    def stand_at(self, variables: Sequence[Tensor]) -> None:
        """Let the beliefs have moved so far."""
        for i, x_i in zip(self.free, variables, strict=True):
            self.x[i] = x_i
        self.wake()

    @torch.no_grad()
    def sweep(self, move: Move, down: bool = False) -> None:
        """Go through the factors once, from the top down.

        ``down``: a belief that is moved is so before its factor's error goes on down: on a chain, Gauss
        and Seidel's method from the top; on other graphs a sweep in sequence. Otherwise all
        errors are those at the beliefs before the sweep.
        """
        x, moved = self.x, self.moved
        pulls: dict[int, Parts] = {i: [] for i in self.free}
        now_moved = set(moved)

        def tell(i: int) -> None:
            if parts := pulls.pop(i):
                move(i, parts)
                now_moved.add(i)

        with self.outside_autocast():
            for factor, last in self._order:
                is_moved = now_moved if down else moved
                is_awake = factor.is_awake or not is_moved.isdisjoint(factor.beliefs)
                if is_awake or (down and pulls.get(factor.target)):
                    for i, parts in factor.pulls(x, down):
                        if i in pulls:
                            _add_parts(pulls[i], parts)
                            if i in last:
                                tell(i)
                        del parts
                for i in last:
                    if i in pulls:
                        tell(i)
        self.moved = now_moved

    @contextmanager
    def still(self) -> Iterator[None]:
        """The body sweeps without moving anything."""
        moved = self.moved
        yield
        self.moved = moved

    @torch.no_grad()
    def retake(self) -> None:
        """Take all errors where the beliefs are now."""
        with self.outside_autocast():
            for factor in self.factors:
                factor.retake(self.x)

    def terms(self) -> Tensor:
        """The terms of F at the beliefs as they are now."""
        with self.aside():
            self.retake()
            return self._terms(self.factors)


class Errors(Energy):
    """F in the errors, from which the beliefs follow: ``x[i]`` is the error at place i, its factor's own."""

    @torch.no_grad()
    def restart(self) -> None:
        """Put the errors where they start."""
        of, self.delta = self.predictions, [None] * len(self.vhat)
        for i in self.free:
            of[i].rest()
            self.delta[i] = torch.zeros_like(of[i].error)
            if self.start is not None:
                torch.sub(self.start[i].detach(), self.vhat[i], out=self.delta[i])
        for i in self.free:
            if self.start is not None:
                with self.outside_autocast():
                    of[i].retake(self.delta)
            self.x[i] = of[i].error
        # Whether the beliefs and the output's error are those that the errors make, and what each factor
        # has saved on the way up, for the way down.
        self._is_settled = False
        self._saved: list[Any] | None = None

    def stand_at(self, variables: Sequence[Tensor]) -> None:
        """Let the errors be these, and the beliefs follow."""
        of = self.predictions
        for i, x_i in zip(self.free, variables, strict=True):
            of[i].error = self.x[i] = x_i
        self._is_settled = False
        self.settle()

    @torch.no_grad()
    def settle(self) -> None:
        """Take the beliefs that the errors make, from the input up, and the output's error there."""
        if not self._is_settled:
            with self.outside_autocast():
                self._saved, self._is_settled = self._climb(), True

    def _climb(self) -> list[Any]:
        """Once up; returns what each factor has saved."""
        kept = []
        for factor in reversed(self.factors):
            moved, saved = factor.displaced(self.delta)
            kept.append(saved)
            if factor.target is None or isinstance(factor, Above):
                factor.take(moved, self.delta)
            elif moved is None:
                torch.neg(factor.error, out=self.delta[factor.target])
            else:
                torch.sub(moved, factor.error, out=self.delta[factor.target])
        return kept

    def descend(
        self, sent: Mapping[Output | Above, Tensor] | None = None
    ) -> Iterator[tuple[Prediction, Tensor | None]]:
        """For each prediction, from the top down, what arrives there of the output's error and those of
        second predictions, or of what is ``sent`` in their places; None if nothing does. It uses up what
        ``settle`` has saved."""
        self.settle()
        arriving: dict[int, Tensor] = {}
        with self.outside_autocast():
            saved, self._saved = self._saved or self._climb(), None

            def add(p: int, g: Tensor) -> None:
                arriving[p] = arriving[p] + g if p in arriving else g

            for factor in self.factors:
                kept = saved.pop()
                if isinstance(factor, Output | Above):
                    arrived: Tensor | None = factor.weighted() if sent is None else sent[factor]
                    if isinstance(factor, Above) and factor.target in self.free:
                        assert arrived is not None
                        add(factor.target, -arrived)
                else:
                    arrived = arriving.pop(factor.target, None)
                    yield factor, arrived
                if arrived is not None:
                    for p, g in factor.arriving(kept, arrived).items():
                        add(p, g)

    @torch.no_grad()
    def sweep(self, move: Move, down: bool = False) -> None:
        """Go up to the output and down again, telling ``move`` of each error's gradient."""
        for factor, arrived in self.descend():
            assert factor.target is not None
            parts: Parts = [(factor.error, factor.precision)]
            if arrived is not None:
                parts.insert(0, (arrived, -1.0))
            move(factor.target, parts)
            self._is_settled = False

    @contextmanager
    def still(self) -> Iterator[None]:
        """The body sweeps without moving anything."""
        self.settle()
        yield
        self._is_settled = True

    @contextmanager
    def aside(self) -> Iterator[None]:
        """The same: the errors are the variables, and there are no others to keep."""
        with self.still():
            yield

    def terms(self) -> Tensor:
        """The terms of F at the errors as they are now."""
        self.settle()
        return self._terms(self.factors)

    def finish(self) -> list[Tensor]:
        """The beliefs, in the place of their displacements; nothing can be evaluated after it."""
        self.settle()
        self._saved = None
        return super().finish()


def _add_parts(to: Parts, parts: Parts) -> None:
    """Add to a gradient in parts. A belief of many children does not hold as many tensors."""
    for part in parts:
        if len(to) < 2 or not (is_one(part[1]) and is_one(to[1][1])):
            to.append(part)
        else:  # the third and those that follow are added to the second
            to[1] = (to[1][0] + part[0], 1.0)


__all__ = ["Beliefs", "Energy", "Errors", "Move", "Number", "Parts"]
