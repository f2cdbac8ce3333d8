"""``pc_graph``: a model of any connections, as a graph of layers with beliefs where they are asked for.

``forward.py`` follows the model's forward. Here its record is cut at the beliefs, each layer being what lies
between a belief and those that it is computed from, and what comes of it is held against the model itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from torch2pc.cutting.between import Between
from torch2pc.cutting.chain import cut, layer_of
from torch2pc.cutting.forward import (
    Forward,
    NoLayers,
    Opens,
    check_followable,
    follow_forward,
    has_weights,
    is_block,
    is_normalisation,
    what,
    writes,
)
from torch2pc.cutting.same import OfModel, check_same, untouched
from torch2pc.cutting.sizes import Sizes, read_by
from torch2pc.graph.nodes import PCGraph
from torch2pc.graph.state import (
    Source,
    devices_of,
    drawn_from,
    generators_in,
    random_state,
    same_values,
)

Beliefs = str | Iterable[str] | Callable[[str, nn.Module], object]


def pc_graph(model: nn.Module, X: Tensor, beliefs: Beliefs | None = None) -> PCGraph:
    r"""Make a ``PCGraph`` of any model whose forward can be followed, with beliefs inside its blocks.

    There is a belief v_i at the output of each module that ``beliefs`` names, in each of its calls, and at
    the model's output. Its layer f_i is every operation between it and the beliefs that it is computed from,
    its parents: ``F = LossFun(f_L(v_parents), Y) + 1/2 sum_i ||f_i(v_parents) - v_i||^2``. Residual
    connections, concatenations, and branches that part and meet again may go around beliefs as they like.

    - The layers hold the modules, parameters and buffers of the model, not copies: training one trains the
      other. Keep the model to save and load, and move or convert it first.
    - A module that is called several times, such as a cell that is unrolled, makes as many layers, whose
      weights are tied.
    - What feeds several layers and has no belief is computed in each of them: along a residual stream each
      layer has all before it as parents, unless there are beliefs at the outputs of the blocks too
      (``["**.q", "**.k", "**.v", "blocks.*"]``).
    - The sizes of a tensor (``x.shape``) do not make it a parent.
    - Places are called as the modules, with ``_`` for dots (and a number, if that is taken, as in a second
      call); the last is ``"output"`` if it is no module's. A layer's parents are in the order in which it
      meets them.

    The result is held against the model on ``X``, as by ``group_layers``: in train mode on ``X`` and in eval
    mode on ``X`` twice over, outputs, gradients and buffers must be equal. Nothing of the model is changed
    by that. The forward is followed once, and where it branches on the shape of its input, the branch that X
    took is taken ever after. If the model is changed later, the layers follow, or raise an error that names
    the change, as those of ``group_layers`` do.

    Args:
        model: a module that takes one tensor and returns one.
        X: a small batch of inputs, ``(batch, *features)``, of the shape that it is used with; two or
            more examples if it normalises over the batch.
        beliefs: which modules. Their qualified names, or patterns of these, in which ``*`` stands for
            anything within one part of a name, ``?`` for a letter and ``**`` for any number of parts
            (``"layer*.*.conv1"``, ``"**.q"``); or a function of ``(name, module)`` that says whether it
            is one. Containers are modules too. By default each module with weights (a matrix or a
            kernel), after a normalisation that directly follows it, and what draws random
            numbers or changes buffers and would be computed in several layers, or after what comes later.

    Returns:
        A ``PCGraph`` for ``PCInfer``; ``names`` and ``parents`` say what was found.

    Raises:
        TypeError: ``model`` is no ``nn.Module``, or wrapped (DistributedDataParallel, torch.compile);
            ``X`` is no tensor; ``beliefs`` is something else than the above.
        ValueError: a belief is at no module of the model, or at one that the forward does not call, whose
            output is used nowhere, is not one floating-point tensor (an LSTM's tuple), or does not depend
            on the input; the model cannot be followed, has lazy modules or none with weights, has hooks on
            a container that would be opened; something that draws random numbers or changes buffers has
            no belief and would be computed more than once, or out of turn; the result does not do what the
            model does.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch2pc import PCInfer, pc_graph
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.stem, self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        ...         self.head = nn.Linear(8, 3)
        ...     def forward(self, x):
        ...         x = self.stem(x)
        ...         x = x + self.b(torch.relu(self.a(x)))
        ...         return self.head(x)
        >>> model = Net()
        >>> graph = pc_graph(model, torch.rand(2, 4))
        >>> [(name, [graph.names[p] for p in ps]) for name, ps in zip(graph.names[1:], graph.parents)]
        [('stem', ['x']), ('a', ['stem']), ('b', ['a']), ('head', ['stem', 'b'])]
        >>> X, Y = torch.rand(16, 4), torch.randint(3, (16,))
        >>> result = PCInfer(graph, nn.CrossEntropyLoss(), X, Y, "Strict", eta=0.1, n=20)
        >>> all(p.grad is not None for p in model.parameters())
        True

    Source: Millidge, Tschantz and Buckley, arXiv:2006.04182 (2020); Salvatori et al., Learning on
    arbitrary graph topologies via predictive coding, NeurIPS (2022).
    """
    check_followable(model, X)
    chosen = _chosen(model, beliefs)
    with torch.inference_mode(False), torch.enable_grad():
        with untouched(model, X):
            forward = follow_forward(model, X, "model", _holders(model, chosen))
            cutter = _Cutter(forward, X)
            places = _places(forward, chosen, cutter.nodes, by_default=beliefs is None)
            layers = cutter.layers(places, by_default=beliefs is None)
            named: dict[str, Any] = _named(layers)
            graph = GraphOfModel(**named)
            for module, name in _idle(layers):
                forward.origin.watch(module, name)
        graph.belong_to(model, forward.origin, "pc_graph", "Follow it anew, graph = ")
        check_same(model, graph, X, "a graph")
    return graph


class GraphOfModel(OfModel, PCGraph):
    """The layers of a model, connected as in its forward."""

    def _get_name(self) -> str:
        return "PCGraph"


# Which modules.


def _chosen(model: nn.Module, beliefs: Beliefs | None) -> dict[nn.Module, str]:
    """The modules that beliefs are asked for at, and their names."""
    if beliefs is None:
        names = {module: name for name, module in model.named_modules()}
        if not has_weights(model):
            raise ValueError("model must have a module with weights, got none")
        return {module: names[module] for module in _weighted(model)}
    named = dict(model.named_modules(remove_duplicate=False))
    del named[""]
    # What has no forward of its own is not meant by a pattern, nor is what makes a weight.
    meant = {
        name: module
        for name, module in named.items()
        if type(module).forward is not nn.Module.forward and "parametrizations" not in name
    }
    if callable(beliefs) and not isinstance(beliefs, nn.Module | type):
        found = [name for name, module in meant.items() if beliefs(name, module)]
    else:
        found = _matching([beliefs] if isinstance(beliefs, str) else beliefs, named, [*meant])
    if not found:
        raise ValueError(
            f"beliefs must choose at least one module, got {beliefs!r}, which does not"
        )
    whole = [f"{name}." for name, module in named.items() if _is_whole(module)]
    _check_called([name for name in found if name.startswith(tuple(whole))])
    chosen: dict[nn.Module, str] = {}
    for name in found:
        chosen.setdefault(named[name], name)
    return chosen


def _matching(patterns: object, named: Iterable[str], meant: Sequence[str]) -> list[str]:
    """The names that are given, or that a pattern stands for."""
    accepted = (
        "beliefs must be names of modules, patterns of names, or a function of (name, module)"
    )
    if not isinstance(patterns, Iterable) or isinstance(patterns, nn.Module | type):
        raise TypeError(f"{accepted}, got {type(patterns).__name__}")
    found: list[str] = []
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"{accepted}, got {type(pattern).__name__} among them")
        regex = re.escape(pattern).replace(r"\*\*", ".*").replace(r"\*", r"[^.]*")
        regex = regex.replace(r".*\.", r"(.*\.)?").replace(r"\?", "[^.]")
        matches = [pattern] if pattern in named else [n for n in meant if re.fullmatch(regex, n)]
        if not matches:
            few = ", ".join(meant[:20]) + (", ..." if len(meant) > 20 else "")
            raise ValueError(
                f"beliefs must be at modules of the model, but there is none called {pattern!r} (* "
                f"stands for anything but a dot, ** for that too): there are {few}"
            )
        found += matches
    return found


def _is_whole(m: nn.Module) -> bool:
    """Whether a module is one of PyTorch's that use their children's weights, and may not call them."""
    file = type(m).__module__
    return file.startswith("torch.nn.modules.") and not file.endswith(
        (".container", ".transformer")
    )


def _weighted(container: nn.Module) -> Iterator[nn.Module]:
    """The innermost modules with weights."""
    for child in container.children():
        inside = [] if _is_whole(child) or not is_block(child) else list(_weighted(child))
        if inside:
            yield from inside
        elif has_weights(child):
            yield child


def _holders(model: nn.Module, chosen: Iterable[nn.Module]) -> Opens:
    """Whether a module, whatever it is called with, has to be opened: some of the chosen are inside."""
    wanted = set(chosen)
    holders = {m for m in model.modules() if not wanted.isdisjoint(set(m.modules()) - {m})}
    return lambda m, x: m in holders


def _places(
    forward: Forward, chosen: dict[nn.Module, str], needed: Sequence[fx.Node], by_default: bool
) -> dict[fx.Node, str]:
    """The nodes that are beliefs, and what they are called."""
    used, places = set(needed), dict[fx.Node, str]()
    if not by_default:
        _check_called([name for m, name in chosen.items() if not forward.outputs_of(m)])
    for module, name in chosen.items():
        outputs = forward.outputs_of(module)
        if by_default:
            outputs = [node for node in outputs if isinstance(node, fx.Node) and node in used]
        for node in outputs:
            if (reason := _why_no_belief(node)) is not None:
                raise ValueError(
                    f"beliefs must be at modules with one floating-point tensor as their output, but "
                    f"{name} {reason}: leave it out, so that it is in the layer that it feeds, or make "
                    "a module of it that returns the tensor that is meant"
                )
        outputs = [node for node in outputs if node in used]
        if not outputs and not by_default:
            raise ValueError(
                f"beliefs must be at modules that the model's output depends on, but {name}'s is used "
                "nowhere: leave it out"
            )
        for node in outputs:
            place = _normalised(node, forward.root, used) if by_default else node
            # A container may return the output of one of its modules that is chosen as well.
            if place is not node or module not in forward.opened:
                places[place] = _name_of(place)
            else:
                places.setdefault(place, name)
    return places


def _name_of(node: fx.Node) -> str:
    is_called = node.op == "call_module"
    return str(node.target).partition(".")[2] if is_called else node.name


def _why_no_belief(node: Any) -> str | None:
    """Why the value of a node, or what is none, can be no belief."""
    value = node.meta["value"] if isinstance(node, fx.Node) else node
    if not isinstance(value, Tensor):
        return f"returns a {type(value).__name__}"
    if not value.is_floating_point():
        return f"returns a tensor of {value.dtype}"
    if not isinstance(node, fx.Node) or not node.meta["moves"]:
        return "does not depend on the model's input"
    return "returns the model's input" if node.op == "placeholder" else None


def _normalised(node: fx.Node, root: nn.Module, used: set[fx.Node]) -> fx.Node:
    """The normalisation that a node feeds, if it feeds nothing else."""
    users = [user for user in node.users if user in used]
    if len(users) != 1 or users[0].op != "call_module" or users[0].args != (node,):
        return node
    normalises = is_normalisation(root.get_submodule(str(users[0].target)))
    return _normalised(users[0], root, used) if normalises else node


def _check_called(uncalled: Sequence[str]) -> None:
    if uncalled:
        raise ValueError(
            "beliefs must be at modules that the forward calls, but it does not call "
            f"{', '.join(uncalled)} (though it may use their weights): leave these out"
        )


# Which layers.


class _Layer:
    """What predicts a belief."""

    def __init__(
        self,
        name: str | None,
        root: nn.Module,
        nodes: list[fx.Node],
        entries: list[fx.Node],
        replaced: dict[fx.Node, Any],
    ) -> None:
        self.name, self.root = name, root
        self.nodes, self.entries, self.replaced = nodes, entries, replaced

    @property
    def result(self) -> fx.Node:
        return self.nodes[-1]

    def runs(self) -> list[fx.Node]:
        """All that it runs, also what does not depend on the input."""
        found = dict.fromkeys(self.nodes)
        waiting = list(found)
        for node in waiting:
            new = [n for n in node.all_input_nodes if not n.meta["moves"] and n not in found]
            found.update(dict.fromkeys(new))
            waiting += new
        return list(found)

    @property
    def writes(self) -> bool:
        """Whether it may write into what it is given."""
        modules = [part for module in self.called for part in module.modules()]
        return any(map(writes, self.nodes)) or any(getattr(m, "inplace", False) for m in modules)

    @property
    def called(self) -> list[nn.Module]:
        called = [node for node in self.nodes if node.op == "call_module"]
        return [self.root.get_submodule(str(node.target)) for node in called]

    def module(self, copies: bool) -> nn.Module:
        """The layer as a module; ``copies``: its inputs, if it may write into them."""
        if copies and self.writes:
            return Between(self.root, self.nodes, self.entries, self.replaced, copies)
        first = self.nodes[0]
        is_call = len(self.nodes) == len(self.called) == 1 and not first.kwargs
        if is_call and list(first.args) == self.entries:
            return self.called[0]
        if len(self.entries) == 1 and not self.replaced:
            return layer_of(cut([*self.entries, *self.nodes], self.root))
        return Between(self.root, self.nodes, self.entries, self.replaced)


class _Cutter:
    """Cuts a model's forward at any places."""

    def __init__(self, forward: Forward, X: Tensor) -> None:
        self.forward, self._sizes = forward, Sizes(forward, X)
        self.nodes = forward.needed()
        self._position = {node: i for i, node in enumerate(forward.graph.nodes)}
        self._reads = {node: read for node in self.nodes if (read := read_by(node)) is not None}
        self._effects = _Effects(forward, X)

    def layers(self, places: dict[fx.Node, str], by_default: bool) -> list[_Layer]:
        """The layers between these places, each after its parents.

        What has effects is to happen once and in turn: by default it becomes a place where it would not.
        """
        while True:
            layers = self._between(places)
            found = self._out_of_turn(layers)
            if found is None:
                return layers
            node, reason = found
            if not by_default or _why_no_belief(node) is not None:
                raise NoLayers(
                    f"{what(node, 'model')} {reason}. Put a belief there (beliefs are at the outputs of "
                    "modules: make it one, if it is none)"
                )
            places[node] = _name_of(node)

    def _between(self, places: dict[fx.Node, str]) -> list[_Layer]:
        wanted, layers = {self.nodes[-1]}, list[_Layer]()
        for node in reversed(self.nodes[1:]):
            if node in wanted:
                layers.append(self._layer(node, places))
                wanted.update(layers[-1].entries)
        return layers[::-1]

    def _layer(self, result: fx.Node, places: dict[fx.Node, str]) -> _Layer:
        """What lies between a node and the places before it."""
        found, waiting = {result}, [result]

        def is_given(node: fx.Node) -> bool:
            return node.op == "placeholder" or (node in places and node is not result)

        while True:
            for node in waiting:
                # A tensor of which only sizes are read is not needed for that.
                passed_over = node.args[0] if node in self._reads else None
                new = [b for b in node.all_input_nodes if b.meta["moves"] and b is not passed_over]
                if not is_given(node):
                    new = [before for before in new if before not in found]
                    found.update(new)
                    waiting += new
            inside = self._in_order(node for node in found if not is_given(node))
            reads = [node for node in inside if node in self._reads]
            elsewhere = [node for node in reads if self._reads[node].tensor not in found]
            given = self._in_order(filter(is_given, found))
            replaced = {node: self._sizes.found_at(node, given) for node in elsewhere}
            lacking = [self._reads[node].tensor for node in elsewhere if replaced[node] is None]
            if not lacking:
                break
            found.add(lacking[0])
            waiting = [lacking[0]]
        # On the way from a tensor to one of its sizes.
        between = [node.args[0] for node in reads if node not in replaced]
        found.update(node for node in between if isinstance(node, fx.Node))
        nodes = self._in_order(n for n in found if not is_given(n) and n not in replaced)
        met = [before for node in nodes for before in node.all_input_nodes if is_given(before)]
        entries = list(dict.fromkeys(met))
        return _Layer(places.get(result), self.forward.root, nodes, entries, replaced)

    def _in_order(self, nodes: Iterable[fx.Node]) -> list[fx.Node]:
        return sorted(nodes, key=self._position.__getitem__)

    def _out_of_turn(self, layers: Sequence[_Layer]) -> tuple[fx.Node, str] | None:
        """What draws random numbers or changes buffers twice, or after what should come later."""
        seen: dict[fx.Node, _Layer] = {}
        last = -1
        for layer in layers:
            for node in self._in_order(layer.runs()):
                draws, changes = node in self._effects.draws, node in self._effects.changes
                does = "draws random numbers" if draws else "changes buffers"
                if (draws or changes) and node in seen:
                    two = " and ".join(_word(each) for each in (seen[node], layer))
                    return node, f"{does}, and would do so once for each layer that it feeds, {two}"
                seen[node] = layer
                if draws and self._position[node] < last:
                    return (
                        node,
                        f"{does}, and would do so late, in the layer that it feeds, {_word(layer)}",
                    )
                last = max(last, self._position[node]) if draws else last
        return None


def _word(layer: _Layer) -> str:
    return "that of the output" if layer.name is None else f"that of {layer.name}"


class _Effects(fx.Interpreter):
    """Which operations of a forward draw random numbers or change buffers, in train mode."""

    def __init__(self, forward: Forward, X: Tensor) -> None:
        super().__init__(forward.root, graph=forward.graph)
        modules = list(forward.root.modules())
        self._sources: list[Source] = [
            *devices_of(modules, X),
            *generators_in(forward.root, modules),
        ]
        self.draws, self.changes = set[fx.Node](), set[fx.Node]()
        for module in modules:
            module.training = True
        with torch.no_grad():
            self.run(X.clone())

    def run_node(self, n: fx.Node) -> Any:
        random = random_state(self._sources)
        module = self.fetch_attr(str(n.target)) if n.op == "call_module" else nn.Module()
        before = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
        value = super().run_node(n)
        if drawn_from(random):
            self.draws.add(n)
        after = list(module.buffers())
        if len(after) != len(before) or any(
            now is not buffer or not same_values(now, then)
            for now, (buffer, then) in zip(after, before, strict=True)
        ):
            self.changes.add(n)
        return value


def _idle(layers: Iterable[_Layer]) -> Iterator[tuple[nn.Module, str]]:
    """The probabilities of 0, with another of which dropout would draw, perhaps out of turn."""
    for layer in layers:
        for module in [part for called in layer.called for part in called.modules()]:
            for name in ("p", "dropout"):
                value = vars(module).get(name)
                if isinstance(value, float | int) and value == 0:
                    yield module, name
        for node in layer.nodes:
            if "dropout" in str(getattr(node.target, "__name__", "")):
                reads = [n for n in node.all_input_nodes if "read" in n.meta]
                yield from [n.meta["read"] for n in reads if n.meta["value"] == 0]


# What they are called.


def _named(layers: Sequence[_Layer]) -> dict[str, tuple[Any, ...]]:
    """What makes a ``PCGraph`` of the layers."""
    names: dict[fx.Node, str] = {}
    taken = {"x", "names", "parents", "above", "above_parents", *vars(nn.Module())}
    for layer in layers:
        base = name = "output" if layer.name is None else layer.name.replace(".", "_")
        count = 0
        while name in taken or hasattr(GraphOfModel, name):
            count += 1
            name = f"{base}_{count}"
        taken.add(name)
        names[layer.result] = name
    # What one layer writes into could be, or share its memory with, what another one is given.
    feeds = [entry for layer in layers for entry in layer.entries]
    has_shared = len(feeds) > len(set(feeds))
    return {
        names[layer.result]: (
            layer.module(copies=has_shared),
            *[names.get(entry, "x") for entry in layer.entries],
        )
        for layer in layers
    }
