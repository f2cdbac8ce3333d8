"""The command line: ``python -m paper_figures`` draws the figures and compares their numbers.

How to add a figure is said in ``__init__.py``.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch

import paper_figures
from paper_figures.data import DataError, MissingData
from paper_figures.download import DATA_SETS
from paper_figures.progress import bar_over
from paper_figures.report import Number, Options, shown, table

DATA = Path("data")


def figure_modules() -> dict[str, ModuleType]:
    """Every figure by its name: ``3`` is in ``figure_3.py``, in the folder of its paper."""
    found = pkgutil.walk_packages(paper_figures.__path__, "paper_figures.")
    places = {module.name.rpartition(".")[2]: module.name for module in found}
    return {
        name.removeprefix("figure_"): importlib.import_module(places[name])
        for name in sorted(places)
        if name.startswith("figure_")
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw what the arguments ask for; the exit status is 0 if all went well."""
    # The papers' networks are cut after the activation, and some are meant to be too deep or to stop
    # short of the equilibrium.
    expected = "Strict takes its updates at v", "The error hardly reaches", "Equilibrium stopped"
    for message in expected:
        warnings.filterwarnings("ignore", message, UserWarning)
    modules = figure_modules()
    asked = parse(modules, arguments)
    if asked.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        # The networks are small: a second thread brings little, and on a busy machine the threads
        # wait for each other longer than they compute.
        torch.set_num_threads(1)
    options = Options(asked.data, asked.out, asked.device, asked.seed, asked.quick, asked.full)
    chosen = asked.figure or [name for name in modules if getattr(modules[name], "DEFAULT", True)]
    not_drawn, off = [], []
    expected = [seconds_of(modules[name], options) for name in chosen]
    try:
        if asked.download:
            wanted = {key for name in chosen for key in getattr(modules[name], "DOWNLOADS", ())}
            for key in sorted(wanted):
                DATA_SETS[key](options.data)
        with bar_over(expected) as bar:
            for name in chosen:
                start = time.perf_counter()
                try:
                    with bar.figure():
                        numbers = modules[name].run(options)
                except MissingData as reason:
                    not_drawn.append(f"Figure {name} is not drawn: {reason}.")
                    continue
                bar.say(told(modules[name], numbers, options, time.perf_counter() - start))
                off += [
                    f"figure {name}: {number.what} is {shown(number.ours)}, "
                    f"not {shown(number.paper)}"
                    for number in numbers
                    if number.check and not number.agrees
                ]
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(*not_drawn, f"The files are in {options.out}.", sep="\n")
    if asked.check and off:
        print("error: off on any data set:", *off, sep="\n  ", file=sys.stderr)
        return 1
    return 1 if not_drawn and asked.figure else 0


def parse(modules: dict[str, ModuleType], arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m paper_figures",
        description="Draws the figures of Rosenbaum, PLOS ONE 17(3) e0266102 (2022), "
        "with torch2pc, and sets our numbers beside the paper's.",
        epilog="figures:\n" + "\n".join(f"  {name:12} {title(modules[name])}" for name in modules),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--figure",
        nargs="+",
        choices=list(modules),
        metavar="NAME",
        help="draw these only (default: all but those marked 'by name only')",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder with the full data sets (default: data, if there is one); "
        "without MNIST there, the embedded digits are used",
    )
    parser.add_argument(
        "--download",
        action="store_true",
        help="first fetch the data sets that the figures can use and that the folder lacks",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="fail if a number that does not depend on the data set is off",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("figures"), metavar="DIR", help="default: figures"
    )
    parser.add_argument(
        "--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--seed", type=int, default=0)
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--full", action="store_true", help="runs of the papers' length, whose numbers docs shows"
    )
    length.add_argument(
        "--quick",
        action="store_true",
        help="runs of seconds: everything is drawn, little is learned",
    )
    asked = parser.parse_args(arguments)
    if asked.download:
        asked.data = asked.data or DATA
    elif asked.data is None:
        asked.data = DATA if DATA.is_dir() else None
    elif not asked.data.is_dir():
        parser.error(f"--data: {str(asked.data)!r} is not a folder")
    return asked


def device(given: str) -> torch.device:
    try:
        return torch.empty(0, device=given).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{given!r} cannot be used: {reason}") from error


def title(module: ModuleType) -> str:
    first_line = (module.__doc__ or "").strip().partition("\n")[0]
    return first_line if getattr(module, "DEFAULT", True) else f"{first_line} (by name only)"


def seconds_of(module: ModuleType, options: Options) -> float:
    """What the figure takes on one core, about; more than nothing, for the bar."""
    default, full = getattr(module, "SECONDS", (60, 600))
    return full if options.full else default


def told(module: ModuleType, numbers: Sequence[Number], options: Options, seconds: float) -> str:
    """One figure's table; a shortened run has only the numbers that hold in any run, if there are some."""
    if not options.full:
        numbers = [number for number in numbers if number.check] or numbers
    lines = [f"\n{title(module)} ({seconds:.0f} s)", *([table(numbers)] if numbers else [])]
    if any(number.check for number in numbers):
        lines.append("* does not depend on the data set")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
