"""A module as a fixed function for the duration of one call: predict, replay, backpropagate.

A ``Layer`` runs one item of the model, keeps it from writing into its input, and can be run again
as the function that it was the first time, with the same random numbers and the same buffers. A
``Network`` is the layers of a model and its loss. Which errors are propagated, and how they are
turned into beliefs, is up to the algorithms (``exact.py``, ``strict.py``, ...).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from torch2pc.apart import Habits, UnguardedError, apart, copied, habits_of, same, storage
from torch2pc.checks import warn_caller
from torch2pc.displacement import (
    Displacement,
    Recorder,
    Reevaluation,
    Uncovered,
    Watch,
    agrees,
    uncompiled,
)
from torch2pc.graph import (
    Graph,
    check_loss,
    ends_flat,
    in_belief_dtype,
    leaves_and_foreign,
    output_gradient,
    outside_autocast,
)
from torch2pc.state import (
    Buffers,
    RandomState,
    Source,
    devices_of,
    drawn_from,
    generators_in,
    generators_kept,
    modules_in,
    random_state,
    set_random_state,
)


class Inference(NamedTuple):
    """What an algorithm finds: PCInfer's results, and each parameter's update."""

    vhat: list[Tensor]
    Loss: Tensor
    dLdy: Tensor
    v: list[Tensor]
    epsilon: list[Tensor | None]
    updates: list[tuple[Tensor, Tensor]]
    distance: Tensor | None = None
    evaluations: int | None = None


# For each model, which of its layers, training or not, were found to be the same function again in a
# replay.
_replayable: WeakKeyDictionary[nn.Module, dict[tuple[str, Any], bool]] = WeakKeyDictionary()


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
    displacement: Displacement | Reevaluation
    # Whether it is kept from memory that others need (``apart.py``).
    is_apart = False
    # The memory of the output that it recorded, which no replay may write into.
    _recorded: int | None = None
    # Why the displacement is no ``Displacement``.
    uncovered: str | None = None

    def __init__(
        self,
        function: Callable[..., Any],
        where: Any,
        devices: set[torch.device],
        copies_input: bool = False,
        *,
        model: nn.Module | None = None,
        habits: Habits | None = None,
    ) -> None:
        self.function, self._where, self._devices = function, where, devices
        # The loss and a prior are given copies until it is seen, in each call, that they need none.
        self.copies_input = copies_input or not isinstance(where, int)
        self._model = model
        self._habits = Habits() if habits is None else habits
        self.is_apart = where in self._habits.apart
        # Whether it is still to be seen if the item has to be kept apart.
        self._key = where, getattr(function, "training", None)
        is_known = self.is_apart or self._key in self._habits.looked_at
        self._is_new = isinstance(where, int) and not is_known

    @property
    def name(self) -> str:
        """What errors call it."""
        where = f"model[{self._where}]" if isinstance(self._where, int) else self._where
        return f"{where} ({_type_name(self.function)})"

    def __call__(self, x: Any, *others: Any) -> Tensor:
        if not self._is_new:
            if self.is_apart or self.copies_input:
                return self._evaluated(x, *others)
            return self._run(x, x, *others)

        def evaluated() -> Tensor:
            output = self._evaluated(x, *others)
            self._keep_apart(leaves_and_foreign(output, [x])[1])
            return output

        return self._looked_at(evaluated, x)

    def _evaluated(self, x: Any, *others: Any) -> Tensor:
        return self._handed_out(self._run(self._given(x), x, *others))

    def _given(self, x: Any) -> Any:
        if self.is_apart:
            return apart(x)
        return copied(x) if self.copies_input else x

    def _handed_out(self, output: Tensor) -> Tensor:
        handed_out: Tensor = apart(output) if self.is_apart else output
        return handed_out

    def _run(self, given: Any, x: Any, *others: Any) -> Tensor:
        """What the function returns for ``given``, which is ``x`` or a copy of it."""
        version = x._version if given is x and isinstance(x, Tensor) else None
        try:
            output = self.function(given, *others)
        except RuntimeError as error:
            # The error that autograd raises for a write into a leaf does not say whose it is.
            if given is x and "leaf Variable that requires grad" in str(error):
                raise self._wrote_input() from error
            raise
        if version is not None and x._version != version:
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

    def _keep_apart(self, needed: bool) -> None:
        """What follows from what an evaluation ran, or wrote into.

        An item that was not kept apart has to be evaluated again; others were given copies.
        """
        if not needed or self.is_apart:
            return
        if isinstance(self._where, int):
            raise self.unguarded()
        self.is_apart = True

    def _wrote(self, given: Any, x: Any, written: set[int]) -> bool:
        """Whether the evaluation wrote into what it was given, though no version may say so."""
        if isinstance(given, list):
            return any([self._wrote(*pair, written) for pair in zip(given, x, strict=True)])
        return storage(given) in written and (given is x or not isinstance(self._where, int))

    def unguarded(self) -> UnguardedError:
        """The item has to be kept apart, from the next call on."""
        self._habits.apart.add(self._where)
        return UnguardedError(self.name)

    def _looked_at(self, evaluated: Callable[[], Tensor], x: Any) -> Tensor:
        """What ``evaluated`` returns the first time; once more if the item has to be kept apart."""
        modules = modules_in(self.function)
        random = random_state([*self._devices, *generators_in(self.function, modules)])
        buffers, before = Buffers(modules), x.detach().clone()
        try:
            output = evaluated()
            if not same(x.detach(), before):
                raise self.unguarded()
        except UnguardedError as error:
            set_random_state(drawn_from(random))
            buffers.restore(error)
            if not same(x.detach(), before):
                x.data.copy_(before)
            self.is_apart, self._recorded = True, None
            output = evaluated()
        self._habits.looked_at.add(self._key)
        self._is_new = False
        return output

    def _wrote_input(self) -> RuntimeError:
        return RuntimeError(
            f"{self.name} wrote into its input in place, which destroys the belief stored there; "
            "clone the input first, or give the module an attribute inplace=True to be handed a copy"
        )

    def record(self, x: Any, *others: Any, displaced: bool = False) -> Tensor:
        """The first evaluation, noting what it draws and changes, so that it can be replayed.

        ``displaced``: it becomes a ``displacement`` too.
        """
        if not self._is_new:
            return self._record(displaced, x, *others)
        return self._looked_at(lambda: self._record(displaced, x, *others), x)

    def _record(self, displaced: bool, x: Any, *others: Any) -> Tensor:
        modules = modules_in(self.function)
        random = random_state([*self._devices, *generators_in(self.function, modules)])
        buffers = Buffers(modules)
        given = self._given(x)
        recorder = Recorder(given) if displaced else Watch()
        with uncompiled, recorder:
            output = self._run(given, x, *others)
        inputs = [x] if isinstance(x, Tensor) else x
        leaves, is_foreign = leaves_and_foreign(output, inputs)
        self._keep_apart(is_foreign or self._wrote(given, x, recorder.written))
        if not isinstance(self._where, int):
            self.copies_input = self.is_apart
        self.drawn = drawn_from(random) if recorder.draws else []
        # Code that is not PyTorch's writes without a trace, the same values perhaps.
        writes = is_foreign or self._key in self._habits.write_buffers
        if buffers and (writes or buffers.differ(recorder.written)):
            self._buffers = buffers
            self._habits.write_buffers.add(self._key)
        self.has_leaves, self.ends_flat = bool(leaves), ends_flat(output)
        if isinstance(self._where, int) and not self.is_apart:
            self._recorded = storage(output)
        has_hooks = any([m._backward_hooks or m._backward_pre_hooks for m in modules])
        # Hooks may write into the gradients that they are given, in this call.
        self.is_apart = self.is_apart or has_hooks or recorder.is_hooked
        # Now, as the next evaluation may write where this output is.
        handed_out = self._handed_out(output)
        if isinstance(recorder, Recorder):
            if has_hooks:
                recorder.give_up("a module has a backward hook")
            self._displace(recorder, x, output, handed_out.detach())
        return handed_out

    def _displace(self, recorder: Recorder, x: Tensor, output: Tensor, before: Tensor) -> None:
        """Set ``displacement``: by rules if it can be, and is found to be right.

        ``before`` are the values of ``output``, which only the recorder knows.
        """
        in_autocast = torch.is_autocast_enabled(x.device.type)
        a = x.detach()

        def reevaluation() -> Reevaluation:
            if not in_autocast:
                return Reevaluation(self.replay, a, before, self.buffers_kept)
            # A difference of half-precision outputs would have no digits left.
            precise = _leaf(in_belief_dtype(a))
            return Reevaluation(
                self.replay, precise.detach(), self.replay(precise).detach(), self.buffers_kept
            )

        with torch.no_grad():
            try:
                self.displacement = recorder.displacement(output)
                with outside_autocast(x.device), generators_kept(self.drawn_sources):
                    is_right = agrees(self.function, self.displacement, reevaluation, x)
                # What was recorded once stays right for a layer that is another one each time.
                if not is_right and self.is_replayable(before, _leaf(a)):
                    raise Uncovered("its operations alone do not give its outputs and gradients")
            except Uncovered as reason:
                self.uncovered = str(reason)
                with outside_autocast(x.device), generators_kept(self.drawn_sources):
                    self.displacement = reevaluation()
                self.is_replayable(before, _leaf(a))

    def is_replayable(self, output: Tensor, x: Any, *others: Any) -> bool:
        """Whether a replay at the same input gives the same output; the first time, it says if not.

        It does not where a layer depends on what is no buffer and no generator that can be found.
        """
        known = {} if self._model is None else _replayable.setdefault(self._model, {})
        key = self.name, getattr(self.function, "training", None)
        if key not in known:
            with torch.enable_grad(), generators_kept(self.drawn_sources):
                again = self.replay(x, *others).detach()
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

    def replay(self, x: Any, *others: Any) -> Tensor:
        """The recorded function, evaluated at another input."""
        set_random_state(self.drawn)
        with self.buffers_kept():
            output = self._evaluated(x, *others)
        if self._recorded is not None and storage(output) == self._recorded != storage(x):
            raise self.unguarded()
        return output

    def buffers_kept(self) -> AbstractContextManager[None]:
        """The body finds the buffers that the recorded evaluation changed as that one did."""
        return nullcontext() if self._buffers is None else self._buffers.swapped_in()


class Network:
    """The layers of a model, its loss, and the data: all that the algorithms work on."""

    def __init__(
        self,
        model: nn.Sequential,
        LossFun: Callable[[Tensor, Any], Tensor],
        X: Tensor,
        Y: Any,
        modules: list[nn.Module] | None = None,
    ) -> None:
        modules = modules_in(model, LossFun) if modules is None else modules
        devices = devices_of(modules, X)
        self.model, self.X, self.Y, self.devices = model, X, Y, devices
        self.modules = modules
        writes, self.habits = _any_in_place(modules), habits_of(model)
        more: Any = dict(model=model, habits=self.habits)
        self.layers = [
            Layer(item, l, devices, writes and _may_write_input(item), **more)
            for l, item in enumerate(model._modules.values())
        ]
        self.loss = Layer(LossFun, "LossFun", devices, model=model)
        # All that can be replayed; a prior is added to it.
        self.functions = [*self.layers, self.loss]
        self.first: tuple[Tensor, Tensor] | None = None
        # Told of each parameter's update as soon as it is there, and once more if it changes.
        self.arrived: Callable[[Tensor, Tensor], None] | None = None
        self._stand_in: nn.Module | None = None

    def feed_forward(self, from_X: bool = False) -> Graph:
        """One forward pass, with its autograd graph; ``from_X``: which goes on into what made X."""
        # A copy in either case: whatever a layer does to it, the user's X stays as it is.
        vhat = [self.X.clone() if from_X else _input_copy(self.X)]

        def walk(x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
                if not x.requires_grad:
                    # No parameters so far, or frozen ones, on an input that needs no gradient.
                    x = x.detach().requires_grad_()
                vhat.append(x)
            return x

        vhat[-1] = self._through_hooks_of_model(walk, vhat[0])
        Loss = check_loss(self.loss(vhat[-1], self.Y))
        graph = Graph(vhat, Loss, self.habits)
        for l in graph.foreign:
            if l <= len(self.layers) and not self.layers[l - 1].is_apart:
                raise self.layers[l - 1].unguarded()
        return graph

    def record(self, free_input: bool) -> tuple[list[Tensor], Tensor, Tensor]:
        """One forward pass without a graph across layers; returns vhat, Loss and dLdy, detached.

        After it each layer, and the loss, can be replayed, and each layer whose input moves has a
        displacement. Layer 1's does not move unless ``free_input``: its evaluation is the only one
        that it needs, so that its input and output stay in ``first``, with the graph between them,
        if anything needs its gradient.
        """
        vhat = [_input_copy(self.X)]

        def walk(x: Tensor) -> Tensor:
            vhat[0] = x.detach()  # a pre-hook of the model may have changed it
            for layer in self.layers:
                x = _leaf(x)
                # With gradients on, as in every replay: under no_grad some modules take another
                # path, and autocast would cache weights that are cut off from the graph.
                moves = free_input or len(vhat) > 1
                output = layer.record(x, displaced=moves)
                if not moves and (layer.has_leaves or self.X.requires_grad):
                    self.first = x, output
                x = output.detach()
                vhat.append(x)
                del output  # and its graph, before the next layer makes its own
            return x

        output = self._through_hooks_of_model(walk, vhat[0])
        if output.data_ptr() != vhat[-1].data_ptr():
            raise ValueError(
                "model must have no forward hook that replaces its output where its beliefs are "
                "relaxed, which evaluates the items one by one; register the hook on the last item"
            )
        prediction = vhat[-1].detach().requires_grad_()
        Loss = check_loss(self.loss.record(prediction, self.Y))
        self.loss.is_replayable(Loss.detach(), prediction.detach().requires_grad_(), self.Y)
        # The loss may write its next gradient where this one is.
        return vhat, Loss.detach().clone(), output_gradient(Loss, prediction).clone()

    def _through_hooks_of_model(self, walk: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """``walk(x)`` in the place of the model's forward, between the hooks of the container."""
        model = self.model
        tables = [getattr(model, name) for name in HOOKS]
        if not any(tables) and not any(GLOBAL_HOOKS):
            return walk(x)
        # What runs is a shallow copy, as another thread may call the model meanwhile. Its own hooks
        # are told that it is the model. It lives on, as backward hooks refer to it.
        self._stand_in = object.__new__(type(model))
        self._stand_in.__dict__.update(model.__dict__, forward=walk)
        for name, table in zip(HOOKS, tables, strict=True):
            told = {i: partial(_of_module, hook, model) for i, hook in table.items()}
            self._stand_in.__dict__[name] = OrderedDict(told)
        output = self._stand_in._call_impl(x)  # type: ignore[no-untyped-call]
        if not isinstance(output, Tensor):
            raise TypeError(f"model must return a tensor, but a hook made it {_type_name(output)}")
        return output

    def replaying(self) -> AbstractContextManager[None]:
        """Leaves the generators as they are before the body, whatever the body replays.

        No others than those that a layer drew from: another thread may be drawing from the rest.
        """
        return generators_kept({s for function in self.functions for s in function.drawn_sources})


HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
GLOBAL_HOOKS = [getattr(nn.modules.module, f"_global{name}") for name in HOOKS]


def _of_module(hook: Callable[..., Any], module: nn.Module, _: Any, *arguments: Any) -> Any:
    return hook(module, *arguments)


def _leaf(x: Tensor) -> Tensor:
    """The same values as layers are given them."""
    return x.detach().requires_grad_(x.is_floating_point())


def detached(X: Tensor) -> Tensor:
    """X itself where it can be returned as it is."""
    return X.detach() if X.requires_grad else X


def _input_copy(X: Tensor) -> Tensor:
    copy = X.detach().clone()
    return copy.requires_grad_() if X.requires_grad else copy


def own_output(output: Tensor, given: Any) -> Tensor:
    """A copy of ``output`` where it is a parameter or a buffer, or a view of one.

    The optimizer would change it later. A view of the input is fine: that is ours.
    """
    base = output._base if output._base is not None else output
    of_input = isinstance(given, Tensor) and (base is given or base is given._base)
    return output.clone() if base.is_leaf and not of_input else output


def _may_write_input(function: object) -> bool:
    """Whether a module says that it works in place, and may do so on its own input."""
    if type(function) is nn.Sequential:
        for child in function._modules.values():
            if _may_write_input(child):
                return True
            if not _may_return_input(child):
                return False
        return False
    return _any_in_place(modules_in(function))


def _any_in_place(modules: list[nn.Module]) -> bool:
    # Not getattr of the module: one without the attribute would take a slow way to say so.
    return any([module.__dict__.get("inplace") for module in modules]) or any(
        [getattr(kind, "inplace", False) for kind in set(map(type, modules))]
    )


def _may_return_input(module: object) -> bool:
    if type(module) is nn.Sequential:
        return all(_may_return_input(child) for child in module)
    return isinstance(module, _VIEWS)


_VIEWS = (nn.Identity, nn.Flatten, nn.Unflatten, nn.modules.dropout._DropoutNd)


def _type_name(value: object) -> str:
    return getattr(value, "__name__", None) or type(value).__name__
