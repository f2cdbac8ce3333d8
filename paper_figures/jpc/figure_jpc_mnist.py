"""A classifier trained by Strict with short, small steps, against backprop, step by step.

The network 784-300-300-10 with tanh learns MNIST from one-hot targets and squared errors. Its
beliefs take so short a way (η n = 0.06) that the error shrinks by about that factor from each layer
to the one below, as the Binomial weights of `torch2pc.fixed_pred` say it must; but Adam divides each
update by its size, so that the two networks learn alike.

Source of the settings and of the accuracies called the paper's: the tutorial "JPC from Scratch", on
the library of F. Innocenti and others, JPC: Flexible Inference for Predictive Coding Networks in
JAX, arXiv:2412.03676 (2024).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from paper_figures.data import DataSet, load_digits
from paper_figures.plotting import METHODS, panels
from paper_figures.progress import track
from paper_figures.report import Number, Options, save, yes
from paper_figures.training import Setup, backprop_step, half_squared_error, test_accuracy
from torch2pc import PCInfer

DOWNLOADS = ("mnist",)
SECONDS = 8, 20

PAPER_ACCURACY = {50: 72.7, 100: 76.3, 200: 89.1, 300: 91.3, 400: 93.0, 500: 93.8}
# The steps from which on the paper's accuracy no longer depends on the first few batches.
SETTLED = (300, 400, 500)

PIXEL_MEAN, PIXEL_STD = 0.1307, 0.3081
BATCH_SIZE = 64


class Normalise(nn.Module):
    """Pixels in [0, 1] to MNIST's mean 0 and standard deviation 1."""

    def forward(self, X: Tensor) -> Tensor:
        return (X - PIXEL_MEAN) / PIXEL_STD


def jpc_net() -> nn.Sequential:
    """Three layers, for images of shape (batch, 1, 28, 28)."""
    return nn.Sequential(
        nn.Sequential(Normalise(), nn.Flatten(), nn.Linear(784, 300), nn.Tanh()),
        nn.Sequential(nn.Linear(300, 300), nn.Tanh()),
        nn.Linear(300, 10),
    )


def run(options: Options) -> list[Number]:
    data = load_digits(options.data)
    # The tutorial's energy is 2/batch of ours, and its step size is 0.1.
    setup = Setup(
        ErrType="Strict",
        eta=2 * 0.1 / BATCH_SIZE,
        n=20,
        LossFun=half_squared_error,
        steps=options.pick(quick=100, default=200, full=500),
        batch_size=BATCH_SIZE,
        learning_rate=0.001,
    )
    torch.manual_seed(options.seed)
    accuracy = train_both(jpc_net(), data, setup, options)

    reached = {step: value for step, value in PAPER_ACCURACY.items() if step <= setup.steps}
    settled = [step for step in SETTLED if step <= setup.steps]
    numbers = [
        Number(f"accuracy at step {step} (%)", value, accuracy["PC"][step])
        for step, value in reached.items()
    ]
    if settled:
        near = all(accuracy["PC"][step] >= PAPER_ACCURACY[step] - 1 for step in settled)
        numbers.append(Number("steps 300-500: within a point or better", "yes", yes(near)))
    title = (
        f"Strict (η = {setup.eta:.3g}, n = {setup.n}) against backprop\n"
        f"{data.described(setup.steps, setup.batch_size)}"
    )
    save(
        options,
        "figure_jpc_mnist",
        draw(accuracy, title),
        data=data.summary(),
        settings=setup.summary(),
        series={"test accuracy (%) at step": accuracy, "paper": PAPER_ACCURACY},
        numbers=numbers,
    )
    return numbers


def train_both(
    model: nn.Sequential, data: DataSet, setup: Setup, options: Options
) -> dict[str, dict[int, float]]:
    """The accuracy on all test images (%) by training step, of Strict and of backprop."""
    PC_model = model.to(options.device)
    BP_model = copy.deepcopy(PC_model)
    PC_optimizer = torch.optim.Adam(PC_model.parameters(), lr=setup.learning_rate)
    BP_optimizer = torch.optim.Adam(BP_model.parameters(), lr=setup.learning_rate)

    accuracy: dict[str, dict[int, float]] = {"PC": {}, "BP": {}}
    batches = data.train_batches(setup.steps, setup.batch_size, options.seed, options.device)
    for step, batch in enumerate(track(batches, "jpc_mnist", setup.steps), start=1):
        PCInfer(PC_model, setup.LossFun, batch.X, batch.labels, setup.ErrType, setup.eta, setup.n)
        PC_optimizer.step()
        backprop_step(BP_model, BP_optimizer, setup.LossFun, batch)
        if step == 1 or step % 10 == 0:
            accuracy["PC"][step] = 100 * test_accuracy(PC_model, data, options.device)
            accuracy["BP"][step] = 100 * test_accuracy(BP_model, data, options.device)
    return accuracy


def draw(accuracy: Mapping[str, Mapping[int, float]], title: str) -> Figure:
    figure, (axes,) = panels(1, 1, (5.6, 3.4), title)
    for who, (colour, style) in METHODS.items():
        curve = accuracy[who]
        axes.plot(curve.keys(), curve.values(), color=colour, linestyle=style, label=who)
    axes.plot(PAPER_ACCURACY.keys(), PAPER_ACCURACY.values(), "ko", label="paper (PC)")
    axes.set(xlabel="training step", ylabel="accuracy on all test images (%)", ylim=(None, 100))
    axes.legend(loc="lower right")
    return figure
