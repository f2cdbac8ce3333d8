"""A module as a fixed function for the duration of one call.

A ``Layer`` runs one item of a model, its loss or a prior, keeps it from writing into its input, and can
be run again as the function that it was the first time, with the same random numbers and the same
buffers. How layers make a network is in ``network.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torch2pc.displacement.check import agrees, is_new
from torch2pc.displacement.closed import Gradient, LossWatch
from torch2pc.displacement.lines import Displacement, OwnBackward, Reevaluation
from torch2pc.displacement.recorder import Recorder, Uncovered, Watch
from torch2pc.displacement.rules.core import storage, tensors_in
from torch2pc.displacement.vjp import kept_tensor, nodes_below
from torch2pc.graph.apart import Habits, UnguardedError, apart, copied, unchanged
from torch2pc.graph.autograd import (
    below,
    ends_flat,
    in_belief_dtype,
    leaves_of,
    next_node,
    outside_autocast,
)
from torch2pc.graph.state import (
    Buffers,
    RandomState,
    Source,
    drawn_from,
    generators_in,
    generators_kept,
    modules_in,
    random_state,
    set_random_state,
)
from torch2pc.graph.warn import warn_caller


class Layer:
    """One item of the model, or the loss, as a function whose side effects happen once.

    ``layer(x)`` evaluates it, with the side effects of the module, and ``record(x)`` does so noting
    what they were. After that ``replay(x)`` evaluates the same function at another input: random
    numbers are drawn from the same state, and buffers are read as they were and left as they are.
    (The generators are put back once, after the last replay, by ``Network.replaying``.)
    """

    # What ``record`` finds. The generators that it drew from, as they were before.
    drawn: RandomState = []  # noqa: RUF012 (replaced, never changed)
    _buffers: Buffers | None = None
    has_leaves = True
    ends_flat = False
    displacement: Displacement | OwnBackward | Reevaluation
    # Whether there are rules for the displacement to be made of, where they can be.
    is_precise = True
    # Why the displacement is a difference.
    uncovered: str | None = None
    # Why its way back is not that of the recorded operations, although the displacement is theirs.
    own_backward: str | None = None
    # Whether J^T 0 is 0: not where a backward or a hook may add what it likes.
    is_linear = True
    # Whether it is kept from memory that others need (``apart.py``), and whether its way back is.
    is_apart = False
    _walls = False
    # The memory of the output that it recorded, which no replay may write into.
    _recorded: int | None = None
    # Of a loss: its gradient, where that has a closed form.
    gradient: Gradient | None = None

    def __init__(
        self,
        function: Callable[..., Any],
        where: str,
        devices: set[torch.device],
        copies_input: bool = False,
        *,
        others: tuple[Any, ...] = (),
        habits: Habits | None = None,
    ) -> None:
        self.function, self._where, self._devices = function, where, devices
        self._others, self._habits = others, Habits() if habits is None else habits
        self._key = where, getattr(function, "training", None)
        # What is no item is given copies until it is seen, in each call, that it needs none.
        self._is_item = where.startswith("model")
        self.copies_input = copies_input or not self._is_item
        if where in self._habits.apart:
            self.is_apart = self._walls = self.copies_input = True
        self._is_new = not self.copies_input and self._key not in self._habits.looked_at
        # What the forward pass adds to autograd's graph is numbered from here on.
        self._begun = next_node()

    @property
    def name(self) -> str:
        """What errors call it."""
        return f"{self._where} ({type_name(self.function)})"

    def __call__(self, *x: Any) -> Tensor:
        before = copied(x) if self._is_new else None
        output = self._evaluated(self._given(x), x)
        if before is not None:
            self._compare(x, before)
        return self._handed_out(output)

    def _compare(self, x: Sequence[Any], before: Sequence[Any]) -> None:
        """See if the first evaluation of an item wrote into its input, as nothing else may tell."""
        self._is_new = False
        self._habits.looked_at.add(self._key)
        if not unchanged(x, before):
            self._habits.apart.add(self._where)

    def _given(self, x: Sequence[Any]) -> Sequence[Any]:
        """What the function is given in the place of ``x``."""
        if self.copies_input:
            return [copied(a) for a in x]
        return no_leaves([*x]) if any(GLOBAL_HOOKS) else x

    def _handed_out(self, output: Tensor) -> Tensor:
        return apart(output) if self._walls else output

    def _evaluated(self, given: Sequence[Any], x: Sequence[Any]) -> Tensor:
        """What the function returns for ``given``, which stands for ``x``."""
        versions = None
        if not self.copies_input:
            versions = [a._version for a in x if isinstance(a, Tensor)]
        try:
            output = self.function(*given, *self._others)
        except RuntimeError as error:
            # The error that autograd raises for a write into a leaf does not say whose it is.
            if versions is not None and "leaf Variable that requires grad" in str(error):
                raise self._wrote_input() from error
            if "not have been used in the graph" in str(error):
                raise cut_off_from_X(self.name) from error
            raise
        if versions is not None and versions != [a._version for a in x if isinstance(a, Tensor)]:
            raise self._wrote_input()
        if not isinstance(output, Tensor) or not output.dtype.is_floating_point:
            is_complex = isinstance(output, Tensor) and output.is_complex()
            advice = "; beliefs are real: return torch.view_as_real of it" if is_complex else ""
            raise TypeError(
                f"{self.name} must return one floating-point tensor, got "
                f"{output.dtype if isinstance(output, Tensor) else type(output).__name__}{advice}"
            )
        is_fresh = not output.is_leaf and not output._is_view()
        return output if is_fresh else own_output(output, given)

    @property
    def is_unguarded(self) -> bool:
        """Whether it was found to need memory of its own, and is given others'."""
        return not self.is_apart and self._where in self._habits.apart

    def _wrote_input(self) -> RuntimeError:
        return RuntimeError(
            f"{self.name} wrote into its input in place, which destroys the belief stored there; "
            "clone the input first, or give the module an attribute inplace=True to be handed a copy"
        )

    def record(self, *x: Any, moving: Sequence[Tensor] = ()) -> Tensor:
        """The first evaluation, noting what it draws and changes, so that it can be replayed.

        ``moving``: those of its inputs that will move; then it becomes a ``displacement`` of these.
        """
        modules = modules_in(self.function)
        random = random_state([*self._devices, *generators_in(self.function, modules)])
        buffers = Buffers(modules)
        compared, before = copied(x) if self._is_new else None, next_node()
        given = self._given(x)
        places = [next(k for k, a in enumerate(x) if a is b) for b in moving]
        recorder = self._watch([given[k] for k in places])
        with recorder:
            output = self._evaluated(given, x)
        if compared is not None:
            self._compare(x, compared)
        graph = below(output, tensors_in(list(x)))
        kept = [node for node in graph.nodes if self._begun <= node._sequence_nr() < before]
        # Of parameters alone it is no function of beliefs.
        if kept and any(
            [not isinstance(x, nn.Parameter) for x in leaves_of(nodes_below(*kept), [])]
        ):
            raise kept_tensor(self.name)
        self._keep_apart(bool(graph.foreign), given, recorder.written)
        if self.is_unguarded:
            return output  # the call begins anew
        self.drawn = drawn_from(random) if recorder.draws else []
        # Code that is not PyTorch's writes without a trace, the same values perhaps.
        writes = bool(graph.foreign) or self._key in self._habits.write_buffers
        if buffers and (writes or buffers.differ(recorder.written)):
            self._buffers = buffers
            self._habits.write_buffers.add(self._key)
        self.has_leaves = bool(graph.leaves)
        self.ends_flat = ends_flat(output)
        hooked = [module._backward_hooks or module._backward_pre_hooks for module in modules]
        if any(hooked) or any(GLOBAL_HOOKS[2:]):
            self.own_backward = "a module has a backward hook"
        # Hooks are at work on the way back alone.
        self._walls = self.is_apart or self.own_backward is not None or recorder.is_hooked
        # Now, as the next evaluation may write where this output is.
        handed_out = self._handed_out(output)
        self._recorded = storage(handed_out) if self._is_item else None
        if isinstance(recorder, LossWatch):
            self.gradient = None if self._walls else recorder.gradient(output, graph.nodes)
        elif places:
            self.is_linear = not graph.is_foreign and self.own_backward is None
            values = handed_out.detach()
            self._displace(recorder, x, places, output, values, graph.is_foreign)
        return handed_out

    def _watch(self, moving: Sequence[Tensor]) -> Watch:
        """What notes what the first evaluation does with the inputs that move."""
        if not moving:
            return Watch()
        if not self._is_item:
            return LossWatch(*moving)
        sees_exits = is_new(self.function)
        return Recorder(*moving, sees_exits=sees_exits) if self.is_precise else Watch()

    def _keep_apart(self, is_foreign: bool, given: Sequence[Any], written: set[int]) -> None:
        """What follows from the code that it ran, and from what it wrote into."""
        wrote = not written.isdisjoint([storage(a) for a in tensors_in(list(given))])
        if not self._is_item:
            self.is_apart, self.copies_input = is_foreign, is_foreign or wrote
        elif is_foreign or (wrote and not self.copies_input):
            self._habits.apart.add(self._where)

    def _displace(
        self,
        recorder: Watch,
        x: Sequence[Any],
        places: Sequence[int],
        output: Tensor,
        before: Tensor,
        is_foreign: bool,
    ) -> None:
        """Set ``displacement``: by rules if it can be, and is found to be right.

        ``before`` are the values of ``output``, which only the recorder knows.
        """
        in_autocast = torch.is_autocast_enabled(output.device.type)
        moving, aside = [x[k] for k in places], partial(self._aside, output.device)

        def at(*moved: Tensor) -> Tensor:
            given = list(x)
            for k, a in zip(places, moved, strict=True):
                given[k] = a
            return self.replay(*given)

        def reevaluation() -> Reevaluation:
            a = [b.detach() for b in moving]
            if not in_autocast:
                return Reevaluation(at, a, before, self.buffers_kept)
            # A difference of half-precision outputs would have no digits left.
            return Reevaluation(at, [in_belief_dtype(b) for b in a], None, self.buffers_kept)

        with torch.no_grad():
            if not isinstance(recorder, Recorder):
                self.displacement = reevaluation()
                self.is_replayable(before, *x)
                return
            try:
                recorded = self.displacement = recorder.displacement(output)
                found = recorder.own_backward(output, is_foreign)
                self.own_backward = self.own_backward or found
                self.is_linear = self.own_backward is None
                is_own = self.own_backward is not None
                is_right = agrees(self.function, recorded, reevaluation, moving, is_own, aside)
                if is_own:
                    self.displacement = OwnBackward(recorded, reevaluation())
                # What was recorded once stays right for a layer that is another one each time.
                if (not is_right or is_own) and self.is_replayable(before, *x) and not is_right:
                    raise Uncovered("its operations alone do not give its outputs and gradients")
            except Uncovered as reason:
                self.uncovered, self.own_backward = str(reason), None
                self.displacement = reevaluation()
                self.is_replayable(before, *x)

    @contextmanager
    def _aside(self, device: torch.device) -> Iterator[None]:
        with outside_autocast(device), generators_kept(self.drawn_sources):
            yield

    def forget(self) -> None:
        """Let go of the displacement and of all that it holds."""
        self.__dict__.pop("displacement", None)

    def is_replayable(self, output: Tensor, *x: Any) -> bool:
        """Whether a replay at the same input gives the same output; the first time, it says if not.

        It does not where a layer depends on what is no buffer and no generator that can be found.
        """
        known, key = self._habits.replayable, (self.name, self._key[1])
        if output.numel() == 0:
            return True
        if key not in known:
            with torch.enable_grad(), generators_kept(self.drawn_sources):
                again = self.replay(*x).detach()
            distance, scale = (again - output).norm(), output.norm()
            near = bool(distance <= 16 * torch.finfo(output.dtype).eps * scale)
            known[key] = near or not bool(scale.isfinite())
            if not known[key]:
                warn_caller(
                    f"{self.name} gives another output when it is evaluated again at the same "
                    "input, so that beliefs are relaxed about a function that changes: keep its "
                    "state in buffers, and draw random numbers from PyTorch's generators, or from "
                    "a torch.Generator that is an attribute of the module"
                )
        return known[key]

    @property
    def drawn_sources(self) -> list[Source]:
        """The generators that the recorded evaluation drew from."""
        return [source for source, _ in self.drawn]

    @property
    def is_pure(self) -> bool:
        """Whether the recorded evaluation drew no random numbers and changed no buffers."""
        return not self.drawn and self._buffers is None

    def replay(self, *x: Any) -> Tensor:
        """The recorded function, evaluated at other inputs."""
        set_random_state(self.drawn)
        with self.buffers_kept():
            output = self(*x)
        where = storage(output)
        if where == self._recorded and where not in map(storage, tensors_in(list(x))):
            self._habits.apart.add(self._where)
            raise UnguardedError([self.name])
        return output

    def buffers_kept(self) -> AbstractContextManager[None]:
        """The body finds the buffers that the recorded evaluation changed as that one did."""
        return nullcontext() if self._buffers is None else self._buffers.swapped_in()


HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
GLOBAL_HOOKS = [getattr(nn.modules.module, f"_global{name}") for name in HOOKS]


def cut_off_from_X(name: str) -> RuntimeError:
    return RuntimeError(
        f"{name} must not differentiate with respect to X, or to anything else that it does not "
        "compute from what it is given: layers and loss run on copies, so that there is no dependence "
        "to be found (allow_unused=True would take the derivative for 0). A loss of derivatives, as "
        "physics-informed networks have, is no function of the output alone, whose error predictive "
        "coding hands down: train it with loss.backward(), or make the network and its derivatives "
        "(torch.func.jvp, jacrev) one item that returns both, so that LossFun is given them"
    )


def no_leaves(x: Any) -> Any:
    """``x`` as views. A tracker of modules hooks their inputs, which autograd refuses for leaves."""
    if isinstance(x, Tensor):
        return x.view_as(x) if x.requires_grad and x.is_leaf else x
    return [no_leaves(entry) for entry in x] if isinstance(x, list) else x


def own_output(output: Tensor, given: Sequence[Any]) -> Tensor:
    """A copy of ``output`` where it is a parameter or a buffer, or a view of one.

    The optimizer would change it later. A view of an input is fine: that is ours.
    """
    base = output._base if output._base is not None else output
    of_input = any([isinstance(x, Tensor) and (base is x or base is x._base) for x in given])
    return output.clone() if base.is_leaf and not of_input else output


def type_name(value: object) -> str:
    return getattr(value, "__name__", None) or type(value).__name__
