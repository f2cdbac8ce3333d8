"""Small networks trained side by side as one: from other seeds, by other rules, at other rates.

A call costs a small network mostly Python, so that a hundred of them in one batched product cost little
more than a few. Their losses are summed, so that none sees another: each is trained as it would be alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from torch2pc import PCInfer


class Linears(nn.Module):
    """A linear layer of each of K networks: (K, batch, in) to (K, batch, out), without biases.

    weight: (K, in, out).
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x, self.weight)


def networks(weights: Sequence[Tensor], activation: Callable[[], nn.Module]) -> nn.Sequential:
    """K networks as one, cut before the activation, from a (K, in, out) for each layer."""
    first, *others = weights
    layers = [nn.Sequential(activation(), Linears(weight)) for weight in others]
    return nn.Sequential(Linears(first), *layers)


def summed_half_squares(output: Tensor, targets: Tensor) -> Tensor:
    """Summed over networks, batch and classes."""
    return 0.5 * (output - targets).square().sum()


def layer_lengths(gradients: Sequence[Tensor]) -> list[Tensor]:
    """||g|| of each network's layers, (K, 1, 1) for each layer."""
    return [torch.linalg.vector_norm(g, dim=(1, 2), keepdim=True) for g in gradients]


def rescaled(gradients: Sequence[Tensor], lengths: Sequence[Tensor]) -> list[Tensor]:
    """The same directions, in each layer with the given length; what is 0 stays 0."""
    now = layer_lengths(gradients)
    return [
        g * (length / old.clamp(min=1e-30))
        for g, old, length in zip(gradients, now, lengths, strict=True)
    ]


class Adam:
    """Adam's steps for rates of 1, with PyTorch's other settings."""

    def __init__(self, first: float = 0.9, second: float = 0.999, eps: float = 1e-8) -> None:
        self._first, self._second, self._eps = first, second, eps
        self._means: list[Tensor] = []
        self._squares: list[Tensor] = []
        self._steps = 0

    def __call__(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        if not self._steps:
            self._means = [torch.zeros_like(g) for g in gradients]
            self._squares = [torch.zeros_like(g) for g in gradients]
        self._steps += 1
        steps = []
        for g, mean, square in zip(gradients, self._means, self._squares, strict=True):
            mean.lerp_(g, 1 - self._first)
            square.mul_(self._second).addcmul_(g, g, value=1 - self._second)
            size = (square / (1 - self._second**self._steps)).sqrt_().add_(self._eps)
            steps.append(mean / size / (1 - self._first**self._steps))
        return steps


class Clipped:
    """Gradients whose length over all layers is above the threshold are shortened to it."""

    def __init__(self, thresholds: Tensor) -> None:
        self._thresholds = thresholds

    def __call__(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        length = sum(layer.square() for layer in layer_lengths(gradients)).sqrt()
        share = (self._thresholds / length.clamp(min=1e-30)).clamp(max=1)
        return [g * share for g in gradients]


def normalised(gradients: Sequence[Tensor]) -> list[Tensor]:
    """In each layer of length 1."""
    return rescaled(gradients, [torch.ones_like(length) for length in layer_lengths(gradients)])


class Method(NamedTuple):
    """Where the updates come from, what is made of them, and how the lines look."""

    updates: str
    """"PC", "backprop", or "both": backprop's, in each layer as long as PC's."""
    rule: str
    """"SGD", "clipped", "normalised" or "Adam"."""
    colour: str
    style: str


METHODS = {
    "PC": Method("PC", "SGD", "#D55E00", "-"),
    "PC, clipped": Method("PC", "clipped", "#E69F00", "-"),
    "PC, Adam": Method("PC", "Adam", "#CC79A7", "-"),
    "backprop": Method("backprop", "SGD", "black", "--"),
    "backprop, clipped": Method("backprop", "clipped", "#56B4E9", "--"),
    "backprop, normalised": Method("backprop", "normalised", "#009E73", "--"),
    "backprop, Adam": Method("backprop", "Adam", "#0072B2", "--"),
    "backprop, as long as PC": Method("both", "SGD", "#999999", "--"),
}


@dataclass(frozen=True)
class Net:
    """One of the networks: its method, learning rate, where it is clipped, and its seed."""

    method: str
    rate: float
    threshold: float
    seed: int


class Updates:
    """What is subtracted from the weights of networks of one method, before the rates."""

    def __init__(self, nets: Sequence[Net], device: torch.device) -> None:
        method = METHODS[nets[0].method]
        self.own_backprop = method.updates == "both"
        thresholds = torch.tensor([net.threshold for net in nets], device=device).view(-1, 1, 1)
        self.rule: Callable[[Sequence[Tensor]], Sequence[Tensor]] = {
            "SGD": lambda: lambda gradients: gradients,
            "clipped": lambda: Clipped(thresholds),
            "normalised": lambda: normalised,
            "Adam": Adam,
        }[method.rule]()


class Stack:
    """Networks side by side, each of which learns by its method at its rate.

    All of them are relaxed, or none is: "PC" and "both" are not to be mixed with "backprop", which
    would pay for a relaxation that it has no use for.

    weights: by seed, one (in, out) for each layer.
    eta, n: of the relaxation, which is Strict's.
    """

    def __init__(
        self,
        nets: Sequence[Net],
        weights: dict[int, list[Tensor]],
        activation: Callable[[], nn.Module],
        eta: float,
        n: int,
    ) -> None:
        stacked = [
            torch.stack(layer) for layer in zip(*(weights[net.seed] for net in nets), strict=True)
        ]
        self.model, self.activation = networks(stacked, activation), activation
        self.eta, self.n = eta, n
        device = stacked[0].device
        self.rates = torch.tensor([net.rate for net in nets], device=device).view(-1, 1, 1)
        self.relaxed = relaxes(nets[0].method)
        self.parts: list[tuple[slice, Updates]] = []
        start = 0
        for _, group in groupby(nets, key=lambda net: net.method):
            alike = list(group)
            part = slice(start, start + len(alike))
            self.parts.append((part, Updates(alike, device)))
            start = part.stop

    @property
    def weights(self) -> list[Tensor]:
        return [weight.detach() for weight in self.model.parameters()]

    def step(self, X: Tensor, targets: Tensor) -> None:
        """One update of all networks, from the batch of each: (K, batch, features)."""
        if self.relaxed:
            PCInfer(self.model, summed_half_squares, X, targets, "Strict", self.eta, self.n)
            gradients = [weight.grad for weight in self.model.parameters()]
        else:
            gradients = backprop(self.weights, self.activation, X, targets)
        for part, updates in self.parts:
            mine = [g[part] for g in gradients]
            if updates.own_backprop:
                weights = [weight[part] for weight in self.weights]
                own = backprop(weights, self.activation, X[part], targets[part])
                mine = rescaled(own, layer_lengths(mine))
            for weight, step in zip(self.weights, updates.rule(mine), strict=True):
                weight[part].sub_(self.rates[part] * step)

    @torch.no_grad()
    def outputs(self, X: Tensor) -> Iterator[Tensor]:
        """Each network's for the same inputs (batch, features), one after the other.

        A batched product would copy the inputs for each.
        """
        activation = self.activation()
        for own in zip(*self.weights, strict=True):
            first, *others = own
            output = X @ first
            for weight in others:
                output = activation(output) @ weight
            yield output


def relaxes(method: str) -> bool:
    """Whether its updates need a relaxation."""
    return METHODS[method].updates != "backprop"


def backprop(
    weights: Sequence[Tensor], activation: Callable[[], nn.Module], X: Tensor, targets: Tensor
) -> list[Tensor]:
    """The gradient of the summed loss for each layer's weights."""
    model = networks(weights, activation)
    loss = summed_half_squares(model(X), targets)
    return list(torch.autograd.grad(loss, list(model.parameters())))


def drawn_weights(sizes: Sequence[int], std: float | None, seed: int) -> list[Tensor]:
    """One network's, (in, out) each: normal with ``std``, or Xavier's uniform ones if it is None."""
    generator = torch.Generator().manual_seed(seed)
    weights = []
    for fan_in, fan_out in pairwise(sizes):
        if std is None:
            bound = math.sqrt(6 / (fan_in + fan_out))
            weights.append((2 * torch.rand(fan_in, fan_out, generator=generator) - 1) * bound)
        else:
            weights.append(torch.randn(fan_in, fan_out, generator=generator) * std)
    return weights
