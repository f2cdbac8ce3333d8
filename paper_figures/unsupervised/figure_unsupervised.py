"""Unsupervised predictive coding of digits: how much the inferred latents say about the labels.

A decoder predicts the images, clamped at its output, from latents that are free; labels are seen by
the probes alone, afterwards. Two set-ups, each probed by softmax regression and by its 5 nearest
neighbours, beside raw pixels under the same probes:

- the reference: 256 latents, three layers, no prior;
- the sparse one: 2048 latents, more than there are pixels, that may not fall far below zero and pay
  for what they are above it, so that each image is put together of few parts. The images are given
  in their first principal components with the differences in variance evened out: the matrix
  of the layer is then well conditioned, so that 50 iterations come near the energy's minimum.

Source of the reference and of the numbers called the paper's: T. Morrill's tutorial "Unsupervised
Representation Learning with Predictive Coding". The sparse set-up follows the sparse prior of
R. Rao and D. Ballard, Nature Neuroscience 2, 79-87 (1999).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

from paper_figures.data import DataSet, load_digits
from paper_figures.decoders import (
    Prior,
    energy,
    half_squared_error,
    mosaic,
    show_mosaic,
    unit_columns,
)
from paper_figures.plotting import letter
from paper_figures.progress import track
from paper_figures.report import Number, Options, save, yes
from torch2pc import PCInferLatent
from torch2pc.pcinfer import PCResult

DEFAULT = False  # the full run takes long
DOWNLOADS = ("mnist",)

PAPER_PROBE, PAPER_MINUTES = 87.0, 10.0
GOOD_PROBE = 97.0

INFERRED_AT_ONCE = 500
# How many training images the probe drawn over training learns from, and how many it is tried on.
WATCHED, WATCHED_TEST = 2000, 1000
CHECKPOINTS = 10
# A quick run, whose time goes into inferring latents more than into training.
QUICK_STEPS, QUICK_CHECKPOINTS, QUICK_PROBED = 8, 2, 1000


class Reference:
    """The tutorial's decoder and settings; pixels in [0, 1] are the data."""

    name = "reference"
    description = "256-256-256-784 with ReLU, no prior"
    latents = 256
    n = 150
    batch_size = 512
    epochs = 10
    learning_rate = 0.001
    prior: Prior | None = None

    def __init__(self, images: Tensor) -> None:
        """``images``: the training images, (count, pixels)."""
        self.decoder = nn.Sequential(
            nn.Sequential(nn.Linear(256, 256), nn.ReLU()),
            nn.Sequential(nn.Linear(256, 256), nn.ReLU()),
            nn.Linear(256, images.shape[1]),
        ).to(images.device)

    @property
    def eta(self) -> float:
        return 0.01

    def data_of(self, images: Tensor) -> Tensor:
        """What the decoder predicts for images (batch, pixels)."""
        return images

    def images_of(self, predictions: Tensor) -> Tensor:
        """The images that such predictions stand for."""
        return predictions

    def after_step(self) -> None:
        """What is done to the weights after the optimizer moved them."""

    def summary(self) -> dict[str, object]:
        names = ("description", "latents", "n", "batch_size", "epochs", "learning_rate")
        settings = {name: getattr(self, name) for name in names}
        return settings | {"optimizer": "Adam", "LossFun": half_squared_error.__name__}


class Sparse(Reference):
    """An overcomplete linear layer with columns of length 1, and a one-sided prior."""

    name = "sparse"
    description = "2048-64 linear, one-sided sparse prior, evened-out principal components"
    latents = 2048
    n = 50
    epochs = 5
    learning_rate = 0.003

    components = 64
    # Dividing by the standard deviation to the power 1 would whiten the components, and raise the
    # smallest ones, mostly noise, to the level of the others.
    whitening = 0.6
    positive_slope = 0.05
    negative_curvature = 30.0

    def __init__(self, images: Tensor) -> None:
        found = PCA(self.components, random_state=0).fit(images.cpu().numpy())
        self.mean, variance, self.axes = (
            torch.as_tensor(value, dtype=images.dtype, device=images.device)
            for value in (found.mean_, found.explained_variance_, found.components_)
        )
        self.scale = (variance + 0.001) ** (self.whitening / 2)
        # So that the data's squared norm is 1 on average, whatever the images.
        self.scale *= (variance / self.scale**2).sum().sqrt()

        layer = nn.Linear(self.latents, self.components, bias=False).to(images.device)
        nn.init.normal_(layer.weight)
        self.decoder = nn.Sequential(layer)
        self.after_step()

    @property
    def eta(self) -> float:
        """Somewhat below twice the inverse of the energy's largest curvature."""
        largest = torch.linalg.matrix_norm(self.decoder[0].weight.detach(), 2).item() ** 2
        return 1.7 / (largest + self.negative_curvature)

    def prior(self, v: list[Tensor]) -> Tensor:
        below = v[0].clamp(max=0)
        above_slope = self.positive_slope * (v[0] - below).sum()
        return above_slope + 0.5 * self.negative_curvature * below.square().sum()

    def data_of(self, images: Tensor) -> Tensor:
        return (images - self.mean) @ self.axes.T / self.scale

    def images_of(self, predictions: Tensor) -> Tensor:
        return predictions * self.scale @ self.axes + self.mean

    def after_step(self) -> None:
        unit_columns(self.decoder[0])

    def summary(self) -> dict[str, object]:
        names = ("components", "whitening", "positive_slope", "negative_curvature")
        return super().summary() | {name: getattr(self, name) for name in names}


@dataclass
class Outcome:
    """What was measured of one set-up; accuracies in %, energies in those of one image.

    accuracy: of the probe over training, by step; scores: by probe, on the test images;
    pictures: reconstructions (10, pixels); plane: the test latents' two principal components.
    """

    energy: list[float] = field(default_factory=list)
    accuracy: dict[int, float] = field(default_factory=dict)
    minutes: float = 0.0
    scores: dict[str, float] = field(default_factory=dict)
    pictures: Tensor = field(default_factory=lambda: torch.empty(0))
    plane: np.ndarray = field(default_factory=lambda: np.empty((0, 2)))

    def series(self) -> dict[str, object]:
        return {
            "energy by step": self.energy,
            "accuracy (%) on held-out training images by step": self.accuracy,
            "minutes of training": self.minutes,
            "test accuracy (%)": self.scores,
        }


@dataclass(frozen=True)
class Probes:
    """The images that the probes learn from and are tried on, (count, pixels), with labels."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def latents(self, setup: Reference) -> tuple[np.ndarray, ...]:
        """What the set-up infers for both, (count, latents)."""
        sides = self.images, self.test_images
        return tuple(infer_all(setup, images).cpu().numpy() for images in sides)

    def scores(self, latents: np.ndarray, test_latents: np.ndarray) -> dict[str, float]:
        """The accuracy (%) of both probes; near is what points in a similar direction."""
        neighbours = KNeighborsClassifier(5, metric="cosine").fit(latents, self.labels)
        return {
            "linear probe": self.linear(latents, test_latents),
            "5 nearest neighbours": 100 * neighbours.score(test_latents, self.test_labels),
        }

    def linear(self, latents: np.ndarray, test_latents: np.ndarray) -> float:
        """Softmax regression; one division for all, as latents have no unit of their own."""
        scale = latents.std()
        probe = LogisticRegression(C=0.1, max_iter=1000, tol=0.001)
        probe.fit(latents / scale, self.labels)
        return 100 * probe.score(test_latents / scale, self.test_labels)


def run(options: Options) -> list[Number]:
    data = load_digits(options.data)
    images, test_images = (
        pixels.flatten(1).to(options.device, torch.float32) / 255
        for pixels in (data.train_images, data.test_images)
    )
    probed = QUICK_PROBED if options.quick else len(images)
    watched = min(WATCHED, probed)
    over_training = Probes(
        images[:watched],
        data.train_labels[:watched],
        images[-WATCHED_TEST:],
        data.train_labels[-WATCHED_TEST:],
    )
    at_the_end = Probes(images[:probed], data.train_labels[:probed], test_images, data.test_labels)
    pixels = at_the_end.scores(at_the_end.images.cpu().numpy(), test_images.cpu().numpy())

    outcomes = {}
    summaries = {}
    for kind in Reference, Sparse:
        torch.manual_seed(options.seed)
        setup = kind(images)
        steps = QUICK_STEPS if options.quick else setup.epochs * (len(images) // setup.batch_size)
        outcome = train(setup, data, over_training, steps, options)
        judge(setup, outcome, at_the_end)
        outcomes[setup.name], summaries[setup.name] = outcome, setup.summary() | {"steps": steps}

    numbers = numbers_of(outcomes, pixels)
    save(
        options,
        "figure_unsupervised",
        draw(outcomes, pixels, test_images[:10], data),
        data=data.summary() | {"images that the probes learn from": probed},
        settings=summaries,
        series={
            **{name: outcome.series() for name, outcome in outcomes.items()},
            "raw pixels": {"test accuracy (%)": pixels},
        },
        numbers=numbers,
    )
    return numbers


def train(
    setup: Reference, data: DataSet, watching: Probes, steps: int, options: Options
) -> Outcome:
    """Train the set-up's decoder; the minutes leave out the probes."""
    outcome = Outcome()
    optimizer = torch.optim.Adam(setup.decoder.parameters(), lr=setup.learning_rate)
    batches = data.train_batches(steps, setup.batch_size, options.seed, options.device)
    title = f"unsupervised, {setup.name}"
    every = max(1, steps // (QUICK_CHECKPOINTS if options.quick else CHECKPOINTS))
    for step, batch in enumerate(track(batches, title, steps)):
        if step % every == 0:
            outcome.accuracy[step] = watching.linear(*watching.latents(setup))
        start = time.perf_counter()
        Y = setup.data_of(batch.X.flatten(1))
        result = infer(setup, Y)
        F = energy(setup.decoder, half_squared_error, Y, result, prior=setup.prior)
        outcome.energy.append(F / len(Y))
        optimizer.step()
        setup.after_step()
        outcome.minutes += (time.perf_counter() - start) / 60
    outcome.accuracy[steps] = watching.linear(*watching.latents(setup))
    return outcome


def infer(setup: Reference, Y: Tensor) -> PCResult:
    """Latents of a batch from zero, and the decoder's updates in ``.grad``."""
    start = Y.new_zeros(len(Y), setup.latents)
    return PCInferLatent(
        setup.decoder, half_squared_error, Y, start, setup.eta, setup.n, prior=setup.prior
    )


def infer_all(setup: Reference, images: Tensor) -> Tensor:
    """The latents of images (count, pixels)."""
    parts = track(images.split(INFERRED_AT_ONCE), "latents")
    return torch.cat([infer(setup, setup.data_of(part)).v[0] for part in parts])


def judge(setup: Reference, outcome: Outcome, probes: Probes) -> None:
    """Probe the trained set-up, and keep what is shown of it."""
    latents, test_latents = probes.latents(setup)
    outcome.scores = probes.scores(latents, test_latents)
    outcome.plane = PCA(2, random_state=0).fit_transform(test_latents[:2000])
    shown = infer(setup, setup.data_of(probes.test_images[:10]))
    with torch.no_grad():
        outcome.pictures = setup.images_of(setup.decoder[-1](shown.v[-2]))


def numbers_of(outcomes: dict[str, Outcome], pixels: dict[str, float]) -> list[Number]:
    reference, sparse = outcomes["reference"], outcomes["sparse"]
    linear, near = "linear probe", "5 nearest neighbours"
    beats = sparse.scores[linear] > pixels[linear]
    return [
        Number("reference set-up: linear probe (%)", PAPER_PROBE, reference.scores[linear]),
        Number(
            "reference set-up: linear probe at least 87 %",
            "yes",
            yes(reference.scores[linear] >= PAPER_PROBE),
        ),
        Number(
            "reference set-up: 5-NN in the high 80s or better",
            "yes",
            yes(reference.scores[near] >= 86),
        ),
        Number("reference set-up: minutes of training", PAPER_MINUTES, reference.minutes),
        Number("sparse set-up: linear probe (%)", GOOD_PROBE, sparse.scores[linear]),
        Number(
            "sparse set-up: linear probe at least 97 %",
            "yes",
            yes(sparse.scores[linear] >= GOOD_PROBE),
        ),
        Number("sparse set-up: linear probe better than on raw pixels", "yes", yes(beats)),
        Number("sparse set-up: minutes of training", PAPER_MINUTES, sparse.minutes),
    ]


COLOURS = {"raw pixels": "#888888", "reference": "#0072B2", "sparse": "#D55E00"}
STYLES = {"reference": (0, (4, 1.5)), "sparse": "-"}


def draw(
    outcomes: dict[str, Outcome], pixels: dict[str, float], originals: Tensor, data: DataSet
) -> Figure:
    figure = Figure(figsize=(8.4, 9.2), layout="constrained")
    figure.suptitle(f"Unsupervised predictive coding of {data.name}", fontsize=9)
    axes = figure.subplot_mosaic(
        [list("AABBCC"), list("DDDDDD"), list("EEEFFF")], height_ratios=(1, 1, 1.7)
    )
    for name, panel in axes.items():
        letter(panel, name)
    _training(axes["A"], axes["B"], outcomes)
    _scores(axes["C"], {"raw pixels": pixels} | {name: o.scores for name, o in outcomes.items()})
    _reconstructions(axes["D"], originals, outcomes)
    for panel, (name, outcome) in zip("EF", outcomes.items(), strict=True):
        labels = data.test_labels[: len(outcome.plane)]
        _plane(axes[panel], outcome.plane, labels, f"test latents, {name}")
    handles, names = axes["F"].get_legend_handles_labels()
    axes["F"].legend(
        handles, names, loc="center left", bbox_to_anchor=(1, 0.5), title="digit", markerscale=3
    )
    return figure


def _training(energies: Axes, accuracies: Axes, outcomes: dict[str, Outcome]) -> None:
    for name, outcome in outcomes.items():
        line = {"color": COLOURS[name], "linestyle": STYLES[name], "label": name}
        shares = np.array(outcome.energy) / outcome.energy[0]
        energies.plot(np.linspace(0, 1, len(shares)), shares, **line)
        steps = np.array(list(outcome.accuracy))
        accuracies.plot(steps / steps[-1], list(outcome.accuracy.values()), **line)
    energies.set(ylabel="energy / energy at the start", ylim=(0, None))
    energies.legend()
    accuracies.set(ylabel="linear probe (%)")
    for panel in energies, accuracies:
        panel.set(xlabel="share of the training")


def _scores(axes: Axes, scores: dict[str, dict[str, float]]) -> None:
    for place, (name, values) in enumerate(scores.items()):
        where = np.arange(len(values)) + 0.27 * (place - 1)
        bars = axes.bar(where, list(values.values()), 0.25, color=COLOURS[name], label=name)
        axes.bar_label(bars, fmt="%.1f", fontsize=7, padding=1)
    axes.set_xticks(range(len(values)), [name.replace(" n", "\nn") for name in values])
    axes.set(ylabel="test accuracy (%)", ylim=(0, 165), yticks=range(0, 101, 20))
    axes.legend(loc="upper center")


def _reconstructions(axes: Axes, originals: Tensor, outcomes: dict[str, Outcome]) -> None:
    rows = {"test image": originals} | {name: o.pictures for name, o in outcomes.items()}
    side = round(originals.shape[1] ** 0.5)
    pictures = torch.cat(list(rows.values())).view(-1, 1, side, side)
    show_mosaic(axes, 1 - mosaic(pictures, len(originals), gap=0))
    axes.set_yticks([side * (row + 0.5) for row in range(len(rows))], rows)
    axes.tick_params(length=0)


def _plane(axes: Axes, plane: np.ndarray, labels: Sequence[int], title: str) -> None:
    for digit in range(10):
        mine = plane[np.asarray(labels) == digit]
        axes.plot(*mine.T, ".", markersize=2.5, color=f"C{digit}", label=digit)
    axes.set(title=title, xlabel="first principal component", ylabel="second")
