"""What a measurement becomes: rows, a table of them, the files.

The JSON file is for programs and has every number; the Markdown table is for readers.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

import torch2pc
from paper_figures.report import write_atomically


@dataclass(frozen=True)
class Options:
    """What the command line asks of every part.

    seconds: how long the steps of one network are timed on one device, roughly.
    threads: numbers of CPU threads; with a GPU, that is measured too.
    """

    out: Path
    networks: Sequence[str]
    threads: Sequence[int]
    seconds: float
    quick: bool = False
    kinds: Sequence[str] = ("cpu", "cuda")

    def devices(self) -> list[tuple[torch.device, int]]:
        """The devices to measure on, each with the number of CPU threads."""
        found = []
        if "cpu" in self.kinds:
            found += [(torch.device("cpu"), count) for count in self.threads]
        if "cuda" in self.kinds and torch.cuda.is_available():
            found.append((torch.device("cuda"), max(self.threads)))
        return found


@dataclass(frozen=True)
class Row:
    """One number: ``what`` takes ``value`` times as much as ``of``, or ``value`` of the unit ``of``.

    quartiles: the middle half of the rounds' ratios, where there were rounds.
    bar: what the value must not exceed, if anything was promised.
    """

    network: str
    device: str
    what: str
    of: str
    value: float
    quartiles: tuple[float, float] | None = None
    bar: float | None = None

    @property
    def reached(self) -> bool | None:
        return None if self.bar is None else self.value <= self.bar

    def cells(self) -> list[str]:
        spread = "" if self.quartiles is None else "{:.3f} to {:.3f}".format(*self.quartiles)
        return [
            self.network,
            self.device,
            self.what,
            self.of,
            f"{self.value:.3f}",
            spread,
            "" if self.bar is None else f"≤ {self.bar:.2f}",
            {None: "", True: "yes", False: "NO"}[self.reached],
        ]


HEADER = ["network", "device", "what", "in units of", "value", "middle half", "bar", "reached"]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns are aligned for those who read it as text."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def rows_table(rows: Sequence[Row]) -> str:
    return table(HEADER, [row.cells() for row in rows])


def device_name(device: torch.device, threads: int) -> str:
    """Such as ``cpu, 2 threads``."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {threads} thread{'s' if threads > 1 else ''}"


def save_rows(
    options: Options, name: str, rows: Sequence[Row], *, method: str, **more: object
) -> None:
    """Print the table of the rows, and write it and them into ``name.md`` and ``name.json``.

    more: what else the JSON file holds.
    """
    text = rows_table(rows)
    print(text)
    found = [asdict(row) | {"reached": row.reached} for row in rows]
    save(options, name, method=method, text=text, record={"rows": found, **more})


def save(
    options: Options,
    name: str,
    *,
    method: str,
    text: str,
    record: Mapping[str, Any],
) -> None:
    """Write ``name.json`` and ``name.md`` into ``options.out``.

    method: how the numbers were taken, a paragraph that goes into both.
    text: the Markdown below it; record: the numbers.
    """
    conditions = {
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch2pc": torch2pc.__version__,
        "processor": processor(),
        "cores": os.cpu_count(),
        "quick": options.quick,
    }
    whole = {"benchmark": name, "method": method, "conditions": conditions, **record}
    where = ", ".join(f"{key} {value}" for key, value in conditions.items() if key != "quick")
    quick = " Shortened run (`--quick`)." if options.quick else ""
    save_text(options.out / f"{name}.json", json.dumps(whole, indent=1, allow_nan=False) + "\n")
    save_text(options.out / f"{name}.md", f"{method}\n\n{text}\n\nTaken with: {where}.{quick}\n")


def save_text(path: Path, text: str) -> None:
    save_file(path, lambda temporary: temporary.write_text(text, "utf-8"))


def save_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` fill a temporary file, which then gets its name; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, write)


def processor() -> str:
    """The CPU's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
