"""Figure 5 E-H: FixedPred with eta = 1 and n = number of layers, against backprop on CIFAR-10.

Loss (E), accuracy (F), and the relative error (G) and angle (H) between the predictive coding
update and the gradient, layer by layer: the two methods are one, as on MNIST.
"""

from __future__ import annotations

from paper_figures.data import load_cifar10
from paper_figures.nets import cifar_net
from paper_figures.plotting import save_comparison
from paper_figures.report import Number, Options
from paper_figures.training import (
    compare_with_backprop,
    loss_numbers,
    papers_cifar_setup,
    sameness_numbers,
)

DOWNLOADS = ("cifar10",)
SECONDS = 30, 3600

# Backprop's in the paper's figure 3 E, at the last step of each epoch.
PAPER_LOSS = {194: 1.52, 389: 1.41, 584: 1.19, 779: 1.08, 974: 1.06}


def run(options: Options) -> list[Number]:
    data = load_cifar10(options.data)
    setup = papers_cifar_setup(options, eta=1, n=len(cifar_net()))
    comparison = compare_with_backprop(cifar_net, data, setup, options, "figure 5 E-H")

    numbers = [
        *loss_numbers(comparison, {"PC": PAPER_LOSS, "BP": PAPER_LOSS}),
        *sameness_numbers(comparison),
    ]
    save_comparison(options, "figure_5_cifar", comparison, data, setup, numbers, letters="EFGH")
    return numbers
