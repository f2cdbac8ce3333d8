"""Holds the examples' texts against what they print: ``python docs/check_numbers.py [NAME ...]``.

Each example runs as it stands, which takes up to a minute. A number of its text, with a decimal point or a
percent sign, must be near one that it has printed, by half a unit of its last digit or 5 %, or be a
setting in its code.
"""

import ast
import contextlib
import io
import os
import re
import sys
import tokenize
import warnings
from pathlib import Path

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
TOLERANCE = 0.05

NUMBER = re.compile(r"(?<![\w.:])-?\d+(?:\.\d+)?(?:e-?\d+)?(?:\s?%)?(?![\w])")


def stated(source: str) -> list[str]:
    """The numbers of the text, its docstring and its blocks of comments, that are measured ones."""
    texts = [ast.get_docstring(ast.parse(source)) or ""]
    lines = source.splitlines()
    texts += [line for line in lines if re.match(r"# (?!%%)", line)]
    # Equations have numbers of their own, and so have dates and identifiers.
    text = re.sub(r":math:`[^`]*`|^ {3,}.*$|``[^`]*``", "", "\n".join(texts), flags=re.MULTILINE)
    found = [number.group() for number in NUMBER.finditer(text)]
    return [number for number in found if "." in number or "%" in number]


def settings(source: str) -> list[float]:
    """The numbers of the code."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return [value(token.string) for token in tokens if token.type == tokenize.NUMBER]


def value(number: str) -> float:
    """``"9 %"`` is 0.09."""
    bare = number.replace("%", "").replace("_", "").strip()
    return float(bare) / (100 if "%" in number else 1)


def is_near(number: str, other: float) -> bool:
    """Whether what is stated may stand for ``other``."""
    places = len(number.replace("%", "").strip().partition(".")[2])
    unit = 10.0**-places / (100 if "%" in number else 1)
    return abs(value(number) - other) <= max(0.5001 * unit, TOLERANCE * abs(other))


def not_shown(source: str, printed: str) -> list[str]:
    """The numbers of the text that are neither printed nor set.

    >>> not_shown("# 91% are right, 0.25 of\\n# them soon, with 0.1\\neta = 0.1", "right: 0.912")
    ['0.25']
    """
    shown = [value(found.group()) for found in NUMBER.finditer(printed)]
    shown += settings(source)
    return [number for number in stated(source) if not any(is_near(number, x) for x in shown)]


def output_of(path: Path) -> str:
    """What an example prints."""
    import matplotlib.pyplot as plt

    plt.switch_backend("agg")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(path.read_text("utf-8"), str(path), "exec"), {"__name__": "__main__"})
    plt.close("all")
    return printed.getvalue()


def main(names: list[str]) -> int:
    """The number of examples whose text states what their run does not show."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.path.insert(0, str(ROOT))
    wrong = 0
    for path in sorted(EXAMPLES.glob("*.py")):
        if names and path.stem not in names:
            continue
        missing = not_shown(path.read_text("utf-8"), output_of(path))
        print(
            f"{path.stem}: {', '.join(missing) + ' not shown' if missing else 'as stated'}",
            flush=True,
        )
        wrong += bool(missing)
    return wrong


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
