"""Figure 4: FixedPred's updates approach the gradient as n grows, whatever eta is.

Against the number of iterations n, layer by layer, on one batch, with a network trained by backprop:
the relative error of torch2pc's update (A-D), with the theory's ``1 - c_{L-l}(n-1)`` as dots; the
relative error of the plain iteration in float32 (E-H); and the angles of both (I-L). The gradient is
that in float64.

The plain iteration forms the prediction error as the difference of a prediction and a belief that
nearly equals it. What float32 rounds off each of them stays in the difference, so that the error
levels off far above float32's precision, as in the paper. The closed form subtracts nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from paper_figures.data import Batch, load_digits
from paper_figures.plotting import layer_legend, letter, panels, per_layer
from paper_figures.progress import track
from paper_figures.report import Number, Options, save
from paper_figures.training import (
    Convergence,
    cross_entropy,
    layer_numbers,
    share_to_come,
    trained_mnist_net,
    weight_gradients,
    weights_of,
)
from torch2pc.inference.fixed_pred import error_factors

DOWNLOADS = ("mnist",)
SECONDS = 10, 40

ETAS = (0.1, 0.2, 0.5, 1.0)

# Where the paper's errors level off, for eta = 0.1.
PAPER_LEVEL = (0.16, 0.17, 0.06, 0.03, 0)


def run(options: Options) -> list[Number]:
    data = load_digits(options.data)
    iterations, batch_size = options.pick(quick=(60, 10), default=(100, 300), full=(200, 300))
    model, settings = trained_mnist_net(data, cross_entropy, options)
    batch = next(data.train_batches(1, batch_size, options.seed + 1, options.device))
    precise = Batch(batch.X.double(), batch.labels)
    gradients = weight_gradients(copy.deepcopy(model).double(), cross_entropy, precise)

    closed, plain, theory = {}, {}, {}
    for eta in ETAS:
        name = f"figure 4: η = {eta:g}"
        closed[eta], plain[eta] = Convergence(), Convergence()
        for updates in track(closed_form(model, batch, eta, iterations), name, iterations):
            closed[eta].append(updates, gradients)
        for updates in track(plain_iteration(model, batch, eta, iterations), name, iterations):
            plain[eta].append(updates, gradients)
        theory[eta] = [
            [share_to_come(len(model) - l, k, eta) for l in range(1, len(model) + 1)]
            for k in range(iterations)
        ]

    numbers = numbers_of(closed, plain, theory)
    title = (
        "FixedPred's update against the gradient in float64, mnist_net trained by backprop, "
        f"cross-entropy\none batch of {batch_size} ({data.name}); dots: theory, 1 − c(n−1)"
    )
    save(
        options,
        "figure_4",
        draw(closed, plain, theory, title),
        data=data.summary(),
        settings=settings | {"eta": ETAS, "n": iterations},
        series={
            f"eta {eta:g}": {
                "torch2pc": vars(closed[eta]),
                "plain iteration in float32": vars(plain[eta]),
                "theory": theory[eta],
            }
            for eta in ETAS
        },
        numbers=numbers,
    )
    return numbers


def closed_form(
    model: nn.Sequential, batch: Batch, eta: float, iterations: int
) -> Iterator[list[Tensor]]:
    """torch2pc's updates after 1, 2, ... iterations: one backward pass serves them all."""
    gradients = weight_gradients(model, cross_entropy, batch)
    for k in range(iterations):
        factors = reversed(error_factors(eta, k, len(model)))
        yield [factor * gradient for factor, gradient in zip(factors, gradients, strict=True)]


def plain_iteration(
    model: nn.Sequential, batch: Batch, eta: float, iterations: int
) -> Iterator[list[Tensor]]:
    """The updates after 1, 2, ... iterations as the algorithm is written, in the model's type."""
    inputs, vhat = [], [batch.X]
    for layer in model:
        inputs.append(vhat[-1].detach().requires_grad_())
        vhat.append(layer(inputs[-1]))
    output = vhat[-1].detach().requires_grad_()
    (dLdy,) = torch.autograd.grad(cross_entropy(output, batch.labels), output)

    v = [vhat_l.detach().clone() for vhat_l in vhat]
    for _ in range(iterations):
        epsilon = [(vhat_l - v_l).detach() for vhat_l, v_l in zip(vhat, v, strict=True)]
        epsilon[-1] = dLdy
        updates, arriving = [], []
        for x, weight, vhat_l, epsilon_l in zip(
            inputs, weights_of(model), vhat[1:], epsilon[1:], strict=True
        ):
            from_above, update = torch.autograd.grad(
                vhat_l, (x, weight), epsilon_l, retain_graph=True
            )
            arriving.append(from_above)
            updates.append(update)
        for l in range(1, len(model)):
            v[l] += eta * (epsilon[l] - arriving[l])
        yield updates


def numbers_of(
    closed: dict[float, Convergence],
    plain: dict[float, Convergence],
    theory: dict[float, list[list[float]]],
) -> list[Number]:
    numbers = []
    for eta in ETAS:
        expected = torch.tensor(theory[eta], dtype=torch.float64)
        ours = torch.tensor(closed[eta].relative_error, dtype=torch.float64)
        farthest = (ours - expected).abs().max().item()
        numbers.append(
            Number(f"η = {eta:g}, largest distance from theory", 0, farthest, 1e-5, check=True)
        )
        end = ours[-1].max().item()
        limit = expected[-1].max().item()
        numbers.append(
            Number(f"η = {eta:g}, largest error at the end", limit, end, 1e-5, check=True)
        )
    largest = max(max(angles) for eta in ETAS for angles in closed[eta].defined_angles())
    numbers.append(Number("largest angle (degrees)", 0, largest, 0.1, check=True))
    numbers += layer_numbers(
        "plain float32, η = 0.1, error at the end",
        PAPER_LEVEL,
        plain[0.1].relative_error[-1],
        [0.2, 0.2, 0.1, 0.05, 0.01],
    )
    return numbers


def draw(
    closed: dict[float, Convergence],
    plain: dict[float, Convergence],
    theory: dict[float, list[list[float]]],
    title: str,
) -> Figure:
    figure, axes = panels(3, len(ETAS), (9.5, 6.8), title)
    ours, written, angles = axes[:4], axes[4:8], axes[8:]
    for eta, error, of_plain, angle in zip(ETAS, ours, written, angles, strict=True):
        n = range(1, len(theory[eta]) + 1)
        per_layer(error, closed[eta].relative_error, n)
        dots = range(0, len(n), 10)
        for layer in range(len(theory[eta][0])):
            expected = [theory[eta][k][layer] for k in dots]
            error.plot([n[k] for k in dots], expected, ".", color="black", markersize=3)
        per_layer(of_plain, plain[eta].relative_error, n)
        for panel in error, of_plain:
            panel.set(yscale="log", ylim=(1e-8, 3))
        per_layer(angle, closed[eta].angle, n)
        per_layer(angle, plain[eta].angle, n, linestyle=":")
        error.set_title(f"η = {eta:g}")
        angle.set(xlabel="iterations n")
    ours[0].set_ylabel("relative error,\ntorch2pc")
    written[0].set_ylabel("relative error,\nplain iteration in float32")
    angles[0].set_ylabel("angle (degrees)\ndotted: plain iteration")
    for panel, name in zip(axes, "ABCDEFGHIJKL", strict=True):
        letter(panel, name)
    layer_legend(figure, written[0])
    return figure
