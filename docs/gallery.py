"""The examples as the site and the tests run them: their order, and their short versions."""

from __future__ import annotations

import re
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"

ORDER = [
    "quickstart",
    "from_torch2pc",
    "convolutions",
    "transformer",
    "deep",
    "graph",
    "bidirectional",
    "follow",
    "side_by_side",
    "incremental",
    "unsupervised",
    "rao_ballard",
    "memory_retrieval",
    "your_own",
    "processes",
    "mixed_precision",
    "training_loops",
]

SHORT = re.compile(r"^(?P<set>[A-Z][A-Z_]* = ).+?  # short: (?P<value>.+)$", re.MULTILINE)


def scripts() -> list[Path]:
    """Every example, in the order in which the site shows them; those not named above come last."""
    return sorted(EXAMPLES.glob("*.py"), key=lambda path: (place(path.name), path.name))


def place(name: str) -> int:
    """The place of a file in the gallery."""
    stem = name.removesuffix(".py")
    return ORDER.index(stem) if stem in ORDER else len(ORDER)


def shortened(source: str) -> str:
    """The example with the value after ``# short:`` in each constant that has one.

    >>> shortened("STEPS = 300  # short: 4")
    'STEPS = 4'
    """
    return SHORT.sub(r"\g<set>\g<value>", source)


def write_short_versions(folder: Path) -> None:
    """The gallery's folder, with short versions of all examples."""
    folder.mkdir(exist_ok=True)
    for path in EXAMPLES.iterdir():
        if path.suffix in {".py", ".rst"}:
            text = path.read_text("utf-8")
            (folder / path.name).write_text(
                shortened(text) if path.suffix == ".py" else text, "utf-8"
            )
