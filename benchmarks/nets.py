"""The networks that are measured, each with one batch of random data and a loss.

The paper's two networks are those of ``paper_figures``; only the batches are made here.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from paper_figures.nets import cifar_net, convolution_layers, mnist_net

CLASSES = 10


@dataclass(frozen=True)
class Case:
    """A model, its loss and a batch, all on one device in float32.

    kind: "conv" or "MLP", on which some bars depend.
    """

    name: str
    kind: str
    model: nn.Sequential
    LossFun: Callable[[Tensor, Any], Tensor]
    X: Tensor
    Y: Tensor


def mlp(layers: int, width: int, inputs: int = 784) -> nn.Sequential:
    """Linear and ReLU, ``layers`` times in all; the last one is Linear(width, 10) alone."""
    sizes = [inputs, *[width] * (layers - 1)]
    hidden = [
        nn.Sequential(nn.Linear(before, after), nn.ReLU())
        for before, after in itertools.pairwise(sizes)
    ]
    return nn.Sequential(*hidden, nn.Linear(sizes[-1], CLASSES))


def vgg_style() -> nn.Sequential:
    """19 convolutions of VGG's kind and a linear layer, for images of shape (batch, 3, 32, 32).

    Half as wide as VGG, which makes a run four times as short.
    """
    layers = convolution_layers((32, 3), (64, 4), (128, 4), (256, 4), (256, 4))
    return nn.Sequential(*layers, nn.Sequential(nn.Flatten(), nn.Linear(256, CLASSES)))


def vgg_blocks() -> nn.Sequential:
    """The same network as ``vgg_style``, with the convolutions up to a pooling as one layer each."""
    blocks: list[list[nn.Module]] = [[]]
    for layer in vgg_style():
        blocks[-1].extend(layer)
        if isinstance(blocks[-1][-1], nn.MaxPool2d):
            blocks.append([])
    return nn.Sequential(*(nn.Sequential(*block) for block in blocks))


# Name: kind, builder, shape of one input, batch size.
NETWORKS: dict[str, tuple[str, Callable[[], nn.Sequential], tuple[int, ...], int]] = {
    "mnist_net": ("conv", mnist_net, (1, 28, 28), 300),
    "cifar_net": ("conv", cifar_net, (3, 32, 32), 32),
    "vgg_style": ("conv", vgg_style, (3, 32, 32), 16),
    "vgg_blocks": ("conv", vgg_blocks, (3, 32, 32), 16),
    "mlp3x300": ("MLP", lambda: mlp(3, 300), (784,), 64),
    "mlp8x300": ("MLP", lambda: mlp(8, 300), (784,), 64),
    "mlp20x64": ("MLP", lambda: mlp(20, 64), (784,), 64),
    "mlp3x32": ("MLP", lambda: mlp(3, 32), (784,), 1),
}


def case(name: str, device: torch.device) -> Case:
    """The network of this name, with weights and data that are the same each time."""
    kind, build, shape, batch = NETWORKS[name]
    return make_case(name, kind, build, (batch, *shape), device)


def make_case(
    name: str,
    kind: str,
    build: Callable[[], nn.Sequential],
    shape: tuple[int, ...],
    device: torch.device,
) -> Case:
    """``build()`` with a batch of ``shape`` (batch, *features), pixels between 0 and 1."""
    torch.manual_seed(0)
    model = build().to(device)
    X = torch.rand(shape, device=device)
    Y = torch.randint(CLASSES, shape[:1], device=device)
    return Case(name, kind, model, nn.CrossEntropyLoss(), X, Y)
