"""Figure 3 A-D: FixedPred against backprop on MNIST.

Loss (A), accuracy (B), and the relative error (C) and angle (D) between the predictive coding
update and the gradient, layer by layer. FixedPred's update is the gradient scaled by
``c_{L-l}(n-1) = P[Binomial(n-1, eta) >= L-l]``, so that the relative error is one minus that, the
same at every step, and the angle is zero.
"""

from __future__ import annotations

import torch

from paper_figures.data import load_digits
from paper_figures.nets import mnist_net
from paper_figures.plotting import save_comparison
from paper_figures.report import Number, Options
from paper_figures.training import (
    compare_with_backprop,
    cross_entropy,
    layer_numbers,
    loss_numbers,
    papers_setup,
)

DOWNLOADS = ("mnist",)
SECONDS = 10, 30

PAPER_LOSS = {
    "PC": {50: 0.69, 100: 0.34, 150: 0.33, 200: 0.25, 250: 0.198, 300: 0.191, 350: 0.134},
    "BP": {50: 0.69, 100: 0.31, 150: 0.31, 200: 0.233, 250: 0.162, 300: 0.155, 350: 0.108},
}
PAPER_ERROR = (0.885, 0.705, 0.42, 0.135, 0)


def run(options: Options) -> list[Number]:
    data = load_digits(options.data)
    setup = papers_setup(options, "FixedPred", eta=0.1, n=20, LossFun=cross_entropy)
    comparison = compare_with_backprop(mnist_net, data, setup, options, "figure 3 A-D")

    error = torch.tensor(comparison.relative_error, dtype=torch.float64)
    farthest = (error - error.mean(0)).abs().max().item()
    numbers = [
        *loss_numbers(comparison, PAPER_LOSS),
        *layer_numbers(
            "relative error", PAPER_ERROR, error.mean(0).tolist(), [5e-4] * 5, check=True
        ),
        Number("relative error's change over the steps", 0, farthest, 1e-5, check=True),
        Number("largest angle (degrees)", 0, max(map(max, comparison.angle)), 0.1, check=True),
    ]
    save_comparison(options, "figure_3", comparison, data, setup, numbers)
    return numbers
