"""Figure 6: what gradients and beliefs of VGG-19 respond to.

Norms over the channels at layers 1 and 10, for two photographs labelled with the network's own
guess: the input, the activation, the gradient of the loss (Exact's prediction error), Strict's
belief and Strict's prediction error.
"""

from __future__ import annotations

from matplotlib.figure import Figure

from paper_figures.maps import ETA, Maps, N, Subject, guess, infer, label_rows, norms, show, subject
from paper_figures.plotting import letter, panels
from paper_figures.report import Number, Options, save

DOWNLOADS = ("vgg19", "mnist")
SECONDS = 3, 10

# Mean norms of the gradient and of Strict's error for the first picture, at layers 1 and 10.
PAPER_NORMS = {"gradient": (6.1e-4, 5.9e-4), "Strict error": (2.3e-7, 3.4e-3)}


def run(options: Options) -> list[Number]:
    shown = subject(options)
    n = options.pick(quick=20, default=100, full=N)
    labels = guess(shown.model, shown.X)
    found = [
        infer(shown.model, shown.X[i : i + 1], labels[i : i + 1], n, f"figure 6: picture {i + 1}")
        for i in range(len(shown.X))
    ]

    means = {
        "gradient": [norms(found[0].gradient[l], c).mean() for l, c in layers_of(shown)],
        "Strict error": [norms(found[0].epsilon[l], c).mean() for l, c in layers_of(shown)],
    }
    # The stand-in's norms have nothing to do with the paper's.
    numbers = (
        []
        if shown.stand_in
        else [
            Number(f"mean norm of the {what}, layer {l}, first picture", paper, float(ours))
            for what in PAPER_NORMS
            for l, paper, ours in zip(shown.layers, PAPER_NORMS[what], means[what], strict=True)
        ]
    )
    save(
        options,
        "figure_6",
        draw(shown, found, f"{shown.name}, Strict: η = {ETA}, n = {n}"),
        data=shown.data,
        settings={"model": shown.name, "eta": ETA, "n": n, "stand-in": shown.stand_in},
        series={"labels": labels, "mean norms, first picture": means},
        numbers=numbers,
    )
    return numbers


def layers_of(shown: Subject) -> list[tuple[int, int]]:
    """The layers to map and their channels."""
    return list(zip(shown.layers, shown.channels, strict=True))


def draw(shown: Subject, found: list[Maps], title: str) -> Figure:
    rows = [(picture, *layer) for picture in range(len(found)) for layer in layers_of(shown)]
    title = "\n".join(filter(None, (shown.stand_in, f"{title}; maps: norm over the channels")))
    figure, axes = panels(len(rows), 5, (9.5, 1.9 * len(rows) + 0.6), title)
    for row, (picture, l, channels) in enumerate(rows):
        of, panel = found[picture], axes[5 * row :]
        show(panel[0], shown.shown[picture], "input")
        show(panel[1], norms(of.vhat[l], channels), "activation")
        show(panel[2], norms(of.gradient[l], channels), "gradient")
        show(panel[3], norms(of.belief[l], channels), "belief (Strict)")
        show(panel[4], norms(of.epsilon[l], channels), "error (Strict)")
        letter(panel[0], "ABCD"[row])
    label_rows(axes, [f"picture {picture + 1}, layer {l}" for picture, l, _ in rows], 5)
    return figure
