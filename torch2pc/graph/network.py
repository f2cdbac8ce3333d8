"""The layers of a model, its loss, and the data: all that the algorithms work on.

A ``Network`` feeds a batch forward: with one graph for a backward pass, or layer by layer, each recorded
so that it can be replayed and displaced. Which errors are propagated then, and how they are turned into
beliefs, is up to ``inference``.
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

from torch2pc.displacement.closed import Gradient
from torch2pc.displacement.recorder import uncompiled
from torch2pc.displacement.rules.core import tensors_in
from torch2pc.displacement.vjp import node_of, nodes_below
from torch2pc.graph.apart import UnguardedError, habits_of
from torch2pc.graph.autograd import (
    Graph,
    check_loss,
    check_scalar,
    foreign_of,
    in_belief_dtype,
    output_gradient,
)
from torch2pc.graph.layer import GLOBAL_HOOKS, HOOKS, Layer, cut_off_from_X, no_leaves, type_name
from torch2pc.graph.nodes import Node, any_in_place, may_write_input, nodes_from_above, nodes_of
from torch2pc.graph.state import (
    devices_of,
    generators_kept,
    modules_in,
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


class FromAbove:
    """A layer that predicts a belief which has a layer of its own (``PCGraph(above=...)``)."""

    first: Tensor
    """Its error g(vhat_parents) - vhat_target, where no belief has moved; set when it is recorded."""
    kept: tuple[list[Tensor], Tensor] | None = None
    """Its inputs and its output, with the graph between them, where none of its parents moves."""

    def __init__(
        self, layer: Layer, target: int, parents: tuple[int, ...], moving: tuple[int, ...]
    ) -> None:
        self.layer, self.target, self.parents, self.moving = layer, target, parents, moving


class Network:
    """The layers of a model, its loss, and the data: all that the algorithms work on.

    ``free_input``: whether the belief at the input moves with the others. ``prior``: what a relaxation
    adds to the energy of its beliefs.
    """

    vhat: list[Tensor]
    """The feed-forward values, once they have been recorded."""
    Loss: Tensor
    dLdy: Tensor
    loss_gradient: Gradient | None = None
    """dLdy at any output, where the recorded loss has a closed form of it."""
    from_above: Sequence[FromAbove] = ()
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
        self.parents = tuple([node.parents for node in self.nodes])
        writes, self.habits = any_in_place(modules), habits_of(model)

        def layer_of(node: Node) -> Layer:
            copies = writes and may_write_input(node.function)
            return Layer(node.function, node.where, devices, copies, habits=self.habits)

        self.layers = [layer_of(node) for node in self.nodes]
        self.loss = Layer(LossFun, "LossFun", devices, others=(Y,), habits=self.habits)
        self.prior = None if prior is None else Layer(prior, "prior", devices, habits=self.habits)
        self.free = set(range(0 if free_input else 1, len(self.nodes)))
        """The places whose beliefs move. The output's does not: the target has taken its place."""
        self.from_above = [
            FromAbove(layer_of(node), target, node.parents, self._that_move(node.parents))
            for target, node in nodes_from_above(model).items()
        ]
        self.kept: dict[int, tuple[list[Tensor], Tensor]] = {}
        """The inputs and the output, with the graph between them, of layers none of whose parents moves."""
        # Told of each parameter's update as soon as it is there, and once more if it changes.
        self.arrived: Callable[[Tensor, Tensor], None] | None = None
        self._stand_in: nn.Module | None = None
        self._is_recorded = False

    def moving(self, l: int) -> tuple[int, ...]:
        """The parents of layer l whose beliefs move."""
        return self._that_move(self.nodes[l - 1].parents)

    def _that_move(self, places: Sequence[int]) -> tuple[int, ...]:
        return tuple([p for p in places if p in self.free])

    def feed_forward(self, from_X: bool = False) -> Graph:
        """One forward pass, with its autograd graph; ``from_X``: which goes on into what made X."""
        # A copy in either case: whatever a layer does to it, the user's X stays as it is.
        vhat = [self.X.clone() if from_X else _input_copy(self.X)]

        def walk(x: Tensor) -> Tensor:
            values, seen = [x], {id(x)}
            for layer, parents in zip(self.layers, self.parents, strict=True):
                x = layer(*[values[p] for p in parents])
                if not x.requires_grad:
                    # No parameters so far, or frozen ones, on an input that needs no gradient.
                    x = x.detach().requires_grad_()
                elif id(x) in seen:
                    # The belief at a parent has other children's errors, too.
                    x = x.view_as(x)
                values.append(x)
                seen.add(id(x))
            vhat.extend(values[1:])
            return x

        vhat[-1] = self._through_hooks_of_model(walk, vhat[0])
        with nullcontext() if from_X else self._derivatives_refused():
            Loss = check_loss(self.loss(vhat[-1]))
        graph = Graph(vhat, Loss, self.parents, self.habits)
        L = len(self.nodes)
        self.habits.apart.update([self.nodes[l - 1].where for l in graph.foreign if l <= L])
        self._check_guarded()
        return graph

    def _check_guarded(self) -> None:
        """No layer is at memory that it is to be kept from."""
        if not self.habits.apart:
            return
        layers = [*self.layers, *[part.layer for part in self.from_above]]
        names = [layer.name for layer in layers if layer.is_unguarded]
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
        with uncompiled:
            self._record(evaluate)

    def _record(self, evaluate: Callable[[int, list[Tensor]], Tensor]) -> None:
        vhat = self.vhat = self._layer_by_layer(evaluate)
        prediction = vhat[-1].detach().requires_grad_()
        with self._derivatives_refused():
            Loss = check_loss(self.loss.record(prediction, moving=[prediction]))
        self.loss.is_replayable(Loss.detach(), prediction.detach().requires_grad_())
        # Copies, as the loss may write its next gradient where this one is.
        self.Loss = Loss.detach().clone()
        self.loss_gradient = closed = self.loss.gradient
        if closed is None:
            self.dLdy = output_gradient(Loss, prediction).clone()
        else:
            self.dLdy = closed(prediction.detach())
        if self.prior is not None:
            beliefs = self._beliefs_of_prior()
            energy = self.prior.record(beliefs)
            check_scalar("prior", energy)
            self.prior.is_replayable(energy.detach(), self._beliefs_of_prior())
        for part in self.from_above:
            self._record_from_above(part)
        self._check_guarded()

    def _record_from_above(self, part: FromAbove) -> None:
        """The same of a second prediction of a belief: its error at the feed-forward values."""
        name, vhat = part.layer.name, self.vhat[part.target]
        given = self.given_at(part.parents, self.vhat)
        moving = [a for p, a in zip(part.parents, given, strict=True) if p in part.moving]
        output = part.layer.record(*given, moving=moving)
        if output.shape != vhat.shape or not vhat.is_floating_point():
            place = "the input" if part.target == 0 else self.nodes[part.target - 1].where
            raise ValueError(
                f"{name} must predict what {place} is, {tuple(vhat.shape)} of floating-point numbers, but it "
                f"returns {tuple(output.shape)} for a tensor {tuple(vhat.shape)} of {vhat.dtype}"
            )
        if not moving and (part.layer.has_leaves or (self.asks_input and 0 in part.parents)):
            part.kept = given, output
        part.first = in_belief_dtype(output.detach()) - in_belief_dtype(vhat)

    def given_at(self, places: Sequence[int], at: Sequence[Tensor]) -> list[Tensor]:
        """What a layer of such parents is given, where the beliefs are ``at``, ready to be differentiated.

        At the last place that is the target.
        """
        found = []
        for p in places:
            x: Any = at[p].to(self.vhat[p].dtype) if p < len(self.nodes) else self.Y
            if not isinstance(x, Tensor):
                raise TypeError(
                    "Y must be a torch.Tensor where a layer of PCGraph(above=...) reads the last place, "
                    f"got {type(x).__name__}"
                )
            x = x.detach()
            found.append(x.requires_grad_(x.is_floating_point()))
        return found

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
        given = no_leaves(x) if any(GLOBAL_HOOKS) else x
        output = self._stand_in._call_impl(given)  # type: ignore[no-untyped-call]
        if not isinstance(output, Tensor):
            raise TypeError(f"model must return a tensor, but a hook made it {type_name(output)}")
        return output

    def _derivatives_refused(self) -> AbstractContextManager[Any]:
        """The body must not differentiate with respect to X, which the layers do not run on."""
        return _NoDerivative(self.X) if self.X.requires_grad else nullcontext()

    def replaying(self) -> AbstractContextManager[None]:
        """Leaves the generators as they are before the body, whatever the body replays.

        No others than those that a layer drew from: another thread may be drawing from the rest.
        """
        functions = [*self.layers, self.loss, *([] if self.prior is None else [self.prior])]
        functions += [part.layer for part in self.from_above]
        return generators_kept({s for function in functions for s in function.drawn_sources})


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


def detached(X: Tensor) -> Tensor:
    """X itself where it can be returned as it is."""
    return X.detach() if X.requires_grad else X


def _input_copy(X: Tensor) -> Tensor:
    copy = X.detach().clone()
    return copy.requires_grad_() if X.requires_grad else copy
