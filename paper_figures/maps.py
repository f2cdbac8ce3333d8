"""Activations, gradients and beliefs of a convolutional network as maps: shared by figures 6 and 7.

The paper shows VGG-19 and photographs. Where its weights are missing, mnist_net trained on the spot
and digits stand in for them, and the figures say so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.axes import Axes
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torch.nn import functional

from paper_figures.data import MissingData, load_digits
from paper_figures.nets import load_vgg19
from paper_figures.progress import track
from paper_figures.report import Options
from paper_figures.training import cross_entropy, trained_mnist_net
from torch2pc import PCInfer
from torch2pc.graph.network import Network
from torch2pc.inference.strict import strict

ETA, N = 0.05, 500

# What the weights of torchvision's VGG-19 were trained on: mean and standard deviation of the
# colours red, green and blue.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SIDE = 224


@dataclass(frozen=True)
class Subject:
    """The network and the pictures that are shown.

    X: (pictures, channels, height, width), as the network wants it; shown: the same pictures for
    the eye, (height, width) or (height, width, 3); layers: the numbers of the layers to map, and
    channels: how many channels each has; stand_in: a remark for the title, or nothing.
    """

    name: str
    model: nn.Sequential
    X: Tensor
    shown: list[np.ndarray]
    layers: tuple[int, int]
    channels: tuple[int, int]
    stand_in: str
    data: dict[str, object]


@dataclass(frozen=True)
class Maps:
    """One picture under one label: the lists of `PCInfer`, and what Exact and Strict found."""

    vhat: list[Tensor]
    gradient: list[Tensor]
    belief: list[Tensor]
    epsilon: list[Tensor]


def subject(options: Options) -> Subject:
    """VGG-19 and two photographs, or the stand-in."""
    try:
        model = load_vgg19(options.data).to(options.device)
    except MissingData as reason:
        return _stand_in(options, reason)
    photographs = load_sample_images()
    shown = [_square(torch.from_numpy(photograph.copy())) for photograph in photographs.images]
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (IMAGENET_MEAN, IMAGENET_STD))
    X = torch.stack([(picture - mean) / std for picture in shown]).to(options.device)
    return Subject(
        "VGG-19",
        model,
        X,
        [picture.permute(1, 2, 0).numpy() for picture in shown],
        (1, 10),
        (64, 512),
        "",
        {"name": "scikit-learn's sample photographs", "pictures": photographs.filenames},
    )


def _square(photograph: Tensor) -> Tensor:
    """The middle of a photograph (height, width, 3), as (3, SIDE, SIDE) in [0, 1]."""
    pixels = photograph.permute(2, 0, 1).float() / 255
    short = min(pixels.shape[1:])
    top, left = ((size - short) // 2 for size in pixels.shape[1:])
    middle = pixels[:, top : top + short, left : left + short]
    resized = functional.interpolate(
        middle[None], size=(SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False
    )
    return resized[0].clamp(0, 1)


def _stand_in(options: Options, reason: MissingData) -> Subject:
    data = load_digits(options.data)
    model, _ = trained_mnist_net(data, cross_entropy, options)
    X = next(data.test_batches(1, 2, options.seed, options.device)).X
    return Subject(
        "mnist_net",
        model.eval(),
        X,
        [picture[0].cpu().numpy() for picture in X],
        (1, 2),
        (10, 5),
        f"STAND-IN: mnist_net, trained on the {data.name}, in place of VGG-19 and photographs",
        data.summary() | {"stand-in because": str(reason)},
    )


def guess(model: nn.Sequential, X: Tensor) -> Tensor:
    """The label that the model gives each picture."""
    with torch.no_grad():
        return model(X).argmax(1)


def infer(model: nn.Sequential, X: Tensor, label: Tensor, n: int, title: str) -> Maps:
    """The gradient and Strict's beliefs for one picture (1, channels, height, width)."""
    exact = PCInfer(model, cross_entropy, X, label, "Exact")
    network = Network(model, cross_entropy, X, label)
    relaxation = strict(network, ETA)
    with network.replaying():
        for _ in track(range(n), title):
            relaxation.step()
    return Maps(exact.vhat, exact.epsilon, relaxation.v, relaxation.epsilon)


def norms(value: Tensor, channels: int) -> np.ndarray:
    """The norm over the channels at each place of one picture's layer: (height, width)."""
    if value.ndim == 2:
        # mnist_net's second layer ends flat; its maps are square.
        side = round((value.shape[1] / channels) ** 0.5)
        value = value.unflatten(1, (channels, side, side))
    return value[0].norm(dim=0).cpu().numpy()


def show(axes: Axes, picture: np.ndarray, title: str = "") -> None:
    """A picture, or a map with its range of values."""
    axes.set(xticks=[], yticks=[], title=title)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    if picture.ndim == 3:
        axes.imshow(picture)
        return
    image = axes.imshow(picture, cmap="viridis")
    bar = axes.figure.colorbar(image, ax=axes, shrink=0.75, pad=0.02)
    bar.formatter.set_powerlimits((-2, 3))
    bar.ax.tick_params(labelsize=6)
    bar.ax.yaxis.get_offset_text().set_size(6)


def label_rows(axes: Sequence[Axes], names: Sequence[str], columns: int) -> None:
    """The names of the rows, left of the first panel of each."""
    for panel, name in zip(axes[::columns], names, strict=True):
        panel.set_ylabel(name, fontsize=9)
