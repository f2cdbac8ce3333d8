"""A captured call as graphs: the feed-forward pass, a step of a relaxation, the updates.

One of Exact or FixedPred is a single graph, of a forward and a backward pass.

``torch.compile`` captures the layers and the loss (``capture``), with guards that notice what changes in
them, and hands the graph to ``Program``. That runs the parts of it on tensors without values, in a
``Traced`` network, through the very sweep, step rule and updates of ``energy`` and ``inference``, and writes
down the operations that come of it. So what is compiled holds no tensor: weights, beliefs, masks, targets
and step sizes are its inputs. To import this file takes a second, as it imports the compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import tracing
from torch._inductor.compile_fx import compile_fx
from torch._inductor.decomposition import decompositions
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from torch2pc.displacement.lines import Displacement
from torch2pc.displacement.recorder import Recorder, Uncovered
from torch2pc.displacement.rules import aten, storage
from torch2pc.displacement.rules.core import WRITES_ASIDE
from torch2pc.energy import Beliefs, Energy, Errors
from torch2pc.energy.factors import Terms, factors_of
from torch2pc.graph.autograd import (
    Below,
    below,
    check_loss,
    check_scalar,
    gradient,
    gradient_of_small,
    in_belief_dtype,
    independent_loss,
    output_gradient,
)
from torch2pc.graph.layer import own_output
from torch2pc.graph.network import Network
from torch2pc.graph.nodes import Node
from torch2pc.inference.steps import Descent
from torch2pc.inference.updates import OfLayer, updates


class Asked(NamedTuple):
    """What is compiled in, besides the layers: another value of it is another program."""

    kind: str
    """What is moved: the ``"beliefs"``, the ``"errors"``, or ``"nothing"``, as in Exact and FixedPred."""
    parents: tuple[tuple[int, ...], ...]
    """Those of each layer."""
    names: tuple[str, ...]
    """What errors call the layers."""
    free: tuple[int, ...]
    """The places whose beliefs move."""
    update_at: str = "v"
    is_weighted: bool = False
    """Whether the layers' errors have precisions."""
    has_prior: bool = False
    takes_errors: bool = False
    """Whether the errors are those at the final beliefs, not those of the last step."""

    @property
    def L(self) -> int:
        """The number of layers."""
        return len(self.parents)

    def moving(self, l: int) -> tuple[int, ...]:
        """The parents of layer l whose beliefs move."""
        return tuple([p for p in self.parents[l - 1] if p in self.free])


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def mark(x: Tensor, k: int) -> Tensor:
    """``x``; where part ``k`` of a captured call ends."""
    return x.view_as(x)


def capture(
    items: Sequence[Callable[..., Tensor]],
    parents: Sequence[Sequence[int]],
    copies_input: Sequence[bool],
    LossFun: Callable[[Tensor, Any], Tensor],
    prior: Callable[[list[Tensor]], Tensor] | None,
    X: Tensor,
    Y: Any,
) -> list[Tensor]:
    """What is captured: part l is layer l, then come the loss and the prior."""
    marked = [mark(X, 0)]
    for item, of_item, copies in zip(items, parents, copies_input, strict=False):
        x = [marked[p].clone() if copies else marked[p] for p in of_item]
        marked.append(mark(item(*x), len(marked)))
    beliefs, y = list(marked[:-1]), marked[-1]
    marked.append(mark(LossFun(y.clone() if copies_input[-1] else y, Y), len(marked)))
    if prior is not None:
        marked.append(mark(prior(beliefs), len(marked)))
    return marked


class Parts:
    """The parts of a captured call, each to be run on any inputs."""

    def __init__(self, captured: fx.GraphModule, parents: Sequence[Sequence[int]]) -> None:
        # The marks that each part is given: none for the input, all beliefs for the prior.
        L = len(parents)
        self._given = [(), *parents, (L,), tuple(range(L))]
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
        """Part ``k``, at ``x``: what its parents are, or the beliefs that a prior is given."""
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

    def add(self, tensor: Tensor) -> Place:
        """The place of a tensor that is new."""
        self._by_storage.setdefault(storage(tensor), []).append(len(self.tensors))
        self.tensors.append(tensor)
        return Place(len(self.tensors) - 1, None)


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), tensor.dtype


def find(held: Sequence[Any], place: Place) -> Any:
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


class SameDraws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses what draws other random numbers when it is compiled."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _draws(func):
            _check_draws(func, args)
        return func(*args, **(kwargs or {}))


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
    # What is used of the rest is handed on, and views of it are made again.
    waiting = [before for node in late for before in node.all_input_nodes]
    waiting += [node for node in results[handed_on:] if node not in late]
    again: set[fx.Node] = set()
    cut: set[fx.Node] = set()
    while waiting:
        node = waiting.pop()
        if node not in late and node not in again and node not in cut:
            is_view = getattr(node.target, "is_view", False) or node.op == "get_attr"
            (again if is_view else cut).add(node)
            waiting += node.all_input_nodes if is_view else []
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


class Graphed(NamedTuple):
    """A compiled graph, and which of the tensors that it may be given it takes."""

    function: Callable[..., Any]
    used: list[int]

    def __call__(self, given: Sequence[Any]) -> Any:
        return self.function(*[given[k] for k in self.used])


class _TracedLayer:
    """A layer, the loss or the prior, in a graph that is being traced: what ``Layer`` is elsewhere."""

    uncovered = own_backward = None
    is_linear = True

    def __init__(self, replay: Callable[..., Tensor], displacement: Any, has_leaves: bool) -> None:
        self.replay, self.displacement, self.has_leaves = replay, displacement, has_leaves


class _Masked:
    """A displacement that is 0 until errors have reached its layer.

    What is compiled may compute a displacement of 0 as the difference of two nearly equal numbers.
    """

    def __init__(self, displacement: Displacement, is_reached: Tensor) -> None:
        self._displacement, self._is_reached = displacement, is_reached

    def forward(self, *deltas: Tensor) -> tuple[Tensor, Any]:
        moved, saved = self._displacement.forward(*deltas)
        return torch.where(self._is_reached, moved, 0.0), saved

    def backward(self, saved: Any, e: Tensor) -> Any:
        return self._displacement.backward(saved, torch.where(self._is_reached, e, 0.0))


class Traced(Network):
    """A recorded network, made of the tensors that a graph is given while it is traced."""

    def __init__(self, program: Program, given: Sequence[Any], is_masked: bool = False) -> None:
        asked, L = program.asked, program.asked.L
        held, self.eta, pi, is_reached, self.state = program.divided(given)
        self._program, self.held = program, held
        self.terms = Terms(pi[1:L] if asked.is_weighted else None)
        self.nodes = [
            Node(_no_function, *pair) for pair in zip(asked.parents, asked.names, strict=True)
        ]
        self.free = set(asked.free)
        self.asks_input, self.kept, self.arrived = program.asks_input, {}, None
        self._autocast = None
        self.vhat = [find(held, place) for place in program.vhat]
        self.Loss, self.dLdy = find(held, program.Loss), find(held, program.dLdy)
        inputs = program.inputs_of(held)
        self.own = program.with_leaves(inputs)
        self.layers = []
        for l in range(1, L + 1):
            d: Any = program.displacement(l, held) if asked.moving(l) else None
            if d is not None and is_masked and l < L:
                d = _Masked(d, is_reached[l])
            has_leaves = bool(program.leaves_of[l])
            self.layers.append(_TracedLayer(partial(self._replay, l), d, has_leaves))  # type: ignore[arg-type]
        loss, prior = bool(program.leaves_of[L + 1]), bool(program.leaves_of.get(L + 2))
        self.loss = _TracedLayer(partial(self._replay, L + 1), None, loss)  # type: ignore[assignment]
        self.prior = None
        if asked.has_prior:
            self.prior = _TracedLayer(self._replay_prior, None, prior)  # type: ignore[assignment]

    def _replay(self, l: int, *x: Tensor) -> Tensor:
        program = self._program
        drawn = [find(self.held, place) for place in program.drawn.get(l, [])]
        with torch.enable_grad(), Watched(drawn) if drawn else nullcontext():
            return program.parts.run(l, self.own, *x)

    def _replay_prior(self, beliefs: list[Tensor]) -> Tensor:
        return self._replay(self._program.asked.L + 2, *beliefs)

    def energy(self, x: Sequence[Tensor] = (), moved: Collection[int] | None = None) -> Beliefs:
        """The energy in the beliefs, which stand at ``x``."""
        found = Beliefs(factors_of(self, self.terms), self.vhat, self.free)
        if x:
            found.stand_at([x_i.clone() for x_i in x])
            found.moved = found.moved if moved is None else set(moved)
        return found

    def energy_in_errors(self) -> Errors:
        """The energy in the errors, which stand at the state."""
        found = Errors(factors_of(self, self.terms), self.vhat, self.free)
        found.stand_at([e.clone() for e in self.state])
        return found


def _no_function(*x: Tensor) -> Tensor:
    raise AssertionError("a traced layer is replayed")


class Program:
    """The graphs of one captured call, compiled.

    ``feed_forward`` is given the inputs of the captured call, and returns more to be held. The other
    graphs are given all that is held, eta, the precisions, which layers are reached, and the state:
    a step moves it, ``updates`` ends the call. ``steps[j]`` is the step where the beliefs ``reach[j]``
    have moved, and those above. Where errors are relaxed, they are the state, there is one step, and
    ``start`` takes the errors of given beliefs. Where nothing is, ``backpropagate`` is all that there is.
    """

    def __init__(self, captured: fx.GraphModule, asked: Asked, options: dict[str, Any]) -> None:
        self.parts, self.asked, self._options = Parts(captured, asked.parents), asked, options
        L, self.reach = asked.L, reach(asked)
        # The layers whose updates are taken at vhat: the graph of the feed-forward pass serves.
        all_at_vhat = asked.update_at == "vhat"
        self._at_vhat = [l for l in range(1, L + 1) if all_at_vhat or not asked.moving(l)]
        self._lines: dict[int, Any] = {}
        self.drawn: dict[int, list[Place]] = {}
        # The inputs that require grad and that each layer, the loss and the prior use.
        self.leaves_of: dict[int, list[int]] = {}
        # Whether all backward passes in a layer are PyTorch's own, and whether those of its input are.
        self._is_linear: dict[int, bool] = {}
        self._is_foreign: dict[int, bool] = {}
        inputs = [node.meta["example_value"] for node in self.parts.placeholders]
        values = [mark.meta["example_value"] for mark in self.parts.marks[: L + 1]]
        with torch.no_grad(), tracing(None), values[0].fake_mode, enable_python_dispatcher():
            like = [torch.empty_like(x.detach()) for x in values]
            if asked.kind == "nothing":
                self._compile_backpropagation(inputs, like)
                del self.parts, self._held
                return
            self._compile(inputs, like)
        self.leaves = sorted({k for leaves in self.leaves_of.values() for k in leaves})
        del self.parts, self._held, self._rest

    def _compile(self, inputs: list[Any], like: list[Tensor]) -> None:
        asked, L = self.asked, self.asked.L
        errors = [in_belief_dtype(torch.empty_like(like[l])) for l in self._at_vhat]
        joint = make_fx(self._feed_forward)(*inputs, *errors)
        count = len(self._held.tensors) - len(inputs)
        self._rest, cut = split(joint, len(inputs), len(errors), count)
        self._cut = [
            Place(inputs_of(joint).index(node), None)
            if node.op == "placeholder"
            else self._held.add(node.meta["val"])
            for node in cut
        ]
        self.feed_forward = self._compiled(joint, inputs)

        like = [in_belief_dtype(torch.empty_like(x)) for x in like]
        x = [like[i] for i in asked.free]
        # One tensor for each layer, and not one for all: what is done in two layers is one kernel then.
        numbers = [like[L].new_empty(()) for _ in range(L + 2)]
        numbers += [torch.empty_like(x, dtype=torch.bool) for x in numbers[1:]]
        given = [*self._held.tensors, *numbers]
        self.steps: dict[int, Graphed] = {}
        state = x
        if asked.kind == "errors":
            self.start = self._traced(self._errors_of, given, x)
            self.steps[len(self.reach) - 1] = self._traced(self._error_step, given, x)
        else:
            chosen = [len(self.reach) - 1] if asked.has_prior else levels(len(self.reach), L)
            # Whether a step evaluates layers that no error has reached, whose errors are 0.
            self.skips = any(
                l not in moves_of(asked, moved)[1] and asked.moving(l)
                for k, moved in enumerate(self.reach)
                for l in moves_of(asked, self.reach[min(j for j in chosen if j >= k)])[1]
            )
            for j in chosen:
                self.steps[j] = self._traced(partial(self._step, j), given, x)
            state = [*x, *like[1:], *(x if asked.update_at == "before" else [])]
        self.updates = self._traced(self._updates, given, state)

    def _traced(
        self, function: Callable[..., list[Tensor]], given: list[Any], state: list[Tensor]
    ) -> Graphed:
        state = [torch.empty_like(x) for x in state]
        return self._compiled(make_fx(function)(*given, *state), [*given, *state])

    def step_of(self, k: int) -> tuple[Graphed, list[int], list[int]]:
        """The step that may be taken after k steps, the beliefs that it moves, and the errors it takes."""
        j = min([j for j in self.steps if j >= min(k, len(self.reach) - 1)])
        return self.steps[j], *moves_of(self.asked, self.reach[j])

    def _compile_backpropagation(self, inputs: list[Any], like: list[Tensor]) -> None:
        tensors = [x for x in [*inputs, *like] if isinstance(x, Tensor)]
        is_double = any([x.dtype == torch.float64 for x in tensors])
        self.factor_dtype = torch.float64 if is_double else torch.float32
        c = [like[-1].new_empty((), dtype=self.factor_dtype) for _ in range(2 * self.asked.L)]
        graph = make_fx(self._backpropagate)(*inputs, *c)
        self.adds = len(self._held.tensors) - len(inputs)
        self.backpropagate = self._compiled(graph, [*inputs, *c])

    def _compiled(self, graph: fx.GraphModule, given: Sequence[Any]) -> Graphed:
        # What only autograd knew apart is the same; then much is used no more.
        for node in graph.graph.nodes:
            if node.target in (aten.detach.default, aten.alias.default):
                node.replace_all_uses_with(node.args[0])
        graph.graph.eliminate_dead_code()
        # Numbers are kept: sizes are expressed by them.
        unused = [
            k
            for k, node in enumerate(inputs_of(graph))
            if not node.users and isinstance(given[k], Tensor)
        ]
        for node in [inputs_of(graph)[k] for k in unused]:
            graph.graph.erase_node(node)
        used = [k for k in range(len(given)) if k not in unused]
        graph.recompile()
        function: Any = compile_fx(
            graph, [given[k] for k in used], config_patches=dict(self._options)
        )
        return Graphed(function, used)

    # What is traced.

    def _feed_forward(self, *given: Any) -> list[Tensor]:
        """Forward through all layers and the loss. Sets what the other graphs need to know."""
        asked, parts, L = self.asked, self.parts, self.asked.L
        count = len(parts.placeholders)
        inputs, errors = given[:count], dict(zip(self._at_vhat, given[count:], strict=True))
        held = self._held = Held(inputs)
        own = [_leaf(x) for x in inputs]
        # What the call may change, as it is before.
        before = {
            k: x.clone()
            for k, x in enumerate(inputs)
            if isinstance(x, Tensor) and not x.requires_grad
        }
        found: list[Tensor] = []
        written: set[int] = set()
        X = parts.run(0, own)
        self.asks_input = X.requires_grad
        vhat = [X.detach()]
        for l, parents in enumerate(asked.parents, start=1):
            x = [vhat[p].detach() for p in parents]
            moving = [a for p, a in zip(parents, x, strict=True) if p in asked.free]
            recorder = Recorder(*moving) if moving else None
            with Watched() as watched, recorder or nullcontext():
                output = self._evaluated(l, own, x)
            written |= watched.written
            if recorder is not None:
                try:
                    displacement = recorder.displacement(output)
                    if reason := recorder.own_backward(output, self._is_foreign[l]):
                        raise Uncovered(reason)
                except Uncovered as reason:
                    raise Uncovered(f"{asked.names[l - 1]}: {reason}") from reason
                places = [[held.place(x) for x in line.tensors] for line in displacement.lines]
                self._lines[l] = displacement, places
            self.drawn[l] = [held.place(numbers) for numbers in watched.drawn]
            if l in self._at_vhat:
                asked_of = [own[k] for k in self.leaves_of[l]] + self._inputs_asked(l, x)
                if self._is_linear[l]:
                    of_layer = gradient_of_small(output, asked_of, errors[l])
                else:
                    of_layer = gradient([output], asked_of, [errors[l].to(output.dtype)])
                pairs = zip(of_layer, asked_of, strict=True)
                found += [torch.zeros_like(y) if g is None else g for g, y in pairs]
            vhat.append(output.detach())
        prediction = vhat[-1].detach().requires_grad_()
        with torch.enable_grad(), Watched() as watched:
            Loss = check_loss(parts.run(L + 1, own, prediction))
        outside = {storage(x) for x in inputs if isinstance(x, Tensor)}
        if watched.drawn or watched.written & outside:
            raise Uncovered("LossFun draws random numbers or changes its buffers")
        self.leaves_of[L + 1] = _places(_captured(Loss, [prediction], "LossFun").leaves, own)
        dLdy = output_gradient(Loss, prediction)
        if asked.has_prior:
            beliefs = [in_belief_dtype(x).detach().requires_grad_() for x in vhat[:-1]]
            with torch.enable_grad(), Watched() as watched:
                energy = parts.run(L + 2, own, *beliefs)
            check_scalar("prior", energy)
            if watched.drawn or watched.written & outside:
                raise Uncovered("prior draws random numbers or changes its buffers")
            self.leaves_of[L + 2] = _places(_captured(energy, beliefs, "prior").leaves, own)
        self._before = {
            k: held.place(clone) for k, clone in before.items() if storage(inputs[k]) in written
        }
        self._hold(vhat, Loss, dLdy)
        return [*held.tensors[count:], *found]

    def _inputs_asked(self, l: int, x: Sequence[Tensor]) -> list[Tensor]:
        """Those of layer l's inputs that are the model's, if its error is asked for."""
        parents = self.asked.parents[l - 1]
        return [a for p, a in zip(parents, x, strict=True) if p == 0 and self.asks_input]

    def _backpropagate(self, *given: Any) -> list[Tensor]:
        """Forward through all layers and the loss, and down again, from layer to layer.

        After the inputs come the factors of the layers' errors and those of the beliefs' (``exact.py``).
        Returns what is to be held, the beliefs, the errors, the input's error and the updates.
        """
        parts, L = self.parts, self.asked.L
        count = len(parts.placeholders)
        inputs, c_epsilon, c_v = given[:count], given[count : count + L], given[count + L :]
        held = self._held = Held(inputs)
        own = [_leaf(x) for x in inputs]
        X = parts.run(0, own)
        self.asks_input = X.requires_grad
        vhat, layers = [X.detach()], []
        for l in range(1, L + 1):
            x = [vhat[p].detach() for p in self.asked.parents[l - 1]]
            with SameDraws():
                output = self._evaluated(l, own, x)
            layers.append((x, output))
            vhat.append(output.detach())
        prediction = vhat[-1].detach().requires_grad_()
        with torch.enable_grad(), SameDraws():
            Loss = check_loss(parts.run(L + 1, own, prediction))
        of_loss = _captured(Loss, [prediction], "LossFun").leaves
        leaves = self.leaves_of[L + 1] = _places(of_loss, own)
        dLdy, *found = gradient([Loss], [prediction, *[own[k] for k in leaves]])
        if dLdy is None:
            raise independent_loss()
        self._hold(vhat, Loss, dLdy)
        updates: dict[int, Tensor] = {}
        _add(updates, leaves, found)
        arriving: dict[int, Tensor] = {L: dLdy}
        v: list[Tensor] = []
        epsilon: list[Tensor] = []
        for l in range(L, 0, -1):
            g = arriving.pop(l, None)
            of_belief = in_belief_dtype(torch.zeros_like(vhat[l]) if g is None else g)
            epsilon.insert(0, of_belief * c_epsilon[l - 1])
            v.insert(0, in_belief_dtype(vhat[l]) - of_belief * c_v[l - 1])
            if g is None:
                continue
            (x, output), leaves, parents = (
                layers[l - 1],
                self.leaves_of[l],
                self.asked.parents[l - 1],
            )
            goes_on = [(p, a) for p, a in zip(parents, x, strict=True) if p > 0 or self.asks_input]
            asked = [*[own[k] for k in leaves], *[a for _, a in goes_on]]
            found = gradient([output], asked, [g])
            scaled = [None if y is None else _times(y, c_epsilon[l - 1]) for y in found]
            _add(updates, leaves, scaled[: len(leaves)])
            for (p, _), of_p in zip(goes_on, found[len(leaves) :], strict=True):
                if of_p is not None:
                    arriving[p] = arriving[p] + of_p if p in arriving else of_p
        input_error = []
        if self.asks_input:
            of_input = arriving.get(0, torch.zeros_like(vhat[0]))
            input_error = [_times(of_input, c_epsilon[0])]
        # What the loss does not depend on has no update.
        self.leaves = sorted(updates)
        return [
            *held.tensors[count:],
            *v,
            *epsilon,
            *input_error,
            *[updates[k] for k in self.leaves],
        ]

    def _step(self, j: int, *given: Any) -> list[Tensor]:
        """The beliefs that move in a step where ``reach[j]`` have moved, and the errors of it."""
        network = Traced(self, given, is_masked=self.skips)
        energy = network.energy(network.state, self.reach[j])
        _sweep(energy, network.eta)
        moved, taken = moves_of(self.asked, self.reach[j])
        epsilon = energy.epsilon
        return [*[energy.x[i] for i in moved], *[epsilon[l] for l in taken]]

    def _errors_of(self, *given: Any) -> list[Tensor]:
        """The hidden errors of beliefs that have moved so far."""
        network = Traced(self, given)
        energy = network.energy(network.state)
        energy.retake()
        return energy.epsilon[1:-1]

    def _error_step(self, *given: Any) -> list[Tensor]:
        """The hidden errors after a step."""
        network = Traced(self, given)
        energy = network.energy_in_errors()
        _sweep(energy, network.eta)
        return energy.variables

    def _updates(self, *given: Any) -> list[Tensor]:
        """The beliefs that move, the output's, the errors where they are taken at the end, the input's
        error, the updates."""
        asked, L = self.asked, self.asked.L
        network = Traced(self, given)
        count = len(asked.free)
        energy: Energy
        if asked.kind == "errors":
            energy = network.energy_in_errors()
        else:
            energy = network.energy(network.state[:count])
            if asked.takes_errors:
                energy.retake()
            else:
                for l, error in enumerate(network.state[count : count + L], start=1):
                    factor = energy.output if l == L else energy.predictions[l]
                    factor.error = error
        v = at = energy.beliefs()
        if asked.update_at == "before":
            at, before = list(v), network.state[count + L :]
            for i, d in zip(asked.free, before, strict=True):
                at[i] = network.vhat[i] + d
        weighted = energy.weighted
        cut = [find(network.held, place) for place in self._cut]
        rest = list(fx.Interpreter(self._rest).run(*cut, *[weighted[l] for l in self._at_vhat]))

        def of_layer(l: int, error: Tensor) -> OfLayer | None:
            if l not in self._at_vhat:
                return None
            leaves = [network.own[k] for k in self.leaves_of[l]]
            inputs = len(self._inputs_asked(l, [network.vhat[p] for p in asked.parents[l - 1]]))
            mine = [rest.pop(0) for _ in range(len(leaves) + inputs)]
            return OfLayer(leaves, mine[: len(leaves)], mine[len(leaves) :], network.vhat[l])

        input_error, found = updates(network, at, weighted, v, of_layer)
        place = {id(x): k for k, x in enumerate(network.own)}
        by_place = {place[id(leaf)]: update for leaf, update in found.items()}
        # What a layer does not depend on after all.
        of_leaves = [
            by_place[k] if k in by_place else torch.zeros_like(network.own[k]) for k in self.used
        ]
        taken = energy.epsilon[1:] if asked.takes_errors or asked.kind == "errors" else []
        return [
            *[v[i] for i in asked.free],
            v[L],
            *taken,
            *([input_error] if input_error is not None else []),
            *of_leaves,
        ]

    # Parts of these.

    @property
    def used(self) -> list[int]:
        """The inputs that have an update."""
        return sorted({k for leaves in self.leaves_of.values() for k in leaves})

    def _evaluated(self, l: int, own: Sequence[Any], x: Sequence[Tensor]) -> Tensor:
        """The output of layer l at ``x``, with its graph."""
        for a in x:
            a.requires_grad_(a.is_floating_point())
        versions = [a._version for a in x]
        with torch.enable_grad():
            output = self.parts.run(l, own, *x)
            if versions != [a._version for a in x] or not output.dtype.is_floating_point:
                raise Uncovered(f"{self.asked.names[l - 1]} is no function of its input")
            if output.is_leaf or output._is_view():
                output = own_output(output, x)
        graph = _captured(output, x, self.asked.names[l - 1])
        self.leaves_of[l] = _places(graph.leaves, own)
        self._is_linear[l], self._is_foreign[l] = not graph.foreign, graph.is_foreign
        return output

    def _hold(self, vhat: Sequence[Tensor], Loss: Tensor, dLdy: Tensor) -> None:
        """Hold what a feed-forward pass has found, and what the captured call returns."""
        held, parts = self._held, self.parts
        self.vhat = [held.place(x) for x in vhat]
        self.Loss, self.dLdy = held.place(Loss.detach().clone()), held.place(dLdy.detach())
        self.results = [
            self.Loss if result in parts.marks else held.place(parts.kept[result])
            for result in parts.results
        ]

    def divided(self, given: Sequence[Any]) -> tuple[Any, Any, Any, Any, Any]:
        """What is held, eta, the precisions, which layers are reached, and the state."""
        a, L = len(self._held.tensors), self.asked.L
        b, c = a + L + 2, a + 2 * L + 3
        return given[:a], given[a], given[a + 1 : b], given[b:c], given[c:]

    def inputs_of(self, held: Sequence[Any]) -> list[Any]:
        """The inputs as they were before the call."""
        inputs = list(held[: len(self.parts.placeholders)])
        for k, place in self._before.items():
            inputs[k] = find(held, place)
        return inputs

    def with_leaves(self, inputs: Sequence[Any]) -> list[Any]:
        """Tensors that require grad where they should, and that may be written into."""
        own = list(inputs)
        for k in self.used:
            own[k] = inputs[k].detach().requires_grad_()
        for k in self._before:
            own[k] = inputs[k].clone()
        return own

    def displacement(self, l: int, held: Sequence[Any]) -> Displacement:
        """Layer l's, of tensors that are held."""
        recorded, places = self._lines[l]
        lines = [
            line._replace(tensors=tuple([find(held, place) for place in of_line]))
            for line, of_line in zip(recorded.lines, places, strict=True)
        ]
        vhat = find(held, self.vhat[l])
        return Displacement(lines, recorded.result, vhat, recorded.count)


def _sweep(energy: Energy, eta: Tensor) -> None:
    """One step of a relaxation, as ``inference.relax`` makes it."""
    rule = Descent(0.0)
    rule.eta = eta  # an input of the program, not a number
    rule.begin(energy)
    energy.sweep(rule.move, rule.down)


class _Alike:
    """A factor of which only it counts which beliefs it pulls at."""

    def __init__(self, parents: tuple[int, ...], target: int | None) -> None:
        self.parents, self.target, self.is_awake = parents, target, target is None
        self.beliefs = frozenset([*parents, *([] if target is None else [target])])

    def pulls(self, x: Sequence[Any], down: bool) -> Any:
        for i in self.beliefs:
            yield i, [(_nothing, 1.0)]


_nothing = torch.zeros(())


def reach(asked: Asked) -> list[frozenset[int]]:
    """The beliefs that have moved after 0, 1, ... steps from the feed-forward pass, until all have."""
    L = asked.L
    factors = [_Alike(asked.moving(l), None if l == L else l) for l in range(L, 0, -1)]
    energy = Beliefs(factors, [_nothing] * (L + 1), asked.free)
    found = [frozenset[int]()]
    while True:
        energy.sweep(lambda i, parts: None)
        if energy.moved == found[-1]:
            return found
        found.append(frozenset(energy.moved))


def moves_of(asked: Asked, moved: frozenset[int]) -> tuple[list[int], list[int]]:
    """The beliefs that a step moves where these have moved, and the layers whose errors it takes."""
    L = asked.L
    # A prior pulls at all.
    taken = [l for l in range(1, L + 1) if l == L or not moved.isdisjoint([l, *asked.moving(l)])]
    pulled = {i for l in taken for i in [l, *asked.moving(l)] if i in asked.free}
    return sorted(asked.free if asked.has_prior else pulled), taken


def levels(count: int, L: int) -> list[int]:
    """Of how far errors have reached, 0 to ``count - 1``, where steps are compiled for.

    All in up to 10 layers, but for the last but one, whose step is nearly the last one's; fewer in deeper
    models, as what they evaluate has to be compiled.
    """
    apart = max(1, min(round(L * L / 80), count // 2))
    last = count - 1
    return [last, *range(last - 1 - apart, -1, -apart)]


def _captured(output: Tensor, inputs: Sequence[Tensor], name: str) -> Below:
    """What the graph of ``output`` is made of, if its backward pass can be captured.

    That of an ``autograd.Function`` was, with guards for what it uses. That of a custom operation would
    be traced as it is now, whatever it uses.
    """
    graph = below(output, inputs)
    if any([type(node).__name__.startswith("GeneratedBackward") for node in graph.foreign]):
        raise Uncovered(f"{name}: a custom operation has a backward of its own")
    return graph


def inputs_of(graph: fx.GraphModule) -> list[fx.Node]:
    return [node for node in graph.graph.nodes if node.op == "placeholder"]


def _leaf(x: Any) -> Any:
    if not isinstance(x, Tensor) or not x.requires_grad:
        return x
    return x.detach().requires_grad_()


def _times(x: Tensor, c: Tensor) -> Tensor:
    """``c x``, of x's type; half precision would lose a small factor."""
    return (in_belief_dtype(x) * c).to(x.dtype)


def _places(leaves: Sequence[Tensor], own: Sequence[Any]) -> list[int]:
    return [k for k, x in enumerate(own) if any(x is leaf for leaf in leaves)]


def _add(updates: dict[int, Tensor], leaves: Sequence[int], found: Sequence[Any]) -> None:
    for k, update in zip(leaves, found, strict=True):
        if update is not None:
            updates[k] = updates[k] + update if k in updates else update
