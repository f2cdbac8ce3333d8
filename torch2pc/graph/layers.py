"""A module as a fixed function for the duration of one call: predict, replay, backpropagate.

A ``Layer`` runs one item of the model, keeps it from writing into its input, and can be run again
as the function that it was the first time, with the same random numbers and the same buffers. A
``Network`` is the layers of a model and its loss. Which errors are propagated, and how they are
turned into beliefs, is up to the algorithms (``exact.py``, ``strict.py``, ...).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from torch2pc.displacement.recorder import (
    Displacement,
    OwnBackward,
    Recorder,
    Reevaluation,
    Uncovered,
    Watch,
    agrees,
    is_new,
    uncompiled,
)
from torch2pc.displacement.rules.core import storage, tensors_in
from torch2pc.displacement.vjp import kept_tensor, node_of, nodes_below
from torch2pc.graph.apart import Habits, UnguardedError, apart, copied, habits_of, unchanged
from torch2pc.graph.autograd import (
    Graph,
    below,
    check_loss,
    check_scalar,
    ends_flat,
    foreign_of,
    in_belief_dtype,
    leaves_of,
    next_node,
    output_gradient,
    outside_autocast,
)
from torch2pc.graph.nodes import any_in_place, may_write_input, nodes_of
from torch2pc.graph.state import (
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
from torch2pc.graph.warn import warn_caller


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
        return f"{self._where} ({_type_name(self.function)})"

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
        return _no_leaves([*x]) if any(GLOBAL_HOOKS) else x

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
        sees_exits = bool(places) and is_new(self.function)
        moves = [given[k] for k in places]
        recorder: Recorder | Watch = Watch()
        if places and self.is_precise:
            recorder = Recorder(*moves, sees_exits=sees_exits)
        with uncompiled, recorder:
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
        if places:
            self.is_linear = not graph.is_foreign and self.own_backward is None
            values = handed_out.detach()
            self._displace(recorder, x, places, output, values, graph.is_foreign)
        return handed_out

    def _keep_apart(self, is_foreign: bool, given: Sequence[Any], written: set[int]) -> None:
        """What follows from the code that it ran, and from what it wrote into."""
        wrote = not written.isdisjoint([storage(a) for a in tensors_in(list(given))])
        if not self._is_item:
            self.is_apart, self.copies_input = is_foreign, is_foreign or wrote
        elif is_foreign or (wrote and not self.copies_input):
            self._habits.apart.add(self._where)

    def _displace(
        self,
        recorder: Recorder | Watch,
        x: Sequence[Any],
        places: Sequence[int],
        output: Tensor,
        before: Tensor,
        is_foreign: bool,
    ) -> None:
        """Set ``displacement``: by rules if it can be, and is found to be right.

        ``before`` are the values of ``output``, which only the recorder knows.
        """
        device = output.device
        in_autocast = torch.is_autocast_enabled(device.type)
        moving = [x[k] for k in places]

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
                with outside_autocast(device), generators_kept(self.drawn_sources):
                    self.displacement = reevaluation()
                self.is_replayable(before, *x)
                return
            try:
                recorded = self.displacement = recorder.displacement(output)
                found = recorder.own_backward(output, is_foreign)
                self.own_backward = self.own_backward or found
                self.is_linear = self.own_backward is None
                is_own = self.own_backward is not None
                with outside_autocast(device), generators_kept(self.drawn_sources):
                    is_right = agrees(self.function, recorded, reevaluation, moving, is_own)
                    if is_own:
                        self.displacement = OwnBackward(recorded, reevaluation())
                # What was recorded once stays right for a layer that is another one each time.
                if (not is_right or is_own) and self.is_replayable(before, *x) and not is_right:
                    raise Uncovered("its operations alone do not give its outputs and gradients")
            except Uncovered as reason:
                self.uncovered, self.own_backward = str(reason), None
                with outside_autocast(device), generators_kept(self.drawn_sources):
                    self.displacement = reevaluation()
                self.is_replayable(before, *x)

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


class Network:
    """The layers of a model, its loss, and the data: all that the algorithms work on.

    ``free_input``: whether the belief at the input moves with the others. ``prior``: what a relaxation
    adds to the energy of its beliefs.
    """

    vhat: list[Tensor]
    """The feed-forward values, once they have been recorded."""
    Loss: Tensor
    dLdy: Tensor
    _autocast: tuple[str, torch.dtype] | None

    def __init__(
        self,
        model: nn.Module,
        LossFun: Callable[[Tensor, Any], Tensor],
        X: Tensor,
        Y: Any,
        modules: list[nn.Module] | None = None,
        *,
        free_input: bool = False,
        prior: Callable[[list[Tensor]], Tensor] | None = None,
    ) -> None:
        modules = modules_in(model, LossFun, prior) if modules is None else modules
        devices = devices_of(modules, X)
        self.model, self.X, self.Y, self.devices = model, X, Y, devices
        # Whether the error that arrives at the input is asked for.
        self.asks_input = X.requires_grad
        kind, self._autocast = X.device.type, None
        if kind != "meta" and torch.is_autocast_enabled(kind):
            self._autocast = kind, torch.get_autocast_dtype(kind)
        self.modules = modules
        self.nodes = nodes_of(model)
        writes, self.habits = any_in_place(modules), habits_of(model)
        self.layers = [
            Layer(
                node.function,
                node.where,
                devices,
                writes and may_write_input(node.function),
                habits=self.habits,
            )
            for node in self.nodes
        ]
        self.loss = Layer(LossFun, "LossFun", devices, others=(Y,), habits=self.habits)
        self.prior = None if prior is None else Layer(prior, "prior", devices, habits=self.habits)
        self.free = set(range(0 if free_input else 1, len(self.nodes)))
        """The places whose beliefs move. The output's does not: the target has taken its place."""
        self.kept: dict[int, tuple[list[Tensor], Tensor]] = {}
        """The inputs and the output, with the graph between them, of layers none of whose parents moves."""
        # Told of each parameter's update as soon as it is there, and once more if it changes.
        self.arrived: Callable[[Tensor, Tensor], None] | None = None
        self._stand_in: nn.Module | None = None
        self._is_recorded = False

    def moving(self, l: int) -> tuple[int, ...]:
        """The parents of layer l whose beliefs move."""
        return tuple([p for p in self.nodes[l - 1].parents if p in self.free])

    def feed_forward(self, from_X: bool = False) -> Graph:
        """One forward pass, with its autograd graph; ``from_X``: which goes on into what made X."""
        # A copy in either case: whatever a layer does to it, the user's X stays as it is.
        vhat = [self.X.clone() if from_X else _input_copy(self.X)]

        def walk(x: Tensor) -> Tensor:
            values = [x]
            for layer, node in zip(self.layers, self.nodes, strict=True):
                x = layer(*[values[p] for p in node.parents])
                if not x.requires_grad:
                    # No parameters so far, or frozen ones, on an input that needs no gradient.
                    x = x.detach().requires_grad_()
                elif any([x is before for before in values]):
                    # The belief at a parent has other children's errors, too.
                    x = x.view_as(x)
                values.append(x)
            vhat.extend(values[1:])
            return x

        vhat[-1] = self._through_hooks_of_model(walk, vhat[0])
        with nullcontext() if from_X else self._derivatives_refused():
            Loss = check_loss(self.loss(vhat[-1]))
        graph = Graph(vhat, Loss, [node.parents for node in self.nodes], self.habits)
        wheres = [node.where for node in self.nodes]
        self.habits.apart.update([wheres[l - 1] for l in graph.foreign if l <= len(wheres)])
        self._check_guarded()
        return graph

    def _check_guarded(self) -> None:
        """No layer is at memory that it is to be kept from."""
        if not self.habits.apart:
            return
        names = [layer.name for layer in self.layers if layer.is_unguarded]
        if names:
            raise UnguardedError(names)

    def record(self) -> None:
        """One forward pass without a graph across layers, which sets vhat, Loss and dLdy, detached; once.

        After it each layer, the loss and the prior can be replayed, and each layer of which a parent
        moves has a displacement. One of which none does needs no other evaluation: its inputs and its
        output are ``kept``, if anything needs its gradient.
        """

        def evaluate(l: int, given: list[Tensor]) -> Tensor:
            pairs = zip(self.nodes[l - 1].parents, given, strict=True)
            moving = [a for p, a in pairs if p in self.free]
            layer = self.layers[l - 1]
            output = layer.record(*given, moving=moving)
            if not moving and (layer.has_leaves or self.asks_input):
                self.kept[l] = given, output
            return output

        if self._is_recorded:
            return
        self._is_recorded = True
        vhat = self.vhat = self._layer_by_layer(evaluate)
        prediction = vhat[-1].detach().requires_grad_()
        with self._derivatives_refused():
            Loss = check_loss(self.loss.record(prediction))
        self.loss.is_replayable(Loss.detach(), prediction.detach().requires_grad_())
        # Copies, as the loss may write its next gradient where this one is.
        self.Loss, self.dLdy = Loss.detach().clone(), output_gradient(Loss, prediction).clone()
        if self.prior is not None:
            beliefs = self._beliefs_of_prior()
            energy = self.prior.record(beliefs)
            check_scalar("prior", energy)
            self.prior.is_replayable(energy.detach(), self._beliefs_of_prior())

    def pieces(self) -> tuple[list[tuple[list[Tensor], Tensor]], tuple[Tensor, Tensor]]:
        """One forward pass whose graph ends at each layer, which sets vhat, Loss and dLdy, detached.

        Returns each layer's inputs and output, and the loss's, with the graph between them.
        """
        found = []

        def evaluate(l: int, given: list[Tensor]) -> Tensor:
            output = self.layers[l - 1](*given)
            if foreign_of(nodes_below(output.grad_fn)):
                self.habits.apart.add(self.nodes[l - 1].where)
            found.append((given, output))
            return output

        self.vhat = self._layer_by_layer(evaluate)
        prediction = self.vhat[-1].detach().requires_grad_()
        with self._derivatives_refused():
            Loss = check_loss(self.loss(prediction))
        self.Loss = Loss.detach().clone()
        return found, (prediction, Loss)

    def _layer_by_layer(self, evaluate: Callable[[int, list[Tensor]], Tensor]) -> list[Tensor]:
        """The feed-forward values, detached; ``evaluate`` is given each layer's number and inputs."""
        vhat = [_input_copy(self.X)]

        def walk(x: Tensor) -> Tensor:
            vhat[0] = x.detach()  # a pre-hook of the model may have changed it
            for l, node in enumerate(self.nodes, start=1):
                # With gradients on, as in every replay: under no_grad some modules take another
                # path, and autocast would cache weights that are cut off from the graph.
                given = [vhat[p].detach() for p in node.parents]
                for a in given:
                    a.requires_grad_(a.is_floating_point())
                # (No name for the output: its graph goes before the next layer makes its own.)
                vhat.append(evaluate(l, given).detach())
            return vhat[-1]

        output = self._through_hooks_of_model(walk, vhat[0])
        self._check_guarded()
        if output.data_ptr() != vhat[-1].data_ptr():
            raise ValueError(
                "model must have no forward hook that replaces its output where its beliefs are "
                "relaxed, which evaluates the items one by one; register the hook on the last item"
            )
        return vhat

    def _beliefs_of_prior(self) -> list[Tensor]:
        return [in_belief_dtype(x).detach().requires_grad_() for x in self.vhat[:-1]]

    def loss_at(self, y: Tensor) -> Tensor:
        """The recorded loss at the output ``y``, with its graph."""
        with self._in_autocast():
            return self.loss.replay(y.to(self.vhat[-1].dtype)).reshape(())

    def prior_at(self, beliefs: list[Tensor]) -> Tensor:
        """The recorded prior of such beliefs, with its graph."""
        assert self.prior is not None
        with self._in_autocast():
            return self.prior.replay(beliefs).reshape(())

    def _in_autocast(self) -> AbstractContextManager[Any]:
        """Autocast, if it was on when the call was made."""
        return nullcontext() if self._autocast is None else torch.autocast(*self._autocast)

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
        given = _no_leaves(x) if any(GLOBAL_HOOKS) else x
        output = self._stand_in._call_impl(given)  # type: ignore[no-untyped-call]
        if not isinstance(output, Tensor):
            raise TypeError(f"model must return a tensor, but a hook made it {_type_name(output)}")
        return output

    def _derivatives_refused(self) -> AbstractContextManager[Any]:
        """The body must not differentiate with respect to X, which the layers do not run on."""
        return _NoDerivative(self.X) if self.X.requires_grad else nullcontext()

    def replaying(self) -> AbstractContextManager[None]:
        """Leaves the generators as they are before the body, whatever the body replays.

        No others than those that a layer drew from: another thread may be drawing from the rest.
        """
        functions = [*self.layers, self.loss, *([] if self.prior is None else [self.prior])]
        return generators_kept({s for function in functions for s in function.drawn_sources})


HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
GLOBAL_HOOKS = [getattr(nn.modules.module, f"_global{name}") for name in HOOKS]


def _of_module(hook: Callable[..., Any], module: nn.Module, _: Any, *arguments: Any) -> Any:
    return hook(module, *arguments)


class _NoDerivative(TorchFunctionMode):
    """Raises an error where LossFun differentiates with respect to ``X``, or to what made it.

    It would find no dependence, and with ``allow_unused`` take the derivative for 0.
    """

    def __init__(self, X: Tensor) -> None:
        super().__init__()
        self._node = node_of(X)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.autograd.grad:
            for x in tensors_in(args[1]):
                node = node_of(x)
                below = nodes_below(node)
                if node is not None and (self._node in below or node in nodes_below(self._node)):
                    raise cut_off_from_X("LossFun")
        return func(*args, **(kwargs or {}))


def cut_off_from_X(name: str) -> RuntimeError:
    return RuntimeError(
        f"{name} must not differentiate with respect to X, or to anything else that it does not "
        "compute from what it is given: layers and loss run on copies, so that there is no dependence "
        "to be found (allow_unused=True would take the derivative for 0). A loss of derivatives, as "
        "physics-informed networks have, is no function of the output alone, whose error predictive "
        "coding hands down: train it with loss.backward(), or make the network and its derivatives "
        "(torch.func.jvp, jacrev) one item that returns both, so that LossFun is given them"
    )


def _no_leaves(x: Any) -> Any:
    """``x`` as views. A tracker of modules hooks their inputs, which autograd refuses for leaves."""
    if isinstance(x, Tensor):
        return x.view_as(x) if x.requires_grad and x.is_leaf else x
    return [_no_leaves(entry) for entry in x] if isinstance(x, list) else x


def detached(X: Tensor) -> Tensor:
    """X itself where it can be returned as it is."""
    return X.detach() if X.requires_grad else X


def _input_copy(X: Tensor) -> Tensor:
    copy = X.detach().clone()
    return copy.requires_grad_() if X.requires_grad else copy


def own_output(output: Tensor, given: Sequence[Any]) -> Tensor:
    """A copy of ``output`` where it is a parameter or a buffer, or a view of one.

    The optimizer would change it later. A view of an input is fine: that is ours.
    """
    base = output._base if output._base is not None else output
    of_input = any([isinstance(x, Tensor) and (base is x or base is x._base) for x in given])
    return output.clone() if base.is_leaf and not of_input else output


def _type_name(value: object) -> str:
    return getattr(value, "__name__", None) or type(value).__name__
