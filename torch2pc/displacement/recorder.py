"""The operations that a layer is made of, noted while it runs.

In the feed-forward pass a ``Recorder`` notes them; each has a rule (``rules/``), or one of its user's
(``displacement_rule``), that takes the displacement of its inputs to that of its output. Put together they
are the layer's ``Displacement`` (``lines.py``). What was recorded is what was computed, so that it cannot be
out of date. A layer that cannot be recorded (it branches on values, leaves PyTorch, changes a tensor through
two names, draws numbers from its input) is ``Uncovered``.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from torch2pc.displacement.lines import Displacement, Line
from torch2pc.displacement.rules import (
    COMPOSING,
    PREPARED,
    Call,
    Rule,
    Step,
    aten,
    base,
    composed_step,
    difference_step,
    linear_step,
    pooled_before_relu,
    storage,
)
from torch2pc.displacement.rules.core import (
    DIFFERENCE,
    WRITES_ASIDE,
    all_arguments,
    is_float,
    operations,
    tensors_in,
)
from torch2pc.displacement.rules.decisions import (
    GENERIC,
    JUMP,
    MOVED_VALUE,
    VALUE,
    Noted,
    decides,
    kinds_of,
)
from torch2pc.displacement.rules.kinks import RELU
from torch2pc.displacement.vjp import reaches

# What these return depends on the shape of a tensor, not on its values.
_OF_SHAPE_ALONE = operations(
    """
    empty_like.* zeros_like.* ones_like.* full_like.* rand_like.* randn_like.* randint_like.*
    new_empty.* new_zeros.* new_ones.* new_full.* new_empty_strided.* sym_size.* sym_numel.* sym_stride.*
    """
)
# Those that update running statistics, and the place of the argument that says whether they do. Not
# all say that they write, and none counts it.
_STATISTICS = {
    aten.native_batch_norm.default: 5,
    aten._native_batch_norm_legit.default: 5,
    aten.cudnn_batch_norm.default: 5,
    aten.miopen_batch_norm.default: 5,
}
_FLOATS_OF = aten._local_scalar_dense.default


class Uncovered(Exception):
    """Why a layer has no displacement by rules."""


CHANGED = "a tensor that the layer used was changed afterwards"


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes whether its body draws random numbers, and which memory it writes into.

    What other threads do does not count.
    """

    supports_higher_order_operators = True

    def __init__(self, sees_exits: bool = False) -> None:
        """``sees_exits``: tensors that are read outside PyTorch are noticed, which takes a while."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._exits: Any = Exits(self) if sees_exits else None
        self.draws = False
        self.written: set[int] = set()
        self._tensors: list[Tensor] = []  # what was computed, so that no id is used twice

    @property
    def is_hooked(self) -> bool:
        """Whether what was computed has a hook that sees its gradient."""
        return any(map(_is_hooked, self._tensors))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nothing is compiled while it watches (``uncompiled``): to make sure of that once more for each
        # operation would cost as much as an operation.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = kind_of(func)
        self.draws = self.draws or kind.may_draw
        if kind.written:
            self._note_written(func, kind.written, args, kwargs or {})
        return self.dispatch(func, kind, args, kwargs or {})

    def _note_written(
        self, func: Any, places: tuple[int, ...], args: Any, kwargs: dict[str, Any]
    ) -> None:
        given = all_arguments(func, args, kwargs)
        if func in _STATISTICS and not given[_STATISTICS[func]]:
            return  # read, not written
        self.written.update([storage(given[k]) for k in places if isinstance(given[k], Tensor)])

    def dispatch(self, func: Any, kind: Kind, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run one operation."""
        output = func(*args, **kwargs)
        self._tensors += tensors_in(output)
        return output

    def is_read(self, tensor: Tensor) -> None:
        """The numbers of a tensor go where no operation is seen."""

    def __enter__(self) -> Any:
        super().__enter__()  # type: ignore[no-untyped-call]
        if self._exits is not None:
            self._exits.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._exits is not None:
            self._exits.__exit__(*exception)
            self._exits = None
        super().__exit__(*exception)  # type: ignore[no-untyped-call]


class Recorder(Watch):  # type: ignore[no-untyped-call]
    """Notes the operations that turn the inputs into a layer's output, while the layer runs.

    ``displacement(output)`` puts them together afterwards, or raises Uncovered.
    """

    def __init__(self, *inputs: Tensor, sees_exits: bool = False) -> None:
        super().__init__(sees_exits)
        self.lines: list[Recorded] = []
        # Where the value of a tensor stands: the inputs come first, then what each line computes.
        self.place: dict[int, int] = {id(x): k for k, x in enumerate(inputs)}
        self._count = len(inputs)
        self._tensors += inputs
        self._output_of: list[Tensor] = []
        self._version_of: list[int] = []
        # The version of each, as the operation that made it left it.
        self._versions: dict[int, int] = {id(x): x._version for x in inputs}
        self._new: list[Tensor] = []
        self._storages = {storage(x) for x in inputs}
        # What operations were given that does not depend on the inputs, and its version then. (That of what a
        # step holds does not tell: what is detached inside a mode of this kind counts by itself.)
        self._constant: list[tuple[Tensor, int]] = []
        # What the layer used that has a graph, but none of the lines computes.
        self._strange: list[Tensor] = []
        self._reason: str | None = None
        self._suspended = False

    def dispatch(self, func: Any, kind: Kind, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run one operation, and note it."""
        if self._reason is not None or self._suspended:
            return super().dispatch(func, kind, args, kwargs)
        for tensor in self._new:
            # Autograd has made a view of it, or counted a write, after the operation returned.
            self._versions[id(tensor)] = tensor._version
        self._new.clear()
        place = self.place
        given = _tensors_in(args, kwargs)
        moves = any([id(tensor) in place for tensor in given])
        written = None
        try:
            self._check(func, given, moves)
            if moves and kind.writes:
                written = self._about_to_write(func, args)
                before = written.detach().clone()
        except Uncovered as reason:
            self._reason = str(reason)
        output = func(*args, **kwargs)
        if moves and self._reason is None and not kind.is_of_shape_alone:
            try:
                if written is None:
                    self._note(func, args, kwargs, output, output, given)
                else:
                    # The operation that does not write, on what the tensor was before.
                    if id(written) in place:
                        self._enter(before, place[id(written)])
                    args = tuple([before if value is written else value for value in args])
                    given = _tensors_in(args, kwargs)
                    self._note(_functional(func), args, kwargs, output.detach(), written, given)
            except Uncovered as reason:
                self._reason = str(reason)
            except Exception as error:  # the layer itself works, and must go on
                self._reason = f"no rule could be prepared for {func}: {error!r}"
        return output

    def _check(self, func: Any, given: list[Tensor], moves: bool) -> None:
        """Raises Uncovered for what the lines cannot describe."""
        for tensor in given:
            expected = self._versions.get(id(tensor))
            if expected is None:
                if not tensor.is_leaf:
                    self._strange.append(tensor)
                    self._tensors.append(tensor)
                is_parameter = tensor.is_leaf and isinstance(tensor, nn.Parameter)
                if not is_parameter and storage(tensor) in self._storages:
                    raise Uncovered(f"{func} uses a tensor of the layer's under another name")
            elif tensor._version != expected:
                raise Uncovered(f"{func} uses a tensor that was changed through another name")
        if moves and func is _FLOATS_OF:
            raise Uncovered("a Python number is taken from a tensor that depends on the input")
        if moves and not isinstance(func, torch._ops.OpOverload):
            raise Uncovered(f"{func} is made of other operations")

    def _about_to_write(self, func: Any, args: Any) -> Tensor:
        """The tensor that the operation writes into, once what was saved of it is saved elsewhere."""
        written = args[0] if args else None
        first = func._schema.arguments[0].alias_info
        if (
            not isinstance(written, Tensor)
            or first is None
            or not first.is_write
            or _functional(func) is None
        ):
            raise Uncovered(f"{func} writes into one of its arguments")
        if written._is_view() or not written.is_floating_point():
            raise Uncovered(f"{func} writes into a part of a tensor")
        its = storage(written)
        for k, line in enumerate(self.lines):
            tensors = line.step.tensors
            if any([storage(tensor) == its for tensor in tensors]):
                kept = tuple([t.clone() if storage(t) == its else t for t in tensors])
                self.lines[k] = line._replace(step=line.step._replace(tensors=kept))
        return written

    def _note(
        self,
        func: Any,
        args: Any,
        kwargs: dict[str, Any],
        output: Any,
        entered: Any,
        given: list[Tensor],
    ) -> None:
        """The lines of an operation on ``given``; ``entered`` holds its output from now on."""
        # Where they stand now, as what is there may be another tensor later.
        place = {id(x): self.place[id(x)] for x in given if id(x) in self.place}
        constant = [(x, x._version) for x in given if id(x) not in place]
        versions = [version for _, version in constant]
        self._constant += constant
        call = Call(func, tuple(args), kwargs, output, self.place)
        noted = Noted(Call(*call[:-1], place), None, versions)
        if isinstance(output, Tensor):
            self._append(self._step(call), entered, noted)
        else:
            self._append_items(call, output, noted)

    def _step(self, call: Call) -> Step:
        _check_shape(call)
        if not is_float(call.output):
            return difference_step(call)
        if call.func in COMPOSING:
            step = composed_step(call, self._made_by)
            if step is not None:
                return step
        prepare = PREPARED.get(call.func)
        step = prepare(call) if prepare is not None else None
        if step is not None:
            return step
        if torch.Tag.nondeterministic_seeded in call.func.tags:
            raise Uncovered(f"{call.func} draws random numbers from what depends on the input")
        return (linear_step if call.func.is_view else difference_step)(call)

    def _made_by(self, tensor: object) -> Step | None:
        line = self._line(self.place.get(id(tensor), 0))
        return None if line is None else line.step

    def _append_items(self, call: Call, output: Any, noted: Noted) -> None:
        """The lines of an operation with several outputs, one for each."""
        if not isinstance(output, list | tuple):
            return  # a size, a flag
        swapped = pooled_before_relu(call, self._made_by)
        if swapped is not None:
            pool, between, relu = swapped
            of_pool = noted._replace(call=noted.call._replace(func=None))
            self._append(pool, between, of_pool, output[0])
            self._append(relu, output[0], noted._replace(item=0))
            return
        _check_shape(call)
        prepare = PREPARED.get(call.func)
        step = prepare(call) if prepare is not None else None
        is_linear = call.func.is_view or call.func in _SPLITS
        for item, tensor in enumerate(output):
            if not isinstance(tensor, Tensor) or tensor.numel() == 0:
                continue
            of_item = step if item == 0 else None
            if of_item is None:
                of_item = (linear_step if is_linear else difference_step)(call, item)
            self._append(of_item, tensor, noted._replace(item=item))

    def _append(
        self, step: Step, output: Tensor, noted: Noted, recorded: Tensor | None = None
    ) -> None:
        """A line that computes ``output``, on the way to ``recorded`` if that is another tensor."""
        inputs = tuple([self.place[id(tensor)] for tensor in step.inputs])
        self.lines.append(Recorded(step, inputs, noted))
        self._output_of.append(output if recorded is None else recorded)
        self._version_of.append(self._output_of[-1]._version)
        self._enter(output, self._count + len(self.lines) - 1)

    def _enter(self, tensor: Tensor, place: int) -> None:
        self.place[id(tensor)] = place
        self._versions[id(tensor)] = tensor._version
        self._new.append(tensor)
        self._tensors.append(tensor)
        self._storages.add(storage(tensor))

    def __enter__(self) -> Any:
        self._outer, _local.recorder = getattr(_local, "recorder", None), self
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        _local.recorder = self._outer
        super().__exit__(*exception)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Notes nothing in the body."""
        before, self._suspended = self._suspended, True
        try:
            yield
        finally:
            self._suspended = before

    def give_up(self, reason: str) -> None:
        """There will be no displacement."""
        self._reason = self._reason or reason

    def is_read(self, tensor: Tensor) -> None:
        """The numbers of a tensor go where no operation is seen."""
        if id(tensor) in self.place and not self._suspended:
            self.give_up("a tensor that depends on the input is read outside PyTorch")

    def note_module(
        self, rule: Callable[..., Tensor], module: nn.Module, x: Tensor, output: Tensor
    ) -> None:
        """A line for a module with a rule of its own."""
        if id(x) in self.place:
            call = Call(None, (x,), {}, output, {id(x): self.place[id(x)]})
            step = Step(Rule(by_user), (x,), (base(x),), (rule, module))
            self._append(step, output, Noted(call, None, []))

    def displacement(self, output: Tensor) -> Displacement:
        """The displacement of ``output``, of the lines that it depends on."""
        if self._reason is not None:
            raise Uncovered(self._reason)
        for tensor in self._new:
            self._versions[id(tensor)] = tensor._version
        if id(output) in self.place and output._version != self._versions[id(output)]:
            raise Uncovered("the output was changed through another name")
        if id(output) not in self.place and storage(output) in self._storages:
            raise Uncovered("the output is a tensor of the layer's under another name")
        changed = {storage(x) for x, version in self._constant if x._version != version}
        held = [tensor for line in self.lines for tensor in line.step.tensors] if changed else []
        if not changed.isdisjoint(map(storage, held)):
            raise Uncovered(CHANGED)
        lines, result = self._put_together(self.place.get(id(output)))
        return Displacement(lines, result, output.detach(), self._count)

    def own_backward(self, output: Tensor, is_foreign: bool) -> str | None:
        """Why the way back is not that of the lines, if it is not.

        ``is_foreign``: whether the graph of ``output`` says so (``graph.autograd.below``).
        """
        inputs = self._tensors[: self._count]
        if is_foreign:
            # Had every forward been followed, no more than the parameters would have a graph besides.
            unseen = [t for t in self._strange if t.grad_fn is not None]
            unseen += [output] if id(output) not in self.place else []
            if reaches([tensor.grad_fn for tensor in unseen], inputs):
                raise Uncovered("what a forward of its own computes cannot be followed")
            return "it has a backward of its own"
        if self.is_hooked:
            return "a tensor has a backward hook"
        return None

    def _put_together(self, result: int | None) -> tuple[list[Line], int | None]:
        """The lines that ``result`` depends on, and its place among what these compute."""
        if result is None:
            return [], None
        start = self._count
        moved, valued = self._needed(result)
        decided = {p for p in moved | valued if p >= start and self._decides_by_values(p)}
        decided = decided if valued else set()
        lines: list[Line] = []
        # Where the displacement of a recorded tensor is found now, and where its value.
        place, value = {p: p for p in range(start)}, dict[int, int]()

        def append(*line: Any) -> int:
            lines.append(Line(*line))
            return start + len(lines) - 1

        for p in range(start):
            if p in valued:
                value[p] = append(MOVED_VALUE, (p,), (self._tensors[p].detach(),), (), False)
        for p, (step, inputs, noted) in enumerate(self.lines, start=start):
            output = self._output_of[p - start]
            if p not in moved and p not in valued:
                continue
            if p in decided:
                count, given = len(inputs), tuple([value[i] for i in inputs])
                constant, static = step.tensors[count:], step.static[:-2]
                value[p] = append(VALUE, given, constant[1:], static, False)
                if not is_float(output):
                    place[p] = value[p]
                elif p in moved:
                    given = (*[place[i] for i in inputs], *given)
                    static = (*static, kinds_of(step.inputs))
                    place[p] = append(JUMP, given, constant, static, output.requires_grad)
                continue
            if p in moved:
                given = tuple([place[i] for i in inputs])
                place[p] = append(step.rule, given, step.tensors, step.static, output.requires_grad)
            if p not in valued:
                continue
            if not is_float(output):
                value[p] = place[p]
            elif noted.is_repeatable:
                again = noted.again()
                if again is None:
                    raise Uncovered(CHANGED)
                given = tuple([value[i] for i in again.places])
                value[p] = append(VALUE, given, again.constant, again.static, False)
            else:
                before = self._as_it_was(p)
                value[p] = append(MOVED_VALUE, (place[p],), (before,), (), False)
        return lines, place[result]

    def _line(self, place: int) -> Recorded | None:
        """The line that computes what stands there; None for an input."""
        return self.lines[place - self._count] if place >= self._count else None

    def _as_it_was(self, place: int) -> Tensor:
        """What the line at this place computed."""
        k = place - self._count
        output = self._output_of[k]
        if output._version != self._version_of[k]:
            raise Uncovered(CHANGED)
        return output.detach()

    def _needed(self, result: int) -> tuple[set[int], set[int]]:
        """The recorded tensors whose displacements are needed, and those whose values are."""
        moved, valued, start = {result}, set[int](), self._count
        for p in range(start + len(self.lines) - 1, start - 1, -1):
            if p not in moved and p not in valued:
                continue
            _, inputs, noted = self.lines[p - start]
            is_floating = is_float(self._output_of[p - start])
            if self._decides_by_values(p):
                valued.update(inputs)
                moved.update(inputs if p in moved and is_floating else ())
                continue
            if p in valued:
                if is_floating and noted.is_repeatable:
                    valued.update(noted.call.place.values())
                else:
                    moved.add(p)
            if p in moved:
                moved.update(inputs)
        return moved, valued

    def _decides_by_values(self, place: int) -> bool:
        """Whether a line is a decision that round-off could take in another way than the layer does.

        It could not where chance alone makes equal what is compared: numbers from one source that are
        equal to none in particular, or to 0, which a displacement keeps.
        """
        step, inputs, noted = self.lines[place - self._count]
        output = self._output_of[place - self._count]
        if step.rule is not DIFFERENCE or not decides(noted.call.func, output):
            return False
        numbers = zip(inputs, step.inputs, strict=True)
        sources = {self._source(i) for i, tensor in numbers if is_float(tensor)}
        return len(sources) > 1 or not all(map(self._is_generic, sources))

    def _source(self, place: int) -> int:
        """The place of which this one is a view."""
        while (line := self._line(place)) is not None:
            func = line.noted.call.func
            is_copy = getattr(func, "is_view", False) or func in _COPIES
            if len(line.inputs) != 1 or not is_copy:
                break
            (place,) = line.inputs
        return place

    def _is_generic(self, place: int) -> bool:
        line = self._line(place)
        if line is not None and line.step.rule is RELU:
            (place,) = line.inputs
        waiting = [place]
        for place in waiting:
            if (line := self._line(place)) is not None:
                if line.step.rule not in GENERIC:
                    return False
                waiting += line.inputs
        return True


def _is_hooked(tensor: Tensor) -> bool:
    """Whether a hook may change the tensor's gradient, or has to see it.

    Not those of ``register_multi_grad_hook``, by which trackers of modules learn where a pass is.
    """
    hooks = tensor._backward_hooks
    if not hooks:
        return False
    codes = [getattr(hook, "__code__", None) for hook in hooks.values()]
    return any([code is None or code.co_filename != _OF_TRACKERS for code in codes])


_OF_TRACKERS = torch.autograd.graph.__file__


class Exits(TorchFunctionMode):
    """Tells what watches of the tensors whose numbers are read without an operation."""

    def __init__(self, recorder: Watch) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _EXITS:
            self._recorder.is_read(args[0])
        return func(*args, **(kwargs or {}))


_EXITS = {Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__, Tensor.data_ptr}


class Recorded(NamedTuple):
    """One operation while it is recorded: its inputs are places among all recorded tensors."""

    step: Step
    inputs: tuple[int, ...]
    noted: Noted
    """How to compute the value again."""


def _check_shape(call: Call) -> None:
    """Raises Uncovered where another input makes an output of another shape."""
    if not kind_of(call.func).has_dynamic_shape:
        return
    masks = [torch.bool, torch.uint8]
    if call.func is not aten.index.Tensor or any(
        [i.dtype in masks and call.moves(i) for i in tensors_in(call.args[1])]
    ):
        raise Uncovered(f"the shape of what {call.func} returns depends on the input")


_COPIES = operations("clone alias lift_fresh")
# Linear in their input, as views are, with several outputs.
_SPLITS = operations("split.* split_with_sizes.* unbind.* chunk.* unsafe_split.* unsafe_chunk.*")


class Kind(NamedTuple):
    """What is to be known of an operation, whatever it is given."""

    may_draw: bool
    """Whether it draws random numbers; only PyTorch's own say so."""
    written: tuple[int, ...]
    """The places of the arguments that it writes into."""
    writes: bool
    """Whether it writes into an argument that is part of what it returns."""
    is_of_shape_alone: bool
    """Whether what it returns depends on shapes, and not on values."""
    has_dynamic_shape: bool
    """Whether the shape of what it returns depends on values."""


@functools.cache
def kind_of(func: Any) -> Kind:
    """What is to be known of an operation. (To look for one by itself takes as long as for all.)"""
    schema, tags = getattr(func, "_schema", None), getattr(func, "tags", ())
    is_known = isinstance(func, torch._ops.OpOverload) and func.namespace in ("aten", "prim")
    written = [
        k
        for k, argument in enumerate(getattr(schema, "arguments", ()))
        if (argument.alias_info is not None and argument.alias_info.is_write)
        or (func in _STATISTICS and argument.name in ("running_mean", "running_var"))
    ]
    return Kind(
        not is_known or torch.Tag.nondeterministic_seeded in tags,
        tuple(written),
        schema is not None and schema.is_mutable and func not in WRITES_ASIDE,
        func in _OF_SHAPE_ALONE,
        torch.Tag.dynamic_output_shape in tags,
    )


@functools.cache
def _functional(func: Any) -> Any:
    """``aten.relu`` for ``aten.relu_``: the same without writing; None where there is none."""
    namespace, name = func._schema.name.split("::")
    if not name.endswith("_") or name.endswith("__"):
        return None
    packet = getattr(getattr(torch.ops, namespace), name[:-1], None)
    return getattr(packet, func._overloadname, None)


def _tensors_in(args: Any, kwargs: Any) -> list[Tensor]:
    found = []
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += [entry for entry in value if isinstance(entry, Tensor)]
    return found


class _Uncompiled:
    """Runs the body without what its user has compiled, which could not be recorded.

    (Nor would PyTorch compile it later, once it has met it inside a recorder.) The setting is the
    whole process's: threads that overlap share it, and the last one puts it back.
    """

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._stance: Any = None

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._stance = torch.compiler.set_stance("force_eager")
                self._stance.__enter__()
            self._inside += 1

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._stance.__exit__(*exception)


uncompiled = _Uncompiled()


# Modules with a rule of their user's.

_local = threading.local()


def displacement_rule(
    kind: type[nn.Module],
) -> Callable[[Callable[[Any, Tensor, Tensor], Tensor]], Callable[[Any, Tensor, Tensor], Tensor]]:
    r"""Give a module of your own a displacement rule, for Strict to use.

    ``rule(module, a, d)`` returns ``module(a + d) - module(a)``, computed so that it is right also
    where d is far smaller than a, by operations that autograd can differentiate with respect to d:
    its derivative is the Jacobian at ``a + d``. Without a rule the operations that the module is
    made of are used; a rule helps where they subtract nearly equal numbers.

    Args:
        kind: the class; instances of it that take one tensor and return one are handed to the rule,
            wherever in a model they are. Subclasses that override ``forward`` are not.

    Raises:
        TypeError: ``kind`` is no subclass of ``nn.Module`` with a ``forward`` of its own.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch2pc import displacement_rule
        >>> class Versine(nn.Module):
        ...     def forward(self, x):
        ...         return 1 - torch.cos(x)
        >>> @displacement_rule(Versine)
        ... def versine(module, a, d):
        ...     return 2 * torch.sin(a + d / 2) * torch.sin(d / 2)
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module) and "forward" in vars(kind)):
        raise TypeError(
            f"kind must be a subclass of nn.Module with a forward of its own, got {kind!r}"
        )

    def enter(rule: Callable[[Any, Tensor, Tensor], Tensor]) -> Any:
        plain = vars(kind)["forward"]

        @functools.wraps(plain)
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            recorder = getattr(_local, "recorder", None)
            if recorder is None or len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
                return plain(self, *args, **kwargs)
            with recorder.suspended():
                output = plain(self, args[0])
            recorder.note_module(rule, self, args[0], output)
            return output

        forward.displacement_rule = rule  # type: ignore[attr-defined]
        kind.forward = forward
        return rule

    return enter


def by_user(d: Tensor, a: Tensor, rule: Callable[..., Tensor], module: nn.Module) -> Tensor:
    return rule(module, a, d)
