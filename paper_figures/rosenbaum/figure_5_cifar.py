"""Figure 5 E-H: FixedPred with eta = 1 and n = number of layers, against backprop on CIFAR-10.

Loss (E), accuracy (F), and the relative error (G) and angle (H) between the predictive coding
update and the gradient, layer by layer: the two methods are one, as on MNIST.
"""

from __future__ import annotations

import torch

from paper_figures.data import load_cifar10
from paper_figures.nets import cifar_net
from paper_figures.plotting import save_comparison
from paper_figures.report import Number, Options
from paper_figures.training import (
    Setup,
    compare_with_backprop,
    cross_entropy,
    loss_numbers,
    sameness_numbers,
)

DOWNLOADS = ("cifar10",)

# Backprop's in the paper's figure 3 E, at the last step of each epoch.
PAPER_LOSS = {194: 1.52, 389: 1.41, 584: 1.19, 779: 1.08, 974: 1.06}


def run(options: Options) -> list[Number]:
    data = load_cifar10(options.data)
    torch.manual_seed(options.seed)
    model = cifar_net()
    setup = Setup(
        ErrType="FixedPred",
        eta=1,
        n=len(model),
        LossFun=cross_entropy,
        steps=4 if options.quick else 975,
        batch_size=16 if options.quick else 256,
        learning_rate=0.01,
    )
    comparison = compare_with_backprop(model, data, setup, options, "figure 5 E-H")

    numbers = [
        *loss_numbers(comparison, {"PC": PAPER_LOSS, "BP": PAPER_LOSS}),
        *sameness_numbers(comparison),
    ]
    save_comparison(options, "figure_5_cifar", comparison, data, setup, numbers, letters="EFGH")
    return numbers
