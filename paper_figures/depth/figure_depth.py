"""How deep predictive coding learns: every algorithm, from 3 to 128 layers.

Networks of width 64, cut before the activation (items ``Linear | act, Linear | ... | act, Linear``), learn
digits with the mean cross-entropy and Adam. For each network, depth and method, networks from three seeds at
each of the learning rates see the same batches; the rate that is best on the last 1000 training images, on
which none is trained, is the method's, and drawn is what its networks make of the test images. All else is
the same at every depth.

Strict passes errors on from layer to layer, all at once or in sweeps from the top; an error that arrives has
been multiplied by a fraction at each, and Adam divides small updates by their size, as long as they are
above its eps. Multipliers add up what is left, until it is the gradient. ErrorBased carries the loss's
gradient through all layers in each iteration. Incremental predictive coding moves the weights after each
step of the beliefs, 20 times on a batch, so that with as many weight updates it sees a twentieth of the
images.

Panels: the test accuracy against the depth (A to E); with muPC's parameterisation the held-out accuracy
against the learning rate, at several depths (F); the search for a step size and a number of sweeps that
serve all networks, at backprop's best rate (G); the time of one update, inference and all (H); in the midst
of the training of a ReLU network by backprop the length of each layer's update as a share of backprop's (I)
and its cosine to backprop's (J); and how far the errors of all layers are from backprop's there, after so
many sweeps (K) and by the step size (L), with multipliers that grow by alpha.

``--full`` trains all of it, which takes two hours on one core; else a few depths, for two minutes. What
is finished is kept in ``figure_depth_runs.json`` beside the figure, and not repeated when the command is
given again. Stopped by Ctrl-C, the command draws what there is.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from paper_figures.data import Batch, DataSet, load_digits
from paper_figures.depth.networks import (
    ALL_METHODS,
    BACKPROP,
    BATCH_SIZE,
    BELIEF_STEPS,
    ETAS,
    FEW_SWEEPS,
    FOUND,
    HELD_OUT,
    INCREMENTAL,
    LONG_STEP,
    METHODS,
    SEARCH,
    SWEEPS,
    WIDTH,
    Grid,
    batches_of,
    network,
    summed,
    train,
    update,
    updates,
)
from paper_figures.plotting import letter, panels
from paper_figures.progress import track
from paper_figures.report import Number, Options, save, yes
from paper_figures.runs import Runs
from paper_figures.training import quietly
from torch2pc import PCInfer

DEFAULT = False
SECONDS = 90, 7200
DOWNLOADS = ("mnist",)

MUPC = "ReLU muPC"
SEARCH_RATE, MUPC_SEARCH_RATE = 1e-3, 0.1
MOST_LAYERS = 32  # that a step found in each call is tried with
ALPHAS = {0.0: "#D55E00", 0.5: "#E69F00", 1.0: "#009E73"}


@dataclass(frozen=True)
class Plan:
    """What is trained. The first network is so by all methods, the others by some."""

    steps: int = 200
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3)
    mupc_rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3)
    depths: tuple[int, ...] = (3, 10, 20, 40)
    residual_depths: tuple[int, ...] = (10, 20, 40, 128)
    mupc_depths: tuple[int, ...] = (8, 32, 128)
    seeds: tuple[int, ...] = (0, 1, 2)
    layers_at: int = 20
    sweeps: int = 100
    etas: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    searched: tuple[float, ...] = ETAS
    rounds: int = 5

    def networks(self) -> dict[str, tuple[tuple[int, ...], list[str]]]:
        """By network, the depths and the methods."""
        every, few = list(METHODS), [BACKPROP, FEW_SWEEPS, LONG_STEP]
        smooth = [m for m in every if m not in (INCREMENTAL, FOUND, "FixedPred, η .1, n 20")]
        return {
            "ReLU": (self.depths, every),
            "tanh": (self.depths, smooth),
            "ReLU residual": (self.residual_depths, [*few, FOUND]),
            "GELU residual": (self.residual_depths[:3], few),
            MUPC: (self.mupc_depths, [*few, FOUND]),
        }

    def grids(self) -> Iterator[Grid]:
        """All trainings for the accuracies, of each network the shallow ones first."""
        for name, (depths, methods) in self.networks().items():
            rates = self.mupc_rates if name == MUPC else self.rates
            for depth in depths:
                for method in methods:
                    if method != FOUND or depth <= MOST_LAYERS:
                        yield Grid(name, depth, method, rates, self.seeds, self.steps)

    def search(self) -> Iterator[Grid]:
        """Those by step size and number of sweeps, at the rate that is best for backprop in most of them."""
        plain = tuple(sorted({self.depths[0], self.depths[-2]}))
        shallow = {"ReLU residual": self.residual_depths[:1], MUPC: self.mupc_depths[:1]}
        for name, depths in ({"ReLU": plain} | shallow).items():
            rate = MUPC_SEARCH_RATE if name == MUPC else SEARCH_RATE
            for depth in depths:
                for n in SWEEPS:
                    for eta in self.searched:
                        yield Grid(name, depth, SEARCH[eta, n], (rate,), self.seeds, self.steps)


def plan_of(options: Options) -> Plan:
    seeds = tuple(range(options.seed, options.seed + 3))
    if options.full:
        return Plan(seeds=seeds)
    if options.quick:
        return Plan(
            2, (1e-3,), (0.1,), (3, 4), (3, 4), (3, 4), seeds[:1], 4, 3, (0.5, 1.0), (0.5,), 1
        )
    few = (0.4, 0.8)
    return Plan(
        30, (1e-3,), (0.03, 0.1), (5, 20), (20,), (8, 20), seeds, sweeps=50, searched=few, rounds=2
    )


class Outcome(NamedTuple):
    """What a method's training on a network at one depth came to: accuracies in %."""

    network: str
    depth: int
    method: str
    rate: float
    held_out: list[float]
    """By rate, the mean of the seeds on the held-out images."""
    test: list[float]
    """By seed, at the best rate."""
    mean: float

    @classmethod
    def of(cls, grid: Grid, found: dict[str, Any]) -> Outcome:
        held_out = [statistics.fmean(_finite(seeds)) for seeds in found["held out"]]
        k = held_out.index(max(held_out))  # of equal ones the lowest rate
        test = _finite(found["test"][k])
        rate = grid.rates[k]
        return cls(
            grid.network, grid.depth, grid.method, rate, held_out, test, statistics.fmean(test)
        )


def _finite(values: Sequence[float]) -> list[float]:
    return [value if math.isfinite(value) else 0.0 for value in values]


def run(options: Options) -> list[Number]:
    data, plan = load_digits(options.data), plan_of(options)
    runs: Runs[Grid] = Runs(
        "figure_depth", lambda grid, data, options: train(grid, data, options.device), data, options
    )
    try:
        for grid in track([*plan.grids(), *plan.search()], "depth"):
            runs.finish([grid])
    except KeyboardInterrupt:
        print("stopped: the figure is drawn with what there is")
    outcomes = [Outcome.of(grid, runs[grid]) for grid in plan.grids() if grid in runs]
    search = [Outcome.of(grid, runs[grid]) for grid in plan.search() if grid in runs]
    seconds = {depth: seconds_at(depth, plan, data, options) for depth in plan.depths}
    model, batch = trained_by_backprop(plan, data, options)
    layers, sweeps = layers_of(model, batch), distances(model, batch, plan)
    numbers = numbers_of(outcomes)
    save(
        options,
        "figure_depth",
        draw(plan, outcomes, search, seconds, layers, sweeps, data),
        data=data.summary(),
        settings={
            **asdict(plan),
            "width": WIDTH,
            "batch_size": BATCH_SIZE,
            "held-out training images": HELD_OUT,
            "belief steps of incremental on a batch": BELIEF_STEPS,
            "methods: ErrType, eta, n": {
                name: [method.ErrType, str(method.eta), method.n]
                for name, method in METHODS.items()
            },
        },
        series={
            "trainings": [outcome._asdict() for outcome in outcomes],
            "search for eta and n": [outcome._asdict() for outcome in search],
            "seconds of an update": seconds,
            "layers": layers,
            "distance from backprop's errors": sweeps,
        },
        numbers=numbers,
    )
    return numbers


def trained_by_backprop(plan: Plan, data: DataSet, options: Options) -> tuple[nn.Sequential, Batch]:
    """A network in the midst of its training, and the next batch."""
    seeds = plan.seeds[:1]
    model = network("ReLU", plan.layers_at, seeds).to(options.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    batches = batches_of(data, plan.steps + 1, seeds, options.device)
    for _ in zip(range(plan.steps), updates(BACKPROP, model, batches), strict=False):
        optimizer.step()
    return model, next(batches)


def seconds_at(depth: int, plan: Plan, data: DataSet, options: Options) -> dict[str, float]:
    """The time of one update of one network by each method, medians of rounds in which they take turns.

    On a processor it is the processor's time, whatever else runs on the machine.
    """
    seeds = plan.seeds[:1]
    model = network("ReLU", depth, seeds).to(options.device)
    batch = next(batches_of(data, 1, seeds, options.device))
    clock = clock_of(options.device)
    found: dict[str, list[float]] = {method: [] for method in METHODS}
    with quietly():
        for _ in range(plan.rounds + 1):
            for method, spent in found.items():
                count = BELIEF_STEPS if method == INCREMENTAL else 1
                start = clock()
                for _ in updates(method, model, iter([batch])):
                    pass
                spent.append((clock() - start) / count)
    # The first round also prepares what later ones find ready.
    return {method: statistics.median(values[1:]) for method, values in found.items()}


def clock_of(device: torch.device) -> Callable[[], float]:
    if device.type == "cpu":
        return time.process_time

    def clock() -> float:
        torch.accelerator.synchronize(device)
        return time.perf_counter()

    return clock


def layers_of(model: nn.Sequential, batch: Batch) -> dict[str, dict[str, list[float]]]:
    """By method and layer: the update's length over the gradient's, and its cosine to it."""

    def made(method: str) -> list[Tensor]:
        with quietly():
            update(method, model, batch)
        found = [parameter.grad for parameter in model.parameters()]
        return [g.double().flatten() for g in found if g is not None]

    gradients, found = made(BACKPROP), {}
    for method in METHODS:
        if method not in (BACKPROP, INCREMENTAL):
            pairs = list(zip(made(method), gradients, strict=True))
            found[method] = {
                "length": [(u.norm() / g.norm()).item() for u, g in pairs],
                "cosine": [torch.cosine_similarity(u, g, dim=0).item() for u, g in pairs],
            }
    return found


def distances(model: nn.Sequential, batch: Batch, plan: Plan) -> dict[str, dict[str, list[float]]]:
    """``||epsilon - g|| / ||g||`` over all hidden layers, by alpha: after each sweep, and by eta."""
    exact = PCInfer(model, summed, batch.X, batch.labels, "Exact").epsilon[1:-1]
    of_errors = [g for g in exact if g is not None]
    length = math.hypot(*(g.norm().item() for g in of_errors))

    def after_each_sweep(eta: float, n: int, alpha: float) -> list[float]:
        found = []

        def look(k: int, v: list[Tensor], epsilon: list[Tensor | None]) -> None:
            apart = zip(epsilon[1:-1], of_errors, strict=True)
            off = math.hypot(*((e - g).norm().item() for e, g in apart if e is not None))
            found.append(min(off / length, 1e30) if math.isfinite(off) else 1e30)

        given = model, summed, batch.X, batch.labels, "Multipliers", eta, n
        with quietly():
            PCInfer(*given, alpha=alpha, callback=look)
        return found

    by_sweep, by_eta = {}, {}
    for alpha in ALPHAS:
        by_sweep[str(alpha)] = after_each_sweep(0.5, plan.sweeps, alpha)
        by_eta[str(alpha)] = [after_each_sweep(eta, 20, alpha)[-1] for eta in plan.etas]
    return {"by sweep": by_sweep, "by eta": by_eta}


def numbers_of(outcomes: Sequence[Outcome]) -> list[Number]:
    """Backprop against Multipliers, network by network: the same few sweeps, or a step that is found."""
    places: dict[tuple[str, int], dict[str, float]] = {}
    for outcome in outcomes:
        places.setdefault(outcome[:2], {})[outcome.method] = outcome.mean
    numbers = []
    for (name, depth), mean in places.items():
        recipe = LONG_STEP if depth > 40 else FOUND if name == MUPC else FEW_SWEEPS
        if BACKPROP not in mean or recipe not in mean:
            continue
        where = f"{name}, {depth} layers"
        numbers.append(Number(f"{where}: backprop (%), {recipe}", mean[BACKPROP], mean[recipe]))
        if depth >= 20:
            allowed = 0 if depth == 20 else 1 if depth <= 40 else 2
            behind = mean[BACKPROP] - mean[recipe]
            what = f"{where}: at most {allowed} points behind backprop"
            numbers.append(Number(what, "yes", yes(behind <= allowed)))
    return numbers


def draw(
    plan: Plan,
    outcomes: Sequence[Outcome],
    search: Sequence[Outcome],
    seconds: dict[int, dict[str, float]],
    layers: dict[str, dict[str, list[float]]],
    sweeps: dict[str, dict[str, list[float]]],
    data: DataSet,
) -> Figure:
    rates = ", ".join(f"{rate:g}" for rate in plan.rates)
    title = (
        f"Networks of width {WIDTH}, cut before the activation, mean cross-entropy, Adam at the best of the "
        f"rates {rates} on held-out training images\n"
        f"{data.described(plan.steps, BATCH_SIZE)}; dots: seeds, lines: their mean"
    )
    figure, axes = panels(3, 4, (15, 10.5), title)
    for one, name in zip(axes, "ABCDEFGHIJKL", strict=True):
        letter(one, name)
    *accuracy, rate, searched, times, lengths, cosines, by_sweep, by_eta = axes
    for one, name in zip(accuracy, plan.networks(), strict=True):
        draw_accuracy(one, name, [o for o in outcomes if o.network == name])
    draw_rates(rate, [o for o in outcomes if o.network == MUPC], plan)
    draw_search(searched, search)
    for method in METHODS:
        points = {depth: spent[method] for depth, spent in seconds.items()}
        times.plot(points.keys(), points.values(), marker="o", ms=3, **_style(method))
    times.set(
        xscale="log",
        yscale="log",
        xlabel="layers",
        ylabel="time of an update (s)",
        title=f"ReLU, batch {BATCH_SIZE}",
    )
    _depth_ticks(times, plan.depths)
    for method, measured in layers.items():
        numbers = range(1, len(measured["length"]) + 1)
        lengths.plot(numbers, measured["length"], **_style(method))
        cosines.plot(numbers, measured["cosine"], **_style(method))
    at = f"ReLU, {plan.layers_at} layers, in training"
    lengths.set(
        yscale="log", xlabel="layer", ylabel="length over backprop's", ylim=(1e-8, 1e2), title=at
    )
    cosines.set(xlabel="layer", ylabel="cosine to backprop's", ylim=(-0.1, 1.05), title=at)
    for alpha, colour in ALPHAS.items():
        style = {"color": colour, "label": f"α = {alpha:g}"}
        after = sweeps["by sweep"][str(alpha)]
        by_sweep.plot(range(1, len(after) + 1), after, **style)
        by_eta.plot(plan.etas, sweeps["by eta"][str(alpha)], "o-", ms=3, **style)
    for one, of in (by_sweep, "sweeps, η = .5"), (by_eta, "η, 20 sweeps"):
        one.set(
            yscale="log", ylim=(1e-4, 1e4), xlabel=of, ylabel="errors from backprop's", title=at
        )
    by_sweep.legend()
    handles = [axes[0].plot([], [], marker="o", ms=3, **_style(method))[0] for method in METHODS]
    figure.legend(handles, METHODS, loc="outside lower center", ncols=5)
    return figure


def draw_accuracy(axes: Axes, name: str, outcomes: Sequence[Outcome]) -> None:
    for method in METHODS:
        mine = [outcome for outcome in outcomes if outcome.method == method]
        axes.plot([o.depth for o in mine], [o.mean for o in mine], **_style(method))
        for o in mine:
            axes.plot([o.depth] * len(o.test), o.test, "o", ms=2.5, color=METHODS[method].colour)
    axes.set(xscale="log", xlabel="layers", ylabel="test accuracy (%)", ylim=(0, 100), title=name)
    _depth_ticks(axes, sorted({outcome.depth for outcome in outcomes}))


def draw_rates(axes: Axes, outcomes: Sequence[Outcome], plan: Plan) -> None:
    for outcome in outcomes:
        if outcome.method in (BACKPROP, LONG_STEP, FOUND):
            width = 0.7 + 0.6 * plan.mupc_depths.index(outcome.depth)
            label = f"{outcome.depth} layers" if outcome.method == BACKPROP else None
            style = _style(outcome.method) | {"lw": width, "label": label}
            axes.plot(plan.mupc_rates, outcome.held_out, marker="o", ms=3, **style)
    axes.set(
        xscale="log",
        xlabel="learning rate",
        ylabel="held-out accuracy (%)",
        ylim=(0, 100),
        title=MUPC,
    )
    axes.set_xticks(plan.mupc_rates, [f"{rate:g}" for rate in plan.mupc_rates])
    axes.minorticks_off()
    if outcomes:
        axes.legend()


def draw_search(axes: Axes, outcomes: Sequence[Outcome]) -> None:
    lines: dict[tuple[str, int, int], dict[Any, float]] = {}
    for outcome in outcomes:
        method = ALL_METHODS[outcome.method]
        line = lines.setdefault((outcome.network, outcome.depth, method.n), {})
        line[method.eta] = outcome.held_out[0]
    colours = {place: f"C{k}" for k, place in enumerate(dict.fromkeys(line[:2] for line in lines))}
    for (name, depth, n), found in lines.items():
        style = {"color": colours[name, depth], "linestyle": "-" if n == min(SWEEPS) else ":"}
        label = f"{name}, {depth}" if n == min(SWEEPS) else None
        axes.plot(found.keys(), found.values(), marker="o", ms=3, label=label, **style)
    axes.set(
        xlabel="η",
        ylabel="held-out accuracy (%)",
        ylim=(0, 100),
        title="n 3 (lines), n 10 (dotted)",
    )
    if lines:
        axes.legend()


def _depth_ticks(axes: Axes, depths: Sequence[int]) -> None:
    axes.set_xticks(depths, [str(depth) for depth in depths])
    axes.minorticks_off()


def _style(method: str) -> dict[str, Any]:
    return {"color": METHODS[method].colour, "linestyle": METHODS[method].style}
