"""What a call may change besides its results: random number generators, buffers, flags, ``.grad``.

Here they are found, saved, compared and put back. What the layers compute is in ``layer.py``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from torch2pc.displacement.rules.core import storage

# What random numbers are drawn from: the default generator of a device, or one of the user's own.
Source = torch.device | torch.Generator
RandomState = list[tuple[Source, Tensor]]


def modules_in(*roots: object) -> list[nn.Module]:
    """Every module in ``roots`` once, also those that a function among them holds.

    The same as ``Module.modules()``, several times faster, because it builds no names.
    """
    found: dict[nn.Module, None] = {}
    for root in roots:
        if isinstance(root, nn.Module):
            found[root] = None
        elif root is not None:
            found.update(dict.fromkeys(x for x in held_by(root) if isinstance(x, nn.Module)))
    modules = list(found)
    seen = set(modules)
    for module in modules:
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                modules.append(child)
    return modules


# How far ``held_by`` follows references, and the longest container that it looks into.
_DEEPEST, _LONGEST = 4, 100


def held_by(function: object) -> list[nn.Module | torch.Generator]:
    """The modules and generators that a callable which is no module computes with.

    They are looked for in its closure, its default arguments, the globals that it names, the object
    whose method it is, the arguments of a ``functools.partial``, and in containers of these.
    """
    held: list[nn.Module | torch.Generator] = []
    seen: set[int] = set()
    waiting: list[Any] = [function]
    for _ in range(_DEEPEST + 1):
        level, waiting = waiting, []
        for value in level:
            if id(value) not in seen:
                seen.add(id(value))
                if isinstance(value, nn.Module | torch.Generator):
                    held.append(value)
                else:
                    waiting += _references(value)
    return held


def _references(value: Any) -> Iterable[Any]:
    """What a callable or a container refers to, as far as it may matter to ``held_by``."""
    if isinstance(value, FunctionType):
        if value.__module__ is not None and value.__module__.startswith("torch."):
            return ()
        found = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        for cell in value.__closure__ or ():
            with suppress(ValueError):  # an empty cell
                found.append(cell.cell_contents)
        named = value.__globals__
        return found + [named[name] for name in value.__code__.co_names if name in named]
    if isinstance(value, MethodType):
        owner = value.__self__
        attributes = () if isinstance(owner, nn.Module | type) else _attributes(owner)
        return owner, value.__func__, *attributes
    if isinstance(value, partial):
        return value.func, *value.args, *value.keywords.values()
    if isinstance(value, list | tuple | set | dict):
        if len(value) > _LONGEST:
            return ()
        return list(value.values() if isinstance(value, dict) else value)
    if callable(value) and not isinstance(value, type):
        return _attributes(value)
    return ()


def _attributes(value: object) -> list[Any]:
    return list(getattr(value, "__dict__", {}).values())


def generators_in(function: object, modules: Iterable[nn.Module]) -> list[torch.Generator]:
    """The user's own generators: attributes of ``modules``, or held by a function."""
    found = [
        value
        for module in modules
        if not type(module).__module__.startswith("torch.nn.")
        for value in vars(module).values()
        if isinstance(value, torch.Generator)
    ]
    if not isinstance(function, nn.Module):
        found += [value for value in held_by(function) if isinstance(value, torch.Generator)]
    return found


_CPU = torch.device("cpu")


def devices_of(modules: Iterable[nn.Module], X: Tensor) -> set[torch.device]:
    """The devices whose generators a forward pass may draw from."""
    devices = {_CPU, X.device}
    if X.device.type != "cpu" or torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        for module in modules:
            devices.update(p.device for p in module._parameters.values() if p is not None)
    return devices


def random_state(sources: Iterable[Source]) -> RandomState:
    """The state of each generator. Reading it waits for no device."""
    states: RandomState = []
    for source in sources:
        if isinstance(source, torch.Generator):
            states.append((source, source.get_state()))
        elif source.type == "cpu":
            states.append((source, torch.get_rng_state()))
        elif source.type == "mps":
            states.append((source, torch.mps.get_rng_state()))
        elif source.type != "meta":
            states.append((source, torch.get_device_module(source).get_rng_state(source)))
    return states


def set_random_state(states: RandomState) -> None:
    """Put the generators back to ``states``."""
    for source, state in states:
        if isinstance(source, torch.Generator):
            source.set_state(state)
        elif source.type == "cpu":
            torch.set_rng_state(state)
        elif source.type == "mps":
            torch.mps.set_rng_state(state)
        else:
            torch.get_device_module(source).set_rng_state(state, source)


def drawn_from(states: RandomState) -> RandomState:
    """Those of ``states`` whose generators have been drawn from since they were read."""
    now = random_state(source for source, _ in states)
    return [
        before
        for before, after in zip(states, now, strict=True)
        if not torch.equal(before[1], after[1])
    ]


@contextmanager
def generators_kept(sources: Iterable[Source]) -> Iterator[None]:
    """Leaves the generators as they are before the body."""
    random = random_state(sources)
    try:
        yield
    finally:
        set_random_state(random)


class Buffers:
    """The buffers of some modules as they are now: the tensors and copies of their values."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._tables = [
            (
                module,
                module._buffers,
                [(name, *_version_and_copy(b), b) for name, b in module._buffers.items()],
            )
            for module in modules
            if module._buffers
        ]

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._tables)

    def differ(self, written: Collection[int] = ()) -> bool:
        """Whether any buffer was written to or replaced since.

        ``written``: memory that is known to have been written, with the same values perhaps.
        """
        return any(
            _entry(module, name) is not buffer
            or _written(module, buffer, version, value)
            or (bool(written) and buffer is not None and storage(buffer) in written)
            for module, _, table in self._tables
            for name, version, value, buffer in table
        )

    def restore(self, first: BaseException) -> None:
        """Put back both the tensors and their values, after ``first`` was raised."""
        for module, entries, table in self._tables:
            with chained_to(first):
                if module._buffers is not entries:
                    module._buffers = entries
            with chained_to(first):
                _remove_others(module, {name for name, *_ in table})
            for name, version, value, buffer in table:
                with chained_to(first):
                    # One that was not written may be part of a graph that is still to be walked.
                    if (
                        buffer is not None
                        and value is not None
                        and _written(module, buffer, version, value)
                    ):
                        _put_back(buffer, value)
                with chained_to(first):
                    _enter(module, name, buffer)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Run the body with copies of the saved values; the buffers themselves stay untouched."""
        # One entry at a time and none removed: another thread may be using the module.
        now = [(module, dict(module._buffers.items())) for module, _, _ in self._tables]
        try:
            copies: dict[int, Tensor] = {}  # a buffer with two names stays one tensor
            for module, _, table in self._tables:
                for name, _, value, buffer in table:
                    if buffer is not None and value is not None:
                        if id(buffer) not in copies:
                            copies[id(buffer)] = value.clone()
                        _enter(module, name, copies[id(buffer)])
            yield
        finally:
            for module, entries in now:
                for name, buffer in entries.items():
                    _enter(module, name, buffer)
                _remove_others(module, entries.keys())


# A scripted module's table of buffers is none of Python's: it has no ``get`` and nothing can be
# added or removed.


def _entry(module: nn.Module, name: str) -> Tensor | None:
    return module._buffers[name] if name in module._buffers else None  # noqa: SIM401


def _enter(module: nn.Module, name: str, buffer: Tensor | None) -> None:
    if name not in module._buffers or module._buffers[name] is not buffer:
        module._buffers[name] = buffer


def _remove_others(module: nn.Module, names: Collection[str]) -> None:
    for name in [name for name in module._buffers.keys() if name not in names]:  # noqa: SIM118
        del module._buffers[name]


def _put_back(buffer: Tensor, value: Tensor) -> None:
    """Give a buffer its value again, and its shape where that was changed."""
    with torch.no_grad():
        if buffer.is_nested or buffer.shape == value.shape:
            buffer.copy_(value)
        else:
            buffer.data = value


@contextmanager
def chained_to(first: BaseException) -> Iterator[None]:
    """What fails in the body is appended to the chain of ``first``, and not raised in its place."""
    try:
        yield
    except Exception as error:
        error.__context__ = None  # Python has set it to the first
        while (before := first.__cause__ or first.__context__) is not None:
            first = before
        first.__context__ = error


def _written(module: nn.Module, buffer: Tensor | None, version: int, value: Tensor | None) -> bool:
    if buffer is None or value is None:
        return buffer is not None
    if buffer._version != version:
        return True
    # Normalisation layers write their running statistics without counting up the version. To
    # compare values on another device would wait for it, so there training mode counts as written.
    return not same_values(buffer, value) if buffer.device.type == "cpu" else module.training


def same_values(a: Tensor, b: Tensor) -> bool:
    """``torch.equal``, for sparse and nested tensors too, which are compared part by part."""
    if a.layout is torch.strided and not a.is_nested:
        return torch.equal(a, b)
    if (a.layout, a.is_nested) != (b.layout, b.is_nested) or a.dim() != b.dim():
        return False
    mine, others = _parts(a), _parts(b)
    return len(mine) == len(others) and all(map(torch.equal, mine, others))


def _parts(a: Tensor) -> Sequence[Tensor]:
    """The strided tensors that a sparse or a nested tensor consists of."""
    a = a.detach()
    if a.is_nested:
        return a.unbind()
    if a.layout is torch.sparse_coo:
        return a._indices(), a._values()
    if a.layout in (torch.sparse_csr, torch.sparse_bsr):
        return a.crow_indices(), a.col_indices(), a.values()
    return a.ccol_indices(), a.row_indices(), a.values()


def _version_and_copy(buffer: Tensor | None) -> tuple[int, Tensor | None]:
    # A lazy module's buffers have no value yet.
    if buffer is None or torch.nn.parameter.is_lazy(buffer):
        return 0, None
    return buffer._version, buffer.detach().clone()


class Snapshot:
    """Generators, buffers and training flags as they are now, put back if the body raises."""

    def __init__(self, modules: list[nn.Module], devices: set[torch.device]) -> None:
        self._random = random_state(devices)
        self._buffers = Buffers(modules)
        self._training = [(module, module.training) for module in modules]

    def differs(self) -> bool:
        """Whether buffers or training flags are others now."""
        changed = any(module.training != training for module, training in self._training)
        return changed or self._buffers.differ()

    def __enter__(self) -> Snapshot:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if error is not None:
            self.restore(error)

    def restore(self, first: BaseException) -> None:
        """Put everything back as it was, after ``first`` was raised; what cannot be is passed over."""
        with chained_to(first):
            set_random_state(drawn_from(self._random))
        self._buffers.restore(first)
        for module, training in self._training:
            with chained_to(first):
                if module.training != training:
                    module.training = training


def write_gradients(
    updates: Sequence[tuple[Tensor, Tensor]], accumulate: bool, modules: Iterable[nn.Module]
) -> None:
    """Write each update into its parameter's ``.grad``, replacing or adding; all of them or none.

    Where they replace, a parameter of ``modules`` that has no update has no ``.grad`` afterwards, as
    an optimizer would step it again with an old one. Post-accumulate-grad hooks run as after
    ``backward()``.
    """
    before: list[tuple[Tensor, Tensor | None, Tensor | None]] = []
    try:
        if accumulate:
            for parameter, update in updates:
                _add_to_gradient(parameter, update, before)
        else:
            others: list[tuple[Tensor, Tensor | None]] = [
                (parameter, None) for parameter in _others(modules, updates)
            ]
            before += [(parameter, parameter.grad, None) for parameter, _ in [*others, *updates]]
            for parameter, new in [*others, *updates]:
                parameter.grad = new
        for parameter, _ in updates:
            hooks: Any = parameter._post_accumulate_grad_hooks
            if hooks:
                with torch.no_grad():
                    for hook in list(hooks.values()):
                        hook(parameter)
    except BaseException as error:
        for parameter, gradient, value in before:
            with chained_to(error), torch.no_grad():
                parameter.grad = gradient
                if gradient is not None and value is not None:
                    gradient.copy_(value)
        raise


@torch.no_grad()
def _add_to_gradient(
    parameter: Tensor, update: Tensor, before: list[tuple[Tensor, Tensor | None, Tensor | None]]
) -> None:
    """Add in place where that can be done, as ``backward()`` does: ``.grad`` may be a view.

    What was there is appended to ``before``.
    """
    gradient = parameter.grad
    if gradient is None or gradient.is_sparse:
        before.append((parameter, gradient, None))
        parameter.grad = update if gradient is None else gradient + update
    else:
        before.append((parameter, gradient, gradient.clone()))
        gradient.add_(update)


def _others(modules: Iterable[nn.Module], updates: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """The parameters of ``modules`` that have a gradient, but no update: frozen ones too.

    An optimizer steps whatever has a gradient.
    """
    tables = [module._parameters.values() for module in modules if module._parameters]
    parameters = [parameter for table in tables for parameter in table]
    # By their ids, as a tensor takes long to hash.
    others = set(map(id, parameters)).difference([id(parameter) for parameter, _ in updates])
    if not others:
        return []
    return [
        p
        for p in parameters
        if p is not None and id(p) in others and p.is_leaf and p.grad is not None
    ]
