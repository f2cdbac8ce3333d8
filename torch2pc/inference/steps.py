"""Step rules: how a variable is moved, given its gradient.

A rule is told where a relaxation begins, of each variable's gradient in a sweep, and of the sweep's end
(``relax.py``). It moves the variables in place, and writes into none of the parts that a gradient is given
in.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch2pc.energy import Energy, Parts
from torch2pc.energy.curvature import hessian, safe_step

AUTO = "auto"
# What a step size is multiplied by if the energy has risen, and how often at most.
SHRINK, MOST_TRIES = 0.25, 16


class Rule:
    """What a relaxation asks of a rule."""

    eta: Any
    """The step size."""
    down = False
    """Whether a sweep moves a belief before its error goes on down."""

    def begin(self, energy: Energy) -> None:
        """Before the first sweep, or the first one after the energy was put back to its start."""
        self.x = energy.x

    def move(self, i: int, parts: Parts) -> None:
        """Move variable i, of which the gradient is the sum of ``parts``."""
        raise NotImplementedError

    def end(self) -> None:
        """After each sweep."""

    def is_content(self, energy: Energy) -> bool:
        """After the last sweep: whether to leave it at that, or else to begin again."""
        return True


class Descent(Rule):
    """x <- x - eta dF/dx"""

    def __init__(self, eta: Any) -> None:
        self.eta = eta

    def move(self, i: int, parts: Parts) -> None:
        """x_i <- x_i - eta dF/dx_i"""
        for part, c in reversed(parts):  # its own error first
            _add(self.x[i], part, -self.eta * c)


class Safe(Descent):
    """``eta="auto"``: descent with a step size that is found in each call.

    1/lambda, with lambda the largest eigenvalue of the Hessian at the start (``energy/curvature.py``); and
    for as long as the energy is higher in the end than it was, from the start again with a quarter of it.
    """

    def __init__(self) -> None:
        super().__init__(AUTO)
        self._tries = 0

    def begin(self, energy: Energy) -> None:
        """Find the step size, the first time."""
        super().begin(energy)
        if self._tries == 0:
            self.eta = safe_step(hessian(energy), energy.variables)
            self._before = energy.terms()
            self._slack = round_off(energy.vhat[-1].dtype) * self._before.abs().sum()

    def is_content(self, energy: Energy) -> bool:
        """Whether the energy is no higher than it was, or to try again with a smaller step."""
        before = self._before.sum()
        is_lower = energy.terms().sum() <= before + self._slack
        self._tries += 1
        if is_lower | ~before.isfinite() or self._tries > MOST_TRIES:
            return True
        self.eta *= SHRINK
        return False


def rule_of(eta: Any) -> Rule:
    """The rule that a call's ``eta`` asks for."""
    return Safe() if isinstance(eta, str) else Descent(eta)


def round_off(dtype: torch.dtype) -> float:
    """How much of an energy may be round-off, if the loss is computed in ``dtype``."""
    return min(256 * torch.finfo(dtype).eps, 0.1)


def _add(x: Tensor, part: Tensor, c: Any) -> None:
    """x <- x + c part"""
    if type(c) is float:
        x.add_(part, alpha=c)
    else:  # a tensor without dimensions, in a compiled call
        x.add_(part * c)
