"""Draws the pictures of the pages that explain: ``python docs/pictures`` writes them beside this file."""

import copy
import sys
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))

from paper_figures.data import load_digits  # noqa: E402
from paper_figures.plotting import layer_colours, letter  # noqa: E402
from torch2pc import PCInfer  # noqa: E402
from torch2pc.inference.fixed_pred import error_factors  # noqa: E402

VERMILLION, BLUE, GREY = "#D55E00", "#0072B2", "0.55"


def overview() -> Figure:
    """What is computed (A), and that it trains (B)."""
    figure = Figure(figsize=(9, 3.1), layout="constrained")
    scheme, curves = figure.subplots(1, 2, width_ratios=(1.25, 1))
    draw_scheme(scheme)
    draw_training(curves)
    return figure


def draw_scheme(axes: Axes) -> None:
    places = [0, 1, 2, 3]
    names = ["$X$", "$v_1$", "$v_2$", "$y$"]
    arrow = {"arrowstyle": "-|>", "linewidth": 1.6, "shrinkA": 17, "shrinkB": 17}
    for x, name in zip(places, names, strict=True):
        colour = "0.85" if name == "$X$" else "white"
        axes.plot(x, 0, "o", markersize=30, color=colour, markeredgecolor="k", zorder=3)
        axes.text(x, 0, name, ha="center", va="center", fontsize=12, zorder=4)
    for l in (1, 2, 3):
        forward = arrow | {"color": BLUE, "connectionstyle": "arc3,rad=-0.35"}
        back = arrow | {"color": VERMILLION, "connectionstyle": "arc3,rad=-0.35"}
        axes.annotate("", (l, 0), (l - 1, 0), arrowprops=forward)
        axes.text(l - 0.5, 0.43, f"$f_{l}$", color=BLUE, ha="center", fontsize=12)
        if l > 1:
            axes.annotate("", (l - 1, 0), (l, 0), arrowprops=back)
            axes.text(
                l - 0.5, -0.5, rf"$J_{l}^T\epsilon_{l}$", color=VERMILLION, ha="center", fontsize=12
            )
    axes.text(3.42, 0, "Loss, $Y$", va="center", fontsize=11)
    axes.annotate("", (3.42, 0), (3, 0), arrowprops=arrow | {"color": "k", "shrinkB": 2})
    axes.text(
        1.6,
        0.86,
        r"predictions go up,  $\epsilon_l = f_l(v_{l-1}) - v_l$",
        color=BLUE,
        ha="center",
        fontsize=10,
    )
    axes.text(
        1.6,
        -0.93,
        r"errors come down,  $v_l \leftarrow v_l + \eta\,(\epsilon_l -"
        r" J_{l+1}^T\epsilon_{l+1})$",
        color=VERMILLION,
        ha="center",
        fontsize=10,
    )
    axes.set(xlim=(-0.35, 4.2), ylim=(-1.15, 1.1))
    axes.set_axis_off()


def draw_training(axes: Axes) -> None:
    digits = load_digits(None)
    torch.manual_seed(0)
    start = nn.Sequential(
        nn.Sequential(nn.Flatten(), nn.Linear(784, 128)),
        nn.Sequential(nn.ReLU(), nn.Linear(128, 64)),
        nn.Sequential(nn.ReLU(), nn.Linear(64, 32)),
        nn.Sequential(nn.ReLU(), nn.Linear(32, 10)),
    )
    for ErrType, style in ("backprop", "-"), ("FixedPred", "--"), ("Strict", "-"):
        model = copy.deepcopy(start)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
        losses = []
        for batch in digits.train_batches(400, 100, seed=0, device=torch.device("cpu")):
            name = "Exact" if ErrType == "backprop" else ErrType
            result = PCInfer(model, nn.CrossEntropyLoss(), batch.X, batch.labels, name)
            optimizer.step()
            losses.append(result.Loss.item())
        means = torch.tensor(losses).unfold(0, 20, 1).mean(1)
        colour = {"backprop": GREY, "FixedPred": BLUE, "Strict": VERMILLION}[ErrType]
        axes.plot(range(10, 10 + len(means)), means, style, color=colour, label=ErrType)
    axes.set(xlabel="training step", ylabel="loss on digits", yscale="log")
    axes.set_yticks([0.2, 0.5, 1, 2], ["0.2", "0.5", "1", "2"])
    axes.minorticks_off()
    axes.legend()


def closed_form() -> Figure:
    """The share of the gradient in each layer's error against n (A), and float32 (B)."""
    L, eta, N = 8, 0.1, 160
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(50, 50), nn.Tanh()) for _ in range(L)])
    X, Y = torch.randn(100, 50), torch.randn(100, 50)
    shares = torch.tensor([error_factors(eta, n - 1, L)[::-1] for n in range(1, N + 1)])
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    theory, round_off = figure.subplots(1, 2)
    colours = layer_colours(L)
    for precise, axes in (True, theory), (False, round_off):
        one = copy.deepcopy(model).double() if precise else model
        g, errors = iterate(one, X.to(one[0][0].weight.dtype), Y, eta, N)
        for l, colour in enumerate(colours):
            if precise:
                axes.plot(range(1, N + 1), shares[:, l], color=colour, label=l + 1)
                found = [(e[l] * g[l]).sum() / (g[l] * g[l]).sum() for e in errors]
                axes.plot(range(1, N + 1, 12), found[::12], "o", color=colour, markersize=3)
            else:
                first = L - l  # the n at which the error arrives
                off = [
                    (e[l] - s * g[l]).norm() / (s * g[l]).norm()
                    for e, s in zip(errors[first:], shares[first:, l], strict=True)
                ]
                axes.plot(range(first + 1, N + 1), off, color=colour)
    theory.set(xlabel="n", ylabel="share of the gradient in $\\epsilon_l$")
    theory.legend(title="layer", fontsize=7, title_fontsize=8)
    found = PCInfer(model, nn.MSELoss(), X, Y, "FixedPred", eta, N).epsilon
    exact = PCInfer(
        copy.deepcopy(model).double(), nn.MSELoss(), X.double(), Y.double(), "FixedPred", eta, N
    ).epsilon
    worst = max(
        ((a.double() - b).norm() / b.norm()).item()
        for a, b in zip(found[1:], exact[1:], strict=True)
    )
    round_off.axhline(worst, color="k", linestyle=":", linewidth=1)
    round_off.annotate("closed form, worst layer", (N, worst), ha="right", va="bottom", fontsize=8)
    round_off.set(xlabel="n", yscale="log", ylim=(1e-8, 30), ylabel="relative error in float32")
    letter(theory, "A")
    letter(round_off, "B")
    return figure


def iterate(
    model: nn.Sequential, X: Tensor, Y: Tensor, eta: float, N: int
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """The gradients, and FixedPred's errors of N iterations, by the iteration as it is written."""
    Y = Y.to(X.dtype)
    vhat = [X]
    for layer in model:
        vhat.append(layer(vhat[-1].detach().requires_grad_()))
    inputs = [X, *(v.detach().requires_grad_() for v in vhat[1:-1])]
    outputs = [layer(x) for layer, x in zip(model, inputs, strict=True)]
    (top,) = torch.autograd.grad(nn.MSELoss()(outputs[-1], Y), outputs[-1], retain_graph=True)

    def back(l: int, e: Tensor) -> Tensor:
        return torch.autograd.grad(outputs[l], inputs[l], e, retain_graph=True)[0]

    L = len(model)
    g = [top]
    for l in range(L - 1, 0, -1):
        g.insert(0, back(l, g[0]))
    start = [v.detach() for v in vhat[1:-1]]
    v, errors = list(start), []
    for _ in range(N):
        e = [a - b for a, b in zip(start, v, strict=True)] + [top]
        errors.append(e)
        v = [v[l] + eta * (e[l] - back(l + 1, e[l + 1])) for l in range(L - 1)]
    return [x.double() for x in g], [[x.double() for x in e] for e in errors]


def displacements() -> Figure:
    """Differences and displacement rules in float32 against the size of the displacement."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    torch.manual_seed(0)
    a = torch.randn(4000)
    functions = {
        "ReLU": (torch.relu, lambda d: torch.maximum(d + a.clamp(max=0), -a.clamp(min=0))),
        "tanh": (torch.tanh, lambda d: d.tanh() * (1 - a.tanh() ** 2) / (1 + a.tanh() * d.tanh())),
        "softmax": (
            lambda x: x.view(40, 100).softmax(1).flatten(),
            lambda d: softmax_moves(a.view(40, 100), d.view(40, 100)).flatten(),
        ),
    }
    sizes = torch.logspace(-9, 0, 28)
    all_axes = figure.subplots(1, 3, sharey=True)
    for axes, (name, (f, rule)) in zip(all_axes, functions.items(), strict=True):
        plain, ruled = [], []
        for size in sizes:
            d = size * torch.randn(4000)
            # float64 has enough digits for the difference of what float32 can tell apart.
            truth = f(a.double() + d.double()) - f(a.double())
            if name != "ReLU":
                truth = mean_value(f, a.double(), d.double()) if size < 1e-5 else truth
            for found, into in ((f(a + d) - f(a)), plain), (rule(d), ruled):
                into.append(((found.double() - truth).norm() / truth.norm()).item())
        axes.plot(sizes, plain, color=VERMILLION, label="f(a+d) − f(a)")
        axes.plot(sizes, ruled, color=BLUE, label="by its rule")
        axes.set(title=name, xlabel="size of the displacement d", xscale="log", yscale="log")
        axes.set_ylim(1e-9, 10)
    all_axes[0].set_ylabel("relative error in float32")
    all_axes[0].legend()
    return figure


def softmax_moves(a: Tensor, d: Tensor) -> Tensor:
    p, e = a.softmax(1), d.expm1()
    m = (p * e).sum(1, keepdim=True)
    return p * (e - m) / (1 + m)


def mean_value(f, a: Tensor, d: Tensor) -> Tensor:
    """f(a + d) - f(a) by the derivative in the middle, whose error is of third order in d."""
    return torch.func.jvp(f, (a + d / 2,), (d,))[1]


if __name__ == "__main__":
    for draw in overview, closed_form, displacements:
        draw().savefig(HERE / f"{draw.__name__}.png", dpi=130)
