"""A captured call of Strict as graphs: the feed-forward pass, a step of the beliefs, the updates.

One of Exact or FixedPred is a single graph, of a forward and a backward pass.

``torch.compile`` captures the layers and the loss (``capture``), with guards that notice what changes in
them, and hands the graph to ``Program``. That runs the parts of it on tensors without values, much as
``strict.py`` runs the layers, and writes down the operations that come of it. So what is compiled is made
by the same rules and the same order of steps, and holds no tensor: weights, beliefs, masks, targets and
step sizes are its inputs. To import this file takes a second, as it imports the compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

from torch2pc.displacement import Displacement, Recorder, Uncovered
from torch2pc.graph import (
    Below,
    below,
    check_loss,
    check_scalar,
    gradient,
    gradient_of_small,
    in_belief_dtype,
    independent_loss,
    output_gradient,
    outside_autocast,
    storage,
)
from torch2pc.layers import own_output
from torch2pc.rules import aten
from torch2pc.rules.core import WRITES_ASIDE


class Asked(NamedTuple):
    """What is compiled in, besides the layers: another value of it is another program."""

    L: int
    lowest: int
    """The lowest layer whose input moves: 2 if the input is clamped, or else 1."""
    update_at: str
    is_weighted: bool
    """Whether the layers' errors have precisions."""
    has_prior: bool
    takes_errors: bool
    """Whether the errors are those at the final beliefs, not those of the last step."""
    relaxes_errors: bool
    """Whether the hidden errors are the state, as in ErrorBased, and the beliefs follow."""
    backpropagates: bool = False
    """Whether nothing is relaxed: Exact and FixedPred."""


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def mark(x: Tensor, k: int) -> Tensor:
    """``x``; where part ``k`` of a captured call ends."""
    return x.view_as(x)


def capture(
    items: Sequence[Callable[[Tensor], Tensor]],
    copies_input: Sequence[bool],
    LossFun: Callable[[Tensor, Any], Tensor],
    prior: Callable[[list[Tensor]], Tensor] | None,
    X: Tensor,
    Y: Any,
) -> list[Tensor]:
    """What is captured: part l is layer l, then come the loss and the prior."""
    marked = [mark(X, 0)]
    for item, copies in zip(items, copies_input, strict=False):
        x = marked[-1].clone() if copies else marked[-1]
        marked.append(mark(item(x), len(marked)))
    beliefs, y = list(marked[:-1]), marked[-1]
    marked.append(mark(LossFun(y.clone() if copies_input[-1] else y, Y), len(marked)))
    if prior is not None:
        marked.append(mark(prior(beliefs), len(marked)))
    return marked


class Parts:
    """The parts of a captured call, each to be run on any inputs."""

    def __init__(self, captured: fx.GraphModule, L: int) -> None:
        self._L = L
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
        """Part ``k``, at ``x``: one tensor, or the beliefs that a prior is given."""
        given = self.marks[: len(x)] if k == self._L + 2 else self.marks[max(k - 1, 0) : k]
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


class Program:
    """The graphs of one captured call, compiled.

    ``feed_forward`` is given the inputs of the captured call, and returns more to be held. The other
    graphs are given all that is held, eta, the precisions, which layers are reached, and the state:
    ``steps[level]`` moves the beliefs of layers ``level - 1`` and above, ``updates`` ends the call.
    Where errors are relaxed, they are the state, and ``start`` takes those of given beliefs. Where
    nothing is, ``backpropagate`` is all that there is.
    """

    def __init__(self, captured: fx.GraphModule, asked: Asked, options: dict[str, Any]) -> None:
        self._parts, self.asked, self._options = Parts(captured, asked.L), asked, options
        L = asked.L
        # The layers whose updates are taken at vhat: the graph of the feed-forward pass serves.
        all_at_vhat = asked.update_at == "vhat"
        self._at_vhat = [l for l in range(1, L + 1) if all_at_vhat or l < asked.lowest]
        self._lines: dict[int, Any] = {}
        self._drawn: dict[int, list[Place]] = {}
        # The inputs that require grad and that each layer, the loss and the prior use.
        self._leaves_of: dict[int, list[int]] = {}
        # Whether all backward passes in a layer are PyTorch's own, and whether those of its input are.
        self._is_linear: dict[int, bool] = {}
        self._is_foreign: dict[int, bool] = {}
        inputs = [node.meta["example_value"] for node in self._parts.placeholders]
        values = [mark.meta["example_value"] for mark in self._parts.marks[: L + 1]]
        with torch.no_grad(), tracing(None), values[0].fake_mode, enable_python_dispatcher():
            like = [torch.empty_like(x.detach()) for x in values]
            if asked.backpropagates:
                self._compile_backpropagation(inputs, like)
                del self._parts, self._held
                return
            self._compile(inputs, like)
        self.level_of = {
            l: max(k for k in self.steps if k <= l) for l in range(asked.lowest, L + 1)
        }
        self.leaves = sorted({k for leaves in self._leaves_of.values() for k in leaves})
        del self._parts, self._held, self._rest

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

        held = self._held.tensors
        delta = [in_belief_dtype(torch.empty_like(x)) for x in like[:L]]
        epsilon = [in_belief_dtype(torch.empty_like(x)) for x in like[1:]]
        # One tensor for each layer, and not one for all: what is done in two layers is one kernel then.
        numbers = [delta[-1].new_empty(()) for _ in range(L + 2)]
        numbers += [torch.empty_like(x, dtype=torch.bool) for x in numbers[1:]]
        self.steps: dict[int, Graphed] = {}
        if asked.relaxes_errors:
            self._compile_relaxed_errors([*held, *numbers], delta[1:], epsilon[:-1])
            return
        starts = [asked.lowest] if asked.has_prior else levels(L, asked.lowest)
        # Whether a step evaluates layers that no error has reached, whose errors are 0.
        self.skips = len(starts) <= L - asked.lowest
        for level in starts:
            given = [*held, *numbers, *delta[level - 1 :]]
            self.steps[level] = self._compiled(make_fx(partial(self._step, level))(*given), given)
        before = [torch.empty_like(x) for x in delta if asked.update_at == "before"]
        given = [*held, *numbers, *delta, *epsilon, *before]
        self.updates = self._compiled(make_fx(self._updates)(*given), given)

    def _compile_relaxed_errors(
        self, before: list[Any], delta: list[Tensor], hidden: list[Tensor]
    ) -> None:
        functions = {self._errors_of: delta, self._error_step: hidden, self._updates: hidden}
        self.start, step, self.updates = [
            self._compiled(make_fx(function)(*before, *state), [*before, *state])
            for function, state in functions.items()
        ]
        self.steps[self.asked.lowest] = step

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
        asked, parts, L = self.asked, self._parts, self.asked.L
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
        for l in range(1, L + 1):
            x = vhat[-1].detach()
            recorder = Recorder(x) if l >= asked.lowest else None
            with Watched() as watched, recorder or nullcontext():
                output = self._evaluated(l, own, x)
            written |= watched.written
            if recorder is not None:
                try:
                    displacement = recorder.displacement(output)
                    if reason := recorder.own_backward(output, self._is_foreign[l]):
                        raise Uncovered(reason)
                except Uncovered as reason:
                    raise Uncovered(f"model[{l - 1}]: {reason}") from reason
                places = [[held.place(x) for x in line.tensors] for line in displacement.lines]
                self._lines[l] = displacement.result, displacement.lines, places
            self._drawn[l] = [held.place(numbers) for numbers in watched.drawn]
            if l in self._at_vhat:
                found += self._found(l, output, own, x, errors[l])
            vhat.append(output.detach())
        prediction = vhat[-1].detach().requires_grad_()
        with torch.enable_grad(), Watched() as watched:
            Loss = check_loss(parts.run(L + 1, own, prediction))
        outside = {storage(x) for x in inputs if isinstance(x, Tensor)}
        if watched.drawn or watched.written & outside:
            raise Uncovered("LossFun draws random numbers or changes its buffers")
        self._leaves_of[L + 1] = _places(_captured(Loss, [prediction], "LossFun").leaves, own)
        dLdy = output_gradient(Loss, prediction)
        if asked.has_prior:
            beliefs = [in_belief_dtype(x).detach().requires_grad_() for x in vhat[:-1]]
            with torch.enable_grad(), Watched() as watched:
                energy = parts.run(L + 2, own, *beliefs)
            check_scalar("prior", energy)
            if watched.drawn or watched.written & outside:
                raise Uncovered("prior draws random numbers or changes its buffers")
            self._leaves_of[L + 2] = _places(_captured(energy, beliefs, "prior").leaves, own)
        self._before = {
            k: held.place(clone) for k, clone in before.items() if storage(inputs[k]) in written
        }
        self._hold(vhat, Loss, dLdy)
        return [*held.tensors[count:], *found]

    def _backpropagate(self, *given: Any) -> list[Tensor]:
        """Forward through all layers and the loss, and down again, from layer to layer.

        After the inputs come the factors of the layers' errors and those of the beliefs' (``exact.py``).
        Returns what is to be held, the beliefs, the errors, the input's error and the updates.
        """
        parts, L = self._parts, self.asked.L
        count = len(parts.placeholders)
        inputs, c_epsilon, c_v = given[:count], given[count : count + L], given[count + L :]
        held = self._held = Held(inputs)
        own = [_leaf(x) for x in inputs]
        X = parts.run(0, own)
        self.asks_input = X.requires_grad
        vhat, layers = [X.detach()], []
        for l in range(1, L + 1):
            x = vhat[-1].detach()
            with SameDraws():
                output = self._evaluated(l, own, x)
            layers.append((x, output))
            vhat.append(output.detach())
        prediction = vhat[-1].detach().requires_grad_()
        with torch.enable_grad(), SameDraws():
            Loss = check_loss(parts.run(L + 1, own, prediction))
        leaves = self._leaves_of[L + 1] = _places(
            _captured(Loss, [prediction], "LossFun").leaves, own
        )
        dLdy, *found = gradient([Loss], [prediction, *[own[k] for k in leaves]])
        if dLdy is None:
            raise independent_loss()
        self._hold(vhat, Loss, dLdy)
        updates: dict[int, Tensor] = {}
        _add(updates, leaves, found)
        g: Tensor | None = dLdy
        v: list[Tensor] = []
        epsilon: list[Tensor] = []
        for l in range(L, 0, -1):
            of_belief = in_belief_dtype(torch.zeros_like(vhat[l]) if g is None else g)
            epsilon.insert(0, of_belief * c_epsilon[l - 1])
            v.insert(0, in_belief_dtype(vhat[l]) - of_belief * c_v[l - 1])
            (x, output), leaves = layers[l - 1], self._leaves_of[l]
            asked = [own[k] for k in leaves]
            if l > 1 or self.asks_input:
                asked.append(x)
            found = [None] * len(asked) if g is None else gradient([output], asked, [g])
            g = found[len(leaves)] if len(asked) > len(leaves) else None
            scaled = [None if y is None else _times(y, c_epsilon[l - 1]) for y in found]
            _add(updates, leaves, scaled[: len(leaves)])
        input_error = []
        if self.asks_input:
            input_error = [_times(torch.zeros_like(vhat[0]) if g is None else g, c_epsilon[0])]
        # What the loss does not depend on has no update.
        self.leaves = sorted(updates)
        return [
            *held.tensors[count:],
            *v,
            *epsilon,
            *input_error,
            *[updates[k] for k in self.leaves],
        ]

    def _step(self, level: int, *given: Any) -> list[Tensor]:
        """The beliefs of layers ``level - 1`` and above after a step, and the errors of it."""
        asked, L = self.asked, self.asked.L
        held, eta, pi, is_reached, rest = self._divided(given)
        inputs = self._inputs_of(held)
        delta = dict(zip(range(level - 1, L), rest, strict=True))
        epsilon: dict[int, Tensor] = {}
        moved: list[Tensor] = []
        of_prior = self._of_prior(held, inputs, delta) if asked.has_prior else [None] * L
        if level == 2 == asked.lowest:
            epsilon[1] = -delta[1]
        for l in range(level, L + 1):
            displacement = self._displacement(l, held)
            with outside_autocast(delta[l - 1].device):
                d, saved = displacement.forward(delta[l - 1])
            epsilon[l] = d - delta[l] if l < L else self._output_error(held, inputs, d)
            if l < L and self.skips:
                epsilon[l] = torch.where(is_reached[l], epsilon[l], 0.0)
            with outside_autocast(delta[l - 1].device):
                arriving = displacement.backward(saved, self._weighted(epsilon[l], pi, l))
            descended: Any = 0.0
            for part in (arriving, of_prior[l - 1]):
                descended = descended if part is None else descended + part
            if l - 1 in epsilon:
                descended = descended - self._weighted(epsilon[l - 1], pi, l - 1)
            moved.append(delta[l - 1] - eta * descended)
        return [*moved, *epsilon.values()]

    def _errors_of(self, *given: Any) -> list[Tensor]:
        """The hidden errors of beliefs that have moved so far."""
        held, _, _, _, delta = self._divided(given)
        errors = [-delta[0]]
        for l in range(2, self.asked.L):
            with outside_autocast(delta[0].device):
                d, _ = self._displacement(l, held).forward(delta[l - 2])
            errors.append(d - delta[l - 1])
        return errors

    def _error_step(self, *given: Any) -> list[Tensor]:
        """The hidden errors after a step."""
        held, eta, _, _, hidden = self._divided(given)
        _, saved, arriving = self._climb(held, self._inputs_of(held), hidden)
        moved: list[Tensor] = []
        g: Tensor | None = arriving
        for l in range(self.asked.L - 1, 0, -1):
            if g is not None:
                with outside_autocast(g.device):
                    g = self._displacement(l + 1, held).backward(saved.pop(), g)
            epsilon = hidden[l - 1]
            moved.insert(0, epsilon - eta * (epsilon if g is None else epsilon - g))
        return moved

    def _climb(
        self, held: Sequence[Any], inputs: Sequence[Any], hidden: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Any], Tensor]:
        """How far beliefs 1..L-1 have moved with such errors, what each layer has saved for the way
        down, and the output's error."""
        delta, saved = [-hidden[0]], []
        for l in range(2, self.asked.L + 1):
            with outside_autocast(hidden[0].device):
                d, of_layer = self._displacement(l, held).forward(delta[-1])
            saved.append(of_layer)
            if l < self.asked.L:
                delta.append(d - hidden[l - 1])
        return delta, saved, self._output_error(held, inputs, d)

    def _updates(self, *given: Any) -> list[Tensor]:
        """The beliefs, the errors where they are taken at the end, the input's error, the updates."""
        asked, L = self.asked, self.asked.L
        held, _, pi, _, rest = self._divided(given)
        inputs, vhat = self._inputs_of(held), [find(held, place) for place in self.vhat]
        if asked.relaxes_errors:
            moved, _, output_error = self._climb(held, inputs, rest)
            rest = [torch.zeros_like(in_belief_dtype(vhat[0])), *moved, *rest, output_error]
        delta = rest[:L]
        epsilon: list[Any] = [None, *rest[L : 2 * L]]
        v = [in_belief_dtype(x) + d for x, d in zip(vhat, delta, strict=False)]
        at = v
        if asked.update_at == "before":
            before = rest[2 * L :]
            at = [in_belief_dtype(x) + d for x, d in zip(vhat, before, strict=False)]
        if asked.takes_errors and not asked.relaxes_errors:
            for l in range(1, L + 1):
                with outside_autocast(delta[0].device):
                    d, _ = self._displacement(l, held).forward(delta[l - 1])
                epsilon[l] = d - delta[l] if l < L else self._output_error(held, inputs, d)
        errors: list[Any] = [None]
        errors += [self._weighted(epsilon[l], pi, l) for l in range(1, L + 1)]
        cut = [find(held, place) for place in self._cut]
        rest = fx.Interpreter(self._rest).run(*cut, *[errors[l] for l in self._at_vhat])
        updates: dict[int, Tensor] = {}
        y, input_error = vhat[L], []
        for l in range(1, L + 1):
            leaves, output = self._leaves_of[l], vhat[L]
            if l in self._at_vhat:
                count = len(leaves) + (l == 1 and self.asks_input)
                found, rest = rest[:count], rest[count:]
                if l == 1 and self.asks_input:
                    *found, of_input = found
                    input_error = [of_input]
            else:
                if not leaves and not (l == L and self._leaves_of[L + 1]):
                    continue
                x = at[l - 1].to(vhat[l - 1].dtype).detach().requires_grad_()
                drawn = [find(held, place) for place in self._drawn[l]]
                own = self._leaves(inputs)
                with torch.enable_grad(), Watched(drawn):
                    output = self._parts.run(l, own, x)
                found = self._found(l, output, own, x, errors[l])
                y = output.detach()
            _add(updates, leaves, found)
        own = self._leaves(inputs)
        if self._leaves_of[L + 1]:
            y = y.detach().requires_grad_()
            with torch.enable_grad():
                Loss = self._parts.run(L + 1, own, y)
            leaves = self._leaves_of[L + 1]
            _add(updates, leaves, gradient([Loss], [own[k] for k in leaves]))
        if asked.has_prior and self._leaves_of[L + 2]:
            beliefs = [x.detach().requires_grad_() for x in v]
            with torch.enable_grad():
                energy = self._parts.run(L + 2, own, *beliefs)
            leaves = self._leaves_of[L + 2]
            _add(updates, leaves, gradient([energy], [own[k] for k in leaves]))
        v.append(in_belief_dtype(vhat[L]).clone())
        taken = epsilon[1:] if asked.takes_errors else []
        return [
            *v[asked.lowest - 1 :],
            *taken,
            *input_error,
            *[updates[k] for k in sorted(updates)],
        ]

    # Parts of these.

    def _evaluated(self, l: int, own: Sequence[Any], x: Tensor) -> Tensor:
        """The output of layer l at ``x``, with its graph."""
        x.requires_grad_(x.is_floating_point())
        version = x._version
        with torch.enable_grad():
            output = self._parts.run(l, own, x)
            if x._version != version or not output.dtype.is_floating_point:
                raise Uncovered(f"model[{l - 1}] is no function of its input")
            if output.is_leaf or output._is_view():
                output = own_output(output, x)
        graph = _captured(output, [x], f"model[{l - 1}]")
        self._leaves_of[l] = _places(graph.leaves, own)
        self._is_linear[l], self._is_foreign[l] = not graph.foreign, graph.is_foreign
        return output

    def _hold(self, vhat: Sequence[Tensor], Loss: Tensor, dLdy: Tensor) -> None:
        """Hold what a feed-forward pass has found, and what the captured call returns."""
        held, parts = self._held, self._parts
        self.vhat = [held.place(x) for x in vhat]
        self.Loss, self.dLdy = held.place(Loss.detach().clone()), held.place(dLdy.detach())
        self.results = [
            self.Loss if result in parts.marks else held.place(parts.kept[result])
            for result in parts.results
        ]

    def _divided(self, given: Sequence[Any]) -> tuple[Any, Any, Any, Any, Any]:
        """What is held, eta, the precisions, which layers are reached, and the state."""
        a, L = len(self._held.tensors), self.asked.L
        b, c = a + L + 2, a + 2 * L + 3
        return given[:a], given[a], given[a + 1 : b], given[b:c], given[c:]

    def _inputs_of(self, held: Sequence[Any]) -> list[Any]:
        """The inputs as they were before the call."""
        inputs = list(held[: len(self._parts.placeholders)])
        for k, place in self._before.items():
            inputs[k] = find(held, place)
        return inputs

    def _leaves(self, inputs: Sequence[Any]) -> list[Any]:
        """Tensors that require grad where they should, and that may be written into."""
        own = list(inputs)
        for leaves in self._leaves_of.values():
            for k in leaves:
                own[k] = inputs[k].detach().requires_grad_()
        for k in self._before:
            own[k] = inputs[k].clone()
        return own

    def _displacement(self, l: int, held: Sequence[Any]) -> Displacement:
        result, lines, places = self._lines[l]
        lines = [
            line._replace(tensors=tuple([find(held, place) for place in of_line]))
            for line, of_line in zip(lines, places, strict=True)
        ]
        return Displacement(lines, result, find(held, self.vhat[l]))

    def _weighted(self, error: Tensor, pi: Sequence[Tensor], l: int) -> Tensor:
        return error * pi[l] if self.asked.is_weighted else error

    def _output_error(self, held: Sequence[Any], inputs: Sequence[Any], d: Tensor) -> Tensor:
        """The loss's gradient where the prediction of the output has moved to."""
        L = self.asked.L
        vhat = find(held, self.vhat[L])
        with torch.enable_grad():
            prediction = (vhat.to(d.dtype) + d).to(vhat.dtype).detach().requires_grad_()
            Loss = self._parts.run(L + 1, inputs, prediction)
        (epsilon,) = gradient([Loss], [prediction])
        return torch.zeros_like(d) if epsilon is None else epsilon.to(d.dtype)

    def _of_prior(
        self, held: Sequence[Any], inputs: Sequence[Any], delta: dict[int, Tensor]
    ) -> Any:
        vhat = [in_belief_dtype(find(held, place)) for place in self.vhat]
        beliefs = [(vhat[l] + d).detach().requires_grad_() for l, d in delta.items()]
        with torch.enable_grad():
            energy = self._parts.run(self.asked.L + 2, inputs, *beliefs)
        return gradient([energy], beliefs)

    def _found(
        self, l: int, output: Tensor, own: Sequence[Any], x: Tensor, error: Tensor
    ) -> list[Tensor]:
        """(df_l/dtheta_l)^T error for the leaves of layer l, and for the input where it is asked."""
        asked = [own[k] for k in self._leaves_of[l]]
        asked += [x] if l == 1 and self.asks_input else []
        if self._is_linear[l]:
            found = gradient_of_small(output, asked, error)
        else:
            found = gradient([output], asked, [error.to(output.dtype)])
        return [torch.zeros_like(y) if g is None else g for g, y in zip(found, asked, strict=True)]


def levels(L: int, lowest: int) -> list[int]:
    """The lowest layers that steps begin at: ``lowest``, and some of those that errors reach first.

    All of them in up to 10 layers; fewer in deeper models, as what they evaluate has to be compiled.
    """
    apart = max(1, min(round(L * L / 80), (L + 2 - lowest) // 2))
    return list(range(lowest, L + 1, apart))


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
