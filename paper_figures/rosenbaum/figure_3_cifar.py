"""Figure 3 E-H: FixedPred against backprop on CIFAR-10.

Loss (E), accuracy (F), and the relative error (G) and angle (H) between the predictive coding
update and the gradient, layer by layer: the same as on MNIST, with one more layer.
"""

from __future__ import annotations

import torch

from paper_figures.data import load_cifar10
from paper_figures.nets import cifar_net
from paper_figures.plotting import save_comparison
from paper_figures.report import Number, Options
from paper_figures.training import (
    compare_with_backprop,
    layer_numbers,
    loss_numbers,
    papers_cifar_setup,
    share_to_come,
)

DOWNLOADS = ("cifar10",)
SECONDS = 30, 3600

# At the last step of each of the five epochs of 195 steps.
PAPER_LOSS = {
    "PC": {194: 1.76, 389: 1.50, 584: 1.24, 779: 1.16, 974: 1.19},
    "BP": {194: 1.52, 389: 1.41, 584: 1.19, 779: 1.08, 974: 1.06},
}


def run(options: Options) -> list[Number]:
    data = load_cifar10(options.data)
    setup = papers_cifar_setup(options, eta=0.1, n=20)
    comparison = compare_with_backprop(cifar_net, data, setup, options, "figure 3 E-H")

    error = torch.tensor(comparison.relative_error).mean(0).tolist()
    numbers = [
        *loss_numbers(comparison, PAPER_LOSS),
        Number("PC accuracy at the end", 0.6, comparison.PC_accuracy, 0.06),
        Number("BP accuracy at the end", 0.6, comparison.BP_accuracy, 0.06),
        *layer_numbers(
            "relative error, binomial",
            [share_to_come(m, setup.n - 1, setup.eta) for m in (5, 4, 3, 2, 1, 0)],
            error,
            [5e-4] * 6,
            check=True,
        ),
        Number("largest angle (degrees)", 0, max(map(max, comparison.angle)), 0.1, check=True),
    ]
    save_comparison(options, "figure_3_cifar", comparison, data, setup, numbers, letters="EFGH")
    return numbers
