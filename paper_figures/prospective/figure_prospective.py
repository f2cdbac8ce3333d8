"""Where predictive coding learns better than backprop, and whether its steps' lengths explain it.

Song and others say that predictive coding (PC) moves the output more directly to its target, and learns
better online and while the task changes; Innocenti and others, that it leaves a saddle where backprop
stays. Each is tried here against backprop with the same optimizer and against a control: does PC
win because its steps are bounded? Backprop with clipped gradients, with layers' updates normalised to one
length, with Adam, and with each layer's update as long as PC's at the same weights.

Every method has the same number of candidates (rates; where it clips, rates times thresholds), of which
the best on 1000 held-out training images, from other seeds, is taken. Backprop has more at the saddle.
PC is Strict, at η .1 and n 20 at the saddle, and at η .5 and n 13 elsewhere, which comes to the same place
as the paper's .1 and 64 in a quarter of the time.

Panels: the loss on test images near a saddle (A: tanh 784-64-64-64-64-10, weights from N(0, .005²),
batches of 64); the alignment of the output's change with its target after one update, by depth, for linear
networks (B) and tanh (C), with what relaxing further does to it; the error with a batch of one, averaged
over the training, by learning rate (D: sigmoid 784-32-32-10, Xavier's weights; where a method clips, at
the best threshold), and the error while the labels of the last five classes are exchanged every 8 epochs
(E: 1200 images, batches of 32). Targets are one-hot and the loss is half the summed squared error, without
biases. The control (F) in errors against plain backprop's of the same seed.

Sources: the code that goes with Y. Song and others, Inferring neural activity before plasticity, Nature
Neuroscience 27 (2024), whose settings these are but for the rates and for the drift (there every 64 epochs,
from trained networks); its numbers are read off its figures. F. Innocenti and others, arXiv:2408.11979.

By default it learns the 10 000 embedded digits, in about four minutes on one core; with ``--data`` all of
Fashion-MNIST, if the folder or its ``fashion-mnist`` has it, or MNIST, for longer: about twenty minutes.
Finished trainings are kept in ``figure_prospective_runs.json`` beside the figure.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paper_figures.data import (
    EMBEDDED_NAME,
    DataSet,
    fashion_folder,
    load_digits,
    load_idx,
)
from paper_figures.plotting import letter, panels
from paper_figures.progress import track
from paper_figures.prospective import alignment
from paper_figures.prospective.alignment import alignments
from paper_figures.prospective.learning import (
    Candidate,
    Outcome,
    Task,
    outcomes,
    train,
)
from paper_figures.prospective.side_by_side import METHODS
from paper_figures.report import Number, Options, save, yes
from paper_figures.runs import Runs
from paper_figures.training import quietly

DEFAULT = False
DOWNLOADS = ("fashion",)

FASHION = "Fashion-MNIST"
# Half a square is .5 where all outputs are 0, and .45 where they are the classes' shares.
LEFT = 0.405
# The mean over a training that has not left, or only in its last updates.
NEAR = 0.49
# Read off figures of the paper's code, of Fashion-MNIST.
PAPER = {
    "online": {"PC": 0.272, "backprop": 0.288},
    "drift": {"PC": 0.29, "backprop": 0.405},
}

SADDLE = Task("saddle", (784, 64, 64, 64, 64, 10), "tanh", 0.005, 64, 120, 5, "loss", 0.1, 20)
ONLINE = Task("online", (784, 32, 32, 10), "sigmoid", None, 1, 1600, 200, "error", 0.5, 13)
DRIFT = Task(
    "drift",
    (784, 32, 32, 10),
    "sigmoid",
    None,
    32,
    888,
    37,
    "error",
    0.5,
    13,
    images=1200,
    drift=296,
)


def spaced(first: float, last: float, count: int) -> list[float]:
    """Rates at equal ratios, to three digits."""
    return [float(f"{rate:.3g}") for rate in np.geomspace(first, last, count)]


def rates(first: float, last: float, count: int = 9) -> list[Candidate]:
    return [(rate, math.inf) for rate in spaced(first, last, count)]


def clips(first: float, last: float, *thresholds: float) -> list[Candidate]:
    """As many candidates as with `rates`."""
    return [(rate, threshold) for threshold in thresholds for rate in spaced(first, last, 3)]


CANDIDATES: dict[str, dict[str, list[Candidate]]] = {
    "saddle": {
        "PC": rates(0.02, 0.5),
        "PC, Adam": rates(1e-3, 0.02),
        "backprop": rates(0.01, 1e5, 29),
        "backprop, clipped": clips(1, 100, 1e-3, 1e-2, 0.1),
        "backprop, normalised": rates(0.01, 0.6),
        "backprop, Adam": rates(1e-3, 0.02),
        "backprop, as long as PC": rates(1e-3, 0.03),
    },
    "online": {
        "PC": rates(0.03, 0.75),
        "PC, clipped": clips(0.3, 1.2, 0.25, 0.5, 1),
        "PC, Adam": rates(5e-4, 0.015),
        "backprop": rates(0.03, 0.75),
        "backprop, clipped": clips(0.3, 1.2, 0.25, 0.5, 1),
        "backprop, normalised": rates(0.03, 0.75),
        "backprop, Adam": rates(5e-4, 0.015),
        "backprop, as long as PC": rates(0.03, 0.75),
    },
    "drift": {
        "PC": rates(2e-3, 0.04),
        "PC, clipped": clips(0.03, 0.2, 5, 12, 30),
        "PC, Adam": rates(1e-3, 0.03),
        "backprop": rates(2e-3, 0.04),
        "backprop, clipped": clips(0.03, 0.2, 5, 12, 30),
        "backprop, normalised": rates(0.05, 1.5),
        "backprop, Adam": rates(1e-3, 0.03),
        "backprop, as long as PC": rates(2e-3, 0.04),
    },
}
TASKS = (SADDLE, ONLINE, DRIFT)


@dataclass(frozen=True)
class Plan:
    """What is trained, from how many seeds; with how many networks and layers alignment is measured."""

    tasks: tuple[Task, ...] = TASKS
    candidates: tuple[tuple[str, dict[str, list[Candidate]]], ...] = tuple(CANDIDATES.items())
    tuning_seeds: tuple[tuple[str, int], ...] = (("saddle", 1), ("online", 3), ("drift", 1))
    seeds: int = 5
    depths: tuple[int, ...] = (2, 5, 10, 15, 20)
    aligned: int = 20
    seed: int = 0


def plan_of(data: DataSet, options: Options) -> Plan:
    """All of it, at the paper's length; less on the embedded digits; and the short version."""
    if options.quick:
        saddle = {"PC": [(0.25, math.inf)], "backprop": rates(0.01, 1e4, 7)}
        few = {
            task: {method: mine[3:5] for method, mine in CANDIDATES[task].items()}
            for task in ("online", "drift")
        }
        return Plan(
            tasks=(
                replace(SADDLE, batch_size=32, steps=100, every=10),
                replace(ONLINE, steps=20, every=10),
                replace(DRIFT, steps=12, every=4, drift=6, images=200),
            ),
            candidates=(("saddle", saddle), *few.items()),
            tuning_seeds=(("saddle", 1), ("online", 2), ("drift", 1)),
            seeds=2,
            depths=(2, 15),
            aligned=5,
            seed=options.seed,
        )
    if data.name == EMBEDDED_NAME:
        return Plan(seed=options.seed)
    return Plan(
        tasks=(
            replace(SADDLE, steps=300),
            replace(ONLINE, steps=12_800),
            replace(DRIFT, steps=2960),
        ),
        # The rates that leave a saddle first are near those that blow up from some seeds.
        tuning_seeds=(("saddle", 3), ("online", 3), ("drift", 1)),
        seed=options.seed,
    )


def digits_or_fashion(options: Options) -> DataSet:
    """Fashion-MNIST, which is the paper's, if the folder holds it."""
    folder = fashion_folder(options.data)
    return load_digits(options.data) if folder is None else load_idx(folder)


Aligned = dict[str, dict[int, dict[str, list[float]]]]
"""By activation, depth and rule: a number for each network."""


def run(options: Options) -> list[Number]:
    data = digits_or_fashion(options)
    plan = plan_of(data, options)
    aligned = aligned_networks(plan)
    runs = Runs("figure_prospective", train, data, options)
    seeds = range(plan.seed, plan.seed + plan.seeds)
    found = {}
    for task in plan.tasks:
        tried_from = range(plan.seed + 1000, plan.seed + 1000 + dict(plan.tuning_seeds)[task.name])
        candidates = dict(plan.candidates)[task.name]
        found[task.name] = outcomes(task, candidates, tried_from, seeds, runs)
    numbers = numbers_of(found, aligned, data)
    save(
        options,
        "figure_prospective",
        draw(plan, found, aligned, data),
        data=data.summary(),
        settings=asdict(plan)
        | {
            "alignment: ErrType, n, at η .1": alignment.RELAXATIONS,
            "alignment: width, learning rate": [alignment.WIDTH, alignment.RATE],
        },
        series={
            "alignment": aligned,
            **{name: series(task_found) for name, task_found in found.items()},
            "paper's alignment, depths": alignment.PAPER_DEPTHS,
            "paper's alignment": alignment.PAPER,
            f"paper's mean error on {FASHION}": PAPER,
        },
        numbers=numbers,
    )
    return numbers


def aligned_networks(plan: Plan) -> Aligned:
    with quietly():
        return {
            activation: {
                depth: alignments(activation, depth, plan.aligned, plan.seed)
                for depth in track(plan.depths, f"alignment, {activation}")
            }
            for activation in alignment.ACTIVATIONS
        }


def series(found: dict[str, Outcome]) -> dict[str, Any]:
    return {
        method: {
            "rates, thresholds": list(outcome.tried),
            "held-out mean by candidate and seed": list(outcome.tried.values()),
            "chosen": outcome.best,
            "test curves by seed": outcome.curves,
        }
        for method, outcome in found.items()
    }


def numbers_of(
    found: dict[str, dict[str, Outcome]], aligned: Aligned, data: DataSet
) -> list[Number]:
    numbers = [
        Number(
            f"alignment, {activation}, 15 layers: {rule}",
            alignment.PAPER[activation][rule][-1],
            statistics.fmean(aligned[activation][15][rule]),
        )
        for activation in aligned
        for rule in (alignment.PC, alignment.BACKPROP)
    ]
    if data.name == FASHION:
        numbers += [
            Number(
                f"{task}: mean error, {method}", value, statistics.fmean(found[task][method].means)
            )
            for task, values in PAPER.items()
            for method, value in values.items()
        ]
    for activation, ratio in ("linear", 1.5), ("tanh", 1.2):
        means = {rule: statistics.fmean(v) for rule, v in aligned[activation][15].items()}
        above = means[alignment.PC] >= ratio * means[alignment.BACKPROP]
        what = f"alignment, {activation}, 15 layers: PC's at least {ratio:g} of backprop's"
        numbers.append(Number(what, "yes", yes(above), check=True))
    left = all(any(loss < LEFT for loss in curve) for curve in found["saddle"]["PC"].curves)
    numbers.append(Number("PC leaves the saddle from every seed", "yes", yes(left), check=True))
    tried = found["saddle"]["backprop"].tried.values()
    ever = min(map(min, tried)) < NEAR
    what = f"backprop with SGD does at one of its {len(tried)} rates"
    numbers.append(Number(what, "no", yes(ever), check=True))
    return numbers


def draw(
    plan: Plan, found: dict[str, dict[str, Outcome]], aligned: Aligned, data: DataSet
) -> Figure:
    count = f"{len(data.train_images):,}".replace(",", " ")
    title = (
        f"Predictive coding (PC, solid) and backprop (dashed) on {data.name} ({count} training images), each "
        "method at the best of its candidates on held-out training images\n"
        f"lines: means of {plan.seeds} seeds (B, C: {plan.aligned} networks; D: the seeds of the tuning); "
        "bands: from the lowest to the highest seed"
    )
    figure, axes = panels(2, 3, (13, 7.6), title)
    for one, name in zip(axes, "ABCDEF", strict=True):
        letter(one, name)
    saddle, linear, tanh, online, drift, control = axes
    tasks = {task.name: task for task in plan.tasks}
    draw_curves(saddle, tasks["saddle"], found["saddle"], per=1)
    saddle.axhline(LEFT, color="0.6", linewidth=0.8, linestyle=":")
    saddle.set(
        xlabel="update",
        ylabel="half squared error of a test image",
        ylim=(0, 0.6),
        title="near a saddle: tanh 784-64×4-10",
    )
    for one, activation in (linear, "linear"), (tanh, "tanh"):
        draw_alignment(one, activation, aligned[activation])
    tanh.legend(loc="lower left", fontsize=7, title="B, C")
    draw_rates(online, found["online"])
    online.set(title=f"batch 1, {tasks['online'].steps} updates: sigmoid 784-32-32-10")
    task = tasks["drift"]
    per = (task.images or len(data.train_images)) // task.batch_size
    draw_curves(drift, task, found["drift"], per=per)
    drift.set(
        xlabel="epoch",
        ylabel="test error",
        title=f"labels exchanged every {(task.drift or 0) / per:.2g} epochs: {task.images} images",
    )
    if data.name == FASHION:
        draw_paper(online, PAPER["online"])
        draw_paper(drift, PAPER["drift"])
    draw_control(control, found)
    used = {method: METHODS[method] for method in METHODS if method in found["online"]}
    handles = [
        saddle.plot([], [], color=style.colour, linestyle=style.style)[0] for style in used.values()
    ]
    figure.legend(handles, used, loc="outside lower center", ncols=4, title="A, D, E, F")
    return figure


def draw_curves(axes: Axes, task: Task, found: dict[str, Outcome], per: int) -> None:
    """The mean of the seeds, from the lowest to the highest; ``per`` updates are one on the axis."""
    for method, outcome in found.items():
        steps = [(k + 1) * task.every / per for k in range(len(outcome.curves[0]))]
        band(axes, steps, list(zip(*outcome.curves, strict=True)), *_style(method))


def draw_alignment(axes: Axes, activation: str, found: dict[int, dict[str, list[float]]]) -> None:
    for rule, style in alignment.STYLES.items():
        values = [at[rule] for at in found.values()]
        band(axes, list(found), values, *style, label=rule, spread=quartiles)
    for rule, published in alignment.PAPER[activation].items():
        axes.plot(
            alignment.PAPER_DEPTHS,
            published,
            "o",
            markersize=4,
            markerfacecolor="none",
            color=alignment.STYLES[rule][0],
            label=f"paper: {'PC' if rule == alignment.PC else rule}",
        )
    axes.set(
        xlabel="layers",
        ylabel="cosine of the output's change to its target",
        ylim=(0, 1.02),
        xticks=list(found),
        title=f"one update, {activation}, width {alignment.WIDTH} (bands: quartiles)",
    )


def draw_rates(axes: Axes, found: dict[str, Outcome]) -> None:
    """What the tuning saw: by learning rate, at the best threshold."""
    for method, outcome in found.items():
        best: dict[float, list[float]] = {}
        for (rate, _), errors in outcome.tried.items():
            if rate not in best or statistics.fmean(errors) < statistics.fmean(best[rate]):
                best[rate] = errors
        at = sorted(best)
        band(axes, at, [best[rate] for rate in at], *_style(method), marker="o")
    axes.set(xscale="log", xlabel="learning rate", ylabel="held-out error, mean over the training")


def draw_control(axes: Axes, found: dict[str, dict[str, Outcome]]) -> None:
    """Errors against those of plain backprop from the same seed, in points: a dot a seed, a line the mean."""
    methods = [method for method in METHODS if method in found["online"] and method != "backprop"]
    for task, marker, shift in ("online", "o", 0.17), ("drift", "s", -0.17):
        against = found[task]["backprop"].means
        for place, method in enumerate(reversed(methods)):
            points = [
                100 * (ours - theirs)
                for ours, theirs in zip(found[task][method].means, against, strict=True)
            ]
            colour = METHODS[method].colour
            at = place + shift
            axes.plot(points, [at] * len(points), marker, color=colour, ms=4, alpha=0.6)
            axes.plot([statistics.fmean(points)] * 2, [at - 0.15, at + 0.15], color=colour, lw=2.5)
        axes.plot(
            [], [], marker, color="0.4", ms=4, label=f"{'D' if task == 'online' else 'E'}: {task}"
        )
    axes.axvline(0, color="black", linestyle="--", linewidth=1)
    axes.set_yticks(range(len(methods)), reversed(methods))
    axes.set(
        xlabel="mean test error against plain backprop's (points)",
        title="the control (left is better)",
    )
    axes.legend(loc="best", fontsize=7)


def draw_paper(axes: Axes, values: dict[str, float]) -> None:
    for method, value in values.items():
        colour = METHODS[method].colour
        axes.axhline(value, color=colour, linestyle=":", linewidth=1)
        axes.annotate(
            f"paper, {method}",
            (1, value),
            # The lower one below its line, so that neither covers the other.
            (0, 2 if value == max(values.values()) else -9),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            fontsize=7,
            color=colour,
        )


def extremes(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    low, _, high = statistics.quantiles(values, n=4)
    return low, high


def band(
    axes: Axes,
    x: Sequence[float],
    values: Sequence[Sequence[float]],
    colour: str,
    style: str,
    spread: Any = extremes,
    **line: Any,
) -> None:
    """One line through the means of ``values``, (places, seeds), in a band of their spread."""
    means = [statistics.fmean(at) for at in values]
    low, high = zip(*map(spread, values), strict=True)
    axes.plot(x, means, color=colour, linestyle=style, markersize=3, **line)
    axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)


def _style(method: str) -> tuple[str, str]:
    return METHODS[method].colour, METHODS[method].style
