"""What a call may change besides its results: random number generators, buffers, flags, ``.grad``.

Here they are saved, compared and put back. What the layers compute is in ``layers.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

RandomState = list[tuple[torch.device, Tensor]]


def modules_in(*roots: object) -> list[nn.Module]:
    """Every module in ``roots`` once; what is not a module is passed over.

    The same as ``Module.modules()``, several times faster, because it builds no names.
    """
    found = list(dict.fromkeys(root for root in roots if isinstance(root, nn.Module)))
    seen = set(found)
    for module in found:
        children = module._modules
        if children:
            for child in children.values():
                if child is not None and child not in seen:
                    seen.add(child)
                    found.append(child)
    return found


_CPU = torch.device("cpu")


def devices_of(modules: Iterable[nn.Module], X: Tensor) -> set[torch.device]:
    """The devices whose generators a forward pass may draw from."""
    devices = {_CPU, X.device}
    if X.device.type != "cpu" or torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        for module in modules:
            devices.update(p.device for p in module._parameters.values() if p is not None)
    return devices


def random_state(devices: Iterable[torch.device]) -> RandomState:
    """The state of each device's default generator. Reading it waits for no device."""
    states: RandomState = []
    for device in devices:
        if device.type == "cpu":
            states.append((device, torch.get_rng_state()))
        elif device.type == "mps":
            states.append((device, torch.mps.get_rng_state()))
        elif device.type != "meta":
            states.append((device, torch.get_device_module(device).get_rng_state(device)))
    return states


def set_random_state(states: RandomState) -> None:
    """Put the default generators back to ``states``."""
    for device, state in states:
        if device.type == "cpu":
            torch.set_rng_state(state)
        elif device.type == "mps":
            torch.mps.set_rng_state(state)
        else:
            torch.get_device_module(device).set_rng_state(state, device)


def random_state_differs(states: RandomState) -> bool:
    """Whether a random number has been drawn since ``states`` was read."""
    now = random_state(device for device, _ in states)
    return any(
        not torch.equal(before, after) for (_, before), (_, after) in zip(states, now, strict=True)
    )


class Buffers:
    """The buffers of some modules as they are now: the tensors and copies of their values."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._tables = [
            (module, [(name, *_version_and_copy(b), b) for name, b in module._buffers.items()])
            for module in modules
            if module._buffers
        ]

    def differ(self) -> bool:
        """Whether any buffer was written to or replaced since."""
        return any(
            module._buffers.get(name) is not buffer or _written(module, buffer, version, value)
            for module, table in self._tables
            for name, version, value, buffer in table
        )

    def restore(self) -> None:
        """Put back both the tensors and their values."""
        for module, table in self._tables:
            module._buffers.clear()
            for name, _, value, buffer in table:
                if buffer is not None and value is not None:
                    with torch.no_grad():
                        buffer.copy_(value)
                module._buffers[name] = buffer

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Run the body with copies of the saved values; the buffers themselves stay untouched."""
        now = [(module, dict(module._buffers)) for module, _ in self._tables]
        try:
            copies: dict[int, Tensor] = {}  # a buffer with two names stays one tensor
            for module, table in self._tables:
                for name, _, value, buffer in table:
                    if buffer is not None and value is not None:
                        if id(buffer) not in copies:
                            copies[id(buffer)] = value.clone()
                        module._buffers[name] = copies[id(buffer)]
            yield
        finally:
            for module, table_now in now:
                module._buffers.clear()
                module._buffers.update(table_now)


def _written(module: nn.Module, buffer: Tensor | None, version: int, value: Tensor | None) -> bool:
    if buffer is None or value is None:
        return buffer is not None
    if buffer._version != version:
        return True
    # Normalisation layers write their running statistics without counting up the version. To
    # compare values on another device would wait for it, so there training mode counts as written.
    return not torch.equal(buffer, value) if buffer.device.type == "cpu" else module.training


def _version_and_copy(buffer: Tensor | None) -> tuple[int, Tensor | None]:
    # A lazy module's buffers have no value yet.
    if buffer is None or torch.nn.parameter.is_lazy(buffer):
        return 0, None
    return buffer._version, buffer.detach().clone()


class Snapshot:
    """Generators, buffers and training flags as they are now, to be put back if a call fails."""

    def __init__(self, modules: list[nn.Module], devices: set[torch.device]) -> None:
        self._random = random_state(devices)
        self._buffers = Buffers(modules)
        self._training = [(module, module.training) for module in modules]

    def restore(self) -> None:
        """Put everything back as it was."""
        set_random_state(self._random)
        self._buffers.restore()
        for module, training in self._training:
            module.training = training


def write_gradients(updates: Sequence[tuple[Tensor, Tensor]], accumulate: bool) -> None:
    """Write each update into its parameter's ``.grad``, replacing or adding; all of them or none.

    Post-accumulate-grad hooks run as after ``backward()``.
    """
    before = [parameter.grad for parameter, _ in updates]
    try:
        if accumulate:
            with torch.no_grad():
                updates = [
                    (parameter, update if gradient is None else gradient + update)
                    for (parameter, update), gradient in zip(updates, before, strict=True)
                ]
        for parameter, update in updates:
            parameter.grad = update
        for parameter, _ in updates:
            hooks: Any = parameter._post_accumulate_grad_hooks
            if hooks:
                with torch.no_grad():
                    for hook in list(hooks.values()):
                        hook(parameter)
    except BaseException:
        for (parameter, _), gradient in zip(updates, before, strict=True):
            parameter.grad = gradient
        raise
