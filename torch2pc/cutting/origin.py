"""What layers took from a model as it was, and whether the model still is that.

``forward.py`` follows a model's forward once. Numbers that it merely hands to an operation are read anew
in each call. All else that the forward read then decided what the layers are: other attributes, globals,
the modules that it called. Here they are noted while it is followed, and compared with what is there
whenever the layers are used, so that a model that was changed since is an error and not another model.
"""

from __future__ import annotations

import dis
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from torch2pc.graph.layer import HOOKS

# How deep a value's parts, and functions that call others, are looked into; the longest container.
_DEEPEST, _LONGEST = 4, 100
_PLAIN = (bool, int, float, complex, str, bytes, type(None), Enum, torch.dtype, torch.device)


class Read:
    """An attribute of a module that the forward read."""

    def __init__(self, module: nn.Module, name: str, value: Any, given: Any) -> None:
        self.module, self.name, self.value, self.given = module, name, value, given
        # Whether an operation is given it; whether it was compared, rounded or the like; whether it
        # is read anew in each call, and nothing else depends on it.
        self.is_operand = self.decides = self.is_followed = False

    @property
    def key(self) -> tuple[int, str]:
        return id(self.module), self.name


class Number:
    """A number that knows where it was read, and tells if the forward decides anything by it."""

    read: Read


def _deciding(name: str) -> Callable[..., Any]:
    def method(self: Any, *others: Any) -> Any:
        self.read.decides = True
        return getattr(type(self).__mro__[2], name)(self, *others)

    return method


class _Float(Number, float):
    pass


class _Int(Number, int):
    pass


for _kind in (_Float, _Int):
    # (Arithmetic makes plain numbers, which would be others in ``Reads.tried``.)
    for _name in (
        *(
            "eq",
            "ne",
            "lt",
            "le",
            "gt",
            "ge",
            "bool",
            "hash",
            "int",
            "round",
            "floor",
            "ceil",
            "trunc",
        ),
        *("floordiv", "rfloordiv", "mod", "rmod", "divmod", "index", "str", "repr", "format"),
    ):
        if hasattr(_kind.__mro__[2], f"__{_name}__"):
            setattr(_kind, f"__{_name}__", _deciding(f"__{_name}__"))


class Reads:
    """The attributes of modules that a forward reads."""

    def __init__(
        self, tensors_followed: bool = True, others: dict[tuple[int, str], Any] | None = None
    ) -> None:
        self.tensors_followed = tensors_followed
        self._found: dict[tuple[int, str], Read] = {}
        # What the forward is given in the place of some.
        self._others = others or {}

    def __iter__(self) -> Iterator[Read]:
        return iter(self._found.values())

    def note(self, module: nn.Module, name: str, value: Any) -> Any:
        """Note that ``name`` was read, and return what the forward is to be given."""
        key = id(module), name
        if key not in self._found:
            given = self._others.get(key, value)
            self._found[key] = Read(module, name, value, given)
        read = self._found[key]
        kind = {float: _Float, int: _Int}.get(type(read.given))
        if kind is None:
            return value
        number: Any = kind(read.given)
        number.read = read
        return number

    def joined(self, other: Reads) -> Reads:
        """All that were read here or there."""
        for read in other:
            mine = self._found.setdefault(read.key, read)
            mine.is_operand |= read.is_operand
            mine.decides |= read.decides
        return self

    def tried(self, chosen: Sequence[Read]) -> Reads:
        """For another look, in which the chosen numbers are others."""
        others = {
            read.key: read.value + 1 if isinstance(read.value, int) else 0.75 * read.value + 0.05
            for read in chosen
        }
        return Reads(self.tensors_followed, others)

    def decides(self, read: Read) -> bool:
        """Whether this attribute decided anything in the look that was noted here."""
        return read.key not in self._found or self._found[read.key].decides

    @contextmanager
    def watched(self, watch: Callable[[nn.Module, str, Any], Any]) -> Iterator[None]:
        """Call ``watch(module, name, value)`` for each attribute of a module that the body reads.

        What it returns is what is read. Not for methods, properties, and what every module has.
        """
        own = nn.Module.__dict__.get("__getattribute__")

        def read(module: nn.Module, name: str) -> Any:
            value = object.__getattribute__(module, name) if own is None else own(module, name)
            if name in _OF_EVERY_MODULE or name.startswith("__"):
                return value
            if name not in object.__getattribute__(module, "__dict__"):
                for base in type(module).__mro__:
                    if name in base.__dict__:
                        if hasattr(base.__dict__[name], "__get__"):
                            return value
                        break
            return watch(module, name, value)

        nn.Module.__getattribute__ = read  # type: ignore[assignment,method-assign]
        try:
            yield
        finally:
            if own is None:
                del nn.Module.__getattribute__
            else:
                nn.Module.__getattribute__ = own  # type: ignore[method-assign]


class Attributes:
    """The attributes of some modules as they are now; not the tables that every module has."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._before = {
            module: {
                name: (value, value.copy() if isinstance(value, list | dict | set) else None)
                for name, value in vars(module).items()
                if name not in _OF_EVERY_MODULE
            }
            for module in modules
        }
        self._changed: dict[tuple[nn.Module, str], None] = {}

    def changed(self, modules: Iterable[nn.Module]) -> list[str]:
        """The names of what has been set or filled since in some of the modules."""
        for module, before in self._before.items():
            for name in {*before, *vars(module)} - _OF_EVERY_MODULE:
                value, content = before.get(name, (_ABSENT, None))
                now = vars(module).get(name, _ABSENT)
                is_same = now is value and (content is None or _same_entries(now, content))
                # What a cached property keeps is no change.
                if not is_same and not hasattr(getattr(type(module), name, None), "__get__"):
                    self._changed[module, name] = None
        chosen = set(modules)
        return list(dict.fromkeys(name for module, name in self._changed if module in chosen))

    def holds_other(self, module: nn.Module, name: str) -> bool:
        """Whether the attribute was found to be ``changed``."""
        return (module, name) in self._changed

    def restore(self) -> None:
        """Put all back as it was."""
        for module, before in self._before.items():
            for name in set(vars(module)) - _OF_EVERY_MODULE - set(before):
                del module.__dict__[name]
            for name, (value, content) in before.items():
                module.__dict__[name] = value
                if content is not None and not _same_entries(value, content):
                    value.clear()
                    value.extend(content) if isinstance(value, list) else value.update(content)


def _same_entries(a: Any, b: Any) -> bool:
    """Whether two lists, dicts or sets hold the same objects."""
    if type(a) is not type(b) or len(a) != len(b):
        return False
    pairs = zip(*(x.items() if isinstance(x, dict) else x for x in (a, b)), strict=True)
    if isinstance(a, dict):
        return all(k is k2 and v is v2 for (k, v), (k2, v2) in pairs)
    return all(x is y for x, y in pairs)


_OF_EVERY_MODULE = {*vars(nn.Module()), *dir(nn.Module)}


class Origin:
    """The model that some layers were made of, and what of it they depend on.

    reads: what its forward read; opened: the containers whose forward was followed; called, held: the
    modules that it called and the tensors that it used, by names of which the first is the model's.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        reads: Iterable[Read],
        opened: Sequence[nn.Module],
        called: Iterable[str],
        held: Iterable[str],
    ) -> None:
        self.model, self.name = model, name
        # The function that makes the layers, and what to do if they are no longer the model's.
        self.maker = self.anew = ""
        self._paths = {module: path for path, module in model.named_modules()}
        functions = _functions_of([model, *opened])
        self._names = _names_in(functions)
        self._reads = [
            (read.module, read.name, _Value(read.value, self._names))
            for read in reads
            if not read.is_followed and not isinstance(read.value, nn.Module)
        ]
        self._globals = _globals_of(functions, self._names)
        # (parent, name, child): on the way to what is called.
        self._children: dict[tuple[nn.Module, str], nn.Module] = {}
        for path in called:
            parent = model
            for step in path.split(".")[1:]:
                child = parent._modules[step]
                assert child is not None
                self._children[parent, step] = child
                parent = child
        parents = {parent for parent, _ in self._children}
        self._tables = [
            (parent, list(parent._modules))
            for parent in parents
            if isinstance(parent, nn.Sequential | nn.ModuleList | nn.ModuleDict)
        ]
        self._opened = list(dict.fromkeys([model, *opened]))
        # Tensors that the layers have under the model's names, and where.
        self._held: list[tuple[nn.Module, str, Any, list[nn.Module]]] = []
        for path in dict.fromkeys(held):
            *way, last = path.split(".")
            if way and way[0] == "model":
                owner = model.get_submodule(".".join(way[1:]))
                value = getattr(owner, last, None)
                if isinstance(value, Tensor):
                    self._held.append((owner, last, value, []))

    def keep_in(self, holders: Iterable[nn.Module]) -> None:
        """Note which modules of the layers have the model's tensors, by the same names."""
        for holder in holders:
            for owner, name, _, places in self._held:
                path = ".".join(["model", *filter(None, [self._paths[owner]])])
                try:
                    place = holder.get_submodule(path)
                except AttributeError:
                    continue
                if hasattr(place, name):
                    places.append(place)

    def watch(self, module: nn.Module, name: str) -> None:
        """Let an attribute be an error too where it is another one, although a layer reads it anew."""
        self._reads.append((module, name, _Value(getattr(module, name), self._names)))

    def check(self) -> None:
        """Raises an error if the layers would not do what the model does now.

        Parameters and buffers that were assigned anew are taken over.
        """
        for module, name, value in self._reads:
            now = getattr(module, name, _ABSENT)
            if not value.is_still(now):
                raise self._changed(f"{self._path(module)}.{name}", value, now)
        for function, name, value in self._globals:
            now = _looked_up(function, name)
            if not value.is_still(now):
                raise self._changed(f"{name} (which {function.__qualname__} uses)", value, now)
        for (parent, name), child in self._children.items():
            if parent._modules.get(name) is not child:
                raise self._error(f"{self._path(parent)}.{name} is another module now")
        for parent, names in self._tables:
            if list(parent._modules) != names:
                raise self._error(f"{self._path(parent)} has other modules now")
        for module in self._opened:
            if any(getattr(module, table) for table in HOOKS):
                raise self._error(
                    f"{self._path(module)} has hooks now, which do not run where its children are layers "
                    "of their own (register them on its children)"
                )
        for i, (owner, name, tensor, places) in enumerate(self._held):
            now = getattr(owner, name, _ABSENT)
            if now is not tensor:
                try:
                    if now is _ABSENT:
                        raise TypeError
                    for place in places:
                        setattr(place, name, now)
                except TypeError as error:
                    what = f"{self._path(owner)}.{name} was {_word(tensor)} and is {_word(now)} now"
                    raise self._error(what) from error
                self._held[i] = owner, name, now, places

    def _path(self, module: nn.Module) -> str:
        path = self._paths.get(module, type(module).__name__)
        return f"{self.name}.{path}" if path else self.name

    def _changed(self, what: str, value: _Value, now: Any) -> RuntimeError:
        then, here = value.word, _word(now)
        seen = f"was {then} and is {here} now" if then != here else "has changed"
        return self._error(f"{what} {seen}")

    def _error(self, what: str) -> RuntimeError:
        return RuntimeError(
            f"model must be what it was when {self.maker} followed its forward, but {what}: the layers "
            f"would go on with what was then. {self.anew}{self.maker}(model, X), which keeps "
            "the parameters; or let the forward hand a number to an operation as it is "
            "(x / self.tau), or hold it in a buffer: these are followed"
        )


class _Absent:
    def __repr__(self) -> str:
        return "absent"


_ABSENT = _Absent()


def _word(value: Any) -> str:
    if isinstance(value, Tensor):
        kind = "parameter" if isinstance(value, nn.Parameter) else "tensor"
        return f"a {kind} of shape {tuple(value.shape)}"
    text = getattr(value, "__name__", None) or repr(value)
    return text if len(text) < 60 else type(value).__name__


class _Value:
    """A value as it is now: its parts, as far as a forward that uses ``names`` may look at them."""

    def __init__(self, value: Any, names: frozenset[str], is_outside: bool = False) -> None:
        self.word, self._names = _word(value), names
        # What is outside the model, and is no setting, is not kept: it might not be copied with it.
        self._whole: Callable[[Any], Any] = _kind_of if is_outside else _Itself
        self._parts = self._parts_of(value)

    def is_still(self, now: Any) -> bool:
        """Whether a value is the same, in what may matter."""
        return now is self._parts or _same(self._parts, self._parts_of(now))

    def _parts_of(self, value: Any, depth: int = _DEEPEST) -> Any:
        """A nested tuple of what a value consists of, to be compared by ``_same``."""
        if isinstance(value, _PLAIN):
            return value
        if isinstance(value, Tensor) and depth == _DEEPEST and value.device.type == "cpu":
            # Read itself by a forward that may have taken numbers from it.
            small = value.numel() <= _LONGEST
            return _kind_of(value), value.dtype, value.tolist() if small else value.sum().item()
        if isinstance(value, types.MethodType):
            return self._whole(value.__func__), self._whole(value.__self__)
        if isinstance(value, Tensor | nn.Module | type | types.FunctionType) or depth == 0:
            return self._whole(value)
        if isinstance(value, types.ModuleType) and _is_library(value):
            return value.__name__
        if isinstance(value, list | tuple | dict | set | frozenset):
            return self._parts_of_container(value, depth - 1)
        fields = getattr(value, "__dict__", None)
        if fields is None and not hasattr(type(value), "__slots__"):
            return self._whole(value)
        slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
        named = sorted(self._names.intersection([*(fields or {}), *slots]))
        parts = [(n, self._parts_of(getattr(value, n, None), depth - 1)) for n in named]
        return _kind_of(value), *parts

    def _parts_of_container(self, value: Any, depth: int) -> Any:
        if len(value) > _LONGEST:
            return self._whole(value)
        if isinstance(value, set | frozenset):
            return _kind_of(value), frozenset(value)
        entries = value.items() if isinstance(value, dict) else enumerate(value)
        return _kind_of(value), *[
            (key, self._parts_of(entry, depth))
            for key, entry in entries
            if not isinstance(key, str) or key in self._names
        ]


def _kind_of(value: Any) -> str:
    """Its class in words, as a class itself may not be pickled."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


class _Itself:
    """A value that is compared by what it is."""

    def __init__(self, value: Any) -> None:
        self.value = value


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, _Itself) and isinstance(b, _Itself):
        return a.value is b.value
    if type(a) is not type(b):
        return False
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)


def _functions_of(modules: Iterable[nn.Module]) -> list[types.FunctionType]:
    """The functions that the forward of some modules may run, PyTorch's own not among them."""
    kinds = {base: None for module in modules for base in type(module).__mro__}
    found: dict[Any, None] = {}
    level: list[Any] = [
        function
        for kind in kinds
        for name, function in vars(kind).items()
        if isinstance(function, types.FunctionType) and name != "__init__"
    ]
    for _ in range(_DEEPEST):
        new = [f for f in level if isinstance(f, types.FunctionType) and f not in found]
        new = [f for f in new if str(f.__module__).partition(".")[0] not in _LIBRARIES]
        found.update(dict.fromkeys(new))
        level = [_looked_up(f, name) for f in new for name in _outside(f)]
    return list(found)


def _outside(function: types.FunctionType) -> list[str]:
    """The globals and closed-over variables that a function names."""
    named = dict.fromkeys(name for code in _codes(function.__code__) for name in code.co_names)
    found = [name for name in named if name in function.__globals__]
    return [*function.__code__.co_freevars, *found]


def _looked_up(function: types.FunctionType, name: str) -> Any:
    """What a function finds under such a name."""
    free = function.__code__.co_freevars
    if name not in free:
        return function.__globals__.get(name, _ABSENT)
    try:
        return (function.__closure__ or ())[free.index(name)].cell_contents
    except ValueError:  # an empty cell
        return _ABSENT


def _codes(code: types.CodeType) -> list[types.CodeType]:
    """A function's code, and that of functions inside it."""
    inner = [const for const in code.co_consts if isinstance(const, types.CodeType)]
    return [code, *[found for each in inner for found in _codes(each)]]


def _names_in(functions: Iterable[types.FunctionType]) -> frozenset[str]:
    """The names and strings that occur in functions: what they may look for in a value."""
    found: set[str] = set()
    for function in functions:
        for code in _codes(function.__code__):
            found.update(code.co_names)
            found.update(const for const in code.co_consts if isinstance(const, str))
    return frozenset(found)


def _globals_of(
    functions: Iterable[types.FunctionType], names: frozenset[str]
) -> list[tuple[types.FunctionType, str, _Value]]:
    """(function, name, value) of the variables outside that may decide what functions do.

    By the function, not its table: that is copied and pickled by its name.
    """
    found: dict[Any, tuple[types.FunctionType, str, _Value]] = {}
    for function in functions:
        written = {name for code in _codes(function.__code__) for name in _stored_globals(code)}
        for name in _outside(function):
            value = _looked_up(function, name)
            if name not in written and _may_vary(value):
                where = function if name in function.__code__.co_freevars else None
                key = name, where, id(function.__globals__)
                found.setdefault(key, (function, name, _Value(value, names, True)))
    return list(found.values())


def _stored_globals(code: types.CodeType) -> list[str]:
    return [
        str(step.argval) for step in dis.get_instructions(code) if step.opname == "STORE_GLOBAL"
    ]


def _may_vary(value: Any) -> bool:
    """Whether a variable may hold a setting: it is no function or class, nor a library."""
    if isinstance(value, types.ModuleType):
        return not _is_library(value)
    return value is not _ABSENT and not callable(value)


def _is_library(module: types.ModuleType) -> bool:
    return module.__name__.partition(".")[0] in _LIBRARIES


_LIBRARIES = {*sys.stdlib_module_names, "numpy", "timm", "torch", "torchvision", "transformers"}
