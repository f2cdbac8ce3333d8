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
that a belief is about what goes into the ReLU. Weights still grow longer than at vhat, so that at
large learning rates the beliefs diverge in some trainings, which half the step size mends.
Backprop is trained beside them, from the same weights, on the same batches.

Panels: the loss (A) and the length of the weights that leave inactive units (B) during training; the
accuracy with other optimizers (C); the accuracy above backprop's of the cures, for each network,
loss, learning rate and seed, and with half the step size and twice the steps (D); the accuracy for
four activations against the learning rate (E-H).

A training that is finished is kept in ``figure_stability_runs.json`` beside the figure, and is not
repeated when the command is given again: all of them take some three hours on one core.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
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
DOWNLOADS = ("mnist",)

BATCH_SIZE = 64
# Seeds of the comparison of the cures with backprop, and of all other panels.
SEEDS, FEW_SEEDS = 10, 2
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
    """Where updates are taken (None: backprop), the inference, and how its lines look."""

    update_at: str | None
    eta: float
    n: int
    colour: str
    style: Any = "-"


METHODS = {
    "at v, cut after": Method("v", 0.1, 20, "#D55E00"),
    "at v, cut before": Method("v", 0.1, 20, "#009E73"),
    "at vhat": Method("vhat", 0.1, 20, "#CC79A7"),
    "backprop": Method(None, 0, 0, "#0072B2", (0, (4, 1.5))),
}
HALVED = "at v, cut before, η/2"
ALL_METHODS = {**METHODS, HALVED: Method("v", 0.05, 40, "#E69F00")}
CURES = ("at v, cut before", "at vhat")
OPTIMIZERS = {
    "Adam, eps 1e-8": {"eps": 1e-8},
    "Adam, eps 1e-6": {"eps": 1e-6},
    "Adam, eps 1e-5": {"eps": 1e-5},
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
    losses, growth, method = [], [], ALL_METHODS[training.method]
    batches = data.train_batches(training.steps, BATCH_SIZE, training.seed, options.device)
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
                    method.n,
                    update_at=method.update_at,
                )
                optimizer.step()
                loss = result.Loss.item()
            losses.append(float(f"{loss:.5g}"))
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
    """Whether the loss, once it has been low, rose above a third of what it was at first.

    So does one that is not finite, or that never was low. The means of ten steps in a row are
    compared.
    """
    means = [statistics.fmean(losses[k : k + 10]) for k in range(len(losses) - 9)]
    lowest = min(range(len(means)), key=lambda k: (not math.isfinite(means[k]), means[k]))
    return not all(mean <= losses[0] / 3 for mean in means[lowest:])


@dataclass(frozen=True)
class Plan:
    """What is trained: all of it, or the short version."""

    steps: int = 400
    networks: tuple[str, ...] = ("mnist_net", "3x300", "8x300")
    cured_lr: tuple[float, ...] = (1e-3, 2e-3)
    shown: str = "8x300"
    swept: str = "3x300"
    lr: tuple[float, ...] = (3e-4, 1e-3, 2e-3, 3e-3)
    activations: tuple[str, ...] = tuple(ACTIVATIONS)
    seeds: int = SEEDS
    few_seeds: int = FEW_SEEDS
    seed: int = 0

    def cured(self) -> list[Training]:
        """Panel D, and backprop beside it."""
        return [
            Training(network, loss, lr, method, self.seed + k, self.steps)
            for k in range(self.seeds)
            for loss in LOSSES
            for lr in reversed(self.cured_lr)
            for network in self.networks
            for method in (*CURES, "backprop", *([HALVED] if network == self.swept else []))
        ]

    def followed(self, method: str) -> list[Training]:
        """One method's trainings in panels A and B."""
        return [
            Training(
                self.shown, "cross-entropy", max(self.cured_lr), method, self.seed + k, self.steps
            )
            for k in range(self.few_seeds)
        ]

    def optimized(self, method: str, optimizer: str) -> list[Training]:
        """One method's trainings in panel C."""
        lr = 0.05 if optimizer == SGD else max(self.cured_lr)
        return [
            Training(
                self.swept,
                "cross-entropy",
                lr,
                method,
                self.seed + k,
                self.steps,
                optimizer=optimizer,
            )
            for k in range(self.few_seeds)
        ]

    def swept_at(self, activation: str, loss: str, lr: float, method: str) -> list[Training]:
        """One point of panels E to H."""
        return [
            Training(self.swept, loss, lr, method, self.seed + k, self.steps, activation)
            for k in range(self.few_seeds)
        ]

    def all(self) -> list[Training]:
        """Every training, in the order of the panels."""
        found = list(itertools.chain(*(self.followed(method) for method in METHODS)))
        found += self.cured()
        for method, optimizer in itertools.product(METHODS, OPTIMIZERS):
            found += self.optimized(method, optimizer)
        for point in itertools.product(self.activations, LOSSES, self.lr, METHODS):
            found += self.swept_at(*point)
        return found


def plan_of(options: Options) -> Plan:
    if options.quick:
        return Plan(
            steps=12,
            networks=("2x30",),
            cured_lr=(2e-3,),
            shown="2x30",
            swept="2x30",
            lr=(1e-3,),
            activations=("ReLU", "tanh"),
            seeds=1,
            few_seeds=1,
            seed=options.seed,
        )
    return Plan(seed=options.seed)


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
            "eta, n": {name: (method.eta, method.n) for name, method in ALL_METHODS.items()},
        },
        series=[{**asdict(training), **runs[training]} for training in dict.fromkeys(plan.all())],
        numbers=numbers,
    )
    return numbers


def numbers_of(plan: Plan, runs: Runs[Training]) -> list[Number]:
    """What the two cures promise, and what there is without them."""
    numbers = []
    for method in (*CURES, HALVED):
        cured = [training for training in plan.cured() if training.method == method]
        ups = sum(blew_up(runs[training]["loss"]) for training in cured)
        numbers.append(Number(f"{method}: trainings of {len(cured)} that blow up", 0, ups, 0))
        behind = max(-mean for mean in mean_leads(plan, runs, method).values())
        numbers.append(Number(f"{method}: farthest behind backprop (points)", 0, behind, 1.5))
    after = plan.followed("at v, cut after")
    ups = sum(blew_up(runs[training]["loss"]) for training in after)
    numbers.append(
        Number(f"{plan.shown} cut after: trainings of {len(after)} that blow up", len(after), ups)
    )
    for method in METHODS:
        growth = [runs[training]["growth"][-1] for training in plan.followed(method)]
        what = f"{method}: growth of the weights that leave inactive units"
        numbers.append(Number(what, 1, statistics.fmean(growth)))
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
    for training in plan.cured():
        if training.method == method:
            backprop = Training(**{**asdict(training), "method": "backprop"})
            lead = 100 * (runs[training]["accuracy"] - runs[backprop]["accuracy"])
            found.setdefault((training.network, training.loss, training.lr), []).append(lead)
    return found


def draw(plan: Plan, runs: Runs[Training], data: DataSet) -> Figure:
    title = (
        "Strict (η = 0.1, n = 20) with updates at v and at vhat, cut after and before the "
        f"activation\n{data.described(plan.steps, BATCH_SIZE)}"
    )
    figure, axes = panels(2, 4, (13, 6.2), title)
    loss, growth, optimizers, lead, *swept = axes
    for method in METHODS:
        for k, training in enumerate(plan.followed(method)):
            style = _style(method, label=method if k == 0 else None)
            found = runs[training]
            loss.plot(found["loss"], **{**style, "linewidth": 0.8})
            growth.plot(range(0, plan.steps, EVERY), found["growth"], **style)
    shown = f"{plan.shown}, cross-entropy, lr {max(plan.cured_lr):g}"
    loss.set(xlabel="training step", ylabel="loss", yscale="log", title=shown)
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
    halved = dict(zip(*reversed(lead.get_legend_handles_labels()), strict=True))[HALVED]
    handles, labels = [*handles, halved], [*labels, HALVED]
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def draw_optimizers(axes: Axes, plan: Plan, runs: Runs[Training]) -> None:
    """Panel C: a point for each seed."""
    for offset, method in enumerate(METHODS):
        for x, optimizer in enumerate(OPTIMIZERS):
            values = _accuracies(runs, plan.optimized(method, optimizer))
            places = [x + 0.15 * (offset - 1.5)] * len(values)
            axes.plot(places, values, **{**_style(method), "linestyle": "", "marker": "o"}, ms=4)
    names = ["SGD" if name == SGD else name.replace(", eps ", "\n") for name in OPTIMIZERS]
    axes.set_xticks(range(len(names)), names, fontsize=7)
    axes.set(
        xlabel="Adam: its eps; SGD: momentum 0.9, lr 0.05",
        ylabel="test accuracy (%)",
        title=f"{plan.swept}, cross-entropy",
    )


def draw_leads(axes: Axes, plan: Plan, runs: Runs[Training]) -> None:
    """Panel D: a point for each network, loss, learning rate and seed."""
    place = {where: x for x, where in enumerate(leads(plan, runs, CURES[0]))}
    for offset, method in enumerate((*CURES, HALVED)):
        style = {**_style(method, label=method), "linestyle": "", "marker": "o"}
        for where, values in leads(plan, runs, method).items():
            axes.plot([place[where] + 0.25 * (offset - 1)] * len(values), values, ms=3, **style)
            style["label"] = None
    axes.axhline(0, **_style("backprop"))
    axes.axhline(-1.5, color="0.6", linewidth=0.8)
    names = [f"{name}, {SHORT[loss]}, {lr:g}" for name, loss, lr in place]
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    axes.set_yscale("symlog", linthresh=5)
    axes.set_yticks([-50, -10, -5, 0, 5], ["-50", "-10", "-5", "0", "5"])
    axes.set(ylabel="above backprop (points)", title=f"seeds: {plan.seeds}")


def draw_swept(axes: Axes, activation: str, plan: Plan, runs: Runs[Training]) -> None:
    """Panels E to H: the mean of the seeds; squared error dotted."""
    for loss, method in itertools.product(LOSSES, METHODS):
        values = [
            statistics.fmean(_accuracies(runs, plan.swept_at(activation, loss, lr, method)))
            for lr in plan.lr
        ]
        style = _style(method)
        if loss == "squared error":
            style["linestyle"] = ":"
        marker = "o" if loss == "cross-entropy" else "s"
        axes.plot(range(len(plan.lr)), values, marker=marker, ms=3, **style)
    axes.set_xticks(range(len(plan.lr)), [f"{lr:g}" for lr in plan.lr])
    axes.set(
        xlabel="learning rate (dotted: squared error)",
        ylabel="test accuracy (%)",
        ylim=(0, 100),
        title=f"{activation}, {plan.swept}",
    )


def _accuracies(runs: Runs[Training], trainings: Sequence[Training]) -> list[float]:
    return [100 * runs[training]["accuracy"] for training in trainings]


def _style(method: str, label: str | None = None) -> dict[str, Any]:
    found = ALL_METHODS[method]
    return {"color": found.colour, "linestyle": found.style, "label": label}
