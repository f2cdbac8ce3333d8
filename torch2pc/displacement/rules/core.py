"""What a rule is, how one is chosen for an operation, and what is done where there is none.

Displacements are float32 where the operation works in half precision; only products of matrices
are computed in the operation's own type there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

aten = torch.ops.aten


def operations(names: str) -> frozenset[Any]:
    """PyTorch's operations of these names; of ``add.Tensor`` that overload, of ``neg`` the default one.

    ``sum.*`` are all.
    """
    found: list[Any] = []
    for name in names.split():
        name, _, overload = name.partition(".")
        packet = getattr(aten, name)
        overloads = packet.overloads() if overload == "*" else [overload or "default"]
        found += [getattr(packet, overload) for overload in overloads]
    return frozenset(found)


# Those that write into an argument that is no part of what they return.
WRITES_ASIDE = operations(
    """native_batch_norm _native_batch_norm_legit _batch_norm_with_update cudnn_batch_norm
    rrelu_with_noise"""
)


class Rule(NamedTuple):
    """``forward(*d, *tensors, *static)`` gives the displacement of the output, and what to save.

    ``backward(e, saved, *tensors, *static)`` gives J(a + d)^T e, for several inputs as a tuple; if it
    is None, ``forward`` gives the displacement alone and is differentiated by autograd.

    ``forward_`` and ``backward_`` do the same and may write into ``d`` or ``e``; both of a rule are
    there or none. ``is_fresh``: what ``forward`` and ``backward`` return is in memory of its own, and
    is not saved, so that whoever is given it may write into it.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any] | None = None
    is_fresh: bool = False
    forward_: Callable[..., Any] | None = None
    backward_: Callable[..., Any] | None = None

    def overwriting(self, d: bool, e: bool) -> Rule:
        """The rule, if it can, writing into ``d`` or ``e`` where it may."""
        forward = self.forward_ if d and self.forward_ is not None else self.forward
        return Rule(forward, self.backward_ if e else self.backward, self.is_fresh)


class Step(NamedTuple):
    """One operation, prepared: its rule, the inputs that move, and what the rule is given besides.

    The inputs are tensors that the recorder knows; ``tensors`` are constant during the call, and
    ``static`` is hashable, and the same in the next call of the same model.
    """

    rule: Rule
    inputs: tuple[Tensor, ...]
    tensors: tuple[Tensor, ...] = ()
    static: tuple[Any, ...] = ()


class Call(NamedTuple):
    """An operation that was just evaluated, as the preparations see it."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    place: dict[int, int]
    """The tensors that depend on the layer's input, by id."""

    def moves(self, value: object) -> bool:
        """Whether ``value`` is a tensor that depends on the layer's input."""
        return isinstance(value, Tensor) and id(value) in self.place

    @property
    def arguments(self) -> tuple[Any, ...]:
        """All arguments in the operation's order, with the default of each that is not given."""
        return all_arguments(self.func, self.args, self.kwargs)

    @property
    def named(self) -> dict[str, Any]:
        """All arguments by their names."""
        return dict(
            zip([name for name, _ in parameters_of(self.func)], self.arguments, strict=True)
        )


@functools.cache
def parameters_of(func: Any) -> tuple[tuple[str, Any], ...]:
    """The names of an operation's arguments, and their defaults. (A schema takes long to read.)"""
    return tuple([(argument.name, argument.default_value) for argument in func._schema.arguments])


def all_arguments(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """All arguments of an operation in its order, with the default of each that is not given."""
    rest = parameters_of(func)[len(args) :]
    return (*args, *[kwargs.get(name, default) for name, default in rest])


PREPARED: dict[Any, Callable[[Any], Step | None]] = {}


def prepares(*operations: Any) -> Callable[[Callable[[Any], Step | None]], Any]:
    """Enter a function as the preparation of some operations; None from it means no rule applies."""

    def enter(prepare: Callable[[Any], Step | None]) -> Callable[[Any], Step | None]:
        PREPARED.update(dict.fromkeys(operations, prepare))
        return prepare

    return enter


HALF = (torch.bfloat16, torch.float16)


def belief_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of displacements of such values: float32 for half precision."""
    return torch.float32 if dtype in HALF else dtype


def unit_of(d: Tensor, largest: int = 120) -> Tensor:
    """The power of two next above the largest entry; 1 for zeros. To divide by it rounds nothing.

    It is at most 2 to the power of ``largest``.
    """
    if d.numel() == 0:
        return d.new_ones(())
    _, exponent = torch.frexp(torch.linalg.vector_norm(d, torch.inf))
    return torch.pow(2.0, exponent.clamp(-120, largest))


def is_float(tensor: Tensor) -> bool:
    """Whether there are displacements of such a tensor."""
    return tensor.dtype.is_floating_point or tensor.dtype.is_complex


def storage(tensor: Tensor) -> int:
    """The same for tensors that share memory."""
    try:
        return tensor.untyped_storage()._cdata
    except NotImplementedError:  # a sparse tensor
        return id(tensor)


def size_now(size: Any) -> int:
    """A size as it is in this call, where it may be any: what depends on it compiles nothing anew."""
    found: int = size.node.hint if isinstance(size, torch.SymInt) else size
    return found


def base(a: Tensor) -> Tensor:
    """``a`` as a constant, in the type of its displacements."""
    return a.detach().to(belief_dtype(a.dtype))


def only_first_moves(call: Call) -> bool:
    """Whether the first argument is the only one that depends on the layer's input."""
    others = tensors_in([*call.args[1:], *call.kwargs.values()])
    return call.moves(call.args[0]) and not any(map(call.moves, others))


# Where no rule is known, and where the operation is linear.


class Slot(NamedTuple):
    """Stands for the k-th tensor in a template of arguments."""

    k: int


def template(
    call: Call, linear: bool = False
) -> tuple[list[Tensor], list[Tensor], tuple[Any, ...]]:
    """The tensors that move, the constant ones, and (func, args, kwargs) with slots for them.

    ``linear``: constant tensors beside those that move are made zero (in a concatenation, say).
    """
    given = tensors_in([*call.args, *call.kwargs.values()])
    moving = [tensor for tensor in given if call.moves(tensor)]
    constant = [tensor for tensor in given if not call.moves(tensor)]
    slot_of = {id(tensor): Slot(k) for k, tensor in enumerate([*moving, *constant])}
    names, values = tuple(call.kwargs), tuple(call.kwargs.values())
    shape = (call.func, _with_slots(call.args, slot_of), names, _with_slots(values, slot_of))
    kept = [torch.zeros_like(c) if linear else c.detach() for c in constant]
    return moving, kept, shape


# (Not closures: one that calls itself is kept, with its tensors, until garbage is collected.)


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in nested lists of arguments."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for entry in value for tensor in tensors_in(entry)]
    return []


def _with_slots(value: Any, slot_of: dict[int, Slot]) -> Any:
    if isinstance(value, list | tuple):
        return tuple([_with_slots(entry, slot_of) for entry in value])
    return slot_of[id(value)] if isinstance(value, Tensor) else value


def _without_slots(value: Any, tensors: Sequence[Tensor]) -> Any:
    if isinstance(value, Slot):
        return tensors[value.k]
    return [_without_slots(entry, tensors) for entry in value] if _is_list(value) else value


def evaluate(tensors: Sequence[Tensor], func: Any, args: Any, names: Any, values: Any) -> Any:
    """The operation on ``tensors``, put into their slots."""
    given = _without_slots(args, tensors), _without_slots(values, tensors)
    return func(*given[0], **dict(zip(names, given[1], strict=True)))


def _linear(*given: Any) -> Tensor:
    *tensors, func, args, names, values, item, dtype = given
    found = evaluate(tensors, func, args, names, values)
    found = found if item is None else found[item]
    return found.to(dtype)


LINEAR = Rule(_linear)


def linear_step(call: Call, item: int | None = None) -> Step:
    """The step of an operation that is linear in the tensors that move, and has no constant term."""
    moving, constant, shape = template(call, linear=len(call.args) > 0 and _is_list(call.args[0]))
    if not all(map(is_float, moving)):
        return difference_step(call, item)  # of a flag or an index its new value is at hand
    output = call.output if item is None else call.output[item]
    return Step(LINEAR, tuple(moving), tuple(constant), (*shape, item, belief_dtype(output.dtype)))


def _is_list(value: object) -> bool:
    return isinstance(value, list | tuple)


def _difference(*given: Any) -> Tensor:
    *tensors, func, args, names, values, item, count, is_moving = given
    ds, bases, (before, *constant) = (
        tensors[:count],
        tensors[count : 2 * count],
        tensors[2 * count :],
    )
    moved = [
        (a.to(d.dtype) + d).to(a.dtype) if floats else d
        for a, d, floats in zip(bases, ds, is_moving, strict=True)
    ]
    found = evaluate([*moved, *constant], func, args, names, values)
    found = found if item is None else found[item]
    if not is_float(found):
        return found
    dtype = belief_dtype(before.dtype)
    return found.to(dtype) - before.to(dtype)


DIFFERENCE = Rule(_difference)


def difference_step(call: Call, item: int | None = None) -> Step:
    """The step of an operation without a rule: f(a + d) - f(a).

    An output that is no float (a comparison, an index) has no displacement: its new value is passed
    on in its place.
    """
    moving, constant, shape = template(call)
    output = call.output if item is None else call.output[item]
    bases = [a.detach() for a in moving]
    kinds = tuple(map(is_float, moving))
    tensors = (*bases, output.detach(), *constant)
    return Step(DIFFERENCE, tuple(moving), tensors, (*shape, item, len(moving), kinds))


# Shared parts.


def all_float(call: Call) -> bool:
    """Whether whatever moves is a float, and so is the output: else it has no displacement."""
    tensors = [value for value in call.args if isinstance(value, Tensor) and call.moves(value)]
    return call.output.dtype.is_floating_point and all(
        tensor.dtype.is_floating_point for tensor in tensors
    )


def if_finite(near: Tensor, far: Tensor) -> Tensor:
    """The rule, or the plain difference where infinities or an overflow spoil the rule."""
    return torch.where(near.isfinite(), near, far)


def unsqueezed(e: Tensor, dim: tuple[int, ...]) -> Tensor:
    for k in sorted(dim):
        e = e.unsqueeze(k)
    return e


def given_or_zero(given: Sequence[Any], kinds: tuple[bool, ...]) -> list[Any]:
    """The displacements of operands of which ``kinds`` says which move; 0 for one that does not."""
    moving = iter(given)
    return [next(moving) if moves else 0.0 for moves in kinds]
