"""What there is to know of an energy where a relaxation stands."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch2pc.energy import Energy, Errors, Parts
from torch2pc.energy.factors import Prior


class Here(NamedTuple):
    """What there is to know of the energy where a relaxation stands."""

    errors: list[Any]
    """None, epsilon_1..epsilon_L."""
    Loss: Tensor
    prior: Tensor | None
    gradient: list[Tensor]
    """F's gradient in the variables."""
    arriving: list[Tensor]
    """What arrives at each of them from above; at equilibrium, its error (times its precision)."""


@torch.no_grad()
def look(energy: Energy) -> Here:
    """The energy and its gradient where it stands, and stays."""
    of = energy.predictions
    gradient = {i: torch.zeros_like(energy.x[i]) for i in energy.free}
    arriving = {i: torch.zeros_like(energy.x[i]) for i in energy.free}
    # What arrives at a belief is added to it, and subtracted from an error.
    sign = -1.0 if isinstance(energy, Errors) else 1.0

    def note(i: int, parts: Parts) -> None:
        for part, c in parts:
            gradient[i].add_(part, alpha=c)
            if i not in of or part is not of[i].error:
                arriving[i].add_(part, alpha=sign * c)

    with energy.aside():
        energy.sweep(note)
        priors = [f.energy(energy.delta) for f in energy.factors if isinstance(f, Prior)]
        errors, Loss = energy.epsilon, energy.output.Loss
    prior = priors[0] if priors else None
    return Here(errors, Loss, prior, list(gradient.values()), list(arriving.values()))
