"""A layer as a displacement, d(delta) = f(vhat + delta) - f(vhat), computed without a difference.

Strict's prediction errors are differences of nearly equal tensors, of which float32 keeps few digits
in the lower layers. With delta_l = v_l - vhat_l they are

    epsilon_l = d_l(delta_{l-1}) - delta_l,    d_l(delta) = f_l(vhat_{l-1} + delta) - f_l(vhat_{l-1})

in which nothing large is subtracted, if d_l is not. A ``Displacement`` is a recorded layer as lines, one for
each operation, with its rule (``rules/``): it holds whatever depends on vhat alone (a dropout mask, batch
statistics), and does not run the layer again. A layer that cannot be recorded is evaluated again and
subtracted: a ``Reevaluation``. One whose backward pass is its own is an ``OwnBackward``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch2pc.displacement.rules import (
    Rule,
    belief_dtype,
)
from torch2pc.displacement.vjp import vjp


class Line(NamedTuple):
    """One operation of a layer: the places of its inputs among all values, and its constants."""

    rule: Rule
    inputs: tuple[int, ...]
    tensors: tuple[Tensor, ...]
    static: tuple[Any, ...]
    has_gradient: bool


class Displacement:
    """d(delta) = f(vhat + delta) - f(vhat) for a recorded layer, and its vector-Jacobian product.

    Values 0..count-1 are the deltas of its inputs; each line computes the next value from earlier ones.
    """

    def __init__(
        self, lines: Sequence[Line], result: int | None, like: Tensor, count: int = 1
    ) -> None:
        self.lines, self.result, self.like = _overwriting(lines, result, count), result, like
        self.count = count
        # For each line what is called, on the way up and down, with which values and constants, and the
        # values that no line after it uses.
        used: set[int | None] = {result}
        self._run: list[tuple[Any, Any, tuple[int, ...], tuple[Any, ...], list[int]]] = []
        for rule, inputs, tensors, static, has_gradient in reversed(self.lines):
            up, back = rule.forward, rule.backward
            if back is None:
                up, back = functools.partial(_with_graph, up, len(inputs)), _through_graph
            constants = (*tensors, *static)
            last = [i for i in inputs if i not in used]
            self._run.append((up, back if has_gradient else None, inputs, constants, last))
            used.update(inputs)
        self._run.reverse()

    @functools.cached_property
    def key(self) -> tuple[Any, ...]:
        """Equal for displacements that differ in their tensors alone."""
        lines = tuple([(*line[:2], *line[3:]) for line in self.lines])
        return self.count, self.result, lines

    def forward(self, *deltas: Tensor) -> tuple[Tensor, list[Any]]:
        """The displacement of the output, and what ``backward`` needs."""
        values: list[Any] = list(deltas)
        saved: list[Any] = []
        for up, _, inputs, constants, last in self._run:
            given = [values[i] for i in inputs]
            for i in last:
                values[i] = None
            value, kept = up(*given, *constants)
            values.append(value)
            saved.append(kept)
            del given, value, kept
        if self.result is None:
            return torch.zeros_like(self.like, dtype=belief_dtype(self.like.dtype)), saved
        return values[self.result], saved

    def backward(self, saved: list[Any], e: Tensor) -> list[Any]:
        """For each input J(vhat + delta)^T e, or None without one. ``saved`` is used up."""
        count = self.count
        errors: list[Any] = [None] * (len(self.lines) + count)
        if self.result is None:
            return errors
        errors[self.result] = e
        del e
        for _, back, inputs, constants, _ in reversed(self._run):
            error, kept = errors.pop(), saved.pop()
            if error is None or back is None:
                continue
            found = back(error, kept, *constants)
            del error, kept
            if len(inputs) == 1 and not isinstance(found, tuple):
                found = (found,)
            for i, of_input in zip(inputs, found, strict=True):
                if of_input is not None:
                    errors[i] = of_input if errors[i] is None else errors[i] + of_input
            del found, of_input
        return errors


def _overwriting(lines: Sequence[Line], result: int | None, count: int) -> list[Line]:
    """The same lines, which write into what no other line needs."""
    lines = list(lines)
    uses = [0] * (len(lines) + count)
    user: dict[int, Rule] = {}
    for line in lines:
        for i in line.inputs:
            uses[i] += 1
            user[i] = line.rule

    def is_free(i: int) -> bool:
        return i >= count and i != result and uses[i] == 1

    for k, line in enumerate(lines, start=count):
        if line.rule.forward_ is not None:
            first = line.inputs[0]
            d = is_free(first) and lines[first - count].rule.is_fresh
            e = is_free(k) and user[k].is_fresh
            lines[k - count] = line._replace(rule=line.rule.overwriting(d, e))
    return lines


class Reevaluation:
    """The same by evaluating a layer again: right to what a difference of its outputs is right to."""

    def __init__(
        self,
        evaluate: Callable[..., Tensor],
        x: Sequence[Tensor],
        before: Tensor | None,
        buffers_kept: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._evaluate, self._x, self._before = evaluate, x, before
        # A checkpointed module is evaluated once more in the backward pass.
        self._buffers_kept = buffers_kept

    def forward(self, *deltas: Tensor) -> tuple[Tensor, Any]:
        """The displacement of the output, and what ``backward`` needs."""
        x = self.moved(*deltas)
        output = self.graph_at(x)
        if self._before is None:
            self._before = self._evaluate(*self._x).detach()
        dtype = belief_dtype(output.dtype)
        return output.detach().to(dtype) - self._before.to(dtype), (x, output)

    def moved(self, *deltas: Tensor) -> list[Tensor]:
        """Where the layer is evaluated."""
        return [(a.to(d.dtype) + d).to(a.dtype) for a, d in zip(self._x, deltas, strict=True)]

    def graph_at(self, x: Sequence[Tensor]) -> Tensor:
        """The output, with a graph down to ``x``."""
        with torch.enable_grad():
            return self._evaluate(*[a.requires_grad_() for a in x])

    def backward(self, saved: Any, e: Tensor) -> list[Any]:
        """For each input J(vhat + delta)^T e, or None without one."""
        x, output = saved
        if not output.requires_grad:
            return [None] * len(x)
        with self._buffers_kept():
            found = vjp([output], x, [e.to(output.dtype)])
        return [None if g is None else g.to(belief_dtype(g.dtype)) for g in found]


class OwnBackward:
    """The displacement of a recorded layer whose way back is not that of its operations.

    It is taken from the layer's own graph, which is made anew where the belief is, and just before it is
    used: nothing is lost by that, as it is no difference.
    """

    def __init__(self, recorded: Displacement, layer: Reevaluation) -> None:
        self._recorded, self._layer = recorded, layer

    def forward(self, *deltas: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The displacement of the output, and what ``backward`` needs."""
        moved, _ = self._recorded.forward(*deltas)
        return moved, self._layer.moved(*deltas)

    def backward(self, saved: list[Tensor], e: Tensor) -> list[Any]:
        """For each input J(vhat + delta)^T e, or None without one."""
        return self._layer.backward((saved, self._layer.graph_at(saved)), e)


def _with_graph(forward: Callable[..., Tensor], count: int, *given: Any) -> tuple[Tensor, Any]:
    """The value of a rule that autograd differentiates, and what ``_through_graph`` needs.

    ``given``: the ``count`` displacements of its inputs, and constants.
    """
    given, constants = given[:count], given[count:]

    def function(*moving: Tensor) -> Tensor:
        return forward(*moving, *constants)

    if torch.compiler.is_compiling():
        return torch.func.vjp(function, *given)  # type: ignore[return-value]
    with torch.enable_grad():
        moving = [d.detach().requires_grad_(d.is_floating_point() or d.is_complex()) for d in given]
        value = function(*moving)
    return value.detach(), (moving, value)


def _through_graph(error: Tensor, kept: Any, *constants: Any) -> tuple[Tensor | None, ...]:
    if not isinstance(kept, tuple):
        return kept(error)
    moving, value = kept
    asked = [d for d in moving if d.requires_grad]
    if not value.requires_grad:
        return (None,) * len(moving)
    found = iter(torch.autograd.grad(value, asked, error, allow_unused=True))
    return tuple([next(found) if d.requires_grad else None for d in moving])
