"""Rao and Ballard's hierarchical model, and the fields that a sparse prior gives it.

A hierarchy of causes predicts colour images: the images from the causes r of level 1, these from
the causes r_h of level 2. It minimises

    L = 1/sigma^2 ||I - f(U r)||^2 + 1/sigma_td^2 ||r - f(U_h r_h)||^2
        + g(U) + g(U_h) + h(r) + h(r_h),    f = tanh,

over r and r_h for each image (fast) and over U and U_h over the images (slow). A-E show it with the
reference's settings, in which all of g and h are quadratic. F-H show one level on whitened grey
patches: if h prefers causes that are mostly near zero, the fields become localised and oriented.

Both matrices are convolutions, the same at every place. Every 8x8 patch, 4 pixels from the next, has
its own 8 causes and is predicted by itself, a convolution of 1x1; every 3x3 neighbourhood of patches,
2 patches from the next, has 10 causes of level 2, and where neighbourhoods overlap, their predictions
are added before the tanh, a transposed convolution.

Source of the settings and of the numbers called the paper's: A. Shai, "Basic Mathematics of
Predictive Coding"; the model is that of R. Rao and D. Ballard, Nature Neuroscience 2, 79-87 (1999),
and the whitening that of B. Olshausen and D. Field, Nature 381, 607-609 (1996).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.optimize import least_squares
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torch.nn import functional

from paper_figures.data import cifar10_folder, load_cifar10
from paper_figures.decoders import (
    energy,
    half_squared_error,
    mosaic,
    show_mosaic,
    signed,
    unit_columns,
)
from paper_figures.plotting import letter
from paper_figures.progress import track
from paper_figures.report import Number, Options, save, yes
from torch2pc import PCInferLatent
from torch2pc.pcinfer import PCResult

DEFAULT = False  # the full run takes minutes
DOWNLOADS = ("cifar10",)

PAPER_ERROR = {"start": 0.384, "end": 0.19}

SIDE, PATCH, STRIDE = 32, 8, 4
CAUSES, PATCHES = 8, (SIDE - PATCH) // STRIDE + 1
CAUSES_2, PATCHES_2 = 10, (PATCHES - 3) // 2 + 1
# The largest crop of a photograph, in pixels, that is made into one image.
LARGEST_CROP = 200

FIELD_SIDE, FIELDS = 12, 144
WELL_FITTED = 0.75


@dataclass(frozen=True)
class Hierarchy:
    """The reference's settings, but for the weights' rates; where it gives none, the choice is ours.

    weight_rate is for the mean of the images' gradients, at level 2 and at level 1, as are g and
    initial_weights. With the reference's 0.05 for both, and as few batches, the weights of level 1
    keep much of the noise that they start with, and those of level 2, whose causes are smaller,
    stay what they were drawn as.
    """

    variance: float = 10.0
    variance_top_down: float = 10.0
    h: float = 0.1
    g: tuple[float, float] = (0.01, 0.1)
    belief_rate: float = 0.005
    n: int = 100
    weight_rate: tuple[float, float] = (1.0, 0.5)
    weight_rate_decay: float = 1.05
    initial_weights: tuple[float, float] = (0.3, 0.1)
    batches: int = 40
    batch_size: int = 500
    images: int = 5000

    def LossFun(self, output: Tensor, Y: Tensor) -> Tensor:
        return half_squared_error(output, Y) * (2 / self.variance)

    @property
    def precision(self) -> float:
        return 2 / self.variance_top_down

    def prior(self, v: list[Tensor]) -> Tensor:
        return self.h * sum(v_l.square().sum() for v_l in v)


@dataclass(frozen=True)
class Fields:
    """One level on grey patches, with the prior ``weight sum (r / scale)^2`` or, if it is kurtotic,
    ``weight sum log(1 + (r / scale)^2)``.
    """

    prior: str
    weight: float
    scale: float
    n: int = 50
    batches: int = 800
    batch_size: int = 250
    learning_rate: float = 0.02
    patches: int = 20000
    deviation: float = 0.5

    def energy_of_causes(self, v: list[Tensor]) -> Tensor:
        squares = (v[0] / self.scale).square()
        return self.weight * (squares if self.prior == "quadratic" else squares.log1p()).sum()

    @property
    def curvature(self) -> float:
        """The largest second derivative of the prior."""
        return 2 * self.weight / self.scale**2


@dataclass
class Learned:
    """What came of the hierarchy: energy of one image and mean absolute error, by batch."""

    decoder: nn.Sequential
    energy: list[float] = field(default_factory=list)
    error: list[float] = field(default_factory=list)


def run(options: Options) -> list[Number]:
    torch.manual_seed(options.seed)
    hierarchy = Hierarchy(batches=8, batch_size=100) if options.quick else Hierarchy()
    name, images = colour_images(hierarchy.images, options)
    learned = learn(hierarchy, images[:-6], options)

    shown = images[-6:].to(options.device)
    seen = infer(learned.decoder, hierarchy, patches_of(shown))
    with torch.no_grad():
        predictions = images_of(learned.decoder[-1](seen.v[-2]), SIDE)

    kinds = [Fields("kurtotic", weight=0.12, scale=0.15), Fields("quadratic", weight=0.1, scale=1)]
    if options.quick:
        kinds = [replace(kind, batches=150) for kind in kinds]
    bases, fits, kurtoses = {}, {}, {}
    for kind in kinds:
        torch.manual_seed(options.seed)
        patches = whitened_patches(kind).to(options.device)
        bases[kind.prior], kurtoses[kind.prior] = learn_fields(kind, patches)
        fits[kind.prior] = [
            gabor_fit(basis.double().cpu().numpy())
            for basis in track(bases[kind.prior], f"Gabor fits, {kind.prior}")
        ]

    numbers = numbers_of(learned, fits, kurtoses)
    save(
        options,
        "figure_rao_ballard",
        draw(learned, shown, predictions, bases, fits, name),
        data={
            "name": name,
            "images": len(images),
            "grey patches": "scikit-learn's sample photographs",
        },
        settings={"hierarchy": vars(hierarchy)} | {f"fields, {k.prior}": vars(k) for k in kinds},
        series={
            "energy by batch": learned.energy,
            "mean absolute error by batch": learned.error,
            "share of variance that a Gabor function explains": fits,
            f"share of fields above {WELL_FITTED:g}": {
                prior: well_fitted(values) for prior, values in fits.items()
            },
            "excess kurtosis of the causes": kurtoses,
        },
        numbers=numbers,
    )
    return numbers


def numbers_of(
    learned: Learned, fits: dict[str, list[float]], kurtoses: dict[str, float]
) -> list[Number]:
    share = {prior: well_fitted(values) for prior, values in fits.items()}
    start, end = learned.error[0], learned.error[-1]
    return [
        Number("mean absolute error at the start", PAPER_ERROR["start"], start),
        Number("mean absolute error at the end", PAPER_ERROR["end"], end),
        Number("end at most half of the start", "yes", yes(end <= start / 2)),
        Number(
            "the kurtotic prior makes more fields Gabor functions",
            "yes",
            yes(share["kurtotic"] > share["quadratic"]),
        ),
        Number(
            "the kurtotic prior makes the causes more kurtotic",
            "yes",
            yes(kurtoses["kurtotic"] > kurtoses["quadratic"]),
        ),
    ]


def colour_images(count: int, options: Options) -> tuple[str, Tensor]:
    """Colour images (count, 3, 32, 32) in [-1, 1]: CIFAR-10 if it is there, or else crops."""
    if cifar10_folder(options.data) is not None:
        images = load_cifar10(options.data).train_images
        return "CIFAR-10", images[torch.randperm(len(images))[:count]] / 127.5 - 1
    return "crops of scikit-learn's sample photographs", photograph_crops(count)


def photograph_crops(count: int) -> Tensor:
    """Random squares of the two photographs, of many sizes, each made 32 pixels wide."""
    photographs = _photographs()
    crops = []
    for index in range(count):
        photograph = photographs[index % 2] / 127.5 - 1
        size = int(torch.randint(SIDE, LARGEST_CROP + 1, ()))
        crop = _random_window(photograph, size)
        crops.append(
            functional.interpolate(
                crop[None], size=(SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False
            )
        )
    return torch.cat(crops).clamp(-1, 1)


def _photographs() -> list[Tensor]:
    """Two photographs, (3, height, width), floats from 0 to 255."""
    images = load_sample_images().images
    return [torch.from_numpy(image.copy()).permute(2, 0, 1).float() for image in images]


def _random_window(picture: Tensor, size: int) -> Tensor:
    top, left = (int(torch.randint(length - size + 1, ())) for length in picture.shape[-2:])
    return picture[..., top : top + size, left : left + size]


def hierarchy_decoder(initial_weights: tuple[float, float]) -> nn.Sequential:
    """From (batch, 10, 3, 3) by (batch, 8, 7, 7) to patches (batch, 192, 7, 7)."""
    decoder = nn.Sequential(
        nn.Sequential(nn.ConvTranspose2d(CAUSES_2, CAUSES, 3, stride=2, bias=False), nn.Tanh()),
        nn.Sequential(nn.Conv2d(CAUSES, 3 * PATCH**2, 1, bias=False), nn.Tanh()),
    )
    for weight, deviation in zip(decoder.parameters(), initial_weights, strict=True):
        nn.init.normal_(weight, std=deviation)
    return decoder


def patches_of(images: Tensor) -> Tensor:
    """The overlapping patches of images (batch, 3, side, side): (batch, 192, places, places)."""
    places = (images.shape[-1] - PATCH) // STRIDE + 1
    return functional.unfold(images, PATCH, stride=STRIDE).unflatten(2, (places, places))


def images_of(patches: Tensor, side: int) -> Tensor:
    """The images that patches add up to, with the mean where they overlap."""
    columns = patches.flatten(2)
    added, times = (
        functional.fold(one, side, PATCH, stride=STRIDE)
        for one in (columns, torch.ones_like(columns))
    )
    return added / times


def infer(decoder: nn.Sequential, hierarchy: Hierarchy, Y: Tensor) -> PCResult:
    """The causes of patches, from zero, and the decoder's updates in ``.grad``."""
    return PCInferLatent(
        decoder,
        hierarchy.LossFun,
        Y,
        Y.new_zeros(len(Y), CAUSES_2, PATCHES_2, PATCHES_2),
        hierarchy.belief_rate,
        hierarchy.n,
        precision=hierarchy.precision,
        prior=hierarchy.prior,
    )


def learn(hierarchy: Hierarchy, images: Tensor, options: Options) -> Learned:
    """Gradient descent on the weights, with the mean of the images' gradients."""
    batch_size = min(hierarchy.batch_size, len(images))
    learned = Learned(hierarchy_decoder(hierarchy.initial_weights).to(options.device))
    weights = list(learned.decoder.parameters())
    # The gradients are sums over the batch; the energy of the weights counts once for each image.
    optimizer = torch.optim.SGD(
        [
            {"params": weight, "lr": rate / batch_size, "weight_decay": 2 * g * batch_size}
            for weight, rate, g in zip(weights, hierarchy.weight_rate, hierarchy.g, strict=True)
        ]
    )
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 1 / hierarchy.weight_rate_decay)
    for _ in track(range(hierarchy.batches), "rao_ballard, hierarchy"):
        chosen = torch.randperm(len(images))[:batch_size]
        Y = patches_of(images[chosen].to(options.device))
        result = infer(learned.decoder, hierarchy, Y)
        of_images = energy(
            learned.decoder, hierarchy.LossFun, Y, result, hierarchy.precision, hierarchy.prior
        )
        of_weights = sum(
            g * weight.detach().square().sum().item()
            for g, weight in zip(hierarchy.g, weights, strict=True)
        )
        learned.energy.append(of_images / batch_size + of_weights)
        with torch.no_grad():
            learned.error.append((learned.decoder[-1](result.v[-2]) - Y).abs().mean().item())
        optimizer.step()
        schedule.step()
    return learned


@torch.no_grad()
def level_2_shown(decoder: nn.Sequential) -> Tensor:
    """What each cause of level 2 predicts by itself, through level 1: (10, 3, 16, 16)."""
    weight = next(decoder.parameters())
    alone = torch.eye(CAUSES_2, device=weight.device).view(CAUSES_2, CAUSES_2, 1, 1)
    return images_of(decoder(alone), PATCH + 2 * STRIDE)


def whiten(photograph: Tensor) -> Tensor:
    """Grey, with the spectrum made flat up to 0.4 cycles a pixel; (height, width), deviation 1.

    Natural images have amplitudes that fall as 1/f; the filter f exp(-(f/0.4)^4) undoes that but
    leaves out the corners of the spectrum, where there is little but noise.
    """
    grey = (photograph + 10).log().mean(0)
    frequency = torch.hypot(
        torch.fft.fftfreq(grey.shape[0])[:, None], torch.fft.fftfreq(grey.shape[1])[None]
    )
    filtered = torch.fft.fft2(grey) * frequency * torch.exp(-((frequency / 0.4) ** 4))
    white = torch.fft.ifft2(filtered).real
    return white / white.std()


def whitened_patches(kind: Fields) -> Tensor:
    """Random grey patches (count, 144) with their contrasts made more alike."""
    # The filter takes the photograph for periodic, which spoils the margin.
    white = [whiten(photograph)[4:-4, 4:-4] for photograph in _photographs()]
    windows = [_random_window(white[i % 2], FIELD_SIDE) for i in range(kind.patches)]
    patches = torch.stack(windows).flatten(1)
    patches = patches - patches.mean(1, keepdim=True)
    patches = patches / (patches.std(1, keepdim=True) + 0.5)
    return patches * (kind.deviation / patches.std())


def learn_fields(kind: Fields, patches: Tensor) -> tuple[Tensor, float]:
    """The fields (144, 12, 12) of one level under a prior, and its causes' excess kurtosis."""
    layer = nn.Linear(FIELDS, FIELD_SIDE**2, bias=False).to(patches.device)
    nn.init.normal_(layer.weight)
    unit_columns(layer)
    decoder = nn.Sequential(nn.Sequential(layer, nn.Tanh()))
    optimizer = torch.optim.Adam(layer.parameters(), lr=kind.learning_rate)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, max(1, kind.batches // 2), 0.25)
    for _ in track(range(kind.batches), f"rao_ballard, {kind.prior} prior"):
        Y = patches[torch.randint(len(patches), (kind.batch_size,))]
        infer_fields(decoder, kind, Y)
        optimizer.step()
        schedule.step()
        unit_columns(layer)
    causes = infer_fields(decoder, kind, patches[:2000]).v[0]
    return layer.weight.detach().T.unflatten(1, (FIELD_SIDE, FIELD_SIDE)), excess_kurtosis(causes)


def infer_fields(decoder: nn.Sequential, kind: Fields, Y: Tensor) -> PCResult:
    weight = next(decoder.parameters()).detach()
    # tanh is nowhere steeper than 1, so that this is close to the largest curvature of the energy.
    curvature = torch.linalg.matrix_norm(weight, 2).item() ** 2 + kind.curvature
    start = Y.new_zeros(len(Y), FIELDS)
    return PCInferLatent(
        decoder,
        half_squared_error,
        Y,
        start,
        1.5 / curvature,
        kind.n,
        prior=kind.energy_of_causes,
    )


def excess_kurtosis(values: Tensor) -> float:
    """The fourth moment over that of a normal distribution of the same variance, less 3."""
    return (values.pow(4).mean() / values.square().mean() ** 2 - 3).item()


def gabor_fit(basis: np.ndarray) -> float:
    """The share of the square sum of ``basis`` (side, side) that the best Gabor function explains.

    A cosine wave of any phase under a Gaussian envelope whose two deviations are at most a third of
    the side, so that what fills its window is no good fit. Least squares from the peak of
    the spectrum, with a round and two long envelopes to start from.
    """
    side = len(basis)
    y, x = np.mgrid[:side, :side].astype(float)

    def waves(shape: np.ndarray) -> np.ndarray:
        centre_x, centre_y, across, along, angle, frequency = shape
        u = (x - centre_x) * np.cos(angle) + (y - centre_y) * np.sin(angle)
        w = (y - centre_y) * np.cos(angle) - (x - centre_x) * np.sin(angle)
        envelope = np.exp(-0.5 * ((u / across) ** 2 + (w / along) ** 2))
        phases = 2 * np.pi * frequency * u
        return np.stack([envelope * np.cos(phases), envelope * np.sin(phases)], -1).reshape(-1, 2)

    def residual(shape: np.ndarray) -> np.ndarray:
        # The amplitudes of cosine and sine are the best ones for the shape.
        both = waves(shape)
        return both @ np.linalg.lstsq(both, basis.ravel(), rcond=None)[0] - basis.ravel()

    spectrum = np.abs(np.fft.fft2(basis, (64, 64)))
    frequencies = np.fft.fftfreq(64)
    row, column = np.unravel_index(spectrum.argmax(), spectrum.shape)
    peak = frequencies[column], frequencies[row]
    weight = basis**2 / (basis**2).sum()
    start = [(weight * x).sum(), (weight * y).sum()]
    angle, frequency = np.arctan2(peak[1], peak[0]), np.hypot(*peak)
    lowest = [-1, -1, 0.5, 0.5, -np.inf, 0]
    highest = [side, side, side / 3, side / 3, np.inf, 0.71]
    errors = [
        least_squares(
            residual,
            [*start, across, along, angle, frequency],
            bounds=(lowest, highest),
            max_nfev=60,
        ).cost
        for across, along in ((2.0, 2.0), (1.5, 3.5), (3.5, 1.5))
    ]
    return 1 - 2 * min(errors) / (basis**2).sum()


def well_fitted(fits: list[float]) -> float:
    """The share of the fields that a Gabor function explains well."""
    return float(np.mean(np.array(fits) >= WELL_FITTED))


def draw(
    learned: Learned,
    inputs: Tensor,
    predictions: Tensor,
    bases: dict[str, Tensor],
    fits: dict[str, list[float]],
    name: str,
) -> Figure:
    figure = Figure(figsize=(8.4, 10.4), layout="constrained")
    figure.suptitle(
        f"Rao and Ballard's model on {name} (A-E) and whitened grey patches (F-H)", fontsize=9
    )
    axes = figure.subplot_mosaic(
        [list("AAAAAA"), list("BBBCCC"), list("DDDEEE"), list("FFGGHH")],
        height_ratios=(2.2, 0.9, 0.9, 1.4),
    )
    for letter_of_panel, panel in axes.items():
        letter(panel, letter_of_panel)
    rows = 0.5 + 0.5 * torch.cat([inputs, predictions, inputs - predictions])
    show_mosaic(axes["A"], mosaic(rows, len(inputs), gap=2))
    names = ("input", "prediction", "difference")
    axes["A"].set_yticks([SIDE / 2 + row * (SIDE + 2) for row in range(3)], names)
    axes["A"].tick_params(length=0)

    level_1 = learned.decoder[1][0].weight.detach().flatten(1).T.unflatten(1, (3, PATCH, PATCH))
    show_mosaic(axes["B"], mosaic(signed(level_1), 4), "level 1: fields of the 8 causes")
    level_2 = level_2_shown(learned.decoder)
    show_mosaic(
        axes["C"], mosaic(signed(level_2), 5), "level 2: the 10 causes, shown through level 1"
    )

    axes["D"].plot(learned.energy, color="#D55E00")
    axes["D"].set(ylabel="energy of one image", xlabel="batch", ylim=(0, None))
    axes["E"].plot(learned.error, color="#D55E00", label="ours")
    for (end, value), side in zip(PAPER_ERROR.items(), ("bottom", "top"), strict=True):
        axes["E"].axhline(value, color="k", linestyle=":", linewidth=1)
        axes["E"].annotate(
            f"reference, {end}",
            (1, value),
            xycoords=("axes fraction", "data"),
            ha="right",
            va=side,
        )
    axes["E"].set(ylabel="mean absolute error", xlabel="batch", ylim=(0, None))

    for panel, (prior, basis) in zip("FG", bases.items(), strict=True):
        show_mosaic(axes[panel], mosaic(signed(basis[:, None]), 12), f"fields, {prior} prior")
    _fits(axes["H"], fits)
    return figure


def _fits(axes: Axes, fits: dict[str, list[float]]) -> None:
    colours = {"kurtotic": "#D55E00", "quadratic": "#888888"}
    for prior, values in fits.items():
        axes.hist(
            values,
            bins=np.linspace(0, 1, 21),
            histtype="step",
            linewidth=1.3,
            color=colours[prior],
            label=f"{prior}: {100 * well_fitted(values):.0f} % above {WELL_FITTED:g}",
        )
    axes.axvline(WELL_FITTED, color="k", linestyle=":", linewidth=1)
    axes.set(xlabel="share explained by a Gabor function", ylabel="fields")
    axes.legend(loc="upper left")
    axes.margins(y=0.25)
