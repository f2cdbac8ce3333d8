"""Figure 7: what gradients and beliefs of VGG-19 respond to under a right and a wrong label.

Norms over the channels at layer 10 for one photograph, labelled with the network's own guess (A) or
with its guess for another photograph (B): the input, the gradient of the loss (Exact's prediction
error), Strict's belief and Strict's prediction error.
"""

from __future__ import annotations

import torch
from matplotlib.figure import Figure

from paper_figures.maps import ETA, Maps, N, Subject, guess, infer, label_rows, norms, show, subject
from paper_figures.plotting import letter, panels
from paper_figures.report import Number, Options, save, yes

DOWNLOADS = ("vgg19", "mnist")
SECONDS = 3, 10

# Mean norms of the gradient and of Strict's error.
PAPER_NORMS = {"matching": (3.4e-6, 2.0e-5), "mismatched": (6.8e-3, 1.7e-2)}


def run(options: Options) -> list[Number]:
    shown = subject(options)
    n = options.pick(quick=20, default=100, full=N)
    X = shown.X[:1]
    labels = dict(zip(PAPER_NORMS, matching_and_mismatched(shown), strict=True))
    found = {
        name: infer(shown.model, X, label, n, f"figure 7: {name} label")
        for name, label in labels.items()
    }

    l, channels = shown.layers[1], shown.channels[1]
    means = {
        name: [
            float(norms(of.gradient[l], channels).mean()),
            float(norms(of.epsilon[l], channels).mean()),
        ]
        for name, of in found.items()
    }
    # The stand-in's norms have nothing to do with the paper's.
    numbers = (
        []
        if shown.stand_in
        else [
            Number(f"mean norm of the {what}, {name} label", PAPER_NORMS[name][i], means[name][i])
            for name in PAPER_NORMS
            for i, what in enumerate(("gradient", "Strict error"))
        ]
    )
    larger = all(b > a for a, b in zip(means["matching"], means["mismatched"], strict=True))
    numbers.append(Number("a mismatched label gives larger norms", "yes", yes(larger)))
    save(
        options,
        "figure_7",
        draw(shown, found, f"{shown.name}, layer {l}, Strict: η = {ETA}, n = {n}"),
        data=shown.data,
        settings={"model": shown.name, "eta": ETA, "n": n, "stand-in": shown.stand_in},
        series={"labels": labels, "mean norms": means},
        numbers=numbers,
    )
    return numbers


def matching_and_mismatched(shown: Subject) -> tuple[torch.Tensor, torch.Tensor]:
    """The guess for the first picture, and that for the second, or if it is the same, another."""
    own, other = guess(shown.model, shown.X)[:2].split(1)
    classes = shown.model(shown.X[:1]).shape[1]
    return own, other if other != own else (own + 1) % classes


def draw(shown: Subject, found: dict[str, Maps], title: str) -> Figure:
    l, channels = shown.layers[1], shown.channels[1]
    title = "\n".join(filter(None, (shown.stand_in, f"{title}; maps: norm over the channels")))
    figure, axes = panels(len(found), 4, (8, 2.1 * len(found) + 0.6), title)
    for row, of in enumerate(found.values()):
        panel = axes[4 * row :]
        show(panel[0], shown.shown[0], "input")
        show(panel[1], norms(of.gradient[l], channels), "gradient")
        show(panel[2], norms(of.belief[l], channels), "belief (Strict)")
        show(panel[3], norms(of.epsilon[l], channels), "error (Strict)")
        letter(panel[0], "AB"[row])
    label_rows(axes, [f"{name} label" for name in found], 4)
    return figure
