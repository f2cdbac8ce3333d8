"""Mutation testing changes what it says, one place at a time, and notices how a process ends."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import mutants
from tests.mutations import Mutant, mutants_of

SOURCE = '''"""A docstring."""

LIMIT = 3


def clipped(x: float, names: list[str] | None = None) -> float:
    """Another one."""
    if x < LIMIT and not names:
        raise ValueError(f"{x} is too small")
    for name in sorted(names, reverse=True):
        x = x + -1
    return x
'''

EXPECTED = {
    "LIMIT = 3": ["LIMIT = 4", "LIMIT = 2", "pass"],
    "if x < LIMIT and (not names):": [
        "if not (x < LIMIT and (not names)):",
        "if True:",
        "if False:",
        "if x < LIMIT or not names:",
        "if not names:",
        "if x < LIMIT:",
        "if x <= LIMIT and (not names):",
        "if x < LIMIT and names:",
    ],
    "raise ValueError(f'{x} is too small')": ["pass"],
    "for name in sorted(names, reverse=True):": [
        "for name in ():",
        "for name in sorted(reverse=True):",
        "for name in sorted(names):",
        "for name in sorted(names, reverse=False):",
    ],
    "x = x + -1": ["pass", "x = x - -1", "x = x + 1", "x = x + -2", "x = x + -0"],
    "return x": ["return"],
}


@pytest.fixture
def found(tmp_path: Path) -> list[Mutant]:
    (tmp_path / "mutated_example.py").write_text(SOURCE)
    return mutants_of(tmp_path / "mutated_example.py", tmp_path)


def test_all_that_can_be_changed_is(found: list[Mutant]) -> None:
    for before, after in EXPECTED.items():
        assert sorted(m.after for m in found if m.before == before) == sorted(after)
    assert {m.before for m in found} == EXPECTED.keys()
    assert len({m.key for m in found}) == len(found)
    condition = next(m for m in found if m.before.startswith("if"))
    assert (condition.function, condition.lines) == ("clipped", (8,))


def test_code_holds_one_change(found: list[Mutant]) -> None:
    original = compile(SOURCE, "mutated_example.py", "exec")
    for mutant in found:
        assert mutant.code() != original
        assert ast.unparse(mutant.tree) == ast.unparse(ast.parse(SOURCE))


def test_the_changed_module_is_imported(
    found: list[Mutant], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutant = next(m for m in found if m.after == "LIMIT = 4")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(
        sys, "meta_path", [mutants.Finder(mutant.module, mutant.code()), *sys.meta_path]
    )
    assert importlib.import_module("mutated_example").LIMIT == 4
    del sys.modules["mutated_example"]


def test_started_processes_take_part(
    found: list[Mutant], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(program: str) -> str:
        command = [sys.executable, "-c", program]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    mutant = next(m for m in found if m.after == "LIMIT = 4")
    processes = mutants.Processes(tmp_path)
    processes.take_part((mutant.module, mutant.code()))
    assert started("import mutated_example as m; print(m.LIMIT)") == "4\n"
    assert processes.lines() == {}

    pytest.importorskip("coverage")
    processes.take_part(None)
    started("import os, torch2pc.distributed.reductions; os._exit(0)")
    lines = processes.lines()[mutants.ROOT / "torch2pc" / "distributed" / "reductions.py"]
    text = (mutants.ROOT / "torch2pc" / "distributed" / "reductions.py").read_text().splitlines()
    assert text.index("from __future__ import annotations") + 1 in lines
    assert lines[-1] <= len(text)


def test_how_a_process_ends() -> None:
    assert mutants.forked(lambda: 3, 30.0) == 3
    assert mutants.forked(lambda: 1 // 0, 30.0) == 70
    assert mutants.forked(lambda: time.sleep(60) or 0, 0.2) is None


def test_the_library_has_many_and_equivalent_ones_have_reasons() -> None:
    samples = [[m.key for m in mutants.draw(1000, seed)] for seed in (0, 0, 1)]
    assert samples[0] == samples[1] != samples[2]
    assert len(set(samples[0])) == 1000
    assert any("memory.py " in key for key in samples[0])
    assert all(mutants.read_equivalent().values())
