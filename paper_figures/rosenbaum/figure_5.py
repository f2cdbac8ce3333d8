"""Figure 5 A-D: FixedPred with eta = 1 and n = number of layers, against backprop on MNIST.

Loss (A), accuracy (B), and the relative error (C) and angle (D) between the predictive coding
update and the gradient, layer by layer. With these settings the error of the loss has arrived
everywhere in full, and the two methods are one.
"""

from __future__ import annotations

from paper_figures.data import load_digits
from paper_figures.nets import mnist_net
from paper_figures.plotting import save_comparison
from paper_figures.report import Number, Options
from paper_figures.training import (
    compare_with_backprop,
    cross_entropy,
    loss_numbers,
    papers_setup,
    sameness_numbers,
)

DOWNLOADS = ("mnist",)
SECONDS = 10, 30

# The paper's curves of backprop are those of its figure 3, and PC's cannot be told from them.
PAPER_LOSS = {50: 0.69, 100: 0.31, 150: 0.31, 200: 0.233, 250: 0.162, 300: 0.155, 350: 0.108}


def run(options: Options) -> list[Number]:
    data = load_digits(options.data)
    setup = papers_setup(options, "FixedPred", eta=1, n=len(mnist_net()), LossFun=cross_entropy)
    comparison = compare_with_backprop(mnist_net, data, setup, options, "figure 5 A-D")

    numbers = [
        *loss_numbers(comparison, {"PC": PAPER_LOSS, "BP": PAPER_LOSS}),
        *sameness_numbers(comparison),
    ]
    save_comparison(options, "figure_5", comparison, data, setup, numbers)
    return numbers
