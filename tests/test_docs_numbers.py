"""The check of the numbers that the examples state."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
check = runpy.run_path(str(ROOT / "docs" / "check_numbers.py"))

EXAMPLE = '''
"""
Title with 0.7
==============

.. math::

   F = 0.5 x
"""
ETA = 0.1
print("right", 912 / 1000, "loss:", 344 / 100)

# %%
# 91% are right, at a loss of {loss}, with eta = 0.1, ``x=0.9`` and 3 layers (arXiv:2212.00720).
'''


def test_what_is_printed_or_set_is_shown() -> None:
    printed = "right 0.912 loss: 3.44 title 0.70"
    assert check["not_shown"](EXAMPLE.format(loss="3.44"), printed) == []
    assert check["not_shown"](EXAMPLE.format(loss="3.4"), printed) == []
    assert check["not_shown"](EXAMPLE.format(loss="3.44"), "") == ["0.7", "91%", "3.44"]


@pytest.mark.parametrize(
    ("number", "other", "near"),
    [
        ("91%", 0.9149, True),
        ("91%", 0.85, False),
        ("0.25", 0.2549, True),
        ("3.33", 3.44, True),
        ("3.33", 3.55, False),
        ("0.1", 0.149, True),
        ("0.1", 0.16, False),
    ],
)
def test_tolerance(number: str, other: float, near: bool) -> None:
    assert check["is_near"](number, other) == near


def test_an_examples_output_is_what_it_prints(tmp_path: Path) -> None:
    path = tmp_path / "example.py"
    path.write_text(EXAMPLE.format(loss="3.44"), "utf-8")
    assert check["output_of"](path) == "right 0.912 loss: 3.44\n"


def test_only_some_examples_state_numbers() -> None:
    """Those that the check then has to run; if none did, it would hold nothing."""
    texts = {path.stem: path.read_text("utf-8") for path in (ROOT / "examples").glob("*.py")}
    with_numbers = {name for name, text in texts.items() if check["stated"](text)}
    assert {"convolutions", "transformer", "unsupervised"} <= with_numbers
