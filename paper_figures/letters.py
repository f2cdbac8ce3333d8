"""Handwritten letters as pen trajectories: the embedded ones, and those of UCI's data set.

The embedded ones are in ``letters.csv``, which ``python -m paper_figures.letters`` writes anew from
the strokes of the package Hershey-Fonts. What is done with the letters is in ``memory``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.io import loadmat
from scipy.ndimage import gaussian_filter1d
from torch import Tensor

from paper_figures.data import DataError
from paper_figures.report import write_atomically

EMBEDDED = Path(__file__).parent / "letters.csv"
UCI_FILE = "mixoutALL_shifted.mat"

# The letters that are written without lifting the pen.
CHARACTERS = "abcdeghlmnopqrsuvwyz"
POINTS = 60
# That of the model's source, so that its step sizes mean the same here.
VARIANCE = 0.69

HEADER = """\
# 20 letters as pen trajectories, 60 points each in the order of writing: letter,x,y with y upwards.
# Derived from the font Script Simplex of the Hershey Fonts, as the package Hershey-Fonts 2.1.0 (MIT
# License, Copyright (c) 2020 apshu) contains it. The strokes were joined and smoothed, the stroke
# that leads to the next letter was cut off, and the points follow each other as a pen moves.
# The Hershey Fonts may be used by anyone for any purpose, with these acknowledgements:
# - The Hershey Fonts were originally created by Dr. A. V. Hershey while working at the
#   U. S. National Bureau of Standards.
# - The format of the Font data in this distribution was originally created by James Hurt,
#   Cognition, Inc., 900 Technology Park Drive, Billerica, MA 01821 (mit-eddie!ci-dandelion!hurt).
"""

Path2D = NDArray[np.float64]  # (points, 2)


@dataclass(frozen=True)
class Letters:
    """Pen trajectories (time, letters, 2) of the letters named by ``characters``."""

    name: str
    characters: str
    trajectories: Tensor

    def summary(self) -> dict[str, str | int]:
        points, count, _ = self.trajectories.shape
        return {"name": self.name, "letters": count, "points": points}


def load_letters(folder: Path | None) -> Letters:
    """The letters of UCI's file if it lies in ``folder``, else the embedded ones."""
    if folder is not None and (folder / UCI_FILE).is_file():
        return load_uci(folder / UCI_FILE)
    return load_csv(EMBEDDED)


def load_csv(path: Path) -> Letters:
    """The letters of a file with one point ``letter,x,y`` a line and comments after ``#``."""
    paths: dict[str, list[list[float]]] = {}
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if line.startswith("#") or not line.strip():
            continue
        try:
            character, x, y = line.split(",")
            paths.setdefault(character, []).append([float(x), float(y)])
        except ValueError as error:
            raise DataError(
                f"{path}, line {number}: {line!r} is not 'letter,x,y' with numbers x and y"
            ) from error
    lengths = {character: len(points) for character, points in paths.items()}
    if len(set(lengths.values())) != 1:
        raise DataError(f"{path}: every letter must have as many points, got {lengths}")
    trajectories = np.stack([np.array(points) for points in paths.values()], 1)
    return Letters(
        "embedded letters", "".join(paths), torch.tensor(trajectories, dtype=torch.float32)
    )


def load_uci(path: Path) -> Letters:
    """The first example of each letter in UCI's Character Trajectories (mixoutALL_shifted.mat).

    Its variables: ``mixout``, a cell array of (3, time) matrices of horizontal and vertical pen
    velocity and pen force, zero before and after the letter; ``consts.charlabels``, the number of
    each matrix's letter, counted from 1; ``consts.key``, the letters.
    """
    mend = f"get {UCI_FILE} of the data set Character Trajectories from archive.ics.uci.edu again"
    try:
        content = loadmat(path, squeeze_me=True)
    # The parser lets out whatever a broken file makes it stumble over.
    except Exception as error:
        raise DataError(f"{path} cannot be read as a MATLAB file ({error}): {mend}") from error
    try:
        velocities = np.atleast_1d(content["mixout"])
        labels = np.atleast_1d(content["consts"]["charlabels"][()]).astype(int)
        key = [str(character) for character in np.atleast_1d(content["consts"]["key"][()])]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise DataError(
            f"{path} must hold mixout, consts.charlabels and consts.key ({error}): {mend}"
        ) from error
    if len(labels) != len(velocities) or not all(1 <= label <= len(key) for label in labels):
        raise DataError(
            f"{path} holds {len(velocities)} trajectories, {len(labels)} labels from "
            f"{min(labels, default=0)} to {max(labels, default=0)} and {len(key)} letters: the "
            f"labels must be as many as the trajectories, from 1 to the number of letters: {mend}"
        )
    first = {key[label - 1]: index for index, label in reversed(list(enumerate(labels)))}
    characters = "".join(sorted(first))
    paths = [_integrated(velocities[first[character]], path, mend) for character in characters]
    return Letters("UCI Character Trajectories", characters, _normalised(paths))


def _integrated(velocity: NDArray[np.generic], path: Path, mend: str) -> Path2D:
    """The pen's path, at points that follow each other at equal times."""
    if velocity.ndim != 2 or velocity.shape[0] != 3 or velocity.dtype.kind != "f":
        raise DataError(
            f"{path}: each trajectory must be a (3, time) matrix of floats, "
            f"got shape {velocity.shape}, {velocity.dtype}: {mend}"
        )
    moving = np.flatnonzero(np.any(velocity[:2] != 0, axis=0))
    if len(moving) < 2 or not np.isfinite(velocity).all():
        raise DataError(f"{path}: a trajectory does not move, or is not finite: {mend}")
    positions = np.cumsum(velocity[:2, moving[0] : moving[-1] + 1].T.astype(np.float64), axis=0)
    return _resampled(positions, np.arange(len(positions)), POINTS)


def _normalised(paths: Sequence[Path2D]) -> Tensor:
    """Trajectories (time, letters, 2) that start at the origin, equally large, of `VARIANCE`."""
    equally_large = [(path - path[0]) / np.sqrt(path.var(0).mean()) for path in paths]
    trajectories = np.stack(equally_large, 1)
    trajectories *= np.sqrt(VARIANCE / trajectories.var())
    return torch.tensor(trajectories, dtype=torch.float32)


def _resampled(path: Path2D, times: NDArray[np.generic], count: int) -> Path2D:
    """``count`` points of the path at equal times, given the times of its points."""
    wanted = np.linspace(times[0], times[-1], count)
    return np.stack([np.interp(wanted, times, coordinate) for coordinate in path.T], 1)


def write_embedded() -> None:
    """Write ``letters.csv`` from the strokes of Hershey-Fonts."""
    from HersheyFonts import HersheyFonts

    font = HersheyFonts()
    font.load_default_font("scripts")
    trajectories = _normalised(
        [trace(list(font.strokes_for_text(character))) for character in CHARACTERS]
    )
    lines = [
        f"{character},{x:.4f},{y:.4f}\n"
        for index, character in enumerate(CHARACTERS)
        for x, y in trajectories[:, index].tolist()
    ]
    text = HEADER + "".join(lines)
    write_atomically(EMBEDDED, lambda path: path.write_text(text, "utf-8"))


def trace(strokes: Sequence[Sequence[tuple[float, float]]]) -> Path2D:
    """The path of a pen that writes the strokes, ``y`` downwards, without lifting it."""
    corners = np.array([point for stroke in strokes for point in stroke], np.float64) * (1, -1)
    fine = 600
    path = gaussian_filter1d(_evenly(corners, fine), fine / 20, axis=0, mode="nearest")
    # The last of the path leads to the next letter.
    path = _evenly(_evenly(path, fine)[: round(0.85 * fine)], fine)

    slope = gaussian_filter1d(path, 6, axis=0, order=1, mode="nearest")
    bend = gaussian_filter1d(path, 6, axis=0, order=2, mode="nearest")
    cross = slope[:, 0] * bend[:, 1] - slope[:, 1] * bend[:, 0]
    curvature = np.abs(cross) / np.maximum((slope**2).sum(1), 1e-9) ** 1.5
    # A hand moves with the speed curvature^(-1/3) (Lacquaniti, Terzuolo & Viviani, Acta
    # Psychologica 54, 1983); near both ends it gathers and loses speed at a steady rate.
    slowness = gaussian_filter1d((curvature + 0.02) ** (1 / 3), 10, mode="nearest")
    part = np.linspace(0, 1, fine)
    slowness /= np.sqrt(np.clip(np.minimum(part, 1 - part) / 0.3, 0.01, 1))
    return _resampled(path, np.cumsum(slowness), POINTS)


def _evenly(path: Path2D, count: int) -> Path2D:
    """``count`` points of the path at equal distances."""
    distances = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(path, axis=0).T))])
    return _resampled(path, distances, count)


if __name__ == "__main__":
    write_embedded()
