"""Target alignment: does one update move the output towards the target?

The cosine between the change of the output and the way that it has to go, for one random input and
target and one small update. Clipping or normalising a whole update changes nothing about it, as a small
step's direction is all that counts; how long each layer's update is against the other layers' does. So
the control is backprop in each layer as long as PC.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from paper_figures.prospective.side_by_side import (
    backprop,
    layer_lengths,
    networks,
    rescaled,
    summed_half_squares,
)
from torch2pc import PCInfer

WIDTH, RATE = 64, 1e-3
# Xavier's gains, as in the paper's code.
GAINS = {"linear": 1.0, "tanh": 5 / 3}
ACTIVATIONS: dict[str, type[nn.Module]] = {"linear": nn.Identity, "tanh": nn.Tanh}


PC, FURTHER = "Strict, η .1, n 128", "Strict, η .1, n 512"
BACKPROP, AS_LONG = "backprop", "backprop, as long as Strict, n 128"
RELAXATIONS = {
    PC: ("Strict", 128),
    FURTHER: ("Strict", 512),
    "Equilibrium, n 100": ("Equilibrium", 100),
}
STYLES = {
    PC: ("#D55E00", "-"),
    FURTHER: ("#E69F00", "-"),
    "Equilibrium, n 100": ("#CC79A7", "-"),
    BACKPROP: ("black", "--"),
    AS_LONG: ("#999999", "--"),
}
# Read off figures of the paper's code (three seeds, n 128): linear and tanh, PC and backprop.
PAPER_DEPTHS = (2, 4, 6, 8, 10, 12, 14, 15)
PAPER = {
    "linear": {
        PC: (0.99, 0.985, 0.92, 0.95, 0.935, 0.92, 0.95, 0.895),
        BACKPROP: (0.91, 0.82, 0.72, 0.685, 0.575, 0.55, 0.55, 0.39),
    },
    "tanh": {
        PC: (0.94, 0.865, 0.735, 0.76, 0.77, 0.77, 0.795, 0.82),
        BACKPROP: (0.76, 0.64, 0.54, 0.53, 0.61, 0.595, 0.545, 0.50),
    },
}


def alignments(activation: str, depth: int, seeds: int, seed: int) -> dict[str, list[float]]:
    """By rule, one number for each of ``seeds`` networks of ``depth`` layers, side by side.

    In float64, as the change of the output is a small difference.
    """
    generator = torch.Generator().manual_seed(seed)
    X, targets = torch.randn(2, seeds, 1, WIDTH, generator=generator, dtype=torch.float64)
    # In [-bound, bound]: Xavier's uniform distribution.
    bound = GAINS[activation] * (3 / WIDTH) ** 0.5
    drawn = torch.rand(depth, seeds, WIDTH, WIDTH, generator=generator, dtype=torch.float64)
    weights = list((2 * drawn - 1) * bound)
    kind = ACTIVATIONS[activation]
    before = networks(weights, kind)(X).detach()
    return {
        name: alignment(
            networks([w - RATE * u for w, u in zip(weights, updates, strict=True)], kind)(X)
            - before,
            targets - before,
        )
        for name, updates in updates_of(weights, kind, X, targets).items()
    }


def alignment(change: Tensor, way: Tensor) -> list[float]:
    """The cosines of (networks, 1, features)."""
    return functional.cosine_similarity(change.detach(), way, dim=-1).flatten().tolist()


def updates_of(
    weights: Sequence[Tensor], kind: type[nn.Module], X: Tensor, targets: Tensor
) -> dict[str, list[Tensor]]:
    found = {BACKPROP: backprop(weights, kind, X, targets)}
    for name, (ErrType, n) in RELAXATIONS.items():
        model = networks(weights, kind)
        PCInfer(model, summed_half_squares, X, targets, ErrType, 0.1, n)
        found[name] = [weight.grad for weight in model.parameters()]
    found[AS_LONG] = rescaled(found[BACKPROP], layer_lengths(found[PC]))
    return found
