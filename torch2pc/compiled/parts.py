"""A captured call in parts: its layers, its loss and what else there is, and where its tensors are.

``torch.compile`` captures ``capture``, with guards that notice what changes in the model, and hands over a
graph. ``Parts`` runs the parts of it on any tensors; ``Held`` knows what one graph hands to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._inductor.decomposition import decompositions
from torch.utils._python_dispatch import TorchDispatchMode

from torch2pc.compiled.rewrites import is_view
from torch2pc.displacement.recorder import Uncovered
from torch2pc.displacement.rules import aten, storage
from torch2pc.displacement.rules.core import WRITES_ASIDE
from torch2pc.energy.divergences import LayerEnergy, OfCallable
from torch2pc.graph.autograd import in_belief_dtype


class OwnEnergy(NamedTuple):
    """Another energy of a layer than half the squared difference: what is compiled in of it."""

    place: int
    is_at_rest: bool
    slopes: bool
    """Whether it has slopes of its own, or they are autograd's."""
    value: bool
    """Whether it has a value of displacements of its own."""


def own_energy(place: int, energy: LayerEnergy) -> OwnEnergy:
    """What is compiled in of ``energy``, besides what it computes."""
    kind = type(energy)
    has_slopes = kind.slopes is not LayerEnergy.slopes
    return OwnEnergy(place, energy.is_at_rest, has_slopes, kind.value is not LayerEnergy.value)


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def mark(x: Tensor) -> Tensor:
    """``x``; where a part of a captured call ends."""
    return x.view_as(x)


def capture(
    items: Sequence[Callable[..., Tensor]],
    parents: Sequence[Sequence[int]],
    copies_input: Sequence[bool],
    LossFun: Callable[[Tensor, Any], Tensor],
    prior: Callable[[list[Tensor]], Tensor] | None,
    energies: Sequence[tuple[OwnEnergy, LayerEnergy]],
    X: Tensor,
    Y: Any,
) -> list[Tensor]:
    """What is captured: part l is layer l, then come the loss, the prior, and the layers' own energies."""
    marked = [mark(X)]
    for item, of_item, copies in zip(items, parents, copies_input, strict=True):
        x = [marked[p].clone() if copies else marked[p] for p in of_item]
        marked.append(mark(item(*x)))
    beliefs, y = list(marked[:-1]), marked[-1]
    marked.append(mark(LossFun(y.clone(), Y)))
    if prior is not None:
        marked.append(mark(prior(beliefs)))
    for of, energy in energies:
        # Three tensors that stand for the feed-forward value and how far the two have moved.
        for _ in range(3):
            marked.append(mark(in_belief_dtype(beliefs[of.place].detach()).clone()))
        vhat, df, dv = marked[-3:]
        function = energy.function if isinstance(energy, OfCallable) else energy
        marked.append(mark(function(df, dv)))
        if of.slopes:
            marked.append(mark(torch.stack(energy.slopes(vhat, df, dv))))
        if of.value:
            marked.append(mark(energy.value(vhat, df, dv)))
    return marked


class Parts:
    """The parts of a captured call, each to be run on any inputs."""

    def __init__(
        self,
        captured: fx.GraphModule,
        parents: Sequence[Sequence[int]],
        has_prior: bool = False,
        energies: Sequence[OwnEnergy] = (),
    ) -> None:
        # The marks that each part is given: none for the input, all beliefs for the prior.
        L = len(parents)
        self._given: list[Sequence[int]] = [(), *parents, (L,)]
        if has_prior:
            self._given.append(range(L))
        self.of_energy: dict[int, tuple[int, int | None, int | None]] = {}
        """The parts of a layer's own energy: itself, its slopes and its value, where it has them."""
        for of in energies:
            k = len(self._given)
            self._given += [(), (), (), (k + 1, k + 2)]
            own: list[int | None] = [None, None]
            for j, has in enumerate(of[2:]):
                if has:
                    own[j] = len(self._given)
                    self._given.append((k, k + 1, k + 2))
            self.of_energy[of.place] = (k + 3, own[0], own[1])
        self._interpreter = fx.Interpreter(captured, garbage_collect_values=False)
        self.placeholders: list[fx.Node] = []
        self.marks: list[fx.Node] = []
        self._nodes: list[list[fx.Node]] = [[]]
        for node in captured.graph.nodes:
            if node.op == "placeholder":
                self.placeholders.append(node)
            elif node.target is mark:
                self.marks.append(node)
                self._nodes.append([])
            elif node.op == "output":
                self.results = list(node.args[0])
            else:
                self._nodes[-1].append(node)
        if self._nodes.pop():
            raise Uncovered("something is computed after the loss")
        # What the captured call returns, as it was computed last: Python may keep it in attributes.
        self.kept: dict[fx.Node, Any] = {}

    def run(self, k: int, inputs: Sequence[Any], *x: Tensor) -> Tensor:
        """Part ``k``, at ``x``: what its parents are, or what a prior or an energy is given."""
        given = [self.marks[p] for p in self._given[k]]
        values = dict(zip([*self.placeholders, *given], [*inputs, *x], strict=True))
        self._interpreter.env = values
        nodes = set(self._nodes[k])
        for node in self._nodes[k]:
            if any(
                [before not in values and before not in nodes for before in node.all_input_nodes]
            ):
                raise Uncovered(f"part {k} uses what an earlier one has computed")
            values[node] = self._interpreter.run_node(node)
            if node in self.results:
                self.kept[node] = values[node].detach()
        found: Tensor = values[self.marks[k].all_input_nodes[0]]
        self._interpreter.env = {}
        return found


class Place(NamedTuple):
    """Where a tensor is found in a call: one of those that are held, or a view of it."""

    k: int
    view: tuple[Any, ...] | None

    @property
    def is_fixed(self) -> bool:
        """Whether the view is the same for all batch sizes."""
        return self.view is None or not any(
            isinstance(size, torch.SymInt) for size in (*self.view[0], *self.view[1], self.view[2])
        )


class Held:
    """The tensors that one graph hands to the next: its inputs, and what it adds to them."""

    def __init__(self, inputs: Sequence[Any]) -> None:
        self.tensors = list(inputs)
        self._by_storage: dict[int, list[int]] = {}
        for k, tensor in enumerate(inputs):
            if isinstance(tensor, Tensor):
                self._by_storage.setdefault(storage(tensor), []).append(k)

    def place(self, tensor: Tensor) -> Place:
        """Where ``tensor`` is held from now on."""
        mine = self._by_storage.setdefault(storage(tensor), [])
        for k in mine:
            if _layout(self.tensors[k]) == _layout(tensor):
                return Place(k, None)
        for k in mine:
            held = self.tensors[k]
            is_whole = held.storage_offset() == 0 and held.is_contiguous()
            if held.dtype == tensor.dtype and is_whole:
                return Place(k, _layout(tensor)[:3])
        return self.add(tensor)

    def whole(self, tensor: Tensor) -> Place:
        """Where ``tensor`` is found outside the graphs, too, which alone know the sizes of a trace."""
        place = self.place(tensor)
        return place if place.is_fixed else self.add(tensor)

    def add(self, tensor: Tensor) -> Place:
        """The place of a tensor that is new."""
        self._by_storage.setdefault(storage(tensor), []).append(len(self.tensors))
        self.tensors.append(tensor)
        return Place(len(self.tensors) - 1, None)


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), tensor.dtype


def find(held: Sequence[Any] | Mapping[int, Any], place: Place) -> Any:
    """The tensor at this place."""
    tensor = held[place.k]
    if place.view is None:
        return tensor
    size, stride, _ = place.view
    if tensor.dim() == 2 and (size, stride) == (tuple(tensor.shape)[::-1], tensor.stride()[::-1]):
        return tensor.t()
    return tensor.as_strided(*place.view)


class Watched(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the random numbers that its body draws, or hands out those that were ``drawn`` before.

    ``written``: the storages that the body wrote into.
    """

    supports_higher_order_operators = True

    def __init__(self, drawn: Sequence[Tensor] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._again = None if drawn is None else iter(drawn)
        self.drawn: list[Tensor] = []
        self.written: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        places = _written(func)
        given = [args[k] for k in places if k < len(args)]
        self.written.update([storage(x) for x in given if isinstance(x, Tensor)])
        if not _draws(func):
            return func(*args, **kwargs)
        _check_draws(func, args)
        if self._again is None:
            output = func(*args, **kwargs)
            numbers = output.clone() if isinstance(output, Tensor) else output[-1]
            self.drawn.append(numbers.detach())
            return output
        numbers = next(self._again)
        if func is aten.native_dropout.default:
            return args[0] * numbers * (1 / (1 - args[1])), numbers
        return args[0].copy_(numbers) if places else numbers.clone()


@cache
def _draws(func: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(func, "tags", ())


def _check_draws(func: Any, args: Sequence[Any]) -> None:
    """Raises Uncovered for what draws other random numbers when it is compiled."""
    # A dropout that leaves nothing needs none where it is not.
    drops_all = func is aten.native_dropout.default and args[1] == 1
    if func in decompositions or func in WRITES_ASIDE or drops_all:
        raise Uncovered(f"{func} draws other random numbers when it is compiled")


@cache
def _written(func: Any) -> list[int]:
    """The places of the arguments that an operation writes into."""
    arguments = getattr(getattr(func, "_schema", None), "arguments", ())
    return [
        k for k, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write
    ]


def split(
    joint: fx.GraphModule, inputs: int, errors: int, handed_on: int
) -> tuple[fx.GraphModule, list[fx.Node]]:
    """Take out of a graph what depends on its last ``errors`` placeholders.

    Its first ``handed_on`` results do not. The graph that is taken out computes the others, from the
    values of the nodes that are returned with it, and from the errors. What is left returns these
    values too, except those of placeholders.
    """
    nodes = list(joint.graph.nodes)
    placeholders = [node for node in nodes if node.op == "placeholder"]
    (results,) = nodes[-1].args
    late = set(placeholders[inputs:])
    for node in nodes[:-1]:
        if any([before in late for before in node.all_input_nodes]):
            late.add(node)
    # What is used of the rest is handed on; views of it, and its sizes, are made again.
    waiting = [before for node in late for before in node.all_input_nodes]
    waiting += [node for node in results[handed_on:] if node not in late]
    again: set[fx.Node] = set()
    cut: set[fx.Node] = set()
    while waiting:
        node = waiting.pop()
        if node not in late and node not in again and node not in cut:
            is_size = node.op != "placeholder" and isinstance(node.meta.get("val"), torch.SymInt)
            is_made_again = is_size or is_view(node) or node.op == "get_attr"
            (again if is_made_again else cut).add(node)
            waiting += node.all_input_nodes if is_made_again else []
    rest = fx.Graph()
    handed = [node for node in nodes if node in cut]
    values = {node: rest.placeholder(node.name) for node in [*handed, *placeholders[inputs:]]}
    for node in nodes:
        if node in again or (node in late and node.op != "placeholder"):
            values[node] = rest.node_copy(node, values.__getitem__)
    rest.output([values[node] for node in results[handed_on:]])

    more = [node for node in handed if node.op != "placeholder"]
    nodes[-1].args = ([*results[:handed_on], *more],)
    for node in reversed(nodes):
        if node in late:
            joint.graph.erase_node(node)
    joint.recompile()
    return fx.GraphModule(joint, rest), handed
