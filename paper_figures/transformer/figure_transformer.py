"""A transformer by predictive coding, with its beliefs between the blocks and inside them.

A character model of two blocks (width 32, two heads, contexts of 32) learns two texts, 16 stretches an
update, with Adam. Beliefs lie between the blocks, or also at q, k, v, the attention's output and the
perceptron's hidden layer of each block. Every method makes the same number of updates from the same
weights on the same stretches. Its learning rate is the best of one grid by the bits a character on
the held-out tenth of the first text, for the first seed; another tenth is the test.

The loss is the cross-entropy summed over all characters, times a weight that is part of each method: it
weighs against the squared errors of the layers, and how far beliefs move depends on it. (Adam does
not mind that the updates are as much smaller.) In the rows "divergence", attention scores are
beliefs too, and the energy between them and their prediction is the divergence of the two softmaxes.

Panels: bits a character above backprop's, in percent of these, of each method with beliefs between the blocks
(A) and inside them (B), a dot for each seed and text; the processor's time of an update, means of these (C).

By default one seed learns one text for a few updates. With ``--full`` three seeds learn both, in most
of an hour on one core. Finished trainings are kept in ``figure_transformer_TEXT_runs.json`` beside
the figure, so that the command goes on where it was stopped. Stopped by Ctrl-C, it draws what there is.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

import torch2pc
from paper_figures.plotting import letter, panels
from paper_figures.report import Number, Options, save
from paper_figures.runs import Runs
from paper_figures.training import quietly
from paper_figures.transformer.network import (
    Text,
    bits_per_character,
    layers,
    load_text,
    summed_cross_entropy,
)
from torch2pc import PCInfer, energies, steps

DEFAULT = False

TEXTS = ("shakespeare", "federalist")
RATES = (0.01, 0.03)
SEEDS = 3
BACKPROP, ONE_SWEEP = "backprop", "Strict, one sweep"
MARKS: dict[str, dict[str, Any]] = {
    text: dict(marker=mark, color=colour, markersize=4, fillstyle="none", ls="")
    for text, mark, colour in zip(TEXTS, "os", ("#0072B2", "#D55E00"), strict=True)
}


class Method(NamedTuple):
    """How errors are inferred; ``weight`` is the loss's against the errors of the layers."""

    ErrType: str
    eta: Any = 1.0
    n: int = 1
    weight: float = 1.0


METHODS = {
    BACKPROP: Method("Exact"),
    "FixedPred": Method("FixedPred", 0.5, 12),
    "Strict, η .1": Method("Strict", 0.1, 8),
    "Strict, η .002": Method("Strict", 0.002, 8),
    "Strict, three sweeps": Method("Strict", steps.Descent(0.5, sweep="down"), 3, 0.1),
    ONE_SWEEP: Method("Strict", steps.Descent(0.9, sweep="down"), 1, 0.1),
    "Multipliers": Method("Multipliers", "auto", 5, 0.01),
    "ErrorBased": Method("ErrorBased", "auto", 5, 0.01),
    "Equilibrium": Method("Equilibrium", 0.1, 5, 0.01),
}
BETWEEN, INSIDE, SCORES = "between blocks", "inside", "inside, with scores"
DIVERGENCE = ", divergence"
ROWS = {
    BETWEEN: {name: (BETWEEN, name) for name in METHODS},
    INSIDE: {
        **{name: (INSIDE, name) for name in METHODS},
        ONE_SWEEP + ", scores": (SCORES, ONE_SWEEP),
        ONE_SWEEP + DIVERGENCE: (SCORES, ONE_SWEEP + DIVERGENCE),
    },
}


@dataclass(frozen=True)
class Training:
    """One training: where beliefs lie, by which method, at which rate."""

    places: str
    method: str
    lr: float
    seed: int
    updates: int

    def key(self, data: str) -> str:
        settings = str(METHODS[self.method.removesuffix(DIVERGENCE)])
        return json.dumps([*asdict(self).values(), settings, data, torch2pc.__version__])


def train(training: Training, text: Text, options: Options) -> dict[str, Any]:
    """Bits a character on the held-out part and on the test part, and seconds an update."""
    method = METHODS[training.method.removesuffix(DIVERGENCE)]
    model = layers(len(text.letters), training.places, training.seed).to(options.device)
    asked: dict[str, Any] = {}
    if training.method.endswith(DIVERGENCE):
        scores = [name for name in model.names if name.endswith("scores")]
        asked = {"energies": {name: energies.Categorical(-1) for name in scores}}

    def loss(logits: Tensor, Y: Tensor) -> Tensor:
        return method.weight * summed_cross_entropy(logits, Y)

    optimizer = torch.optim.Adam(model.parameters(), training.lr)
    start = time.process_time()
    with quietly():
        for X, Y in text.batches(training.updates, training.seed):
            X, Y = X.to(options.device), Y.to(options.device)
            PCInfer(model, loss, X, Y, method.ErrType, method.eta, method.n, **asked)
            optimizer.step()
    seconds = (time.process_time() - start) / training.updates
    model.to("cpu")
    bits = {part: bits_per_character(model, text, part) for part in ("held_out", "test")}
    return {**bits, "seconds": seconds}


def run(options: Options) -> list[Number]:
    updates, seeds = options.pick((2, 1), (20, 1), (150, SEEDS))
    texts = [load_text(name) for name in options.pick(TEXTS[:1], TEXTS[:1], TEXTS)]
    rates = RATES if options.full else RATES[:1]
    # A file for each text, as each of these writes all that it knows.
    runs = {
        text.name: Runs(f"figure_transformer_{text.name}", train, text, options) for text in texts
    }
    first = runs[TEXTS[0]]

    def trainings(places: str, method: str, lr: float) -> list[Training]:
        return [Training(places, method, lr, options.seed + k, updates) for k in range(seeds)]

    tried = {
        which: [trainings(*which, lr)[0] for lr in rates]
        for of in ROWS.values()
        for which in of.values()
    }
    first.finish(training for of in tried.values() for training in of)
    # (Not a number, where training is lost, is the worst.)
    best = {
        which: min(
            of, key=lambda t: (first[t]["held_out"] != first[t]["held_out"], first[t]["held_out"])
        ).lr
        for which, of in tried.items()
    }
    chosen = {which: trainings(*which, lr) for which, lr in best.items()}
    try:
        for text in texts:  # one seed after the other
            of_seeds = zip(*chosen.values(), strict=True)
            runs[text.name].finish(training for of_seed in of_seeds for training in of_seed)
    except KeyboardInterrupt:
        print("stopped: the picture has what is there")
    found: Outcomes = {
        where: {
            row: {
                (text.name, training.seed): runs[text.name][training]
                for text in texts
                for training in chosen[which]
                if training in runs[text.name]
            }
            for row, which in of.items()
        }
        for where, of in ROWS.items()
    }
    numbers = [
        Number(
            f"{where}, {row}: % of bits above backprop's",
            "-",
            round(statistics.fmean(shares.values()), 2),
        )
        for where, of in found.items()
        for row, shares in above(of).items()
        if shares
    ]
    save(
        options,
        "figure_transformer",
        draw(found, updates),
        data={text.name: {"characters": 90_000} for text in texts},
        settings={
            "updates": updates,
            "seeds": seeds,
            "rates": rates,
            "best rates": {", ".join(which): lr for which, lr in best.items()},
            "methods": {name: str(method) for name, method in METHODS.items()},
        },
        series={
            "bits a character and seconds an update": {
                where: {row: [[*which, o] for which, o in of.items()] for row, of in rows.items()}
                for where, rows in found.items()
            }
        },
        numbers=numbers,
    )
    return numbers


# By where beliefs lie and by row, what came of each training, by its text and seed.
Row = dict[tuple[str, int], dict[str, Any]]
Outcomes = dict[str, dict[str, Row]]


def above(rows: dict[str, Row]) -> dict[str, dict[tuple[str, int], float]]:
    """By how many percent each training's bits are above those of backprop's, of the same text and seed."""
    base = rows[BACKPROP]
    return {
        row: {
            which: 100 * (outcome["test"] / base[which]["test"] - 1)
            for which, outcome in of.items()
            if which in base
        }
        for row, of in rows.items()
    }


def draw(found: Outcomes, updates: int) -> Figure:
    figure, (*axes, times) = panels(
        1,
        3,
        (11, 3.6),
        "A character model of two transformer blocks: bits a character on the test text above backprop's, "
        f"after {updates} updates",
    )
    for one, (where, rows) in zip(axes, found.items(), strict=True):
        draw_shares(one, rows)
        one.set(title=f"beliefs {where}" + (" blocks" if where == INSIDE else ""))
    draw_times(times, found)
    for one, name in zip([*axes, times], "ABC", strict=True):
        letter(one, name)
    return figure


def draw_shares(axes: Axes, rows: dict[str, Row]) -> None:
    """A dot for each training, and the mean in figures."""
    bits = statistics.fmean(outcome["test"] for outcome in rows[BACKPROP].values())
    for place, shares in enumerate(above(rows).values()):
        for (text, _), share in shares.items():
            axes.plot(share, place, **MARKS[text])
        if shares:
            mean, at = f"{statistics.fmean(shares.values()):+.1f}", ("axes fraction", "data")
            axes.annotate(mean, (1.01, place), xycoords=at, va="center", fontsize=7)
    for text, mark in MARKS.items():
        axes.plot([], [], **mark, label=text)
    axes.legend(fontsize=7)
    axes.axvline(0, color="0.6", linewidth=1)
    axes.set_xscale("symlog", linthresh=1)
    axes.margins(x=0.1)
    axes.set_yticks(range(len(rows)), [*rows])
    axes.invert_yaxis()
    axes.set(xlabel=f"% above backprop's {bits:.2f} bits")


def draw_times(axes: Axes, found: Outcomes) -> None:
    """Milliseconds an update of the processor's time."""
    for (where, rows), mark in zip(found.items(), "os", strict=True):
        means = {
            row: 1000 * statistics.fmean(outcome["seconds"] for outcome in of.values())
            for row, of in rows.items()
            if row in METHODS and of
        }
        places = [[*METHODS].index(row) for row in means]
        axes.plot([*means.values()], places, mark, fillstyle="none", label=where)
    axes.set_yticks(range(len(METHODS)), [*METHODS])
    axes.invert_yaxis()
    axes.set(xlabel="milliseconds an update", xscale="log", title="time")
    axes.legend(fontsize=7)
