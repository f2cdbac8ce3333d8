"""Figure 1: Strict against backprop on MNIST.

Loss (A), accuracy (B), and the relative error (C) and angle (D) between the predictive coding
update and the gradient, layer by layer. Strict's updates are far from the gradient, the farther
the deeper the layer lies below the loss, and train as well.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from paper_figures.data import load_digits
from paper_figures.nets import mnist_net
from paper_figures.plotting import save_comparison
from paper_figures.report import Number, Options, yes
from paper_figures.training import (
    Setup,
    compare_with_backprop,
    layer_numbers,
    loss_numbers,
    squared_error,
)

DOWNLOADS = ("mnist",)

PAPER_LOSS = {
    "PC": {50: 0.039, 100: 0.021, 150: 0.018, 200: 0.0127, 250: 0.0093, 300: 0.0094, 350: 0.0079},
    "BP": {50: 0.038, 100: 0.020, 150: 0.015, 200: 0.0111, 250: 0.0081, 300: 0.0084, 350: 0.0072},
}
PAPER_ERROR = (0.97, 0.94, 0.77, 0.30, 0)
PAPER_ANGLE = (40, 30, 18, 6, 0)
ANGLE_TOLERANCE = (10, 10, 5, 5, 1)


def run(options: Options) -> list[Number]:
    data = load_digits(options.data)
    setup = Setup(
        ErrType="Strict",
        eta=0.1,
        n=20,
        LossFun=squared_error,
        steps=20 if options.quick else 400,
        batch_size=300,
        learning_rate=0.002,
    )
    torch.manual_seed(options.seed)
    comparison = compare_with_backprop(mnist_net(), data, setup, options, "figure 1")

    error = torch.tensor(comparison.relative_error)[-50:].mean(0).tolist()
    angle = torch.tensor(comparison.angle)[-50:].mean(0).tolist()
    farther_below = all(below > above for below, above in pairwise(error))
    numbers = [
        *loss_numbers(comparison, PAPER_LOSS),
        Number("PC accuracy at the end", 0.97, comparison.PC_accuracy, 0.015),
        Number("BP accuracy at the end", 0.97, comparison.BP_accuracy, 0.015),
        *layer_numbers("relative error at the end", PAPER_ERROR, error, [0.1] * 5),
        *layer_numbers("angle at the end (degrees)", PAPER_ANGLE, angle, ANGLE_TOLERANCE),
        Number("each layer's error exceeds the next one's", "yes", yes(farther_below), check=True),
    ]
    save_comparison(options, "figure_1", comparison, data, setup, numbers)
    return numbers
