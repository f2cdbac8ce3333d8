"""The picture of a record. Nothing imports it, nor matplotlib, before one is drawn."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from torch import Tensor

from torch2pc.graph.picture import centres

MOST_IN_LEGEND = 12
# Grey stands for what there is none of.
COLOURS = matplotlib.colormaps["viridis"].with_extremes(bad="0.92")

GUIDE: dict[str, Any] = dict(color="0.6", linewidth=0.8, zorder=0)
SMALL: dict[str, Any] = dict(fontsize=8, frameon=False)

Numbers = NDArray[np.float64]


# A ``follow.record.Record``, whose file imports this one.
Drawn = Any


def draw(record: Drawn, figure: Figure) -> None:
    """Six panels; lines are layers, from dark (the first) to light."""
    axes = list(figure.subplots(2, 3).flat)
    figure.suptitle(record._head(), fontsize=10)
    layers = range(1, record.L + 1)
    hidden = [l for l in layers if l < record.L]
    is_chain = all([parents == (l,) for l, parents in enumerate(record.parents)])
    if is_chain:
        _draw_map(record, axes[0], figure, hidden)
    else:
        _draw_graph(record, axes[0], figure)
    _draw_lines(axes[1], "energy of each layer", record.energies, hidden, is_log=True)
    _draw_energy(record, axes[2])
    _draw_distance(record, axes[3], hidden)
    _draw_lines(axes[4], "cosine of the update to backprop's", record.cosine, layers)
    _draw_lines(axes[5], "size of the update / backprop's", record.size, layers, True)
    axes[5].axhline(1, **GUIDE)
    for panel in axes:
        panel.title.set_fontsize(9)
        panel.xaxis.label.set_fontsize(9)
        panel.tick_params(labelsize=8)
        if panel is not axes[0]:
            panel.set_xlim(0, max(record.n, 1))
        if is_chain or panel is not axes[0]:
            panel.set_xlabel("evaluation" if record.ErrType == "Equilibrium" else "iteration")
            panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    handles, labels = axes[5].get_legend_handles_labels()
    if handles and 1 < record.L <= MOST_IN_LEGEND:
        labels = labels if is_chain else [record.names[int(l)] for l in labels]
        head: dict[str, Any] = dict(title="layer", title_fontsize=8)
        figure.legend(handles, labels, loc="outside right center", **head, **SMALL)


def _draw_graph(record: Drawn, axes: Axes, figure: Figure) -> None:
    axes.set_title("energies at the end")
    axes.set_axis_off()
    places = centres(record.parents)
    for l, parents in enumerate(record.parents, start=1):
        for p in parents:
            is_skip = places[l][1] - places[p][1] > 1
            style = dict(arrowstyle="->", color="0.6", linewidth=0.8, shrinkA=7, shrinkB=7)
            bend = "arc3,rad=0.4" if is_skip else "arc3"
            axes.annotate("", places[l], places[p], arrowprops={**style, "connectionstyle": bend})
    shown = _drawable(record.energies[-1].numpy(), True)
    shown[[0, -1]] = np.nan  # those of the prior and of the loss
    seen = shown[np.isfinite(shown)]
    norm = LogNorm(*_ends(seen)) if len(seen) else LogNorm(1, 10)
    for name, (x, y), energy in zip(record.names, places, shown, strict=True):
        colour, is_dark = COLOURS(norm(energy)), bool(norm(energy) < 0.6)
        box = dict(boxstyle="round", facecolor=colour, edgecolor="0.4")
        axes.text(
            *(x, y, name), ha="center", va="center", bbox=box, fontsize=7,
            color="white" if is_dark else "black",
        )  # fmt: skip
    across, up = zip(*places, strict=True)
    axes.set_xlim(min(across) - 0.6, max(across) + 1.2)
    axes.set_ylim(-0.5, max(up) + 0.5)
    if len(seen):
        _draw_scale(figure, ScalarMappable(norm, COLOURS), axes)


def _draw_map(record: Drawn, axes: Axes, figure: Figure, hidden: list[int]) -> None:
    axes.set_title("energy of each layer")
    energies = _drawable(record.energies[:, 1:-1].T.numpy(), True)
    seen = energies[np.isfinite(energies)]
    if not len(seen):
        axes.text(0.5, 0.5, "no energy", ha="center", va="center", transform=axes.transAxes)
        return
    # What is less than a hundred-millionth of the largest would make all the rest look alike.
    least, largest = _ends(seen)
    norm, shown = LogNorm(max(least, 1e-8 * largest), largest), np.ma.masked_invalid(energies)
    edges = (-0.5, record.n + 0.5, hidden[0] - 0.5, hidden[-1] + 0.5)
    image = axes.imshow(shown, aspect="auto", origin="lower", extent=edges, norm=norm, cmap=COLOURS)
    axes.set_ylabel("layer")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    _draw_scale(figure, image, axes)


def _ends(seen: Numbers) -> tuple[float, float]:
    """The least and the largest; one number alone has a scale of its own, too."""
    return seen.min(), max(seen.max(), seen.min() * 1.0001)


def _draw_scale(figure: Figure, colours: ScalarMappable, axes: Axes) -> None:
    figure.colorbar(colours, ax=axes).ax.tick_params(labelsize=7)


def _draw_lines(
    axes: Axes, title: str, table: Tensor, layers: Iterable[int], is_log: bool = False
) -> None:
    axes.set_title(title)
    L = table.shape[1] - 1
    for l in layers:
        values = table[:, l].numpy()
        if np.isfinite(values).any():
            axes.plot(_drawable(values, is_log), color=_colour(l, L), label=l)
    if is_log:
        axes.set_yscale("log")


def _draw_energy(record: Drawn, axes: Axes) -> None:
    axes.set_title("F, and the loss" if record.descends else "the loss")
    F, loss = record.F.numpy(), record.loss.numpy()
    if record.descends:
        axes.plot(_drawable(F), color="#D55E00", label="F")
    axes.plot(_drawable(loss), color="#0072B2", ls="--", label="loss")
    if bool(record.prior.any()):
        axes.plot(record.prior.numpy(), color="0.4", ls=":", label="prior")
    if record.rises_at is not None and np.isfinite(_drawable(F)).any():
        top, bottom = np.nanmax(_drawable(F)), np.nanmin(_drawable(F))
        if bottom > 0 and top > 100 * bottom:
            axes.set_yscale("log")
    axes.legend(**SMALL)


def _draw_distance(record: Drawn, axes: Axes, hidden: list[int]) -> None:
    axes.set_title("distance from equilibrium")
    for l in hidden:
        values = _drawable(record.distances[:, l].numpy(), True)
        axes.plot(values, color=_colour(l, record.L), linewidth=0.8)
    axes.plot(
        _drawable(record.distance.numpy(), True), color="k", linewidth=1.8, label="all layers"
    )
    axes.axhline(0.01, **GUIDE)
    if bool((record.distance > 0).any()):
        axes.set_yscale("log")
        lowest = record.distance[record.distance > 0].min().item()
        axes.set_ylim(min(0.005, lowest / 2), 3)
    axes.legend(**SMALL)


def _drawable(values: Numbers, is_log: bool = False) -> Numbers:
    """The values with a gap where there is none, or it is 0 on a logarithmic axis, or enormous."""
    seen = np.abs(values) < 1e100
    return np.where(seen & (values > 0) if is_log else seen, values, np.nan)


def _colour(l: int, L: int) -> tuple[float, ...]:
    return COLOURS(0.9 * (l - 1) / max(L - 1, 1))
