"""How deep predictive coding learns: every algorithm, from 3 to 40 layers.

Networks of width 128, cut before the activation (items ``Linear | act, Linear | ... | act, Linear``),
learn digits with the mean cross-entropy and Adam. Weights start so that neither the signal nor the
gradient shrinks from layer to layer, by Kaiming's normal distribution for ReLU and GELU and Xavier's
for tanh, biases at 0. (PyTorch's own start shrinks a ReLU's signal by .41 in each layer, and even
backprop does not get away from it at 40 layers. GELU halves small signals, so that without residual
items 1e-5 of them is left there whatever the start; it is shown with them alone.) Each method has
the same number of weight updates on the same batches, and its learning rate is the best of the same
grid for each network and depth: the one with the highest accuracy on the last 1000 training images
after a shorter training on the others. Test images are seen by the final networks alone. One recipe
stands for every depth: nothing but the learning rate depends on it, and where n is a multiple of the
depth the name says so. Methods that need more than 100 iterations at some depth are left out there.

Strict passes errors on from layer to layer: an error that arrives has been multiplied by a fraction at each,
and Adam divides the small updates by their size, as long as they are above its eps. ErrorBased
carries the loss's gradient through all layers in each iteration, and Equilibrium goes on to the
energy's minimum. Incremental predictive coding moves the weights after each belief's step, 20 times
on a batch, so that with as many weight updates it sees a twentieth of the images.
With residual items a layer is ``x + Linear(act(x)) / sqrt(depth)``, scaled as by F. Innocenti and
others, Scaling Up Predictive Coding (muPC), arXiv:2505.13124 (2025).

Panels: the test accuracy against the depth, for ReLU with all methods (A) and for the other networks
with a few (B-D); the time of one update, inference and all (E); at one state of a 20-layer network
the length of each layer's update as a share of backprop's (F) and its cosine to backprop's (G); how
far the errors are from equilibrium after so many passes, each of them forward and backward, in a
10-layer tanh network (H). A step size "auto" costs passes of its own, which are counted.

A training that is finished is kept in ``figure_depth_runs.json`` beside the figure, and is not
repeated when the command is given again. All of them take about an hour and a half on one core. Stopped by
Ctrl-C, the command draws what there is; each point is the mean of the seeds that are there, and
each seed has its dot.
"""

from __future__ import annotations

import json
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

import torch2pc
from paper_figures.data import Batch, DataSet, load_digits
from paper_figures.plotting import letter, panels
from paper_figures.progress import track
from paper_figures.report import Number, Options, save, yes
from paper_figures.runs import Runs
from paper_figures.training import (
    backprop_step,
    cross_entropy,
    incremental_steps,
    quietly,
    test_accuracy,
    weight_gradients,
    weights_of,
)
from torch2pc import PCInfer
from torch2pc.energy.curvature import PASSES

DEFAULT = False
DOWNLOADS = ("mnist",)

WIDTH, BATCH_SIZE, HELD_OUT = 128, 64, 1000
# Belief steps of incremental predictive coding on a batch.
BELIEF_STEPS = 20
ACTIVATIONS: dict[str, type[nn.Module]] = {"ReLU": nn.ReLU, "tanh": nn.Tanh, "GELU": nn.GELU}


class Method(NamedTuple):
    """PCInfer's arguments, and how the lines look; ErrType None is backprop."""

    ErrType: str | None
    eta: float | str = 0.1
    n: int = 1
    colour: str = ""
    style: Any = "-"
    times_depth: bool = False
    """Whether ``n`` is counted in depths."""
    update_at: str = "v"


BACKPROP, INCREMENTAL = "backprop", "incremental"
METHODS = {
    BACKPROP: Method(None, colour="black", style=(0, (4, 1.5))),
    "FixedPred, η .1, n 20": Method("FixedPred", 0.1, 20, "#999999"),
    "Strict, η .1, n 20": Method("Strict", 0.1, 20, "#E69F00", ":"),
    "Strict, η .1, n 4L": Method("Strict", 0.1, 4, "#E69F00", times_depth=True),
    "Strict, auto, n 20": Method("Strict", "auto", 20, "#D55E00", ":"),
    "Strict, auto, n 4L": Method("Strict", "auto", 4, "#D55E00", times_depth=True),
    "ErrorBased, auto, n 5": Method("ErrorBased", "auto", 5, "#56B4E9"),
    "ErrorBased, auto, n 20": Method("ErrorBased", "auto", 20, "#0072B2"),
    "ErrorBased, auto, n 5, at vhat": Method(
        "ErrorBased", "auto", 5, "#56B4E9", "--", False, "vhat"
    ),
    "Equilibrium, n 10": Method("Equilibrium", n=10, colour="#009E73"),
    "Equilibrium, n 10, at vhat": Method("Equilibrium", 0.1, 10, "#009E73", "--", False, "vhat"),
    INCREMENTAL: Method("Strict", 0.1, 1, "#CC79A7"),
}
FEW = (
    BACKPROP,
    "Strict, auto, n 20",
    "ErrorBased, auto, n 5",
    "ErrorBased, auto, n 5, at vhat",
)


@dataclass(frozen=True)
class Training:
    """One training: what is trained, how, and from which seed."""

    network: str
    depth: int
    method: str
    lr: float
    seed: int
    steps: int
    held_out: bool

    def key(self, data: str) -> str:
        return json.dumps([*asdict(self).values(), data, torch2pc.__version__])


class Residual(nn.Module):
    """x + scale inner(x)."""

    def __init__(self, inner: nn.Module, scale: float) -> None:
        super().__init__()
        self.inner, self.scale = inner, scale

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.inner(x)


def network(name: str, depth: int) -> nn.Sequential:
    """``depth`` layers of the network "ReLU", "tanh residual", ...; seed before calling."""
    activation = ACTIVATIONS[name.removesuffix(" residual")]
    items: list[nn.Module] = [nn.Sequential(nn.Flatten(), nn.Linear(784, WIDTH))]
    for _ in range(depth - 2):
        inner = nn.Sequential(activation(), nn.Linear(WIDTH, WIDTH))
        items.append(Residual(inner, depth**-0.5) if name.endswith(" residual") else inner)
    model = nn.Sequential(*items, nn.Sequential(activation(), nn.Linear(WIDTH, 10)))
    for module in model.modules():
        if isinstance(module, nn.Linear):
            draw_weights(module, activation)
    return model


def draw_weights(linear: nn.Linear, activation: type[nn.Module]) -> None:
    """Anew, so that signals and gradients keep their size on the way through the layers."""
    if activation is nn.Tanh:
        nn.init.xavier_normal_(linear.weight)
    else:
        nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
    nn.init.zeros_(linear.bias)


def train(training: Training, data: DataSet, options: Options) -> dict[str, Any]:
    """The accuracy at the end (%), on the test images or on the held-out training images."""
    if training.held_out:
        data = held_out(data)
    torch.manual_seed(training.seed)
    model = network(training.network, training.depth).to(options.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=training.lr)
    batches = data.train_batches(training.steps, BATCH_SIZE, training.seed, options.device)
    with quietly():
        if training.method == INCREMENTAL:
            eta = METHODS[INCREMENTAL].eta
            updates = (
                result
                for batch in batches
                for result in incremental_steps(model, cross_entropy, batch, eta, BELIEF_STEPS)
            )
            for _ in zip(range(training.steps), updates, strict=False):
                optimizer.step()
        else:
            for batch in batches:
                update(training.method, model, batch)
                optimizer.step()
    return {"accuracy": 100 * test_accuracy(model, data, options.device)}


def held_out(data: DataSet) -> DataSet:
    """The training images alone: the last 1000 of them are there to test on."""
    images, labels = data.train_images, data.train_labels
    return DataSet(
        data.name,
        images[:-HELD_OUT],
        labels[:-HELD_OUT],
        images[-HELD_OUT:],
        labels[-HELD_OUT:],
    )


def update(method: str, model: nn.Sequential, batch: Batch) -> None:
    """One method's updates in ``.grad``."""
    ErrType, eta, n, _, _, times_depth, update_at = METHODS[method]
    X, Y = batch.X, batch.labels
    if ErrType is None:
        model.zero_grad()
        cross_entropy(model(X), Y).backward()
    else:
        n *= len(model) if times_depth else 1
        PCInfer(model, cross_entropy, X, Y, ErrType, eta, n, update_at=update_at)


@dataclass(frozen=True)
class Plan:
    """What is trained: all of it, or the short version.

    The first network is trained by all methods, at ``depths``; the others by ``FEW``, at ``few_depths``.
    ``FEW`` train the first network from ``seeds``; all else is from ``few_seeds``. A method that needs more
    iterations than ``most_iterations`` at some depth is left out there.
    """

    steps: int = 200
    tuning_steps: int = 75
    lr: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3)
    networks: tuple[str, ...] = ("ReLU", "tanh", "ReLU residual", "GELU residual")
    depths: tuple[int, ...] = (3, 5, 10, 20, 40)
    few_depths: tuple[int, ...] = (5, 20, 40)
    seeds: int = 3
    few_seeds: int = 1
    most_iterations: int = 100
    layers_at: int = 20
    relaxed_at: int = 10
    passes: tuple[int, ...] = (1, 2, 3, 5, 8, 12, 20, 30, 50, 80, 120, 200, 300, 500)
    rounds: int = 5
    seed: int = 0

    def points(self, name: str) -> Iterator[tuple[str, int]]:
        """Methods and depths of one network, the shallow ones first."""
        main = name == self.networks[0]
        for depth in self.depths if main else self.few_depths:
            for method in METHODS if main else FEW:
                times = depth if METHODS[method].times_depth else 1
                if METHODS[method].n * times <= self.most_iterations:
                    yield method, depth

    def seeds_of(self, name: str, method: str) -> range:
        count = self.seeds if name == self.networks[0] and method in FEW else self.few_seeds
        return range(self.seed, self.seed + count)

    def tunings(self, name: str, method: str, depth: int) -> list[Training]:
        """One for each learning rate, from a seed that is used for nothing else."""
        seed = self.seed + 1000
        return [Training(name, depth, method, lr, seed, self.tuning_steps, True) for lr in self.lr]

    def finals(self, name: str, method: str, depth: int, lr: float) -> list[Training]:
        return [
            Training(name, depth, method, lr, seed, self.steps, False)
            for seed in self.seeds_of(name, method)
        ]


def plan_of(options: Options) -> Plan:
    if options.quick:
        return Plan(
            steps=3,
            tuning_steps=2,
            lr=(3e-4, 1e-3),
            networks=("ReLU", "tanh residual"),
            depths=(3, 6),
            few_depths=(3, 6),
            seeds=1,
            layers_at=6,
            relaxed_at=4,
            passes=(1, 5, 20),
            rounds=1,
            seed=options.seed,
        )
    return Plan(seed=options.seed)


def run(options: Options) -> list[Number]:
    data, plan = load_digits(options.data), plan_of(options)
    runs = Runs("figure_depth", train, data, options)
    try:
        train_all(plan, runs)
    except KeyboardInterrupt:
        print("stopped: the figure is drawn with what there is")
    found = outcomes(plan, runs)
    seconds = {depth: seconds_at(depth, plan, data, options) for depth in plan.depths}
    layers = layers_of(plan, data, options)
    relaxed = distances(plan, data, options)
    numbers = numbers_of(plan, found, relaxed)
    save(
        options,
        "figure_depth",
        draw(plan, found, seconds, layers, relaxed, data),
        data=data.summary(),
        settings={
            **asdict(plan),
            "width": WIDTH,
            "batch_size": BATCH_SIZE,
            "held-out training images": HELD_OUT,
            "belief steps of incremental on a batch": BELIEF_STEPS,
            "methods: ErrType, eta, n": {
                name: [method.ErrType, method.eta, f"{method.n}{' L' * method.times_depth}"]
                for name, method in METHODS.items()
            },
        },
        series={
            "trainings": [outcome._asdict() for outcome in found],
            "seconds of an update": seconds,
            "layers": layers,
            "distance from equilibrium": relaxed,
        },
        numbers=numbers,
    )
    return numbers


def train_all(plan: Plan, runs: Runs[Training]) -> None:
    """All networks from their first seed before any from its second."""
    for k in range(plan.seeds):
        for name in plan.networks:
            points = [
                (m, depth) for m, depth in plan.points(name) if k < len(plan.seeds_of(name, m))
            ]
            for method, depth in track(points, f"depth, {name}, seed {k}"):
                runs.finish(plan.tunings(name, method, depth))
                lr = chosen_lr(plan.tunings(name, method, depth), runs)
                runs.finish(plan.finals(name, method, depth, lr)[k : k + 1])


def chosen_lr(tunings: Sequence[Training], runs: Runs[Training]) -> float:
    """The rate that is best on the held-out images; of equal ones the lowest."""
    return max(tunings, key=lambda training: (runs[training]["accuracy"], -training.lr)).lr


class Outcome(NamedTuple):
    """What is known of one network and method at one depth: the accuracies (%) of the seeds."""

    network: str
    method: str
    depth: int
    lr: float
    held_out: list[float]
    accuracy: list[float]


def outcomes(plan: Plan, runs: Runs[Training]) -> list[Outcome]:
    """Those of which at least one training is finished."""
    found = []
    for name in plan.networks:
        for method, depth in plan.points(name):
            tunings = plan.tunings(name, method, depth)
            if all(training in runs for training in tunings):
                lr = chosen_lr(tunings, runs)
                finals = plan.finals(name, method, depth, lr)
                accuracy = [runs[final]["accuracy"] for final in finals if final in runs]
                if accuracy:
                    tried = [runs[training]["accuracy"] for training in tunings]
                    found.append(Outcome(name, method, depth, lr, tried, accuracy))
    return found


def trained_by_backprop(
    name: str, depth: int, plan: Plan, data: DataSet, options: Options
) -> tuple[nn.Sequential, Batch]:
    """A network in the midst of its training, and the next batch."""
    torch.manual_seed(plan.seed)
    model = network(name, depth).to(options.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    batches = data.train_batches(plan.steps + 1, BATCH_SIZE, plan.seed, options.device)
    for _ in range(plan.steps):
        backprop_step(model, optimizer, cross_entropy, next(batches))
    return model, next(batches)


def seconds_at(depth: int, plan: Plan, data: DataSet, options: Options) -> dict[str, float]:
    """The time of one update by each method, medians of rounds in which they take turns.

    On a processor it is the processor's time, whatever else runs on the machine.
    """
    torch.manual_seed(plan.seed)
    model = network(plan.networks[0], depth).to(options.device)
    batch = next(data.train_batches(1, BATCH_SIZE, plan.seed, options.device))
    clock = clock_of(options.device)
    methods = [method for method, at in plan.points(plan.networks[0]) if at == depth]
    found: dict[str, list[float]] = {method: [] for method in methods}
    with quietly():
        for _ in range(plan.rounds + 1):
            for method in methods:
                start = clock()
                if method == INCREMENTAL:
                    for _ in incremental_steps(model, cross_entropy, batch, 0.1, BELIEF_STEPS):
                        pass
                else:
                    update(method, model, batch)
                spent = clock() - start
                found[method].append(spent / (BELIEF_STEPS if method == INCREMENTAL else 1))
    # The first round also prepares what later ones find ready.
    return {method: statistics.median(values[1:]) for method, values in found.items()}


def clock_of(device: torch.device) -> Callable[[], float]:
    if device.type == "cpu":
        return time.process_time

    def clock() -> float:
        torch.accelerator.synchronize(device)
        return time.perf_counter()

    return clock


def layers_of(plan: Plan, data: DataSet, options: Options) -> dict[str, dict[str, list[float]]]:
    """By method and layer: the update's length over the gradient's, and its cosine to it."""
    model, batch = trained_by_backprop(plan.networks[0], plan.layers_at, plan, data, options)
    gradients = [gradient.double() for gradient in weight_gradients(model, cross_entropy, batch)]
    found = {}
    for method, depth in plan.points(plan.networks[0]):
        if depth == plan.layers_at and method not in (BACKPROP, INCREMENTAL):
            with quietly():
                update(method, model, batch)
            lengths, cosines = [], []
            for weight, gradient in zip(weights_of(model), gradients, strict=True):
                length = weight.grad.double().norm() / gradient.norm()
                cosine = (weight.grad.double() * gradient).sum() / gradient.norm().square() / length
                lengths.append(length.item())
                cosines.append(cosine.item())
            found[method] = {"length": lengths, "cosine": cosines}
    return found


RELAXATIONS = {
    "Strict": ("Strict", "auto", "#D55E00"),
    "ErrorBased": ("ErrorBased", "auto", "#0072B2"),
    "Equilibrium": ("Equilibrium", 0.1, "#009E73"),
}


def distances(plan: Plan, data: DataSet, options: Options) -> dict[str, list[float]]:
    """By relaxation and number of passes: ``||epsilon - epsilon*|| / ||epsilon*||``, in float64.

    epsilon* is Equilibrium's with far more passes at most; it stops at about 1e-8 of the errors.
    """
    model, batch = trained_by_backprop("tanh", plan.relaxed_at, plan, data, options)
    model, batch = model.double(), Batch(batch.X.double(), batch.labels)

    def errors(ErrType: str, eta: float | str, n: int) -> list[Tensor]:
        with quietly():
            result = PCInfer(model, cross_entropy, batch.X, batch.labels, ErrType, eta, n)
        return [epsilon_l for epsilon_l in result.epsilon[1:-1] if epsilon_l is not None]

    there = errors("Equilibrium", 0.1, 10 * max(plan.passes))
    length = math.hypot(*(epsilon_l.norm().item() for epsilon_l in there))
    found: dict[str, list[float]] = {}
    for name, (ErrType, eta, _) in RELAXATIONS.items():
        found[name] = []
        for n in plan.passes:
            apart = zip(errors(ErrType, eta, n), there, strict=True)
            distance = math.hypot(*((a - b).norm().item() for a, b in apart))
            found[name].append(distance / length)
    return found


def numbers_of(
    plan: Plan, found: Sequence[Outcome], relaxed: dict[str, list[float]]
) -> list[Number]:
    """The best method against backprop, network by network, and how near each relaxation comes."""
    numbers = []
    for name in plan.networks:
        mean = {
            (outcome.method, outcome.depth): statistics.fmean(outcome.accuracy)
            for outcome in found
            if outcome.network == name
        }
        for depth in sorted({depth for _, depth in mean}):
            others = {
                method: value
                for (method, at), value in mean.items()
                if at == depth and method != BACKPROP
            }
            if (BACKPROP, depth) not in mean or not others:
                continue
            best = max(others, key=others.__getitem__)
            allowed = 2 if depth > 20 else 0
            behind = mean[BACKPROP, depth] - others[best]
            what = f"{name}, {depth} layers: backprop (%) and the best other, {best}"
            numbers.append(Number(what, mean[BACKPROP, depth], others[best]))
            if depth >= 20:
                what = f"{name}, {depth} layers: at most {allowed} points behind backprop"
                numbers.append(Number(what, "yes", yes(behind <= allowed)))
    for relaxation, values in relaxed.items():
        what = f"{relaxation}: distance from equilibrium at n = {plan.passes[-1]}"
        numbers.append(Number(what, 0, values[-1]))
    return numbers


def draw(
    plan: Plan,
    found: Sequence[Outcome],
    seconds: dict[int, dict[str, float]],
    layers: dict[str, dict[str, list[float]]],
    relaxed: dict[str, list[float]],
    data: DataSet,
) -> Figure:
    title = (
        f"Networks of width {WIDTH}, cut before the activation, mean cross-entropy, Adam at the best "
        f"of the rates {', '.join(f'{lr:g}' for lr in plan.lr)} on held-out training images\n"
        f"{data.described(plan.steps, BATCH_SIZE)}; dots: seeds, lines: their mean"
    )
    figure, axes = panels(2, 4, (14, 7), title)
    for one, name in zip(axes, "ABCDEFGH", strict=True):
        letter(one, name)
    for one, name in zip(axes, plan.networks, strict=False):
        if mine := [outcome for outcome in found if outcome.network == name]:
            draw_accuracy(one, name, mine, plan.depths)
        else:
            one.set_visible(False)
    for unused in axes[len(plan.networks) : 4]:
        unused.set_visible(False)
    times, lengths, cosines, passes = axes[4:]
    for method in METHODS:
        points = {depth: spent[method] for depth, spent in seconds.items() if method in spent}
        times.plot(points.keys(), points.values(), marker="o", ms=3, **_style(method))
    times.set(
        xscale="log",
        yscale="log",
        xlabel="layers",
        ylabel="time of an update (s)",
        title=f"{plan.networks[0]}, batch {BATCH_SIZE}",
    )
    _depth_ticks(times, plan.depths)
    for method, measured in layers.items():
        numbers = range(1, len(measured["length"]) + 1)
        lengths.plot(numbers, measured["length"], **_style(method))
        cosines.plot(numbers, measured["cosine"], **_style(method))
    at = f"{plan.networks[0]}, {plan.layers_at} layers, in training"
    lengths.set(yscale="log", xlabel="layer", ylabel="length over backprop's", title=at)
    cosines.set(xlabel="layer", ylabel="cosine to backprop's", ylim=(-0.1, 1.05), title=at)
    for name, (_, eta, colour) in RELAXATIONS.items():
        extra = PASSES if eta == "auto" else 0
        numbers = [n + extra for n in plan.passes]
        passes.plot(numbers, relaxed[name], "o-", ms=3, color=colour, label=name)
    passes.set(
        xscale="log",
        yscale="log",
        ylim=(1e-9, 3),
        xlabel="passes",
        ylabel="distance of ε from equilibrium",
        title=f"tanh, {plan.relaxed_at} layers, in training, float64",
    )
    passes.legend()
    handles = [axes[0].plot([], [], marker="o", ms=3, **_style(method))[0] for method in METHODS]
    figure.legend(handles, METHODS, loc="outside lower center", ncols=5)
    return figure


def draw_accuracy(axes: Axes, name: str, found: Sequence[Outcome], depths: Sequence[int]) -> None:
    for method in METHODS:
        mine = [outcome for outcome in found if outcome.method == method]
        means = {outcome.depth: statistics.fmean(outcome.accuracy) for outcome in mine}
        axes.plot(means.keys(), means.values(), **_style(method))
        for outcome in mine:
            dots = [outcome.depth] * len(outcome.accuracy)
            axes.plot(dots, outcome.accuracy, "o", ms=2.5, color=METHODS[method].colour)
    seeds = [len(outcome.accuracy) for outcome in found]
    count = f"{min(seeds)}" if min(seeds) == max(seeds) else f"{min(seeds)} to {max(seeds)}"
    axes.set(
        xscale="log",
        xlabel="layers",
        ylabel="test accuracy (%)",
        xlim=(0.9 * min(depths), 1.1 * max(depths)),
        ylim=(0, 100),
        title=f"{name} (seeds: {count})",
    )
    _depth_ticks(axes, depths)


def _depth_ticks(axes: Axes, depths: Sequence[int]) -> None:
    axes.set_xticks(depths, [str(depth) for depth in depths])
    axes.minorticks_off()


def _style(method: str) -> dict[str, Any]:
    return {"color": METHODS[method].colour, "linestyle": METHODS[method].style}
