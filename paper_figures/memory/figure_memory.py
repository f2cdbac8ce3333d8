"""Memory retrieval: a predictive coding recurrent network stores 20 letters and finds them again.

A `torch2pc.PCRNN` learns one cause for each letter. Then a letter's trajectory is clamped at its
output and the cause, started at random, is inferred in repeated passes over the trajectory. Letters
generated from the learned causes (A), the causes (B), four retrieval paths of one letter (C),
generation error (D) and tries whose nearest cause is right (E) against passes, and tries
that are right against noise on the target (F) and in each seed's network (G), with the settings of
the model's source and with ours.

Source of the model, the reference settings and the numbers called the paper's: L. Annabi,
"Structured memory retrieval". There the letters are those of the UCI file that `letters` can read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from torch import Tensor

from paper_figures.letters import Letters, load_letters
from paper_figures.plotting import METHODS, letter
from paper_figures.progress import track
from paper_figures.report import Number, Options, save
from torch2pc import PCRNN
from torch2pc.memory import Retrieval

DEFAULT = False

HIDDEN = 50
TAU = 50
TRAINING_STEPS = 1000
LEARNING_RATE = 0.03
TRIES = 4
# All passes of our settings; of the reference's, the passes at which the two are compared.
COMPARED_PASSES = 300
REFERENCE_PASSES = 1000
# Standard deviations of the noise added to each coordinate of the targets, whose own is 0.83.
NOISE = (0.0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8)

PAPER_LOSS = 0.015
PAPER_RIGHT = {100: 0.66, 300: 0.74, 1000: 0.74}
PAPER_RIGHT_AT_BEST = {100: 0.99, 300: 1.0, 1000: 1.0}


def falling(first: float, last: float, passes: int) -> list[float]:
    """A number for each pass, from first to last by a constant factor."""
    return np.geomspace(first, last, passes).tolist()


@dataclass(frozen=True)
class Settings:
    """How a network is trained and its memory searched.

    last_part: the last part of training, during which the learning rate falls to nothing.
    rates: the arguments of `PCRNN.retrieve`, given the number of passes.
    """

    name: str
    colour: str
    weight_decay: float
    last_part: float
    rates: Callable[[int], Mapping[str, float | Sequence[float]]]


REFERENCE = Settings(
    name="reference settings",
    colour=METHODS["BP"][0],
    weight_decay=1e-4,
    last_part=0.0,
    rates=lambda passes: {
        "alpha_x": 0.1,
        "alpha_h": 0.019,
        "alpha_c": 0.0085,
        "sigma_c": 0.096,
        "sigma_r": 2.6,
    },
)

# Ours corrects the hidden state less, so that the error at one step is that of the cause and not
# of the state; moves the cause slowly, so that it averages the error over the whole sequence; and
# cools down, from wandering between the causes to staying where the error is least.
OURS = Settings(
    name="our settings",
    colour=METHODS["PC"][0],
    weight_decay=0.0,
    last_part=0.2,
    rates=lambda passes: {
        "alpha_x": 0.02,
        "alpha_h": 0.2,
        "alpha_c": falling(2e-3, 1e-4, passes),
        "sigma_c": 0.06,
        "sigma_r": falling(20, 0.5, passes),
    },
)


def run(options: Options) -> list[Number]:
    letters = load_letters(options.data)
    targets = letters.trajectories.to(options.device)
    seeds = range(options.seed, options.seed + (2 if options.quick else 5))
    noise = NOISE[::3] if options.quick else NOISE
    passes = {
        REFERENCE.name: COMPARED_PASSES if options.quick else REFERENCE_PASSES,
        OURS.name: COMPARED_PASSES,
    }

    models, found, right_in_noise = {}, {}, {}
    for settings in REFERENCE, OURS:
        name = settings.name
        models[name] = [train(targets, settings, seed) for seed in seeds]
        found[name] = [
            retrieve(model, targets, settings, passes[name], seed)
            for model, seed in zip(models[name], seeds, strict=True)
        ]
        right_in_noise[name] = [
            right_with_noise(model, targets, settings, noise, seed)
            for model, seed in zip(models[name], seeds, strict=True)
        ]
    same_networks = [
        right(retrieve(model, targets, OURS, COMPARED_PASSES, seed).nearest)[-1]
        for model, seed in zip(models[REFERENCE.name], seeds, strict=True)
    ]

    losses = {
        name: [relative_loss(model, targets) for model in trained]
        for name, trained in models.items()
    }
    numbers = compared(losses, found, fmean(same_networks))
    title = (
        f"PCRNN, {letters.name}, mean of {len(seeds)} seeds"
        + (" (shortened run: fewer seeds, passes and noise levels)" if options.quick else "")
        + f"\ntraining loss / variance: {fmean(losses[REFERENCE.name]):.4f} (reference settings), "
        f"{fmean(losses[OURS.name]):.4f} (ours)"
    )
    save(
        options,
        "figure_memory",
        drawn(letters, models[OURS.name][0], found, noise, right_in_noise, title),
        data=letters.summary(),
        settings={
            "hidden": HIDDEN,
            "tau": TAU,
            "training steps": TRAINING_STEPS,
            "learning rate": LEARNING_RATE,
            "tries": TRIES,
            "seeds": list(seeds),
            **{
                settings.name: {
                    "weight decay": settings.weight_decay,
                    "part of training with falling learning rate": settings.last_part,
                    "passes": passes[settings.name],
                    **settings.rates(passes[settings.name]),
                }
                for settings in (REFERENCE, OURS)
            },
        },
        series={
            "noise": noise,
            "right with our retrieval in the networks of the reference settings": same_networks,
            **{
                name: {
                    "training loss / variance": losses[name],
                    "generation error": [result.errors.mean((1, 2)) for result in found[name]],
                    "right": [right(result.nearest) for result in found[name]],
                    "right at least error": [right(result.best_so_far()) for result in found[name]],
                    "right with noise, in the end and at least error": right_in_noise[name],
                    "causes": [model.centres for model in models[name]],
                }
                for name in found
            },
        },
        numbers=numbers,
    )
    return numbers


def train(targets: Tensor, settings: Settings, seed: int) -> PCRNN:
    """A network whose free run from each learned cause is that cause's target."""
    generator = torch.Generator().manual_seed(seed)
    time, count, outputs = targets.shape
    model = PCRNN(2, HIDDEN, outputs, TAU, generator=generator, device=targets.device)
    causes = (0.01 * torch.randn(count, 2, generator=generator)).to(targets.device)
    causes.requires_grad_()
    optimizer = torch.optim.Adam(
        [*model.parameters(), causes], LEARNING_RATE, weight_decay=settings.weight_decay
    )
    last_steps = settings.last_part * TRAINING_STEPS
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (TRAINING_STEPS - step) / last_steps) if last_steps else 1.0,
    )
    for _ in track(range(TRAINING_STEPS), f"memory, {settings.name}, seed {seed}"):
        loss = (model(causes, steps=time).x_pred - targets).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.set_centres(causes)
    return model


@torch.no_grad()
def relative_loss(model: PCRNN, targets: Tensor) -> float:
    """The mean squared error of the trained network over the targets' variance."""
    error = model(model.centres, steps=len(targets)).x_pred - targets
    return (error.square().mean() / targets.var()).item()


def retrieve(
    model: PCRNN, targets: Tensor, settings: Settings, passes: int, seed: int
) -> Retrieval:
    generator = torch.Generator().manual_seed(seed)
    return model.retrieve(targets, TRIES, passes, generator=generator, **settings.rates(passes))


def right(index: Tensor) -> list[float]:
    """Share of the tries whose index is that of their target; index: (passes, tries, letters)."""
    letters = torch.arange(index.shape[2], device=index.device)
    return (index == letters).double().mean((1, 2)).tolist()


def right_with_noise(
    model: PCRNN, targets: Tensor, settings: Settings, noise: Sequence[float], seed: int
) -> list[tuple[float, float]]:
    """Share of the tries that are right after `COMPARED_PASSES`, in the end and at least error.

    One pair for each level of noise.
    """
    generator = torch.Generator().manual_seed(seed)
    # The same noise at every level, only larger; all levels are searched in one batch.
    pattern = torch.randn(targets.shape, generator=generator).to(targets.device)
    noisy = torch.cat([targets + level * pattern for level in noise], dim=1)
    result = retrieve(model, noisy, settings, COMPARED_PASSES, seed)
    in_the_end, at_best = (
        [right(part)[0] for part in index[-1:].chunk(len(noise), dim=2)]
        for index in (result.nearest, result.best_so_far())
    )
    return list(zip(in_the_end, at_best, strict=True))


def compared(
    losses: Mapping[str, Sequence[float]],
    found: Mapping[str, Sequence[Retrieval]],
    same_networks: float,
) -> list[Number]:
    """The paper's numbers, which are one seed's, beside the means over our seeds."""
    loss, name = fmean(losses[REFERENCE.name]), REFERENCE.name
    numbers = [Number(f"training loss / variance, {name}", PAPER_LOSS, loss, 0.004)]
    in_the_end, at_best = mean_right(found[name])
    for passes in PAPER_RIGHT:
        if passes <= len(in_the_end):
            after = f"after {passes} passes, {name}"
            ours, ours_at_best = in_the_end[passes - 1], at_best[passes - 1]
            numbers += [
                Number(f"right {after}", PAPER_RIGHT[passes], ours, 0.12),
                Number(
                    f"right at least error {after}", PAPER_RIGHT_AT_BEST[passes], ours_at_best, 0.05
                ),
            ]

    loss, name = fmean(losses[OURS.name]), OURS.name
    in_the_end, at_best = mean_right(found[name])
    after = f"after {len(in_the_end)} passes, {name}"
    return [
        *numbers,
        bound(f"training loss / variance, {name}", "at most", PAPER_LOSS, loss),
        bound(f"right {after}", "at least", 0.9, in_the_end[-1]),
        bound(f"right at least error {after}", "at least", 0.98, at_best[-1]),
        bound(f"right {after} in the reference's networks", "at least", 0.9, same_networks),
    ]


def mean_right(results: Sequence[Retrieval]) -> tuple[list[float], list[float]]:
    """Share of tries that are right after each pass, in the end and at least error so far."""
    in_the_end = np.mean([right(result.nearest) for result in results], 0)
    at_best = np.mean([right(result.best_so_far()) for result in results], 0)
    return in_the_end.tolist(), at_best.tolist()


def bound(what: str, side: str, limit: float, value: float) -> Number:
    """A number that has to be on one side of a limit."""
    kept = value >= limit if side == "at least" else value <= limit
    wanted = f"{side} {limit:g}"
    return Number(f"{what}: {value:.3g}", wanted, wanted if kept else f"{value:.3g}")


def drawn(
    letters: Letters,
    model: PCRNN,
    found: Mapping[str, Sequence[Retrieval]],
    noise: Sequence[float],
    right_in_noise: Mapping[str, Sequence[Sequence[tuple[float, float]]]],
    title: str,
) -> Figure:
    figure = Figure(figsize=(9, 8.4), layout="constrained")
    figure.suptitle(title, fontsize=9)
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 2.3))
    draw_letters(top, letters, model)
    causes, paths, errors, shares, noisy, seeds = bottom.subplots(2, 3).flat
    draw_causes(causes, letters, model, size=8)
    causes.set(xlabel="first cause", ylabel="second cause")
    draw_causes(paths, letters, model, size=6)
    draw_paths(paths, letters, model, found[OURS.name][0])
    paths.set(xlabel="first cause")
    draw_passes(errors, found, lambda result: result.errors.mean((1, 2)).tolist(), "-")
    errors.set(xlabel="pass", ylabel="generation error", xscale="log", ylim=(0, None))
    draw_passes(shares, found, lambda result: right(result.nearest), "-")
    draw_passes(
        shares, found, lambda result: right(result.best_so_far()), ":", ", least error so far"
    )
    shares.set(xlabel="pass", ylabel="share of tries right", xscale="log", ylim=(0, 1.02))
    shares.legend(fontsize=6, loc="lower right")
    for settings in REFERENCE, OURS:
        colour, runs = settings.colour, np.array(right_in_noise[settings.name])
        for index, style in enumerate(("o-", "o:")):
            mean, low, high = (f(runs[..., index], 0) for f in (np.mean, np.min, np.max))
            noisy.plot(noise, mean, style, markersize=3, color=colour)
            noisy.fill_between(noise, low, high, color=colour, alpha=0.12, linewidth=0)
        per_seed = [right(result.nearest)[COMPARED_PASSES - 1] for result in found[settings.name]]
        seeds.plot(range(len(per_seed)), per_seed, "o", color=colour, label=settings.name)
        seeds.axhline(fmean(per_seed), color=colour, linewidth=0.8)
    noisy.set(xlabel="noise on the target (standard deviation)", ylim=(0, 1.02))
    noisy.set(ylabel=f"share right after {COMPARED_PASSES} passes")
    seeds.set(xlabel="seed", ylim=(0, 1.02), xticks=range(len(per_seed)))
    seeds.set(ylabel=f"share right after {COMPARED_PASSES} passes")
    for axes, name in zip((causes, paths, errors, shares, noisy, seeds), "BCDEFG", strict=True):
        letter(axes, name)
    return figure


@torch.no_grad()
def draw_letters(figure: SubFigure, letters: Letters, model: PCRNN) -> None:
    targets = letters.trajectories
    generated = model(model.centres, steps=len(targets)).x_pred.cpu()
    rows = 2
    columns = -(-len(letters.characters) // rows)
    axes_of = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in axes_of:
        axes.set_axis_off()
    for index, axes in zip(range(len(letters.characters)), axes_of, strict=False):
        axes.plot(*targets[:, index].T, color="0.65", linewidth=3, label="target")
        axes.plot(*generated[:, index].T, color=OURS.colour, label="generated, our settings")
        axes.set_aspect("equal", "datalim")
    letter(axes_of[0], "A")
    handles, labels = axes_of[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)


def draw_causes(axes: Axes, letters: Letters, model: PCRNN, size: float) -> None:
    """Each letter written at its cause."""
    for character, (x, y) in zip(letters.characters, model.centres.tolist(), strict=True):
        axes.text(x, y, character, size=size, ha="center", va="center", zorder=3)
    x, y = model.centres.cpu().T
    axes.scatter(x, y, s=70, color="0.9", linewidths=0)


def draw_paths(axes: Axes, letters: Letters, model: PCRNN, result: Retrieval) -> None:
    """The tries' causes after each pass, in the search for the letter in the middle of the list."""
    target = len(letters.characters) // 2
    starts, ends = result.paths[0, :, target], result.paths[-1, :, target]
    for path, style in zip(
        result.paths[:, :, target].unbind(1),
        ("#0072B2", "#009E73", "#CC79A7", "#E69F00"),
        strict=True,
    ):
        x, y = path.cpu().T
        axes.plot(x, y, linewidth=0.5, alpha=0.7, color=style)
        axes.plot(x[0], y[0], "o", markersize=4, color=style)
        axes.plot(x[-1], y[-1], "*", markersize=9, color=style, zorder=4)
    axes.set_title(f"four tries of '{letters.characters[target]}', from ● to ★")
    # A cause is soon thrown far out and comes back: the axes show where the letters are.
    seen = torch.cat([starts, ends, model.centres])
    low, high = seen.amin(0) - 0.5, seen.amax(0) + 0.5
    axes.set(xlim=(low[0].item(), high[0].item()), ylim=(low[1].item(), high[1].item()))


def draw_passes(
    axes: Axes,
    found: Mapping[str, Sequence[Retrieval]],
    measure: Callable[[Retrieval], list[float]],
    style: str,
    what: str = "",
) -> None:
    """Mean over the seeds of a measure against the passes."""
    for settings in REFERENCE, OURS:
        values = np.mean([measure(result) for result in found[settings.name]], 0)
        axes.plot(
            range(1, len(values) + 1),
            values,
            style,
            color=settings.colour,
            label=settings.name + what,
        )
