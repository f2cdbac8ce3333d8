"""The paper's networks, each an ``nn.Sequential`` whose items are its predictive coding layers.

Weights start as PyTorch draws them, so seed before calling; VGG-19's are read from a file.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from paper_figures.data import DataError, MissingData, check_digest

VGG19_FILE = "vgg19-dcbb9e9d.pth"


def mnist_net() -> nn.Sequential:
    """5 layers and 32 695 parameters, for images of shape (batch, 1, 28, 28)."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 10, 3), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(10, 5, 3), nn.ReLU(), nn.Flatten()),
        nn.Sequential(nn.Linear(605, 50), nn.ReLU()),
        nn.Sequential(nn.Linear(50, 30), nn.ReLU()),
        nn.Sequential(nn.Linear(30, 10)),
    )


def cifar_net() -> nn.Sequential:
    """6 layers and 4 633 738 parameters, for images of shape (batch, 3, 32, 32)."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(128, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        nn.Sequential(nn.Linear(16384, 256), nn.ReLU()),
        nn.Sequential(nn.Linear(256, 256), nn.ReLU()),
        nn.Sequential(nn.Linear(256, 10)),
    )


def convolution_layers(*stages: tuple[int, int]) -> list[nn.Sequential]:
    """VGG's layers for colour images: stages of (width, number of convolutions), each pooled."""
    layers = []
    channels = 3
    for width, convolutions in stages:
        for position in range(1, convolutions + 1):
            block: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            if position == convolutions:
                block.append(nn.MaxPool2d(2))
            layers.append(nn.Sequential(*block))
            channels = width
    return layers


def vgg19() -> nn.Sequential:
    """19 layers, each a convolution or a dense block with its pooling, for (batch, 3, 224, 224).

    The modules are the usual ones; only their grouping is ours, with the average pooling in the
    first dense block. ReLU is not in place, as an activation is read after the next layer ran.
    """
    layers = convolution_layers((64, 2), (128, 2), (256, 4), (512, 4), (512, 4))
    return nn.Sequential(
        *layers,
        nn.Sequential(
            nn.AdaptiveAvgPool2d(7), nn.Flatten(), nn.Linear(25088, 4096), nn.ReLU(), nn.Dropout()
        ),
        nn.Sequential(nn.Linear(4096, 4096), nn.ReLU(), nn.Dropout()),
        nn.Sequential(nn.Linear(4096, 1000)),
    )


def load_vgg19(folder: Path | None) -> nn.Sequential:
    """`vgg19` in eval mode, with the ImageNet weights that torchvision publishes."""
    path = None if folder is None else folder / VGG19_FILE
    if path is None or not path.is_file():
        raise MissingData(
            f"it needs VGG-19's weights ({VGG19_FILE}): "
            "run with --download, or put this file into a folder and name it with --data"
        )
    return read_vgg19(path).eval()


def read_vgg19(path: Path) -> nn.Sequential:
    """`vgg19` with a state dict of torchvision's, whose keys follow the order of the layers."""
    promised = re.search(r"-([0-9a-f]{8,})\.pth$", path.name)
    if promised:
        check_digest(path, "sha256", promised[1])
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path} is not a file of weights ({reason}): fetch it again") from error

    if not isinstance(state, Mapping):
        raise DataError(f"{path} holds a {type(state).__name__}, no state dict: fetch it again")
    with torch.device("meta"):
        model = vgg19()
    wanted = {
        theirs: (ours, parameter.shape)
        for theirs, (ours, parameter) in zip(vgg19_keys(), model.named_parameters(), strict=True)
    }
    shapes = {key: getattr(value, "shape", None) for key, value in state.items()}
    wrong = [
        f"{key} {tuple(shape)}" for key, (_, shape) in wanted.items() if shapes.get(key) != shape
    ]
    if wrong or len(shapes) != len(wanted):
        raise DataError(
            f"{path} does not hold torchvision's VGG-19, without batch normalisation "
            f"({len(shapes)} entries, {len(wanted)} expected; missing or of another shape: "
            f"{', '.join(wrong[:3]) or 'none'}): put {VGG19_FILE} there"
        )
    model.load_state_dict(
        {ours: state[theirs] for theirs, (ours, _) in wanted.items()}, assign=True
    )
    return model


def vgg19_keys() -> list[str]:
    """torchvision's names of the parameters, in order: its features are one long Sequential."""
    keys, index = [], 0
    for convolutions in 2, 2, 4, 4, 4:
        for _ in range(convolutions):
            keys += [f"features.{index}.weight", f"features.{index}.bias"]
            index += 2
        index += 1
    return keys + [f"classifier.{i}.{kind}" for i in (0, 3, 6) for kind in ("weight", "bias")]
