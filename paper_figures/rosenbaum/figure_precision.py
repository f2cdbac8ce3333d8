"""Precision: what round-off leaves of Strict's updates, computed in three ways.

The error of each layer's update against the exact iteration, by layer (A, E: at the first step of
training, dashed at the last), and that of layer 1 by the number of iterations n (B, F), by the
step of training (C, G) and, nudged, by beta (D, H), for the paper's network and loss and for 20
layers of tanh. The plain
iteration takes errors as differences of predictions and beliefs that nearly equal them, and what is
rounded off these stays: all of layer 1's update in float32, and on deep networks in float64 too.
torch2pc iterates how far the beliefs have moved, subtracts nothing large, and is right in float32.

The exact iteration is torch2pc's in float64. An update that is zero, as no error has come so far
down, has no relative error. A nudged update, (update(beta) - update(-beta)) / (2 beta), goes to
backpropagation's gradient as beta goes to 0, if round-off leaves it. In a long relaxation a ReLU or
a maximum whose decision is close may switch one iteration sooner in one type than in the other; that
is the largest error there.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from torch import Tensor, nn

from paper_figures.data import Batch, DataSet, load_digits
from paper_figures.nets import mnist_net
from paper_figures.plain import Plain
from paper_figures.plotting import letter, panels
from paper_figures.progress import track
from paper_figures.report import Number, Options, save, yes
from paper_figures.training import relative_error, squared_error, weights_of
from torch2pc import PCInfer
from torch2pc.graph.network import Network
from torch2pc.inference.strict import strict

DOWNLOADS = ("mnist",)
SECONDS = 20, 200

ETA, N, BATCH_SIZE, LEARNING_RATE = 0.1, 20, 300, 0.002
NS = [5, 7, 10, 14, 20, 28, 40, 57, 80, 113, 160, 226]
BETAS = [1.0, 0.1, 1e-2, 1e-4, 1e-6]
PLAIN_32, PLAIN_64, TORCH2PC_32 = "plain, float32", "plain, float64", "torch2pc, float32"

# Okabe and Ito's vermillion, blue and green; the marks tell them apart in grey and on one another.
LOOKS = {
    PLAIN_32: dict(color="#D55E00", marker="s", markersize=6, fillstyle="none"),
    PLAIN_64: dict(color="#0072B2", marker="^", markersize=4),
    TORCH2PC_32: dict(color="#009E73", marker="o", markersize=3),
}


def deep_mlp(depth: int = 20, width: int = 64) -> nn.Sequential:
    """``depth`` layers with tanh for images of shape (batch, 1, 28, 28), weights by Xavier."""
    sizes = [784, *[width] * (depth - 1), 10]
    model = nn.Sequential()
    for l in range(depth):
        linear = nn.Linear(sizes[l], sizes[l + 1])
        nn.init.xavier_normal_(linear.weight)
        first = [nn.Flatten()] if l == 0 else []
        last = [] if l == depth - 1 else [nn.Tanh()]
        model.append(nn.Sequential(*first, linear, *last))
    return model


# Each network with the error that its updates may have: rounding vhat can switch a ReLU or a maximum.
NETWORKS = {"mnist_net": (mnist_net, 1e-3), "20 layers of tanh": (deep_mlp, 1e-5)}


@dataclass
class Errors:
    """The relative errors of one way of computing the updates."""

    by_n: list[list[float]] = field(default_factory=list)
    """At the first step of training: (numbers of iterations, layers)."""
    by_step: list[list[float]] = field(default_factory=list)
    """After N iterations: (steps of training, layers)."""
    by_beta: list[list[float]] = field(default_factory=list)
    """At the first step of training, nudged: (BETAS, layers)."""


def run(options: Options) -> list[Number]:
    data = load_digits(options.data)
    ns = NS[: options.pick(quick=5, default=8, full=len(NS))]
    steps, every = options.pick(quick=(1, 1), default=(40, 20), full=(400, 20))
    measured = range(0, steps + 1, every)
    batch_size = options.pick(quick=50, default=100, full=BATCH_SIZE)
    errors = {name: errors_of(name, data, ns, measured, batch_size, options) for name in NETWORKS}
    numbers = [
        number for name in NETWORKS for number in numbers_of(name, errors[name], NETWORKS[name][1])
    ]
    numbers += [from_backprop(name, data, batch_size, options) for name in NETWORKS]
    save(
        options,
        "figure_precision",
        draw(errors, ns, measured, data.described(steps, batch_size)),
        data=data.summary(),
        settings={
            "LossFun": squared_error.__name__,
            "eta": ETA,
            "n": N,
            "batch_size": batch_size,
            "trained by": "Strict, Adam",
            "learning_rate": LEARNING_RATE,
            "numbers of iterations": ns,
            "betas": BETAS,
            "steps": list(measured),
        },
        series={
            name: {way: vars(found) for way, found in of_network.items()}
            for name, of_network in errors.items()
        },
        numbers=numbers,
    )
    return numbers


def errors_of(
    name: str,
    data: DataSet,
    ns: Sequence[int],
    measured: Sequence[int],
    batch_size: int,
    options: Options,
) -> dict[str, Errors]:
    """Train the network by Strict and measure the errors on the batches that it meets."""
    torch.manual_seed(options.seed)
    model = NETWORKS[name][0]().to(options.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    found = {way: Errors() for way in LOOKS}
    batches = data.train_batches(measured[-1] + 1, batch_size, options.seed, options.device)
    for step, batch in enumerate(track(batches, f"precision: {name}", measured[-1] + 1)):
        if step == 0:
            for way, of_way in relative_errors(model, batch, ns).items():
                found[way].by_n += of_way
            for way, of_way in nudged_errors(model, batch).items():
                found[way].by_beta += of_way
        if step in measured:
            for way, of_way in relative_errors(model, batch, [N]).items():
                found[way].by_step += of_way
        PCInfer(model, squared_error, batch.X, batch.labels, "Strict", ETA, N)
        optimizer.step()
    return found


def relative_errors(
    model: nn.Sequential, batch: Batch, ns: Sequence[int]
) -> dict[str, list[list[float]]]:
    """Each way's errors against the exact iteration, (ns, layers); not a number where that is 0."""
    precise, precise_batch = in_float64(model, batch)
    exact = torch2pc_updates(precise, precise_batch, ns)
    ways = {
        PLAIN_32: plain_updates(model, batch, ns),
        PLAIN_64: plain_updates(precise, precise_batch, ns),
        TORCH2PC_32: torch2pc_updates(model, batch, ns),
    }
    return {way: errors_against(exact, found) for way, found in ways.items()}


def nudged_errors(model: nn.Sequential, batch: Batch) -> dict[str, list[list[float]]]:
    """The same for nudged updates after N iterations, (BETAS, layers)."""
    precise, precise_batch = in_float64(model, batch)
    exact = nudged_updates(precise, precise_batch)
    ways = {
        PLAIN_32: plain_nudged_updates(model, batch),
        PLAIN_64: plain_nudged_updates(precise, precise_batch),
        TORCH2PC_32: nudged_updates(copy.deepcopy(model), batch),
    }
    return {way: errors_against(exact, found) for way, found in ways.items()}


def errors_against(
    exact: Sequence[Sequence[Tensor]], found: Sequence[Sequence[Tensor]]
) -> list[list[float]]:
    """The relative error of each layer in each row."""
    return [
        [
            relative_error(update, right) if right.any() else math.nan
            for update, right in zip(*of_row, strict=True)
        ]
        for of_row in zip(found, exact, strict=True)
    ]


def in_float64(model: nn.Sequential, batch: Batch) -> tuple[nn.Sequential, Batch]:
    return copy.deepcopy(model).double(), Batch(batch.X.double(), batch.labels)


def nudged_updates(model: nn.Sequential, batch: Batch) -> list[list[Tensor]]:
    """The weights' updates of torch2pc for each beta; they are left in ``.grad``."""
    found = []
    for beta in BETAS:
        PCInfer(model, squared_error, batch.X, batch.labels, "Strict", ETA, N, nudge=beta)
        found.append([weight.grad for weight in weights_of(model)])
    return found


def plain_nudged_updates(model: nn.Sequential, batch: Batch) -> list[list[Tensor]]:
    """The same of the plain iteration."""
    weights, found = weights_of(model), []
    for beta in BETAS:
        sides = []
        for sign in 1, -1:
            nudged = partial(_times, sign * beta)
            plain = Plain(model, nudged, batch, ETA)
            for _ in range(N):
                plain.step()
            updates = plain.updates(plain.v)
            sides.append([updates[weight] for weight in weights])
        found.append([(a - b) / (2 * beta) for a, b in zip(*sides, strict=True)])
    return found


def _times(beta: float, yhat: Tensor, labels: Tensor) -> Tensor:
    return beta * squared_error(yhat, labels)


def from_backprop(name: str, data: DataSet, batch_size: int, options: Options) -> Number:
    """How far a nudge of 1e-6 is from backpropagation in float32, at equilibrium (ErrorBased)."""
    torch.manual_seed(options.seed)
    model = NETWORKS[name][0]().to(options.device)
    batch = next(data.train_batches(1, batch_size, options.seed, options.device))
    precise, precise_batch = in_float64(model, batch)
    PCInfer(precise, squared_error, precise_batch.X, precise_batch.labels, "Exact")
    nudge: dict[str, Any] = dict(nudge=BETAS[-1], update_at="vhat")
    PCInfer(model, squared_error, batch.X, batch.labels, "ErrorBased", 1.0, 3, **nudge)
    pairs = zip(weights_of(model), weights_of(precise), strict=True)
    largest = max([relative_error(a.grad, b.grad) for a, b in pairs])
    # Rounding vhat may switch a ReLU or a maximum.
    label = f"{name}, nudged by {BETAS[-1]:g} in float32: largest error against backprop"
    return Number(label, 0, largest, NETWORKS[name][1], check=True)


def torch2pc_updates(model: nn.Sequential, batch: Batch, ns: Sequence[int]) -> list[list[Tensor]]:
    """The weights' updates of torch2pc after each number of iterations, in the model's type."""
    network = Network(model, squared_error, batch.X, batch.labels)
    relaxation, weights, found, done = strict(network, ETA), weights_of(model), [], 0
    with network.replaying():
        for n in ns:
            relaxation.run(n - done)
            _, updates = relaxation.updates()
            found.append([updates[weight] for weight in weights])
            done = n
    return found


def plain_updates(model: nn.Sequential, batch: Batch, ns: Sequence[int]) -> list[list[Tensor]]:
    """The same of the plain iteration."""
    plain, weights, found, done = Plain(model, squared_error, batch, ETA), weights_of(model), [], 0
    for n in ns:
        for _ in range(n - done):
            plain.step()
        updates = plain.updates(plain.v)
        found.append([updates[weight] for weight in weights])
        done = n
    return found


def numbers_of(name: str, errors: dict[str, Errors], tolerance: float) -> list[Number]:
    """The layers' errors at the first and the last step, and what holds on any data set."""
    numbers = []
    for place, when in (0, "first step"), (-1, "last step"):
        layers = range(len(errors[TORCH2PC_32].by_step[place]))
        if len(layers) > 5:
            layers = range(0, len(layers), 5)
        for way, found in errors.items():
            numbers += [
                Number(
                    f"{name}, {when}, {way}: layer {l + 1}",
                    0,
                    found.by_step[place][l],
                    tolerance if way == TORCH2PC_32 else None,
                )
                for l in layers
            ]
    ours = errors[TORCH2PC_32]
    largest, at_any_n, at_any_beta = (
        max(error for of_layers in found for error in of_layers if not math.isnan(error))
        for found in (ours.by_step, ours.by_n, ours.by_beta)
    )
    at_first = errors[PLAIN_32].by_step[0][0]
    return [
        *numbers,
        Number(f"{name}, {TORCH2PC_32}: largest error", 0, largest, tolerance, check=True),
        Number(f"{name}, {TORCH2PC_32}: largest error at any n", 0, at_any_n),
        Number(f"{name}, {TORCH2PC_32}: largest error at any nudge", 0, at_any_beta, tolerance),
        Number(
            f"{name}, {PLAIN_32}: layer 1 off by more than 5 % at the first step",
            "yes",
            yes(at_first > 0.05),
            check=True,
        ),
    ]


def draw(
    errors: dict[str, dict[str, Errors]], ns: Sequence[int], measured: Sequence[int], data: str
) -> Figure:
    title = (
        "Error of Strict's updates against the exact iteration: "
        f"squared error, η = {ETA}, n = {N}\n{data}; "
        "dotted: nothing of the update is right; dashed: after training"
    )
    figure, axes = panels(len(errors), 4, (12, 5.6), title)
    for row, (name, of_network) in enumerate(errors.items()):
        by_layer, by_n, by_step, by_beta = axes[4 * row : 4 * row + 4]
        for way, found in of_network.items():
            look = LOOKS[way]
            layers = range(1, len(found.by_step[0]) + 1)
            by_layer.plot(layers, found.by_step[0], label=way, **look)
            by_layer.plot(layers, found.by_step[-1], linestyle="--", alpha=0.55, **look)
            by_n.plot(ns, [of_layers[0] for of_layers in found.by_n], **look)
            by_step.plot(measured, [of_layers[0] for of_layers in found.by_step], **look)
            by_beta.plot(BETAS, [of_layers[0] for of_layers in found.by_beta], **look)
        by_layer.set(title="by layer", xlabel="layer", ylabel=f"{name}\nrelative error")
        by_layer.xaxis.get_major_locator().set_params(integer=True)
        by_n.set(title="layer 1, by iterations", xlabel="iterations n", xscale="log")
        shown = [n for n in (5, 10, 20, 40, 80, 160) if n in ns]
        by_n.set_xticks(shown, labels=map(str, shown), minor=False)
        by_n.xaxis.set_minor_locator(NullLocator())
        by_n.set_xlim(ns[0] * 0.9, ns[-1] * 1.1)
        by_step.set(title="layer 1, by training", xlabel="training step")
        by_beta.set(title="layer 1, nudged", xlabel="nudge β", xscale="log")
        by_beta.invert_xaxis()
    for panel, name in zip(axes, "ABCDEFGH", strict=True):
        _in_powers_of_ten(panel)
        letter(panel, name)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


def _in_powers_of_ten(panel: Axes) -> None:
    panel.set(yscale="log", ylim=(1e-17, 1e2))
    panel.axhline(1, color="black", linewidth=0.8, linestyle=":")
