"""Figure 2: Strict's updates approach the gradient as n grows, if eta is small.

Relative error (A-D) and angle (E-H) between the predictive coding update and the gradient, layer by
layer, against the number of iterations n, on one batch, with a network trained by backprop. One
relaxation is followed for each eta, and its updates are read off after every iteration.

Strict is gradient descent with step eta on the energy F, so it is stable only below ``2 / lambda``,
where lambda is the largest eigenvalue of F's Hessian. That depends on the trained weights: here it is
about 0.15 to 0.27, so that eta = 0.2, at which the paper's network converges, may go either way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from paper_figures.data import Batch, load_digits
from paper_figures.plotting import layer_legend, letter, panels, per_layer
from paper_figures.report import Number, Options, save, yes
from paper_figures.training import (
    Convergence,
    layer_numbers,
    squared_error,
    trained_mnist_net,
    weight_gradients,
    weights_of,
)
from torch2pc.layers import Network
from torch2pc.strict import Relaxation

DOWNLOADS = ("mnist",)

# What the paper shows at n = 400.
PAPER_ERROR = {0.1: (0.65, 0.31, 0.11, 0.02, 0), 0.2: (0.26, 0.10, 0.04, 0.01, 0)}
PAPER_ANGLE = {0.1: (40, 13, 3, 1, 0)}
PAPER_FATE = {0.1: "converges", 0.2: "converges", 0.5: "diverges", 1.0: "diverges"}


def run(options: Options) -> list[Number]:
    data = load_digits(options.data)
    iterations = 40 if options.quick else 400
    model, settings = trained_mnist_net(data, squared_error, options, "figure 2: backprop")
    batch = next(data.train_batches(1, 300, options.seed + 1, options.device))
    followed = {eta: follow_strict(model, batch, eta, iterations) for eta in PAPER_FATE}

    limit = stability_limit(model, batch)

    numbers = []
    for eta, fate in PAPER_FATE.items():
        found = followed[eta].fate()
        # A limit near eta leaves the end open: it is that of the start, and the Hessian changes.
        clear = abs(eta / limit - 1) > 0.05
        predicted = "converges" if eta < limit else "diverges"
        numbers += [
            Number(f"η = {eta:g}", fate, found, check=eta != 0.2),
            Number(f"η = {eta:g}, theory: limit {limit:.3f}", predicted, found, check=clear),
        ]
    after_20 = followed[0.1].relative_error[19]
    farther_below = all(below > above for below, above in pairwise(after_20))
    numbers.append(
        Number(
            "η = 0.1, n = 20: each layer's error exceeds the next one's",
            "yes",
            yes(farther_below),
            check=True,
        )
    )
    for eta, errors in PAPER_ERROR.items():
        ours = followed[eta].relative_error[-1]
        numbers += layer_numbers(
            f"η = {eta:g}, error at the end", errors, ours, [0.4, 0.2, 0.1, 0.05, 0.01]
        )
    ours = followed[0.1].angle[-1]
    numbers += layer_numbers("η = 0.1, angle at the end", PAPER_ANGLE[0.1], ours, [30, 10, 5, 5, 1])

    title = (
        "Strict's update against the gradient, mnist_net trained by backprop, squared error\n"
        f"one batch of 300 ({data.name}); theory: stable below η = {limit:.2f}"
    )
    save(
        options,
        "figure_2",
        draw(followed, title),
        data=data.summary(),
        settings=settings | {"eta": list(PAPER_FATE), "n": iterations},
        series={"stability limit of eta": limit}
        | {f"eta {eta:g}": vars(found) for eta, found in followed.items()},
        numbers=numbers,
    )
    return numbers


def follow_strict(model: nn.Sequential, batch: Batch, eta: float, iterations: int) -> Convergence:
    """The updates after each iteration against the gradient, until they are no numbers any more."""
    gradients = weight_gradients(model, squared_error, batch)
    network = Network(model, squared_error, batch.X, batch.labels)
    relaxation = Relaxation(network, eta)
    found = Convergence()
    with network.replaying():
        for _ in tqdm(range(iterations), f"figure 2: η = {eta:g}", unit="iteration"):
            relaxation.step()
            _, updates = relaxation.updates()
            found.append([updates[weight] for weight in weights_of(model)], gradients)
            if not math.isfinite(sum(found.relative_error[-1])):
                break
    return found


def stability_limit(model: nn.Sequential, batch: Batch, iterations: int = 100) -> float:
    """2 over the largest eigenvalue of the energy's Hessian at the feed-forward values.

    Found by power iteration, for every image at once: F is a sum over the images.
    """
    vhat = [batch.X]
    for layer in model:
        vhat.append(layer(vhat[-1]).detach().requires_grad_())
    beliefs = vhat[1:-1]
    gradient = torch.autograd.grad(energy(model, vhat, batch.labels), beliefs, create_graph=True)
    direction = [torch.ones_like(v) for v in beliefs]
    for _ in range(iterations):
        length = sum(part.flatten(1).square().sum(1) for part in direction).sqrt()
        direction = [part / length.view(-1, *[1] * (part.ndim - 1)) for part in direction]
        image = torch.autograd.grad(gradient, beliefs, direction, retain_graph=True)
        eigenvalues = sum(
            (before * after).flatten(1).sum(1)
            for before, after in zip(direction, image, strict=True)
        )
        direction = list(image)
    return (2 / eigenvalues.max()).item()


def energy(model: nn.Sequential, v: Sequence[Tensor], labels: Tensor) -> Tensor:
    """F, which Strict descends, as a function of the beliefs."""
    *predictions, output = (layer(v_l) for layer, v_l in zip(model, v[:-1], strict=True))
    errors = (p - v_l for p, v_l in zip(predictions, v[1:-1], strict=True))
    return squared_error(output, labels) + sum(error.square().sum() for error in errors) / 2


def draw(followed: dict[float, Convergence], title: str) -> Figure:
    figure, axes = panels(2, len(followed), (9.5, 4.8), title)
    errors, angles = axes[: len(followed)], axes[len(followed) :]
    for (eta, found), error, angle in zip(followed.items(), errors, angles, strict=True):
        n = range(1, len(found.relative_error) + 1)
        per_layer(error, found.relative_error, n)
        per_layer(angle, found.angle, n)
        error.set(title=f"η = {eta:g}", ylim=(-0.05, 1.5))
        angle.set(ylim=(-2, 60), xlabel="iterations n")
        if found.fate() == "diverges":
            error.set(xlim=(0, 60))
            error.annotate("diverges", (0.95, 0.9), xycoords="axes fraction", ha="right")
            angle.set(xlim=(0, 60), ylim=(-6, 180), yticks=range(0, 181, 45))
    errors[0].set_ylabel("relative error")
    angles[0].set_ylabel("angle (degrees)")
    for panel, name in zip(axes, "ABCDEFGH", strict=True):
        letter(panel, name)
    layer_legend(figure, errors[0])
    return figure
