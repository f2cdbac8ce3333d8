"""Strict's time against the number of layers and of iterations, beside backprop's: is it linear?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.nets import make_case, mlp
from benchmarks.report import Options, save, save_file, table
from benchmarks.steps import backprop, infer
from benchmarks.timing import alternate, threads

WIDTH, BATCH, ETA = 64, 64, 0.1
DEPTHS, FIXED_N = (5, 10, 20, 40, 60, 80, 100), 20
ITERATIONS, FIXED_DEPTH = (1, 20, 50, 100, 200, 300, 400, 500), 10
QUICK_DEPTHS, QUICK_ITERATIONS = (5, 20, 40), (1, 20, 50)

METHOD = (
    f"MLPs of width {WIDTH}, batch {BATCH}, float32, CPU, 1 thread; median over alternated runs. "
    f"Against the number of layers L with n={FIXED_N}, against the number of iterations n with "
    f"L={FIXED_DEPTH}. A straight line is fitted by least squares; R^2 says how much of the "
    "variation it explains. Strict that starts from vinit evaluates layers 2..L in each of the n "
    "iterations. From the feed-forward values, the default, the error climbs down one layer an "
    "iteration, and the layers below it are skipped: beyond L=n its time hardly grows with L, and a "
    "line does not fit."
)

CURVES = {
    "Strict, from vinit": ("#D55E00", "-", "o"),
    "Strict": ("#009E73", "--", "s"),
    "BP": ("#0072B2", ":", "^"),
}


def run(options: Options) -> None:
    """Measure, fit, plot, print and save."""
    depths = QUICK_DEPTHS if options.quick else DEPTHS
    iterations = QUICK_ITERATIONS if options.quick else ITERATIONS
    with threads(1):
        against_depth = measure([(L, FIXED_N) for L in depths], 2 * options.seconds, "depth")
        against_n = measure([(FIXED_DEPTH, n) for n in iterations], 2 * options.seconds, "n")
    panels = {
        "L": series(depths, against_depth),
        "n": series(iterations, against_n),
    }
    text = fits_table(panels)
    print(text)
    figure = plot(panels)
    save_file(options.out / "scaling.png", lambda path: figure.savefig(path, format="png", dpi=200))
    save(options, "scaling", method=METHOD, text=text, record={"against": panels})


def measure(
    points: Sequence[tuple[int, int]], seconds: float, description: str
) -> list[dict[str, float]]:
    """Milliseconds of each curve at each (L, n); all points take turns, so that drift hits all."""
    cpu = torch.device("cpu")
    steps = {}
    for L, n in points:
        case = make_case(f"mlp{L}", "MLP", lambda L=L: mlp(L, WIDTH, WIDTH), (BATCH, WIDTH), cpu)
        steps[f"BP {L} {n}"] = backprop(case)
        steps[f"Strict {L} {n}"] = infer(case, "Strict", eta=ETA, n=n)
        steps[f"Strict, from vinit {L} {n}"] = infer(case, "Strict", from_vinit=True, eta=ETA, n=n)
    times = alternate(steps, cpu, seconds, description)
    return [{curve: 1000 * times.median(f"{curve} {L} {n}") for curve in CURVES} for L, n in points]


def series(x: Sequence[int], found: Sequence[dict[str, float]]) -> dict[str, Any]:
    """The curves over ``x``, each with the line fitted to it."""
    curves = {}
    for curve in CURVES:
        y = [at[curve] for at in found]
        slope, offset, R2 = line(x, y)
        curves[curve] = {"milliseconds": y, "slope": slope, "offset": offset, "R2": R2}
    return {"x": list(x), "curves": curves}


def line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """Slope, offset and R^2 of the straight line through the points.

    >>> [round(number, 9) for number in line([1, 2, 3], [5, 7, 9])]
    [2.0, 3.0, 1.0]
    """
    slope, offset = np.polyfit(x, y, 1)
    residual = np.asarray(y) - (slope * np.asarray(x) + offset)
    total = np.asarray(y) - np.mean(y)
    return float(slope), float(offset), float(1 - residual @ residual / (total @ total))


def fits_table(panels: dict[str, Any]) -> str:
    rows = []
    for variable, panel in panels.items():
        for curve, fit in panel["curves"].items():
            largest = fit["milliseconds"][-1]
            rows.append(
                [
                    variable,
                    curve,
                    f"{fit['offset']:.2f} + {fit['slope']:.4f} {variable}",
                    f"{fit['R2']:.4f}",
                    f"{largest:.1f} at {variable}={panel['x'][-1]}",
                ]
            )
    return table(["against", "curve", "fitted line (ms)", "R²", "longest (ms)"], rows)


def plot(panels: dict[str, Any]) -> Figure:
    """Two panels of times, with the line fitted to Strict where it can skip nothing."""
    with matplotlib.rc_context({"font.size": 9, "legend.frameon": False}):
        figure = Figure(figsize=(7.2, 3.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        panel(left, panels["L"], "layers L", f"n = {FIXED_N} iterations")
        panel(right, panels["n"], "iterations n", f"L = {FIXED_DEPTH} layers")
        left.set_ylabel("milliseconds a step")
    return figure


def panel(axes: Axes, series: dict[str, Any], x_label: str, title: str) -> None:
    x = np.asarray(series["x"])
    for curve, (colour, style, marker) in CURVES.items():
        fit = series["curves"][curve]
        axes.plot(x, fit["milliseconds"], marker, color=colour, markersize=4)
        if curve == "Strict, from vinit":
            label = f"{curve}; line: R² = {fit['R2']:.4f}"
            axes.plot(x, fit["offset"] + fit["slope"] * x, style, color=colour, label=label)
        else:
            axes.plot(x, fit["milliseconds"], style, color=colour, label=curve)
    axes.set(xlabel=x_label, title=title, xlim=(0, None), ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(linewidth=0.4, alpha=0.5)
    axes.legend(fontsize=8)
