"""The perceptrons of PCX's benchmark: backprop, Strict and incremental predictive coding.

The network 784-128-128-128-10 learns MNIST or Fashion-MNIST for 25 epochs in batches of 128, pixels
scaled to [-1, 1]. Five rows, each with the settings that its authors found for it: backprop (BP) and
Strict (PC) with the squared error (SE) of one-hot targets or with cross-entropy (CE), and incremental
predictive coding (iPC), where the weights descend the energy with each single step of the beliefs. Errors
are summed over the batch. AdamW's learning rate climbs from lr to 1.1 lr in the first tenth of
the steps and goes down to 0.1 lr as a cosine. Beliefs descend with momentum, as published; the rows
called plain do without, and show what it does.

What is done otherwise than there:

- items end before the activation, so that beliefs are about what goes into it;
- what counts is the last epoch's accuracy, on all test images, as the mean of the seeds. The
  paper reports the best epoch's, chosen on the test images.

Source of the settings: the configuration files of PCX, of L. Pinchetti and others, Benchmarking
Predictive Coding Networks -- Made Simple, arXiv:2407.01163 (2024). The accuracies called the paper's
are quoted from memory of its table 1 and not verified.

By default it learns the 10 000 embedded digits, for 10 epochs, from one seed (from three with
``--full``), in a few minutes on one core. With ``--data`` it takes all of MNIST, and Fashion-MNIST too
if its files are in the folder's ``fashion-mnist``: about an hour for each seed and data set. Finished
trainings are kept in ``figure_pcx_benchmark_runs.json`` beside the figure.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional

import torch2pc
from paper_figures.data import (
    EMBEDDED_NAME,
    DataSet,
    fashion_folder,
    load_digits,
    load_idx,
)
from paper_figures.plotting import letter, panels
from paper_figures.report import Number, Options, save
from paper_figures.runs import Runs
from paper_figures.training import (
    backprop_step,
    half_squared_error,
    incremental_steps,
    test_accuracy,
)
from torch2pc import PCInfer, steps
from torch2pc.energy import Energy

DEFAULT = False
DOWNLOADS = ("mnist", "fashion")

BATCH_SIZE, WIDTH, SEEDS = 128, 128, 3
# Fewer of the embedded digits, so that they take minutes.
EPOCHS, EMBEDDED_EPOCHS = 25, 10
ACTIVATIONS = {
    "gelu": lambda: nn.GELU(approximate="tanh"),
    "leaky_relu": nn.LeakyReLU,
    "hard_tanh": nn.Hardtanh,
    "relu": nn.ReLU,
}


class Row(NamedTuple):
    """One row of the table: of backprop if n is 0, incremental if there is a belief's step a time."""

    loss: str
    activation: str
    lr: float
    weight_decay: float
    n: int = 0
    eta: float = 0
    momentum: float = 0


ROWS = {
    "MNIST": {
        "BP-SE": Row("SE", "gelu", 2.749e-4, 5.12e-3),
        "BP-CE": Row("CE", "hard_tanh", 2.810e-4, 1.48e-3),
        "PC-SE": Row("SE", "gelu", 2.969e-4, 3.55e-4, 8, 0.01053, 0.65),
        "PC-CE": Row("CE", "gelu", 2.996e-4, 3.31e-3, 5, 0.01828, 0.35),
        "iPC": Row("SE", "leaky_relu", 2.526e-4, 0.0325, 8, 0.8495, 0.35),
    },
    "Fashion-MNIST": {
        "BP-SE": Row("SE", "relu", 2.751e-4, 1.72e-4),
        "BP-CE": Row("CE", "hard_tanh", 2.716e-4, 8.73e-5),
        "PC-SE": Row("SE", "gelu", 2.972e-4, 1.84e-3, 5, 0.02607, 0.10),
        "PC-CE": Row("CE", "gelu", 2.771e-4, 8.40e-4, 5, 0.01313, 0.40),
        "iPC": Row("SE", "leaky_relu", 2.691e-4, 0.0116, 8, 0.7997, 0.25),
    },
}
PLAIN = ", plain"
for rows in ROWS.values():
    for name in "PC-SE", "PC-CE", "iPC":
        rows[name + PLAIN] = rows[name]._replace(momentum=0)
# Quoted from memory.
PAPER = {
    "MNIST": {"BP-SE": 98.29, "BP-CE": 98.07, "PC-SE": 98.26, "PC-CE": 98.11, "iPC": 98.45},
    "Fashion-MNIST": {"BP-SE": 89.48, "BP-CE": 89.04, "PC-SE": 89.58, "PC-CE": 89.16, "iPC": 89.90},
}
COLOURS = {
    "BP-SE": "#0072B2",
    "BP-CE": "#56B4E9",
    "PC-SE": "#D55E00",
    "PC-CE": "#E69F00",
    "iPC": "#009E73",
}


@dataclass(frozen=True)
class Training:
    """One training; ``benchmark`` says whose settings it has."""

    benchmark: str
    row: str
    seed: int
    steps: int

    def key(self, data: str) -> str:
        return json.dumps([*asdict(self).values(), data, torch2pc.__version__])


class Kept(steps.Momentum):
    """Momentum that goes on from call to call, where each makes one step of the beliefs."""

    def fresh(self) -> Kept:
        """The call works with this one."""
        return self

    def begin(self, energy: Energy) -> None:
        """From rest before the first call alone."""
        velocity = getattr(self, "_velocity", None)
        super().begin(energy)
        self._velocity = self._velocity if velocity is None else velocity


class Centre(nn.Module):
    """Pixels in [0, 1] to [-1, 1]."""

    def forward(self, X: Tensor) -> Tensor:
        return (X - 0.5) / 0.5


def network(activation: str) -> nn.Sequential:
    """784-128-128-128-10, cut before the activations; seed before calling."""
    layers = [
        nn.Sequential(ACTIVATIONS[activation](), nn.Linear(WIDTH, out))
        for out in (WIDTH, WIDTH, 10)
    ]
    return nn.Sequential(nn.Sequential(Centre(), nn.Flatten(), nn.Linear(784, WIDTH)), *layers)


def summed_cross_entropy(output: Tensor, labels: Tensor) -> Tensor:
    """Output (batch, classes), labels (batch,)."""
    return functional.cross_entropy(output, labels, reduction="sum")


LOSSES = {"SE": half_squared_error, "CE": summed_cross_entropy}


def share_of_lr(progress: float) -> float:
    """The learning rate's factor when this share of the steps is done."""
    if progress < 0.1:
        return 1 + progress
    return 0.1 + 0.5 * (1 + math.cos(math.pi * (progress - 0.1) / 0.9))


def train(training: Training, data: DataSet, options: Options) -> dict[str, Any]:
    """The test accuracy (%) after each epoch."""
    torch.manual_seed(training.seed)
    row = ROWS[training.benchmark][training.row]
    model, LossFun = network(row.activation).to(options.device), LOSSES[row.loss]
    optimizer = torch.optim.AdamW(model.parameters(), row.lr, weight_decay=row.weight_decay)
    is_incremental = training.row.startswith("iPC")
    updates = training.steps * (row.n if is_incremental else 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: share_of_lr(step / updates)
    )

    accuracy = []
    per_epoch = len(data.train_images) // BATCH_SIZE
    batches = data.train_batches(training.steps, BATCH_SIZE, training.seed, options.device)
    for step, batch in enumerate(batches, start=1):
        if is_incremental:
            rule = Kept(row.eta, row.momentum)
            for _ in incremental_steps(model, LossFun, batch, rule, row.n):
                optimizer.step()
                schedule.step()
        else:
            if row.n == 0:
                backprop_step(model, optimizer, LossFun, batch)
            else:
                rule = steps.Momentum(row.eta, row.momentum)
                PCInfer(model, LossFun, batch.X, batch.labels, "Strict", rule, row.n)
                optimizer.step()
            schedule.step()
        if step % per_epoch == 0 or step == training.steps:
            accuracy.append(100 * test_accuracy(model, data, options.device))
    return {"accuracy": accuracy}


def run(options: Options) -> list[Number]:
    sets = {"MNIST": load_digits(options.data)}
    fashion = fashion_folder(options.data)
    if fashion is not None:
        sets["Fashion-MNIST"] = load_idx(fashion)
    seeds = options.pick(1, 1, SEEDS)
    outcomes: dict[str, Outcomes] = {}
    for benchmark, data in sets.items():
        epochs = EMBEDDED_EPOCHS if data.name == EMBEDDED_NAME else EPOCHS
        steps = 8 if options.quick else epochs * (len(data.train_images) // BATCH_SIZE)
        runs = Runs("figure_pcx_benchmark", train, data, options)
        wanted = {
            row: [Training(benchmark, row, options.seed + k, steps) for k in range(seeds)]
            for row in ROWS[benchmark]
        }
        # One seed after the other, so that all rows are there when it is stopped.
        runs.finish(itertools.chain(*zip(*wanted.values(), strict=True)))
        outcomes[benchmark] = {
            row: [runs[training]["accuracy"] for training in trainings]
            for row, trainings in wanted.items()
        }
    numbers = [
        Number(
            f"{sets[benchmark].name}, {row}: test accuracy (%)",
            PAPER[benchmark][row.removesuffix(PLAIN)],
            statistics.fmean(curve[-1] for curve in curves),
        )
        for benchmark, rows in outcomes.items()
        for row, curves in rows.items()
    ]
    save(
        options,
        "figure_pcx_benchmark",
        draw(outcomes, sets),
        data={benchmark: data.summary() for benchmark, data in sets.items()},
        settings={
            "epochs": EPOCHS,
            "epochs of the embedded digits": EMBEDDED_EPOCHS,
            "batch_size": BATCH_SIZE,
            "seeds": seeds,
            "rows": {
                benchmark: {name: row._asdict() for name, row in ROWS[benchmark].items()}
                for benchmark in sets
            },
        },
        series={
            "test accuracy (%) by epoch, seeds": outcomes,
            "paper's, quoted from memory": PAPER,
        },
        numbers=numbers,
    )
    return numbers


Outcomes = dict[str, list[list[float]]]


def draw(outcomes: dict[str, Outcomes], sets: dict[str, DataSet]) -> Figure:
    figure, axes = panels(
        len(sets),
        2,
        (8.6, 0.7 + 3 * len(sets)),
        "Multi-layer perceptron 784-128-128-128-10 in the settings of PCX's benchmark: backprop (BP), "
        "Strict (PC), incremental (iPC)",
    )
    for (benchmark, rows), curves, ends in zip(
        outcomes.items(), axes[::2], axes[1::2], strict=True
    ):
        data = sets[benchmark]
        count = f"{len(data.train_images):,}".replace(",", " ")
        curves.set(title=f"{data.name} ({count} training images)")
        draw_curves(curves, rows)
        draw_ends(ends, rows, PAPER[benchmark])
    for one, name in zip(axes, "ABCD", strict=False):
        letter(one, name)
    return figure


def draw_curves(axes: Axes, rows: Outcomes) -> None:
    """The mean of the seeds by epoch."""
    for name, curves in rows.items():
        if name.endswith(PLAIN):
            continue
        means = [statistics.fmean(values) for values in zip(*curves, strict=True)]
        style = "--" if name.startswith("BP") else "-"
        axes.plot(range(1, len(means) + 1), means, style, color=COLOURS[name], label=name)
    axes.set(xlabel="epoch", ylabel="test accuracy (%)")
    axes.legend(loc="lower right")


def draw_ends(axes: Axes, rows: Outcomes, paper: dict[str, float]) -> None:
    """The last epoch's: a dot for each seed, and the paper's value as a line."""
    for place, (row, curves) in enumerate(rows.items()):
        ends = [curve[-1] for curve in curves]
        colour = COLOURS[row.removesuffix(PLAIN)]
        axes.plot([place] * len(ends), ends, "o", color=colour, ms=4, alpha=0.7)
        label = f"{statistics.fmean(ends):.2f}"
        axes.annotate(
            label, (place, max(ends)), (0, 4), textcoords="offset points", ha="center", fontsize=7
        )
        axes.plot([place - 0.3, place + 0.3], [paper[row.removesuffix(PLAIN)]] * 2, color="black")
    axes.plot(
        [], [], color="black", label="paper, best epoch on all of the set\n(quoted from memory)"
    )
    axes.plot(
        [], [], "o", color="0.5", ms=4, label="here: last epoch, a dot a seed,\nmean in figures"
    )
    axes.set_xticks(range(len(rows)), [row.replace(", ", ",\n") for row in rows])
    axes.margins(y=0.15)
    axes.set(ylabel="test accuracy (%)")
    axes.legend(loc="best", fontsize=7)
