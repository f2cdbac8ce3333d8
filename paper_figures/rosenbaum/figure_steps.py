"""Step rules: how many iterations each takes to come near equilibrium.

The distance from equilibrium (the length of the energy's gradient in units of the errors, 1 at the
start, 0 there) against the iterations of Strict, for the paper's network and loss (A) and for 10 layers
of tanh (B), on one batch, with fresh weights; and of ErrorBased, for comparison. An iteration costs one
pass up and one down with each rule (halving: one more up). In the paper's network units that switch,
of ReLUs and maxima, keep F's gradient from vanishing. Of 10 layers the error has to come down, which
takes an iteration each, or a single sweep.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from paper_figures.data import load_digits
from paper_figures.nets import mnist_net
from paper_figures.plotting import letter, panels
from paper_figures.progress import track
from paper_figures.report import Number, Options, save
from paper_figures.rosenbaum.figure_precision import deep_mlp
from paper_figures.training import squared_error
from torch2pc import follow, steps

DOWNLOADS = ("mnist",)
SECONDS = 15, 60

N, BATCH_SIZE, NEAR = 100, 50, 0.1


def adam(x: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam(x, lr=0.001)


# What is drawn: its ErrType and its rule.
RULES: dict[str, tuple[str, steps.Rule]] = {
    "descent, η = .1": ("Strict", steps.Descent(0.1)),
    "descent, η = .5": ("Strict", steps.Descent(0.5)),
    "sweep down, η = .1": ("Strict", steps.Descent(0.1, sweep="down")),
    "sweep down, η = .5": ("Strict", steps.Descent(0.5, sweep="down")),
    "momentum, η = .1, μ = .9": ("Strict", steps.Momentum(0.1, 0.9)),
    "Nesterov, η = .1, μ = .9": ("Strict", steps.Momentum(0.1, 0.9, nesterov=True)),
    "halving from η = 1": ("Strict", steps.Halving(1.0)),
    "Adam, .001": ("Strict", steps.Optim(adam)),
    "ErrorBased, η = .1": ("ErrorBased", steps.Descent(0.1)),
    "ErrorBased, η = .5": ("ErrorBased", steps.Descent(0.5)),
}
# A colour for each rule (Okabe and Ito's), dashed for the longer step, dotted for ErrorBased.
COLOURS = ("#000000", "#000000", "#0072B2", "#0072B2", "#D55E00", "#E69F00", "#CC79A7", "#56B4E9")
COLOURS += ("#009E73", "#009E73")
NETWORKS: dict[str, Callable[[], nn.Sequential]] = {
    "mnist_net": mnist_net,
    "10 layers of tanh": partial(deep_mlp, 10),
}


def run(options: Options) -> list[Number]:
    data = load_digits(options.data)
    n, batch_size = options.pick(quick=(12, 5), default=(40, 50), full=(N, BATCH_SIZE))
    batch = next(data.train_batches(1, batch_size, options.seed, options.device))
    series: dict[str, dict[str, list[float]]] = {}
    for name, make in NETWORKS.items():
        torch.manual_seed(options.seed)
        model, of_network = make().to(options.device), series.setdefault(name, {})
        for label, (ErrType, rule) in track(RULES.items(), f"steps: {name}"):
            record = follow(model, squared_error, batch.X, batch.labels, ErrType, rule, n)
            of_network[label] = record.distance.tolist()
    numbers = numbers_of(series)
    save(
        options,
        "figure_steps",
        draw(series, f"{data.name}, one batch of {batch_size}, fresh weights, squared error"),
        data=data.summary(),
        settings={"n": n, "batch_size": batch_size, "rules": {k: str(v) for k, v in RULES.items()}},
        series={"distance": series, f"iterations to {NEAR:.0%}": taken(series)},
        numbers=numbers,
    )
    return numbers


def iterations_to(distance: list[float], near: float) -> int | None:
    """The first iteration from which on the distance is at most ``near``, if any."""
    far = [k for k, d in enumerate(distance) if not d <= near]
    first = far[-1] + 1 if far else 0
    return first if first < len(distance) else None


def taken(series: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, int | None]]:
    """The iterations that each takes to come near."""
    return {
        name: {label: iterations_to(distance, NEAR) for label, distance in of_network.items()}
        for name, of_network in series.items()
    }


def numbers_of(series: dict[str, dict[str, list[float]]]) -> list[Number]:
    """What holds on any data set."""
    deep = series["10 layers of tanh"]
    above, below = (deep[f"descent, η = .{d}"][10] for d in (5, 1))
    swept = deep["sweep down, η = .5"][10]
    return [
        Number(
            "10 layers of tanh: η = .5 diverges together, and swept down is nearer than η = .1",
            "yes",
            "yes" if swept < below < above else "no",
            check=True,
        ),
    ]


def draw(series: dict[str, dict[str, list[float]]], data: str) -> Figure:
    title = f"Distance from equilibrium by the iterations of each step rule\n{data}"
    figure, axes = panels(1, len(series), (9.5, 4.2), title)
    for panel, name, (network, of_network) in zip(axes, "AB", series.items(), strict=True):
        for (label, distance), colour in zip(of_network.items(), COLOURS, strict=True):
            style = ":" if label.startswith("ErrorBased") else "-"
            style = "--" if label.endswith(".5") and style == "-" else style
            style = "-." if label.endswith(".5") and style == ":" else style
            panel.plot(distance, label=label, color=colour, linestyle=style, linewidth=1.2)
        panel.set(title=network, xlabel="iteration", ylabel="distance from equilibrium")
        panel.set(yscale="log", ylim=(1e-3, 3))
        letter(panel, name)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    return figure
