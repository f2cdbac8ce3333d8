"""What figures with `torch2pc.PCInferLatent` share: energies, weights of length 1, and mosaics."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor, nn
from torch.nn import functional

from torch2pc.pcinfer import PCResult

Prior = Callable[[list[Tensor]], Tensor]


def half_squared_error(output: Tensor, Y: Tensor) -> Tensor:
    """Half the sum of the squared errors."""
    return 0.5 * (output - Y).square().sum()


@torch.no_grad()
def energy(
    decoder: nn.Sequential,
    LossFun: Callable[[Tensor, Tensor], Tensor],
    Y: Tensor,
    result: PCResult,
    precision: float = 1.0,
    prior: Prior | None = None,
) -> float:
    """F at the beliefs that `torch2pc.PCInferLatent` returned, with one precision for all layers."""
    F = LossFun(decoder[-1](result.v[-2]), Y)
    F = F + sum(0.5 * precision * epsilon_l.square().sum() for epsilon_l in result.epsilon[1:-1])
    return (F if prior is None else F + prior(result.v[:-1])).item()


def unit_columns(layer: nn.Linear) -> None:
    """Columns of length 1: else the prior could be had for nothing, by small latents."""
    with torch.no_grad():
        layer.weight /= layer.weight.norm(dim=0, keepdim=True)


def mosaic(pictures: Tensor, columns: int, gap: int = 1) -> Tensor:
    """Pictures (count, channels, height, width) in rows: (height, width, channels), gaps at 1."""
    count, channels, height, width = pictures.shape
    rows = -(-count // columns)
    padded = functional.pad(pictures, (0, gap, 0, gap), value=1.0)
    full = padded.new_ones(rows * columns, *padded.shape[1:])
    full[:count] = padded
    grid = full.view(rows, columns, channels, height + gap, width + gap)
    whole = grid.permute(0, 3, 1, 4, 2).reshape(rows * (height + gap), -1, channels)
    return whole[: whole.shape[0] - gap, : whole.shape[1] - gap]


def signed(pictures: Tensor) -> Tensor:
    """Weights (count, ...) for the eye: zero at 0.5, each one's largest size at 0 or 1."""
    largest = pictures.flatten(1).abs().amax(1).clamp(min=1e-12)
    return 0.5 + 0.5 * pictures / largest.view(-1, *[1] * (pictures.ndim - 1))


def show_mosaic(axes: Axes, whole: Tensor, title: str = "") -> None:
    """A mosaic, in grey if it has one channel."""
    picture = np.asarray(whole.clamp(0, 1).cpu())
    axes.imshow(
        picture.squeeze(2) if picture.shape[2] == 1 else picture, cmap="gray", vmin=0, vmax=1
    )
    axes.set(xticks=[], yticks=[], title=title)
    axes.grid(False)
    axes.spines[:].set_visible(False)
