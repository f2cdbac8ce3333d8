"""What a figure is asked for and what it hands back: options, numbers, the table, the files.

How a picture looks is in `plotting`; where its data come from is in `data`.
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

import torch2pc

T = TypeVar("T")


@dataclass(frozen=True)
class Options:
    """What the command line asks of every figure.

    data: the folder with the full data sets, or None for the embedded digits.
    out: the folder that receives the files.
    full: run as long as the paper does; else a figure takes a minute or less, where it can.
    quick: run a version of seconds that shows that everything works, and no more.
    """

    data: Path | None
    out: Path
    device: torch.device
    seed: int = 0
    quick: bool = False
    full: bool = False

    def pick(self, quick: T, default: T, full: T) -> T:
        """What the asked length of the run needs of three."""
        return full if self.full else quick if self.quick else default


@dataclass(frozen=True)
class Number:
    """One number of the paper beside ours.

    paper: the paper's value, or a word such as "diverges".
    tolerance: how far ours may be from the paper's, in the same unit; None to show the two side by
        side and not judge. Words must be equal.
    check: whether it must agree on any data set, so that ``--check`` fails if it does not.
    """

    what: str
    paper: float | str
    ours: float | str
    tolerance: float | None = None
    check: bool = False

    @property
    def agrees(self) -> bool | None:
        if isinstance(self.paper, str) or isinstance(self.ours, str):
            return self.paper == self.ours
        if self.tolerance is None:
            return None
        return abs(self.paper - self.ours) <= self.tolerance


def table(numbers: Sequence[Number]) -> str:
    """The numbers as aligned text, one a line; a star marks those that hold on any data set."""
    rows = [("", "paper", "ours", "tolerance", "agrees")]
    for number in numbers:
        rows.append(
            (
                number.what + (" *" if number.check else ""),
                shown(number.paper),
                shown(number.ours),
                "" if number.tolerance is None else f"± {shown(number.tolerance)}",
                {True: "yes", False: "NO", None: ""}[number.agrees],
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = []
    for row in rows:
        numbers_right = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        lines.append("  ".join([row[0].ljust(widths[0]), *numbers_right]))
    return "\n".join(lines)


def save(
    options: Options,
    name: str,
    figure: Figure,
    *,
    data: Mapping[str, Any],
    settings: Mapping[str, Any],
    series: Mapping[str, Any],
    numbers: Sequence[Number] = (),
) -> None:
    """Write ``name.png`` (200 dpi), ``name.pdf`` and ``name.json`` into ``options.out``.

    The JSON holds the plotted series, the settings, ``data`` (the data set's name and size, as
    `data.DataSet.summary` gives them), the numbers compared with the paper's, the seed and the
    versions; tensors and arrays become lists, values that are not finite become null.
    """
    options.out.mkdir(parents=True, exist_ok=True)
    record = {
        "figure": name,
        "settings": settings,
        "data": data,
        "seed": options.seed,
        "run": options.pick("quick", "default", "full"),
        "device": str(options.device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "matplotlib": matplotlib.__version__,
            "torch2pc": torch2pc.__version__,
        },
        "numbers": [asdict(number) | {"agrees": number.agrees} for number in numbers],
        "series": series,
    }
    text = json.dumps(_plain(record), indent=1, allow_nan=False) + "\n"
    write_atomically(options.out / f"{name}.json", lambda path: path.write_text(text, "utf-8"))
    # Panels are placed once; without a creation date the same run writes the same bytes.
    figure.draw_without_rendering()
    figure.set_layout_engine(None)
    for ending, metadata in ("png", {}), ("pdf", {"CreationDate": None}):
        write_atomically(
            options.out / f"{name}.{ending}",
            lambda path, ending=ending, metadata=metadata: figure.savefig(
                path, format=ending, dpi=200, metadata=metadata
            ),
        )


def yes(answer: bool) -> str:
    """The word for a yes-or-no number."""
    return "yes" if answer else "no"


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` fill a temporary neighbour of ``path``, then give it its name."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def shown(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.3g}"


def _plain(value: Any) -> Any:
    """The same value made of what JSON knows."""
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
