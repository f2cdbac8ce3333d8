"""Strict's training: where it blows up, why, and what cures it.

A ReLU holds an inactive unit j at ``vhat_j = 0``, but Strict's belief about it moves, to
``v_j = -epsilon_j``, with ``epsilon_j = W_j . epsilon_{l+1}`` at equilibrium, where W_j are the weights
that leave the unit. Updates at v take ``v_j`` for the unit's activity, and give W_j the gradient
``-(W_j . epsilon_{l+1}) epsilon_{l+1}``: a step along it lets W_j grow along ``epsilon_{l+1}``, and the
larger W_j is, the larger is the next step. The update is tiny, but Adam divides it by its size. Once
the weights are so long that the beliefs' steps are too large for them (η above 2 over the largest
curvature of the energy, about 1 + ||W||^2), the beliefs diverge, and training is lost.

Two cures leave those weights alone. *Updates at vhat*: ``update_at="vhat"``, as when the paper appeared.
*Cut before the activation*: the items of the same network are ``Linear | ReLU, Linear | ReLU, Linear``, so
that a belief is about what goes into the ReLU. Weights still grow longer than at vhat, until a step of .1
is too large for the beliefs: ``eta="auto"`` goes with it, which finds one that is not. Backprop is
trained beside them, from the same weights, on the same batches.

Panels: the loss (A) and the length of the weights that leave inactive units (B) during training; the
accuracy with other optimizers (C); the accuracy above backprop's of the cures, for each network,
loss, learning rate and seed, and of the cut with η = 0.1 (D); the accuracy for four activations
against the learning rate (E-H).

A training that has blown up is not gone on with. One that is finished is kept in
``figure_stability_runs.json`` beside the figure, and is not repeated when the command is given again.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

import torch2pc
from paper_figures.data import DataSet, load_digits
from paper_figures.nets import mnist_net
from paper_figures.plotting import letter, panels
from paper_figures.report import Number, Options, save
from paper_figures.runs import Runs
from paper_figures.training import (
    backprop_step,
    cross_entropy,
    squared_error,
    test_accuracy,
)
from torch2pc import PCInfer

DEFAULT = False
SECONDS = 120, 7200
DOWNLOADS = ("mnist",)

BATCH_SIZE = 32
# Seeds of the comparison of the cures with backprop; all other panels have one.
SEEDS = 10
# Steps and network of the panels that compare optimizers, activations and learning rates.
SWEPT_STEPS, SWEPT = 400, "3x100"
# The weights that leave inactive units are measured every so many steps, on so many test images.
EVERY, PROBE = 10, 500

LOSSES = {"cross-entropy": cross_entropy, "squared error": squared_error}
SHORT = {"cross-entropy": "CE", "squared error": "SE"}
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "ReLU": nn.ReLU,
    "LeakyReLU": nn.LeakyReLU,
    "tanh": nn.Tanh,
    "GELU": nn.GELU,
}


class Method(NamedTuple):
    """Where updates are taken (None: backprop), the step size, and how its lines look."""

    update_at: str | None
    eta: float | str
    colour: str
    style: Any = "-"


N = 20
METHODS = {
    "at v, cut after": Method("v", 0.1, "#D55E00"),
    "at v, cut before": Method("v", 0.1, "#E69F00"),
    "at v, cut before, η auto": Method("v", "auto", "#009E73"),
    "at vhat": Method("vhat", 0.1, "#CC79A7"),
    "backprop": Method(None, 0, "#0072B2", (0, (4, 1.5))),
}
# Each alone is to prevent it; the cut with η = 0.1 is shown beside them where it fails most often.
CURES = ("at v, cut before, η auto", "at vhat")
CUT_ALONE = "at v, cut before"
OPTIMIZERS = {
    "Adam, eps 1e-8": {"eps": 1e-8},
    "Adam, eps 1e-6": {"eps": 1e-6},
    "Adam, eps 1e-4": {"eps": 1e-4},
    "SGD, momentum 0.9": {"momentum": 0.9},
}
ADAM, SGD = "Adam, eps 1e-8", "SGD, momentum 0.9"


@dataclass(frozen=True)
class Training:
    """One training: what is trained, how, and from which seed."""

    network: str
    loss: str
    lr: float
    method: str
    seed: int
    steps: int = 400
    activation: str = "ReLU"
    optimizer: str = ADAM
    batch_size: int = BATCH_SIZE

    def key(self, data: str) -> str:
        """What it is kept under."""
        return json.dumps([*asdict(self).values(), data, torch2pc.__version__])


def mlp(hidden: int, width: int, activation: type[nn.Module]) -> nn.Sequential:
    """``hidden`` layers of Linear and activation, and Linear(width, 10): cut after the activation."""
    layers = [
        nn.Sequential(nn.Linear(784 if l == 0 else width, width), activation())
        for l in range(hidden)
    ]
    return nn.Sequential(nn.Sequential(nn.Flatten(), *layers[0]), *layers[1:], nn.Linear(width, 10))


def network(training: Training) -> nn.Sequential:
    """The network, cut as the method says; seed before calling."""
    if training.network == "mnist_net":
        model = mnist_net()
    else:
        hidden, width = map(int, training.network.split("x"))
        model = mlp(hidden, width, ACTIVATIONS[training.activation])
    return cut_before(model) if "cut before" in training.method else model


def cut_before(model: nn.Sequential) -> nn.Sequential:
    """The same modules in the same order, with each item ending at a module that has parameters."""
    items: list[list[nn.Module]] = [[]]
    for module in _leaves(model):
        items[-1].append(module)
        if list(module.parameters()):
            items.append([])
    rest = items.pop()
    items[-1] += rest
    return nn.Sequential(*(nn.Sequential(*item) for item in items))


def _leaves(model: nn.Module) -> Iterator[nn.Module]:
    for child in model:  # type: ignore[attr-defined]
        if isinstance(child, nn.Sequential):
            yield from _leaves(child)
        else:
            yield child


def optimizer_of(training: Training, model: nn.Module) -> torch.optim.Optimizer:
    kind = torch.optim.SGD if training.optimizer == SGD else torch.optim.Adam
    return kind(model.parameters(), lr=training.lr, **OPTIMIZERS[training.optimizer])


def train(training: Training, data: DataSet, options: Options) -> dict[str, Any]:
    """The losses of all steps, the test accuracy at the end, and how weights of dead units grew."""
    torch.manual_seed(training.seed)
    model = network(training).to(options.device)
    optimizer, LossFun = optimizer_of(training, model), LOSSES[training.loss]
    measure = OfInactiveUnits(model, next(data.all_test_batches(PROBE, options.device)).X)
    losses, growth, method = [], [], METHODS[training.method]
    batches = data.train_batches(training.steps, training.batch_size, training.seed, options.device)
    with without_the_warning():
        for step, batch in enumerate(batches):
            if training.activation == "ReLU" and step % EVERY == 0:
                growth.append(measure.growth())
            if method.update_at is None:
                loss, _ = backprop_step(model, optimizer, LossFun, batch)
            else:
                result = PCInfer(
                    model,
                    LossFun,
                    batch.X,
                    batch.labels,
                    "Strict",
                    method.eta,
                    N,
                    update_at=method.update_at,
                )
                optimizer.step()
                loss = result.Loss.item()
            losses.append(float(f"{loss:.5g}"))
            if is_lost(losses):
                break
    return {
        "loss": losses,
        "accuracy": test_accuracy(model, data, options.device),
        "growth": growth,
    }


@contextmanager
def without_the_warning() -> Iterator[None]:
    """Strict warns of what is shown here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Strict takes its updates at v")
        yield


class OfInactiveUnits:
    """Measures the weights that leave the units which are inactive for each of some images."""

    def __init__(self, model: nn.Sequential, probe: Tensor) -> None:
        self._model, self._probe = model, probe
        # Not the first one's of a network without convolutions: dark pixels are no units.
        self._linear = [
            module
            for module in model.modules()
            if isinstance(module, nn.Linear) and module.in_features != probe[0].numel()
        ]
        self._start = [_column_norms(module) for module in self._linear]

    @torch.no_grad()
    def growth(self) -> float:
        """The mean of |W_j| now over |W_j| at the start, over all inactive units j."""
        seen: dict[nn.Module, Tensor] = {}
        hooks = [
            module.register_forward_hook(lambda module, x, _: seen.__setitem__(module, x[0]))
            for module in self._linear
        ]
        self._model(self._probe)
        for hook in hooks:
            hook.remove()
        ratios = [
            (_column_norms(module) / start)[(seen[module] == 0).all(0)]
            for module, start in zip(self._linear, self._start, strict=True)
        ]
        return torch.cat(ratios).mean().item()


def _column_norms(module: nn.Linear) -> Tensor:
    return module.weight.detach().norm(dim=0)


def blew_up(losses: Sequence[float]) -> bool:
    """Whether the loss rose to three times its lowest, and above a third of what it was at first.

    So does one that is not finite, or that never fell by a tenth. The means of ten steps in a row are
    compared.
    """
    means = means_of_ten(losses)
    lowest = min(range(len(means)), key=lambda k: (not math.isfinite(means[k]), means[k]))
    bound = max(losses[0] / 3, 3 * means[lowest])
    learns = means[lowest] <= 0.9 * losses[0]
    return not (learns and all(mean <= bound for mean in means[lowest:]))


def means_of_ten(losses: Sequence[float]) -> list[float]:
    """The means of each ten steps in a row."""
    return [statistics.fmean(losses[k : k + 10]) for k in range(len(losses) - 9)]


def is_lost(losses: Sequence[float]) -> bool:
    """Whether a training has blown up so far that there is no use in going on."""
    if not math.isfinite(losses[-1]):
        return True
    return len(losses) > 20 and statistics.fmean(losses[-10:]) > 3 * losses[0]


@dataclass(frozen=True)
class Plan:
    """What is trained: all of it, or less."""

    steps: int = 400
    networks: tuple[str, ...] = ("3x300", "8x300", "mnist_net")
    cured_lr: tuple[float, ...] = (2e-3, 1e-3)
    shown: str = "3x300"
    seeds: int = SEEDS
    swept: str = SWEPT
    swept_steps: int = SWEPT_STEPS
    lr: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    activations: tuple[str, ...] = tuple(ACTIVATIONS)
    seed: int = 0

    def cured(self) -> list[Training]:
        """Panel D, and backprop beside it."""
        return [
            Training(network, loss, lr, method, self.seed + k, self.steps)
            for k in range(self.seeds)
            for lr in self.cured_lr
            for network in self.networks
            for loss in LOSSES
            for method in (
                *CURES,
                "backprop",
                *([CUT_ALONE] if (network, lr) == (self.networks[0], self.cured_lr[0]) else []),
            )
        ]

    def followed(self, method: str) -> Training:
        """One method's training in panels A and B."""
        return Training(
            self.shown, "cross-entropy", self.cured_lr[0], method, self.seed, self.steps
        )

    def optimized(self, method: str, optimizer: str) -> Training:
        """One method's training in panel C."""
        lr = 0.05 if optimizer == SGD else 2e-3
        steps, seed = self.swept_steps, self.seed
        return Training(self.swept, "cross-entropy", lr, method, seed, steps, optimizer=optimizer)

    def swept_at(self, activation: str, lr: float, method: str) -> Training:
        """One point of panels E to H."""
        return Training(
            self.swept, "cross-entropy", lr, method, self.seed, self.swept_steps, activation
        )

    def all(self) -> list[Training]:
        """Every training, one seed and the larger learning rate first."""
        cured = self.cured()
        first = [one for one in cured if (one.seed, one.lr) == (self.seed, self.cured_lr[0])]
        swept = itertools.product(self.activations, self.lr, METHODS)
        optimized = itertools.product(METHODS, OPTIMIZERS)
        one_each = [
            *map(self.followed, METHODS),
            *itertools.starmap(self.swept_at, swept),
            *itertools.starmap(self.optimized, optimized),
        ]
        return list(dict.fromkeys([*first, *one_each, *cured]))


def plan_of(options: Options) -> Plan:
    if options.quick:
        return Plan(
            steps=12,
            networks=("2x30",),
            cured_lr=(2e-3,),
            shown="2x30",
            seeds=1,
            swept="2x30",
            swept_steps=12,
            lr=(1e-3,),
            activations=("ReLU", "tanh"),
            seed=options.seed,
        )
    if options.full:
        return Plan(seed=options.seed)
    return Plan(
        steps=200,
        networks=("3x300",),
        cured_lr=(2e-3,),
        seeds=1,
        swept_steps=100,
        lr=(1e-3, 3e-3),
        activations=("ReLU", "tanh"),
        seed=options.seed,
    )


def run(options: Options) -> list[Number]:
    data, plan = load_digits(options.data), plan_of(options)
    runs = Runs("figure_stability", train, data, options)
    runs.finish(plan.all())
    numbers = numbers_of(plan, runs)
    save(
        options,
        "figure_stability",
        draw(plan, runs, data),
        data=data.summary(),
        settings={
            **asdict(plan),
            "batch_size": BATCH_SIZE,
            "eta": {name: method.eta for name, method in METHODS.items()},
            "n": N,
        },
        series=[{**asdict(training), **runs[training]} for training in plan.all()],
        numbers=numbers,
    )
    return numbers


def numbers_of(plan: Plan, runs: Runs[Training]) -> list[Number]:
    """What the two cures promise, and what there is without them."""
    numbers = []
    for method in (*CURES, CUT_ALONE):
        cured = [training for training in plan.cured() if training.method == method]
        ups = sum(blew_up(runs[training]["loss"]) for training in cured)
        behind = max(0, *[-mean for mean in mean_leads(plan, runs, method).values()])
        of_ups, of_behind = (0, 1.5) if method in CURES else (None, None)
        what = f"{method}: trainings of {len(cured)} that blow up"
        numbers.append(Number(what, 0, ups, of_ups))
        what = f"{method}: farthest behind backprop (points)"
        numbers.append(Number(what, 0, behind, of_behind))
    for method in METHODS:
        growth = runs[plan.followed(method)]["growth"][-1]
        what = f"{method}, {plan.shown}: growth of the weights that leave inactive units"
        numbers.append(Number(what, 1, growth))
    return numbers


def mean_leads(
    plan: Plan, runs: Runs[Training], method: str
) -> dict[tuple[str, str, float], float]:
    """By network, loss and lr: the accuracy above backprop's in points, the mean of all seeds."""
    return {place: statistics.fmean(values) for place, values in leads(plan, runs, method).items()}


def leads(
    plan: Plan, runs: Runs[Training], method: str
) -> dict[tuple[str, str, float], list[float]]:
    """The same for each seed."""
    found: dict[tuple[str, str, float], list[float]] = {}
    for training, lead in leads_of(plan, runs, method):
        found.setdefault((training.network, training.loss, training.lr), []).append(lead)
    return found


def leads_of(plan: Plan, runs: Runs[Training], method: str) -> Iterator[tuple[Training, float]]:
    """Each training of a method, and how far it ends above backprop's."""
    for training in plan.cured():
        if training.method == method:
            backprop = replace(training, method="backprop")
            yield training, 100 * (runs[training]["accuracy"] - runs[backprop]["accuracy"])


def draw(plan: Plan, runs: Runs[Training], data: DataSet) -> Figure:
    title = (
        f"Strict (η = 0.1 or auto, n = {N}) with updates at v and at vhat, cut after and before the "
        f"activation\n{data.described(plan.steps, BATCH_SIZE)}"
    )
    figure, axes = panels(2, 4, (13, 6.4), title)
    loss, growth, optimizers, lead, *swept = axes
    for method in METHODS:
        found = runs[plan.followed(method)]
        style = _style(method, label=method)
        loss.plot(means_of_ten(found["loss"]), **style)
        steps = range(0, EVERY * len(found["growth"]), EVERY)
        growth.plot(steps, found["growth"], **style)
    shown = f"{plan.shown}, cross-entropy, lr {plan.cured_lr[0]:g}"
    loss.set(xlabel="training step", ylabel="loss (mean of 10 steps)", yscale="log", title=shown)
    growth.set(
        xlabel="training step",
        ylabel="inactive units: growth of |W_j|",
        title=shown,
    )
    draw_optimizers(optimizers, plan, runs)
    draw_leads(lead, plan, runs)
    for axes_of, activation in zip(swept, plan.activations, strict=False):
        draw_swept(axes_of, activation, plan, runs)
    for unused in swept[len(plan.activations) :]:
        unused.set_visible(False)
    for name, one in zip("ABCDEFGH", axes, strict=True):
        letter(one, name)
    handles, labels = loss.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def accuracies_shown(plan: Plan, runs: Runs[Training]) -> tuple[float, float]:
    """The range of accuracies of panels C and E to H, which they share."""
    swept = itertools.product(plan.activations, plan.lr, METHODS)
    found = _accuracies(runs, itertools.starmap(plan.swept_at, swept))
    optimized = itertools.product(METHODS, OPTIMIZERS)
    found += _accuracies(runs, itertools.starmap(plan.optimized, optimized))
    return min(found) - 2, max(found) + 2


def draw_optimizers(axes: Axes, plan: Plan, runs: Runs[Training]) -> None:
    """Panel C: a point for each method, in a row for each optimizer."""
    for offset, method in enumerate(METHODS):
        trainings = [plan.optimized(method, optimizer) for optimizer in OPTIMIZERS]
        places = [x + 0.15 * (offset - 2) for x in range(len(OPTIMIZERS))]
        style = {**_style(method), "linestyle": "", "marker": "o"}
        axes.plot(places, _accuracies(runs, trainings), **style, ms=4)
    names = [
        "SGD 0.05\nmomentum 0.9" if name == SGD else name.replace("Adam, ", "")
        for name in OPTIMIZERS
    ]
    axes.set_xticks(range(len(names)), names, fontsize=7)
    axes.set(
        xlabel="Adam at lr 2e-3, by its eps",
        ylabel="test accuracy (%)",
        ylim=accuracies_shown(plan, runs),
        title=f"{plan.swept}, cross-entropy",
    )


def draw_leads(axes: Axes, plan: Plan, runs: Runs[Training]) -> None:
    """Panel D: a point for each network, loss, learning rate and seed; crosses blew up."""
    place = {where: x for x, where in enumerate(leads(plan, runs, CURES[0]))}
    for offset, method in enumerate((*CURES, CUT_ALONE)):
        style = {**_style(method), "linestyle": ""}
        for training, value in leads_of(plan, runs, method):
            x = place[training.network, training.loss, training.lr] + 0.25 * (offset - 1)
            marker = "x" if blew_up(runs[training]["loss"]) else "o"
            axes.plot(x, value, marker=marker, ms=5 if marker == "x" else 3, **style)
    axes.axhline(0, **_style("backprop"))
    axes.axhline(-1.5, color="0.6", linewidth=0.8)
    names = [f"{name}, {SHORT[loss]}, {lr:g}" for name, loss, lr in place]
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    axes.set_yscale("symlog", linthresh=5)
    axes.set_yticks([-50, -10, -5, 0, 5, 10], ["-50", "-10", "-5", "0", "5", "10"])
    seeds = "seed" if plan.seeds == 1 else "seeds"
    axes.set(ylabel="above backprop (points)", title=f"{plan.seeds} {seeds}", ylim=(-100, 20))


def draw_swept(axes: Axes, activation: str, plan: Plan, runs: Runs[Training]) -> None:
    """Panels E to H."""
    for method in METHODS:
        trainings = [plan.swept_at(activation, lr, method) for lr in plan.lr]
        axes.plot(_accuracies(runs, trainings), marker="o", ms=3, **_style(method))
    axes.set_xticks(range(len(plan.lr)), [f"{lr:g}" for lr in plan.lr])
    axes.set(
        xlabel="learning rate (Adam)",
        ylabel="test accuracy (%)",
        ylim=accuracies_shown(plan, runs),
        title=f"{activation}, {plan.swept}, cross-entropy",
    )


def _accuracies(runs: Runs[Training], trainings: Iterable[Training]) -> list[float]:
    return [100 * runs[training]["accuracy"] for training in trainings]


def _style(method: str, label: str | None = None) -> dict[str, Any]:
    found = METHODS[method]
    return {"color": found.colour, "linestyle": found.style, "label": label}
