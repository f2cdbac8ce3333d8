"""Strict's steps as one function for ``torch.compile``, kept for as long as its model lives.

It computes what ``Relaxation.step`` computes, layer by layer, but for all layers in every step. What
the layers do comes from their displacements: the operations are compiled in, and the tensors (weights,
beliefs, dropout masks, targets, step sizes) are its inputs, so that new values of them do not compile
it again. A call of it makes a few steps, as every call takes some time of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from functools import lru_cache, partial
from types import CodeType, FunctionType, MethodType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.func import grad

from torch2pc.checks import warn_caller
from torch2pc.displacement import Displacement, Line

# Each model's functions, by what is compiled in. None for a model that torch.compile could not take.
_compiled: WeakKeyDictionary[nn.Module, dict[Any, Callable[..., Any]] | None] = WeakKeyDictionary()
_warned: WeakSet[nn.Module] = WeakSet()

# A call makes up to so many steps, fewer of deep models: what it evaluates has to be compiled first,
# and the more that is, the less a call's own time counts.
MOST_STEPS, MOST_LAYERS = 4, 80
# For each model, the numbers that its losses held, by their names.
_numbers: WeakKeyDictionary[nn.Module, dict[tuple[str, ...], list[dict[str, float]]]] = (
    WeakKeyDictionary()
)
MOST_VALUES = 2


def compiled_steps(model: nn.Module, program: Program) -> Callable[..., Any] | None:
    """``steps`` of this program, compiled for this model; None if that has failed before."""
    kept = _compiled.setdefault(model, {})
    if kept is None:
        return None
    if program not in kept:
        # Its own code object: what is compiled for a model is kept with the code, so it goes when
        # the model does, and one model's shapes do not count against another's recompilations.

        def run(*arguments: Any) -> Any:
            return steps(program, *arguments)

        code: CodeType = run.__code__.replace(co_name=f"steps_of_{id(model)}")
        own = FunctionType(code, run.__globals__, closure=run.__closure__)
        kept[program] = torch.compile(own, fullgraph=True, options=_options())
    return kept[program]


def _options() -> dict[str, Any]:
    try:
        # Not at the top, as it imports the compiler, and parts of it that another PyTorch may lack.
        from torch2pc.products import fast_products
    except ImportError:
        return {}
    return fast_products()


def run_plainly(model: nn.Module, reason: object, for_good: bool = False) -> None:
    """Say, the first time, that the model's relaxation runs without compilation.

    ``for_good``: nor is it tried again.
    """
    if for_good:
        _compiled[model] = None
    if model not in _warned:
        _warned.add(model)
        first_line = str(reason).strip().partition("\n")[0]
        warn_caller(
            f"compile=True: {type(model).__name__} runs without compilation, because {first_line}"
        )


def changing_number(model: nn.Module, functions: Iterable[object]) -> str | None:
    """Why not to compile again: a Python number that a loss holds is compiled in, and changes.

    The first ``MOST_VALUES`` values that a model meets are compiled.
    """
    now = {name: value for function in functions for name, value in _numbers_of(function)}
    met = _numbers.setdefault(model, {}).setdefault(tuple(now), [])
    if now in met:
        return None
    if len(met) < MOST_VALUES:
        met.append(now)
        return None
    name = next(name for name, value in now.items() if value != met[-1][name])
    return (
        f"the loss holds a Python number {name}, now {now[name]:g}, that changes from call to call, "
        "and each value would have to be compiled: hold it in a tensor, which would not"
    )


def _numbers_of(function: Any, depth: int = 3) -> Iterator[tuple[str, float]]:
    """The floats that a function computes with, by name: those that compiled code is specific to."""
    if isinstance(function, nn.Module):
        function = function.forward
    named: dict[str, Any] = {}
    if isinstance(function, partial):
        named = {"of a partial": function.func, **function.keywords}
        named.update((f"argument {k}", value) for k, value in enumerate(function.args))
    elif isinstance(function, MethodType):
        attributes = vars(function.__self__) if hasattr(function.__self__, "__dict__") else {}
        used = getattr(getattr(function.__func__, "__code__", None), "co_names", ())
        named = {name: attributes[name] for name in used if name in attributes}
        named["of a method"] = function.__func__
    elif isinstance(function, FunctionType):
        code, held = function.__code__, function.__globals__
        named = {name: held[name] for name in code.co_names if name in held}
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            with suppress(ValueError):  # an empty cell
                named[name] = cell.cell_contents
        defaults = function.__defaults__ or ()
        names = code.co_varnames[: code.co_argcount]
        named.update(zip(names[len(names) - len(defaults) :], defaults, strict=True))
        named.update(function.__kwdefaults__ or {})
    for name, value in named.items():
        if isinstance(value, float):
            yield name, value
        elif depth and isinstance(value, FunctionType | MethodType | partial):
            yield from _numbers_of(value, depth - 1)


class Program:
    """What is compiled in: equal for calls that differ in tensors and step sizes alone."""

    def __init__(
        self,
        displacements: Sequence[Displacement | None],
        output_dtype: torch.dtype,
        autocast: tuple[str, torch.dtype] | None,
    ) -> None:
        # For each layer its operations, None for a first layer whose input is clamped.
        self.operations = [
            None if found is None else [(*line[:2], *line[3:]) for line in found.lines]
            for found in displacements
        ]
        self.results = [None if found is None else found.result for found in displacements]
        self.output_dtype, self.autocast = output_dtype, autocast
        keys = [None if found is None else found.key for found in displacements]
        self._key = tuple(keys), output_dtype, autocast

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Program) and self._key == other._key

    def displacement(self, l: int, tensors: Sequence[Sequence[Tensor]], like: Tensor) -> Any:
        """Layer l's, with these tensors."""
        operations = self.operations[l - 1]
        assert operations is not None
        lines = [
            Line(rule, inputs, tuple(of_line), static, has_gradient)
            for (rule, inputs, static, has_gradient), of_line in zip(
                operations, tensors, strict=True
            )
        ]
        return Displacement(lines, self.results[l - 1], like)


def steps(
    program: Program,
    tensors: Sequence[Sequence[Sequence[Tensor]]],
    LossFun: Callable[[Tensor, Any], Tensor],
    prior: Callable[[list[Tensor]], Tensor] | None,
    Y: Any,
    vhat: Sequence[Tensor],
    precision: Sequence[Tensor | None],
    delta: list[Tensor],
    eta: Tensor,
    reached: Tensor,
) -> tuple[list[Tensor], list[Tensor]]:
    """``delta`` after as many steps as ``eta`` has entries, and the errors of the last one.

    ``tensors`` holds the constants of each line of each layer; a precision of None is 1. Step k has
    the size ``eta[k]``, and ``reached[k, l]`` is 0 for a layer that no error has reached by then.
    """
    L = len(program.operations)
    is_clamped = program.operations[0] is None
    displacements: list[Any] = [
        None
        if program.operations[l] is None
        else program.displacement(l + 1, of_layer, vhat[l + 1])
        for l, of_layer in enumerate(tensors)
    ]

    def loss_at(y: Tensor) -> Tensor:
        with nullcontext() if program.autocast is None else torch.autocast(*program.autocast):
            return LossFun(y.to(program.output_dtype), Y).reshape(())

    for k in range(len(eta)):
        moved, epsilon = list(delta), [*delta, vhat[-1]]
        if is_clamped:
            epsilon[1] = -delta[1]
        of_prior = None
        if prior is not None:
            of_prior = grad(prior)([v + d for v, d in zip(vhat, delta, strict=False)])
        for l in range(2 if is_clamped else 1, L + 1):
            d, saved = displacements[l - 1].forward(delta[l - 1])
            if l < L:
                epsilon[l] = reached[k, l] * (d - delta[l])
            else:
                epsilon[L] = grad(loss_at)(vhat[-1].to(d.dtype) + d)
            arriving = displacements[l - 1].backward(saved, _weighted(epsilon[l], precision[l]))
            descended = 0.0 if arriving is None else arriving
            if of_prior is not None:
                descended = descended + of_prior[l - 1]
            if l > 1:
                descended = descended - _weighted(epsilon[l - 1], precision[l - 1])
            moved[l - 1] = delta[l - 1] - eta[k] * descended
        delta = moved
    return delta, epsilon


@lru_cache(maxsize=8)
def schedule(
    n: int, eta: float, lowest: int, count: int, dtype: torch.dtype, device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """``eta`` and ``reached`` for each call that ``n`` steps take, with ``count`` beliefs.

    Errors have reached layer ``lowest`` in the first step and climb down a layer in each. Steps of
    size 0 come before it, so that all calls make the same number of steps, whatever ``n`` is.
    """
    in_a_call = max(1, min(MOST_STEPS, MOST_LAYERS // (count - 1)))
    k = torch.arange(1 - (-n % in_a_call), n + 1, device="cpu")
    etas = eta * (k > 0).double()
    reached = torch.arange(count, device="cpu") > lowest - k[:, None]
    parts = zip(etas.split(in_a_call), reached.split(in_a_call), strict=True)  # type: ignore[no-untyped-call]
    return [(sizes.to(device, dtype), which.to(device, dtype)) for sizes, which in parts]


def _weighted(error: Tensor, precision: Tensor | None) -> Tensor:
    return error if precision is None else precision * error
