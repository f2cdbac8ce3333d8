"""The faults that ``mutants.py`` puts into a file: what can be changed in it, one place at a time.

| what | becomes |
|---|---|
| a comparison | its neighbour: == and !=, < and <=, > and >=, is and is not, in and not in |
| an operator | its opposite: + and -, * and /, & and |, ** becomes *, // becomes /, % becomes * |
| -x, not x | x |
| and, or | each other; also each operand alone is left out |
| a number | one more, and one less where it is positive; True and False each other |
| a string that is no message | another string |
| a condition (if, while, x if c else y, in a comprehension) | its negation; True; False |
| return x | return None |
| a loop over x | a loop over nothing |
| a statement without a body | nothing |
| with x: | its body alone |
| a call's named argument, or its last one | left out; the call of a method: the object itself |
| a decorator | left out |

Annotations, docstrings, messages, assertions, ``zip``'s strict and what caches results stay as they
are.
"""

from __future__ import annotations

import ast
import copy
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any

NEIGHBOURS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.Pow: ast.Mult,
    ast.FloorDiv: ast.Div,
    ast.Mod: ast.Mult,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
SIMPLE = (ast.Expr, ast.Assign, ast.AugAssign, ast.Raise, ast.Delete, ast.Continue, ast.Break)
CACHES = {"cache", "lru_cache", "property"}
Slot = tuple[ast.AST, str, int | None]
# The classes and functions that a place is in.
Scope = tuple[Any, ...]


@dataclass(frozen=True)
class Mutant:
    """One change: ``field`` of ``parent`` (entry ``index`` of it) becomes ``replacement``."""

    path: str
    function: str
    line: int
    lines: tuple[int, ...]
    """The lines whose execution may show the change; none for what runs at import."""
    before: str
    after: str
    occurrence: int
    tree: ast.Module
    slot: Slot
    replacement: ast.AST

    @property
    def key(self) -> str:
        """Names the change whatever line it is in."""
        often = f"  ({self.occurrence})" if self.occurrence > 1 else ""
        where = f"{self.path} {self.function}".rstrip()
        return f"{where}\n{self.before}  =>  {self.after}{often}"

    @property
    def module(self) -> str:
        return self.path.removesuffix(".py").replace("/", ".")

    def code(self) -> CodeType:
        original = _set(self.slot, self.replacement)
        try:
            return compile(ast.fix_missing_locations(self.tree), self.path, "exec")
        finally:
            _set(self.slot, original)


def mutants_of(path: Path, root: Path) -> list[Mutant]:
    """All mutants of a file, in the order of its lines."""
    name, tree = str(path.relative_to(root)), ast.parse(path.read_text())
    seen: Counter[tuple[str, str, str]] = Counter()
    found = []
    for slot, replacement, statement, scope in _places(tree, None, ()):
        before = _headline(statement)
        original = _set(slot, replacement)
        # The statement itself may be what was replaced.
        after = _headline(replacement if original is statement else statement)
        _set(slot, original)
        function = ".".join(part.name for part in scope if not isinstance(part, ast.Lambda))
        if before == after:
            continue
        before, after = _shortened(before, after)
        seen[function, before, after] += 1
        found.append(
            Mutant(
                name,
                function,
                statement.lineno,
                _lines(statement, scope),
                before,
                after,
                seen[function, before, after],
                tree,
                slot,
                replacement,
            )
        )
    return found


def _lines(statement: ast.stmt, scope: Scope) -> tuple[int, ...]:
    if isinstance(statement, ast.FunctionDef):  # its decorators and defaults
        first, last = statement.body[0].lineno, statement.end_lineno
    elif scope and isinstance(scope[-1], ast.Lambda):
        first, last = scope[-1].lineno, scope[-1].end_lineno
    elif any(isinstance(part, ast.FunctionDef) for part in scope):
        body = getattr(statement, "body", None)
        first, last = statement.lineno, body[0].lineno - 1 if body else statement.end_lineno
    else:
        return ()
    return tuple(range(first, max(first, last or first) + 1))


def _shortened(before: str, after: str, context: int = 40) -> tuple[str, str]:
    """Without most of what two long lines have in common."""
    if max(len(before), len(after)) <= 160:
        return before, after
    same = _common_prefix(before, after)
    start = max(0, same - context)
    end = max(0, _common_prefix(before[same:][::-1], after[same:][::-1]) - context)
    return tuple(  # type: ignore[return-value]
        f"{'… ' if start else ''}{line[start : len(line) - end]}{' …' if end else ''}"
        for line in (before, after)
    )


def _common_prefix(one: str, other: str) -> int:
    pairs = zip(one, other, strict=False)
    return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))


def _headline(statement: ast.AST) -> str:
    """A statement in one line, without its body."""
    if isinstance(statement, ast.FunctionDef):
        above = [f"@{ast.unparse(decorator)}" for decorator in statement.decorator_list]
        return " ".join([*above, f"def {statement.name}({ast.unparse(statement.args)})"])
    if hasattr(statement, "body"):
        statement = copy.copy(statement)
        statement.body = [ast.Pass()]
        for field in ("orelse", "handlers", "finalbody"):
            if hasattr(statement, field):
                setattr(statement, field, [])
        return " ".join(ast.unparse(statement).removesuffix("pass").split())
    return ast.unparse(statement)


def _set(slot: Slot, value: ast.AST) -> ast.AST:
    """Put ``value`` into a place of the tree; returns what was there."""
    parent, field, index = slot
    held = getattr(parent, field)
    if index is None:
        setattr(parent, field, value)
        return held
    original = held[index]
    held[index] = value
    return original


def _places(
    node: ast.AST, statement: ast.stmt | None, scope: Scope
) -> Iterator[tuple[Slot, ast.AST, ast.stmt, Scope]]:
    """Every slot below ``node``, with each thing to put there, its statement and functions."""
    for field, value in ast.iter_fields(node):
        if _is_left_alone(node, field):
            continue
        entries = list(enumerate(value)) if isinstance(value, list) else [(None, value)]
        for index, child in entries:
            if not isinstance(child, ast.AST) or _stays(child, node):
                continue
            is_statement = isinstance(child, ast.stmt)
            now = child if is_statement else statement
            if now is not None:
                for replacement in [*_variants(child), *_of_role(node, field, child)]:
                    place = ast.copy_location(replacement, child)
                    yield (node, field, index), place, now, scope
            inner = (
                (*scope, child)
                if isinstance(child, ast.FunctionDef | ast.ClassDef | ast.Lambda)
                else scope
            )
            yield from _places(child, now, inner)


def _is_left_alone(node: ast.AST, field: str) -> bool:
    return field in ("annotation", "returns", "type_comment", "ctx") or (
        isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr | ast.ExceptHandler)
        and field != "body"
    )


def _stays(child: ast.AST, parent: ast.AST) -> bool:
    if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
        return True  # a docstring
    if isinstance(child, ast.Assign):
        return isinstance(child.targets[0], ast.Name) and child.targets[0].id.startswith("__")
    if isinstance(child, ast.keyword):
        return child.arg in ("strict", "maxsize")
    return isinstance(child, ast.Import | ast.ImportFrom | ast.JoinedStr)


def _variants(node: ast.AST) -> Iterator[ast.AST]:
    """What a node may become, wherever it is."""
    kind = NEIGHBOURS.get(type(node))
    if kind is not None:
        yield kind()
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield node.operand
    elif isinstance(node, ast.BoolOp):
        for k in range(len(node.values)):
            others = node.values[:k] + node.values[k + 1 :]
            yield others[0] if len(others) == 1 else ast.BoolOp(node.op, others)
    elif isinstance(node, ast.Constant):
        yield from map(ast.Constant, _constants(node.value))
    elif isinstance(node, ast.Call):
        if node.args:
            yield ast.Call(node.func, node.args[:-1], node.keywords)
        for k, argument in enumerate(node.keywords):
            if not _stays(argument, node):
                yield ast.Call(node.func, node.args, node.keywords[:k] + node.keywords[k + 1 :])
        if isinstance(node.func, ast.Attribute) and isinstance(
            node.func.value, ast.Call | ast.Subscript | ast.BinOp
        ):
            yield node.func.value
    elif isinstance(node, ast.Return) and node.value is not None and not _is_none(node.value):
        yield ast.Return(None)
    elif isinstance(node, SIMPLE):
        yield ast.Pass()
    elif isinstance(node, ast.With):
        yield ast.If(ast.Constant(True), node.body, [])
    elif isinstance(node, ast.FunctionDef | ast.ClassDef):
        for k, decorator in enumerate(node.decorator_list):
            if not _names(decorator) & CACHES:
                bare = copy.copy(node)
                bare.decorator_list = node.decorator_list[:k] + node.decorator_list[k + 1 :]
                yield bare


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _constants(value: object) -> Iterator[object]:
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int | float):
        yield value + 1
        if value > 0:
            yield value - 1
    elif isinstance(value, str) and value and " " not in value:
        yield value + "_"


def _of_role(parent: ast.AST, field: str, child: ast.AST) -> Iterator[ast.AST]:
    """What a node may become for what it does in its parent."""
    if isinstance(child, ast.expr) and (
        field == "test" or (isinstance(parent, ast.comprehension) and field == "ifs")
    ):
        yield ast.UnaryOp(ast.Not(), child)
        if not isinstance(child, ast.Constant):
            yield ast.Constant(True)
            yield ast.Constant(False)
    if field == "iter" and isinstance(child, ast.expr):
        yield ast.Tuple([], ast.Load())


def _names(node: ast.AST) -> set[str]:
    names = [getattr(part, "id", getattr(part, "attr", None)) for part in ast.walk(node)]
    return {name for name in names if name}
