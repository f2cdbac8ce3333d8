"""Deep networks, and their training side by side: several seeds at several learning rates as one model.

Networks that share nothing and whose losses are summed are relaxed and learn as each would alone, so that
one call serves them all. Values are (K, batch, features) and weights (K, in, out) for K networks. A step
size that a call finds is one for all of its networks; so each learning rate has a call of its own there,
and its seeds share the step.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

import torch2pc
from paper_figures.data import Batch, DataSet
from paper_figures.prospective.side_by_side import Adam
from paper_figures.training import incremental_steps, quietly
from torch2pc import PCInfer
from torch2pc.steps import Descent, Rule

PIXELS, WIDTH, CLASSES = 784, 64, 10
BATCH_SIZE, HELD_OUT = 64, 1000
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "ReLU": functional.relu,
    "tanh": torch.tanh,
    "GELU": functional.gelu,
}


class Layer(nn.Module):
    """``skip x + scale activation(x) W`` of each network, cut before the activation; no biases."""

    def __init__(
        self,
        weight: Tensor,
        activation: Callable[[Tensor], Tensor] | None,
        scale: float = 1.0,
        skip: bool = False,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.activation, self.scale, self.skip = activation, scale, skip

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.bmm(x if self.activation is None else self.activation(x), self.weight)
        inner = inner if self.scale == 1 else self.scale * inner
        return x + inner if self.skip else inner


def network(name: str, depth: int, seeds: Sequence[int]) -> nn.Sequential:
    """The networks "ReLU", "tanh residual", "ReLU muPC", ... of ``depth`` layers, one from each seed.

    Weights start so that neither the signal nor the gradient shrinks from layer to layer, by Kaiming's normal
    distribution for ReLU and GELU and Xavier's for tanh. (PyTorch's own start shrinks a ReLU's signal by .41
    in each layer; not even backprop gets away from it at 40 layers.) A residual layer is
    x + depth^-1/2 W act(x).

    With muPC all weights are drawn from N(0, 1), and what they make is scaled instead: by inputs^-1/2 in
    the first layer, (width depth)^-1/2 in the residual layers between, and 1/width in the last, so that a
    learning rate serves many depths.
    """
    kind, _, variant = name.partition(" ")
    activation, sizes = ACTIVATIONS[kind], [PIXELS, *[WIDTH] * (depth - 1), CLASSES]
    drawn: list[list[Tensor]] = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        drawn.append([torch.randn(pair, generator=generator) for pair in pairwise(sizes)])
    layers = []
    for l, weights in enumerate(zip(*drawn, strict=True)):
        fan_in, fan_out = sizes[l : l + 2]
        inside, std = 0 < l < depth - 1, (2 / fan_in) ** 0.5
        scale = depth**-0.5 if inside and variant else 1.0
        if kind == "tanh":
            std = (2 / (fan_in + fan_out)) ** 0.5
        if variant == "muPC":
            std = 1.0
            scale *= 1 / WIDTH if l == depth - 1 else fan_in**-0.5
        skip = bool(variant) and inside
        layers.append(Layer(std * torch.stack(weights), activation if l else None, scale, skip))
    return nn.Sequential(*layers)


def summed(output: Tensor, labels: Tensor) -> Tensor:
    """The sum over the networks of each one's mean cross-entropy."""
    per_example = functional.cross_entropy(output.flatten(0, 1), labels.flatten(), reduction="sum")
    return per_example / labels.shape[1]


class Method(NamedTuple):
    """PCInfer's arguments, and how the lines look; ErrType None is backprop."""

    ErrType: str | None
    eta: float | str | Rule = 0.1
    n: int = 1
    colour: str = ""
    style: Any = "-"
    update_at: str = "v"


# What was looked through for a step and a number of sweeps that serve all networks.
ETAS, SWEEPS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9), (3, 10)
SEARCH = {
    (eta, n): f"Multipliers, η {eta:g}, n {n}".replace("0.", ".") for eta in ETAS for n in SWEEPS
}
BACKPROP, INCREMENTAL = "backprop", "incremental, η .1"
FEW_SWEEPS, LONG_STEP, MANY_SWEEPS = SEARCH[0.8, 3], SEARCH[0.9, 3], SEARCH[0.5, 10]
FOUND = "Multipliers, η auto, n 10"
METHODS = {
    BACKPROP: Method(None, colour="black", style=(0, (4, 1.5))),
    "FixedPred, η .1, n 20": Method("FixedPred", 0.1, 20, "#999999"),
    "Strict, η .1, n 20": Method("Strict", 0.1, 20, "#E69F00"),
    "Strict, sweeps, η .3, n 10": Method("Strict", Descent(0.3, "down"), 10, "#D55E00"),
    FEW_SWEEPS: Method("Multipliers", 0.8, 3, "#009E73"),
    LONG_STEP: Method("Multipliers", 0.9, 3, "#009E73", "--"),
    MANY_SWEEPS: Method("Multipliers", 0.5, 10, "#009E73", "-."),
    FOUND: Method("Multipliers", "auto", 10, "#009E73", ":"),
    "ErrorBased, η .3, n 5, at vhat": Method("ErrorBased", 0.3, 5, "#0072B2", "-", "vhat"),
    INCREMENTAL: Method("Strict", 0.1, 1, "#CC79A7"),
}
ALL_METHODS = {name: Method("Multipliers", *of) for of, name in SEARCH.items()} | METHODS
# Steps of the beliefs on a batch of incremental predictive coding, each with one of the weights.
BELIEF_STEPS = 20


def update(method: str, model: nn.Sequential, batch: Batch) -> None:
    """One method's updates in ``.grad``."""
    ErrType, eta, n, _, _, update_at = ALL_METHODS[method]
    if ErrType is None:
        model.zero_grad()
        summed(model(batch.X), batch.labels).backward()
    else:
        PCInfer(model, summed, batch.X, batch.labels, ErrType, eta, n, update_at=update_at)


def updates(method: str, model: nn.Sequential, batches: Iterator[Batch]) -> Iterator[None]:
    """A method's updates in ``.grad``, one after the other."""
    for batch in batches:
        if method == INCREMENTAL:
            eta = METHODS[method].eta
            for _ in incremental_steps(model, summed, batch, eta, BELIEF_STEPS):
                yield
        else:
            update(method, model, batch)
            yield


def batches_of(
    data: DataSet, steps: int, seeds: Sequence[int], device: torch.device
) -> Iterator[Batch]:
    """For each step the batches of all networks, one by its seed for each."""
    streams = [data.train_batches(steps, BATCH_SIZE, seed, device) for seed in seeds]
    for batches in zip(*streams, strict=True):
        yield Batch(
            torch.stack([batch.X.flatten(1) for batch in batches]),
            torch.stack([batch.labels for batch in batches]),
        )


def held_out(data: DataSet) -> DataSet:
    """The training images alone: the last 1000 of them are there to choose by."""
    images, labels = data.train_images, data.train_labels
    kept, chosen_by = slice(-HELD_OUT), slice(-HELD_OUT, None)
    return DataSet(data.name, images[kept], labels[kept], images[chosen_by], labels[chosen_by])


@torch.no_grad()
def accuracies(model: nn.Sequential, data: DataSet, device: torch.device) -> Tensor:
    """Of each network on all test images, in %."""
    right, count = torch.zeros((), device=device), len(model[0].weight)
    for batch in data.all_test_batches(1000, device):
        output = model(batch.X.flatten(1).expand(count, -1, -1))
        right = right + (output.argmax(-1) == batch.labels).sum(1)
    return 100 * right / len(data.test_images)


@dataclass(frozen=True)
class Grid:
    """All trainings of a method on a network at one depth: from each seed at each rate."""

    network: str
    depth: int
    method: str
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    steps: int

    def key(self, data: str) -> str:
        return json.dumps([*asdict(self).values(), data, torch2pc.__version__])


def train(grid: Grid, data: DataSet, device: torch.device) -> dict[str, list[list[float]]]:
    """The accuracies at the end (%), by rate and seed: on the held-out images, and on the test images."""
    if ALL_METHODS[grid.method].eta == "auto" and len(grid.rates) > 1:
        each = [train(replace(grid, rates=(rate,)), data, device) for rate in grid.rates]
        return {name: [row for found in each for row in found[name]] for name in each[0]}
    seeds = [seed for _ in grid.rates for seed in grid.seeds]
    rates = torch.tensor(grid.rates).repeat_interleave(len(grid.seeds)).view(-1, 1, 1).to(device)
    seen = held_out(data)
    model = network(grid.network, grid.depth, seeds).to(device)
    adam, weights = Adam(), list(model.parameters())
    with quietly():
        made = updates(grid.method, model, batches_of(seen, grid.steps, seeds, device))
        for _ in zip(range(grid.steps), made, strict=False):
            steps = adam([weight.grad for weight in weights if weight.grad is not None])
            with torch.no_grad():
                for weight, step in zip(weights, steps, strict=True):
                    weight.sub_(rates * step)
    shape = len(grid.rates), len(grid.seeds)
    return {
        "held out": accuracies(model, seen, device).view(shape).tolist(),
        "test": accuracies(model, data, device).view(shape).tolist(),
    }
