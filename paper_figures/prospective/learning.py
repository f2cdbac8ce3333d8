"""The three trainings: away from a saddle, online, and while the labels drift.

Networks without biases learn one-hot targets by half the summed squared error, in batches of their own
seed's order. Each method has as many candidates for its learning rate (and, where it clips, for the
threshold), tried from seeds of their own and judged on training images that are held out; the best goes
on to the final seeds and to the test images. All candidates and seeds are trained side by side.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import torch2pc
from paper_figures.data import DataSet
from paper_figures.progress import track
from paper_figures.prospective.side_by_side import METHODS, Net, Stack, drawn_weights, relaxes
from paper_figures.report import Options
from paper_figures.runs import Runs
from paper_figures.training import quietly

CLASSES, HELD_OUT = 10, 1000
ACTIVATIONS: dict[str, type[nn.Module]] = {"sigmoid": nn.Sigmoid, "tanh": nn.Tanh}

Candidate = tuple[float, float]
"""A learning rate, and the length from which on gradients are clipped."""


@dataclass(frozen=True)
class Task:
    """What is learned, for how long, and how PC relaxes.

    every: updates between two measurements, of the "loss" of an image or the "error" (a share).
    images: how many of the training images; None for all but those held out.
    drift: updates after which the labels of the last five classes are exchanged at random; None for never.
    """

    name: str
    sizes: tuple[int, ...]
    activation: str
    std: float | None
    batch_size: int
    steps: int
    every: int
    measure: str
    eta: float
    n: int
    images: int | None = None
    drift: int | None = None
    tested: int = 1000


@dataclass(frozen=True)
class Training:
    """Networks that are trained side by side, measured on held-out training images or test images."""

    task: Task
    nets: tuple[Net, ...]
    held_out: bool

    def key(self, data: str) -> str:
        return json.dumps([asdict(self), data, torch2pc.__version__])


def train(training: Training, data: DataSet, options: Options) -> dict[str, Any]:
    """ "curves": for each network, what was measured every so many updates."""
    task, nets = training.task, training.nets
    device = options.device
    images, labels = _images(data, slice(None, -HELD_OUT), device)
    if training.held_out:
        tested, right = _images(data, slice(-HELD_OUT, None), device)
    else:
        tested, right = _images(data, slice(None), device, test=True)
    tested, right = tested[: task.tested], right[: task.tested]
    streams = {net.seed: batches(task, len(images), net.seed) for net in nets}
    of = torch.tensor([list(streams).index(net.seed) for net in nets], device=device)
    weights = {
        seed: [w.to(device) for w in drawn_weights(task.sizes, task.std, seed)] for seed in streams
    }
    stack = Stack(nets, weights, ACTIVATIONS[task.activation], task.eta, task.n)
    curves: list[list[float]] = [[] for _ in nets]
    with quietly():
        for step in track(range(task.steps), task.name):
            chosen, names = map(torch.stack, zip(*map(next, streams.values()), strict=True))
            chosen, names = chosen.to(device), names.to(device)
            targets = functional.one_hot(names.gather(1, labels[chosen]), CLASSES)
            stack.step(images[chosen][of], targets.to(images.dtype)[of])
            if (step + 1) % task.every == 0:
                for curve, output, own in zip(
                    curves, stack.outputs(tested), names[of], strict=True
                ):
                    curve.append(measured(task.measure, output, own[right]))
    return {"curves": curves}


def _images(
    data: DataSet, part: slice, device: torch.device, test: bool = False
) -> tuple[Tensor, Tensor]:
    """Pixels in [0, 1], (count, features), and labels."""
    images, labels = (
        (data.test_images, data.test_labels) if test else (data.train_images, data.train_labels)
    )
    pixels = images[part].flatten(1).to(device).to(torch.get_default_dtype()) / 255
    return pixels, labels[part].to(device)


def batches(task: Task, count: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Which images come next, and what each class is called now: (batch,), (classes,)."""
    generator = torch.Generator().manual_seed(seed)
    count = min(count, task.images or count)
    names, order = torch.arange(CLASSES), torch.empty(0, dtype=torch.int64)
    for step in range(task.steps):
        if task.drift and step % task.drift == 0:
            names = names.clone()
            names[CLASSES // 2 :] = CLASSES // 2 + torch.randperm(CLASSES // 2, generator=generator)
        if len(order) < task.batch_size:
            order = torch.randperm(count, generator=generator)
        chosen, order = order[: task.batch_size], order[task.batch_size :]
        yield chosen, names


def measured(measure: str, output: Tensor, labels: Tensor) -> float:
    """Of one network: output (images, classes), labels (images,)."""
    if measure == "error":
        return (output.argmax(1) != labels).to(torch.float32).mean().item()
    targets = functional.one_hot(labels, CLASSES)
    return 0.5 * (output - targets).square().sum(1).mean().item()


@dataclass(frozen=True)
class Outcome:
    """What is known of one method: its candidates' means on held-out images, and its test curves.

    tried: by candidate, one number for each seed that it was tried from.
    curves: one for each seed.
    """

    tried: dict[Candidate, list[float]]
    best: Candidate
    curves: list[list[float]]

    @property
    def means(self) -> list[float]:
        """By seed, the mean over the training."""
        return [mean(curve) for curve in self.curves]


def outcomes(
    task: Task,
    candidates: dict[str, list[Candidate]],
    tuning_seeds: Sequence[int],
    seeds: Sequence[int],
    runs: Runs[Training],
) -> dict[str, Outcome]:
    """Each method at its best candidate."""
    wanted = {
        method: [(candidate, seed) for candidate in mine for seed in tuning_seeds]
        for method, mine in candidates.items()
    }
    tunings = curves_of(task, wanted, True, runs)
    tried, best = {}, {}
    for method, mine in candidates.items():
        tried[method] = {
            candidate: [mean(tunings[method, candidate, seed]) for seed in tuning_seeds]
            for candidate in mine
        }
        best[method] = chosen(tried[method])
    finals = {method: [(best[method], seed) for seed in seeds] for method in candidates}
    found = curves_of(task, finals, False, runs)
    return {
        method: Outcome(
            tried[method], best[method], [found[method, best[method], seed] for seed in seeds]
        )
        for method in candidates
    }


def curves_of(
    task: Task,
    wanted: dict[str, list[tuple[Candidate, int]]],
    held_out: bool,
    runs: Runs[Training],
) -> dict[tuple[str, Candidate, int], list[float]]:
    """By method, candidate and seed; all that relax in one stack, all that do not in another."""
    found = {}
    for relaxed in False, True:
        asked = [
            (method, candidate, seed)
            for method in METHODS
            if method in wanted and relaxes(method) == relaxed
            for candidate, seed in wanted[method]
        ]
        nets = tuple(Net(method, *candidate, seed) for method, candidate, seed in asked)
        training = Training(task, nets, held_out)
        runs.finish([training])
        found.update(zip(asked, runs[training]["curves"], strict=True))
    return found


def chosen(tried: dict[Candidate, list[float]]) -> Candidate:
    """The one with the lowest mean; of those that are equal to a thousandth, the lowest rate."""
    means = {candidate: statistics.fmean(values) for candidate, values in tried.items()}
    return min(means, key=lambda candidate: (round(means[candidate], 3), candidate))


def mean(curve: Sequence[float]) -> float:
    """Infinite if the training blew up."""
    found = statistics.fmean(curve)
    return found if math.isfinite(found) else math.inf
