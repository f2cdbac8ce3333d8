"""What there is to know of an energy where a relaxation stands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch2pc.energy import Energy, Errors, Parts
from torch2pc.energy.factors import Between, Prediction, Prior


class Here(NamedTuple):
    """What there is to know of the energy where a relaxation stands."""

    errors: list[Any]
    """None, epsilon_1..epsilon_L."""
    Loss: Tensor
    prior: Tensor | None
    """That of the prior, and of what predicts the input from above."""
    energies: list[Tensor]
    """Those of the hidden beliefs: of what their layers predict, and of second predictions."""
    pulls: list[Tensor]
    """What pulls at each hidden layer's belief of its own error, weighted by its precision."""
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
            if i not in of or all([part is not own for own, _ in of[i].own()]):
                arriving[i].add_(part, alpha=sign * c)

    with energy.aside():
        energy.sweep(note)
        first = [f.energy(energy.delta) for f in energy.factors if isinstance(f, Prior)]
        errors, Loss = energy.epsilon, energy.output.Loss
        hidden = [of[i] for i in sorted(of)]
        energies = {i: _energy(of[i], energy.delta) for i in sorted(of)}
        for factor in energy.above:
            term = _energy(factor, energy.delta)
            if factor.target == 0:
                first.append(term)
            else:
                energies[factor.target] = energies[factor.target] + term
        pulls = [abs(c) * part for factor in hidden for part, c in factor.own()]
    of_input = sum(first[1:], first[0]) if first else None
    return Here(
        errors,
        Loss,
        of_input,
        [*energies.values()],
        pulls,
        list(gradient.values()),
        list(arriving.values()),
    )


def _energy(factor: Prediction, x: Sequence[Any]) -> Tensor:
    """A hidden layer's term; squares are summed in a wider type, so that small ones are not 0."""
    if isinstance(factor, Between):
        return factor.energy(x)
    length = torch.linalg.vector_norm(factor.difference, dtype=wide(factor.error))
    return 0.5 * factor.precision * length.square()


def wide(x: Tensor) -> torch.dtype:
    """What to sum squares in: those of small float32 numbers are 0. Apple's GPUs have nothing wider."""
    return torch.float32 if x.device.type == "mps" else torch.float64
