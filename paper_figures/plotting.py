"""How the panels look: colours, letters and the panels and figures that several files share.

Figures are built without pyplot, so that nothing global holds on to them.
"""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paper_figures.data import DataSet
from paper_figures.report import Number, Options, save
from paper_figures.training import Comparison, Curves, Setup

matplotlib.rcParams.update(
    {
        "font.size": 9,
        "axes.titlesize": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.linewidth": 0.4,
        "grid.alpha": 0.5,
        "legend.frameon": False,
        "legend.fontsize": 8,
        "lines.linewidth": 1.3,
        "pdf.fonttype": 42,
    }
)

# Vermillion and blue of Okabe and Ito's palette, which colour-blind readers tell apart. In grey
# they are alike, so each also has its line style; training curves are the pale ones.
METHODS = {"PC": ("#D55E00", "-"), "BP": ("#0072B2", (0, (4, 1.5)))}

# Loss and accuracy are those of one batch, so noisy that the curves of PC and BP would hide each
# other; they are drawn as running means over this many steps.
SMOOTHED = 10


def layer_colours(count: int) -> list[tuple[float, ...]]:
    """One colour a layer, from dark (the first) to light: a scale that survives grey."""
    scale = matplotlib.colormaps["viridis"]
    return [scale(0.9 * layer / max(count - 1, 1)) for layer in range(count)]


def panels(
    rows: int, columns: int, size: tuple[float, float], title: str
) -> tuple[Figure, list[Axes]]:
    """A figure of ``size`` inches with its panels in reading order."""
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title, fontsize=9)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def letter(axes: Axes, name: str) -> None:
    """The panel's letter, above its upper left corner."""
    axes.set_title(name, loc="left", fontweight="bold", fontsize=11)


def layer_legend(figure: Figure, axes: Axes, title: str = "layer") -> None:
    """The legend of the layers' lines, to the right of all panels, where it covers none."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right lower", title=title)


def save_comparison(
    options: Options,
    name: str,
    comparison: Comparison,
    data: DataSet,
    setup: Setup,
    numbers: Sequence[Number],
    letters: str = "ABCD",
) -> None:
    """Draw predictive coding against backprop and write the figure's files."""
    title = (
        f"{setup.ErrType} (η = {setup.eta}, n = {setup.n}) against backprop\n"
        f"{data.described(setup.steps, setup.batch_size)}"
    )
    save(
        options,
        name,
        comparison_figure(comparison, title, letters),
        data=data.summary(),
        settings=setup.summary(),
        series=comparison.series(),
        numbers=numbers,
    )


def comparison_figure(comparison: Comparison, title: str, letters: str = "ABCD") -> Figure:
    """Loss, accuracy, relative error and angle against the training step."""
    figure, (loss, right, error, angles) = panels(2, 2, (7.2, 5.2), title)
    for who, (colour, style) in METHODS.items():
        training_curves(loss, getattr(comparison, who), "loss", who, colour, style)
        training_curves(right, getattr(comparison, who), "accuracy", who, colour, style)
    loss.set(ylabel="loss", yscale="log")
    loss.yaxis.set_major_formatter("{x:g}")
    right.set(ylabel="accuracy", ylim=(None, 1))
    right.legend(loc="lower right", title=f"mean over {SMOOTHED} steps")
    per_layer(error, comparison.relative_error)
    error.set(
        ylabel="relative error", ylim=(-0.04, max(1, 1.05 * _largest(comparison.relative_error)))
    )
    per_layer(angles, comparison.angle)
    # So high at least that float32's millionths of a degree lie on zero.
    angles.set(ylabel="angle (degrees)", ylim=(-0.2, max(4, 1.05 * _largest(comparison.angle))))
    for axes, name in zip((loss, right, error, angles), letters, strict=True):
        axes.set_xlabel("training step")
        letter(axes, name)
    layer_legend(figure, error)
    return figure


def _largest(values: Sequence[Sequence[float]]) -> float:
    return max(map(max, values))


def training_curves(
    axes: Axes, curves: Curves, measure: str, who: str, colour: str, style: object
) -> None:
    """One method's loss or accuracy, in training (pale) and in testing."""
    for part, paleness in ("train", 0.4), ("test", 1):
        values, steps = running_means(getattr(curves, f"{part}_{measure}"))
        axes.plot(
            steps, values, color=colour, linestyle=style, alpha=paleness, label=f"{who}, {part}"
        )


def running_means(values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Means over SMOOTHED steps, and the steps in their middles."""
    means = np.convolve(values, np.full(SMOOTHED, 1 / SMOOTHED), "valid")
    return means, np.arange(len(means)) + (SMOOTHED - 1) / 2


def per_layer(
    axes: Axes,
    values: Sequence[Sequence[float]],
    steps: Sequence[float] | None = None,
    linestyle: str = "-",
    alpha: float = 1,
) -> None:
    """One line a layer from ``values`` (steps, layers), coloured from first layer to last.

    Pale lines (``alpha`` below 1) have no label, as there are strong ones of the same layers.
    """
    lines = list(zip(*values, strict=True))
    for layer, (line, colour) in enumerate(zip(lines, layer_colours(len(lines)), strict=True), 1):
        axes.plot(
            range(len(line)) if steps is None else steps,
            line,
            color=colour,
            linestyle=linestyle,
            alpha=alpha,
            label=layer if alpha == 1 else None,
        )


def final_dots(axes: Axes, end: float, values: Sequence[float]) -> None:
    """One dot a layer at the end of its line: what a paper shows there."""
    for value, colour in zip(values, layer_colours(len(values)), strict=True):
        axes.plot(
            [end], [value], "o", color=colour, markeredgecolor="black", markersize=5, clip_on=False
        )
