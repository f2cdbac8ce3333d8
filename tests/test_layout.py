"""The rooms of the library: each imports from those below it, and nothing goes around in a circle."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import torch2pc

ROOT = Path(torch2pc.__file__).parent
# From below; what stands on the ground floor is "".
ROOMS = [
    "displacement",
    "graph",
    "energy",
    "inference",
    "compiled",
    "",
    "cutting",
    "distributed",
    "follow",
]
ABOVE = {room: set(ROOMS[: level + 1]) for level, room in enumerate(ROOMS)}
# These stand beside one another.
ABOVE["distributed"] -= {"cutting"}
ABOVE["follow"] -= {"cutting", "distributed"}


def imports() -> dict[str, set[str]]:
    """The modules of the library that each of them imports, wherever in its code."""
    found = {}
    for file in ROOT.rglob("*.py"):
        parts = file.relative_to(ROOT.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        nodes = ast.walk(ast.parse(file.read_text()))
        of_file = [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
        found[name] = {m for m in of_file if m and m.split(".")[0] == "torch2pc"} - {name}
    return found


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and (ROOT / parts[1]).is_dir() else ""


def test_a_room_imports_from_those_below_it() -> None:
    wrong = [
        (name, other)
        for name, others in imports().items()
        for other in others
        if name != "torch2pc" and room_of(other) not in ABOVE[room_of(name)]
    ]
    assert not wrong


def test_every_folder_is_a_room() -> None:
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert folders == set(ROOMS) - {""}


def test_nothing_goes_around_in_a_circle() -> None:
    # What a package's first file imports is for those outside of it.
    inner = {
        name: others
        for name, others in imports().items()
        if not (ROOT.parent / name.replace(".", "/")).is_dir()
    }
    graph = {name: {other for other in others if other in inner} for name, others in inner.items()}
    list(graphlib.TopologicalSorter(graph).static_order())


def test_every_file_says_what_lives_there() -> None:
    without = [
        str(f) for f in ROOT.rglob("*.py") if not ast.get_docstring(ast.parse(f.read_text()))
    ]
    assert not without


def test_the_compiler_is_imported_only_where_something_is_compiled() -> None:
    """It takes a second."""
    code = "import sys, torch2pc; print('torch._dynamo' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
