"""How a model's forward runs its modules one after the other, found by following it once.

``torch.fx`` records what the forward does between its modules (flattening, adding an embedding), and
each step is evaluated on a sample meanwhile, so that branches on shapes can be followed too. ``chain``
cuts the record wherever a single tensor carries everything on. How the pieces become predictive
coding layers is up to ``grouping.py``.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from torch2pc.graph.layers import HOOKS


class NoChain(ValueError):
    """The model cannot be cut into layers; the message says what is in the way."""


class Piece:
    """What lies between two neighbouring cuts: one module by itself, or some operations."""

    def __init__(self, nodes: Sequence[fx.Node], root: nn.Module) -> None:
        self.nodes, self.root = nodes, root
        called = [node for node in nodes if node.op == "call_module"]
        self.modules = [root.get_submodule(str(node.target)) for node in called]
        self.weighted = [
            node for node, module in zip(called, self.modules, strict=True) if has_weights(module)
        ]

    @property
    def module(self) -> nn.Module | None:
        """The module that is called with the input alone, if nothing else is done."""
        first = self.nodes[0]
        alone = len(self.nodes) == 1 and first.op == "call_module"
        return self.modules[0] if alone and len(first.args) == 1 and not first.kwargs else None

    @property
    def has_parameters(self) -> bool:
        """Whether its operations use parameters that belong to no module called here."""
        return any(isinstance(_attribute(self.root, node), nn.Parameter) for node in self._held())

    def _held(self) -> list[fx.Node]:
        waiting, found = list(self.nodes), dict[fx.Node, None]()
        for node in waiting:
            for before in node.all_input_nodes:
                if not before.meta["moves"] and before not in found:
                    found[before] = None
                    waiting.append(before)
        return [node for node in found if node.op == "get_attr"]


class Between(nn.Module):
    """Operations that a model's forward does between its modules, as a module.

    Parameters and buffers that they use are those of the model, under the same names.
    """

    def __init__(self, pieces: Sequence[Piece]) -> None:
        super().__init__()
        graph, root = fx.Graph(), pieces[0].root
        nodes = [node for piece in pieces for node in piece.nodes]
        # What is neither an input that moves nor computed here is held: parameters, mostly.
        made: dict[fx.Node, fx.Node] = {}
        entry = next(before for before in nodes[0].all_input_nodes if before.meta["moves"])
        made[entry] = graph.placeholder("x")

        def copy(node: fx.Node) -> fx.Node:
            if node not in made:
                made[node] = graph.node_copy(node, copy)
            return made[node]

        graph.output(copy(nodes[-1]))
        for node in graph.nodes:
            node.meta.clear()  # values on the sample
        self.run = fx.GraphModule(root, graph, "Operations")
        self.inplace = any(map(_writes, nodes))

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)

    def extra_repr(self) -> str:
        lines = str(self.run.code).strip().splitlines()
        return "; ".join(line.partition(";")[0].strip() for line in lines[1:-1])


def has_weights(module: nn.Module) -> bool:
    """Whether a module is a layer by its own weights: a matrix, a kernel, or a block with one.

    Normalisations are not, nor are activations with a parameter for each channel.
    """
    return any(
        parameter is not None and parameter.dim() > 1
        for part in module.modules()
        if not is_normalisation(part)
        for parameter in part._parameters.values()
    )


def is_normalisation(module: nn.Module) -> bool:
    """Whether a module normalises, by the names of its class and its bases."""
    return not module._modules and any("Norm" in kind.__name__ for kind in type(module).__mro__)


def is_block(module: nn.Module) -> bool:
    """Whether a module has parts: a block that is kept whole."""
    return any(name != "parametrizations" for name in module._modules)


def chain(model: nn.Module, X: Tensor, name: str = "model") -> list[Piece]:
    """The pieces of ``model``'s forward between all places where it can be cut, in order.

    Containers whose children run one after the other are opened, others are one module. Raises
    ``NoChain`` where two layers cannot be cut apart.
    """
    root = _Root(model)
    pieces = _pieces(_follow(root, X, name, {}), root)
    for piece in pieces:
        if len(piece.weighted) > 1:
            raise NoChain(_in_the_way(piece, name))
    return pieces


class _Root(nn.Module):
    """A model with one input, whatever else its forward accepts; what it holds is 'model....'."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training

    def forward(self, x: Tensor) -> Any:
        return self.model(x)


class _Tracer(fx.Tracer):
    """Records the forward of containers that run their children in order, and calls of the others."""

    proxy_buffer_attributes = True
    trace_asserts = True

    def __init__(self, X: Tensor, name: str, opened: dict[nn.Module, bool]) -> None:
        super().__init__()
        self._X, self._name, self._opened = X, name, opened
        self._evaluates = False

    def create_node(self, kind: str, *arguments: Any, **options: Any) -> fx.Node:
        node = super().create_node(kind, *arguments, **options)
        inputs = node.all_input_nodes
        node.meta["moves"] = kind == "placeholder" or any(n.meta["moves"] for n in inputs)
        node.meta["value"] = None if kind == "output" else self._value(node)
        return node

    def _value(self, node: fx.Node) -> Any:
        """The node's value on the sample."""
        if node.op == "placeholder":
            return self._X.detach().clone()
        args, kwargs = map_aggregate(
            (node.args, node.kwargs), lambda a: a.meta["value"] if isinstance(a, fx.Node) else a
        )
        with self._evaluating(), torch.no_grad():
            if node.op == "get_attr":
                return _attribute(self.root, node)
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            if node.op == "call_module":
                return self.root.get_submodule(str(node.target))(*args, **kwargs)
            return node.target(*args, **kwargs)  # type: ignore[operator]

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        before, self._evaluates = self._evaluates, True
        try:
            yield
        finally:
            self._evaluates = before

    def to_bool(self, obj: fx.Proxy) -> bool:
        value = obj.node.meta["value"]
        if isinstance(value, Tensor):
            raise NoChain(
                f"{self._name} must not branch on the values of tensors, but it does on "
                f"{_what(obj.node, self._name)}"
            )
        return bool(value)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        value = obj.node.meta["value"]
        if isinstance(value, tuple | list):
            return iter([operator.getitem(obj, i) for i in range(len(value))])
        return super().iter(obj)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if self._evaluates:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        if self._evaluates:
            return forward(*args, **kwargs)
        alone = len(args) == 1 and not kwargs
        if type(m) is nn.TransformerEncoder and alone:
            self._check_hooks(m)
            x = args[0]
            for layer in [*m.layers, *([] if m.norm is None else [m.norm])]:
                x = layer(x)
            return x
        if self._is_opened(m, args[0] if alone else None):
            self._check_hooks(m)
            return forward(*args, **kwargs)
        return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)

    def _is_opened(self, m: nn.Module, x: Any) -> bool:
        """Whether a module is a container whose children run one after the other."""
        if type(m).forward is nn.Sequential.forward:
            return True
        if not is_block(m) or type(m).__module__.startswith("torch.nn.modules."):
            return False
        if m is self.root.model:
            return True
        if m not in self._opened:
            value = x.node.meta["value"] if isinstance(x, fx.Proxy) else None
            self._opened[m] = isinstance(value, Tensor) and self._runs_in_order(m, value)
        return self._opened[m]

    def _runs_in_order(self, m: nn.Module, x: Tensor) -> bool:
        """Whether nothing goes around any of its children that have parameters."""
        root = _Root(m)
        with self._evaluating():  # what the tracer of its own evaluates is not to be recorded here
            try:
                pieces = _pieces(_follow(root, x, self._name, self._opened), root)
            except Exception:
                return False
        named = [
            sum(next(module.parameters(), None) is not None for module in piece.modules)
            for piece in pieces
        ]
        return len(pieces) > 1 and all(
            count == 0 or len(piece.nodes) == 1 for count, piece in zip(named, pieces, strict=True)
        )

    def _check_hooks(self, m: nn.Module) -> None:
        if any(getattr(m, table) for table in HOOKS):
            where = self.path_of_module(m).replace("model", self._name, 1)
            raise NoChain(
                f"{where} has hooks, which would not run once its children are layers of their own: "
                "register them on its children"
            )


def _follow(root: _Root, X: Tensor, name: str, opened: dict[nn.Module, bool]) -> fx.Graph:
    """The record of the model's forward, the same in train and in eval mode.

    Where an operation is told the mode, as by ``dropout(x, training=self.training)``, it will be.
    opened: which containers run their children in order, as far as it is known.
    """
    modules = list(root.modules())
    modes = [(module, module.training) for module in modules]
    graphs = []
    try:
        for training in (True, False):
            for module in modules:
                module.training = training
            # Each time a root of its own, as constants are put there.
            graphs.append(_trace(root if training else _Root(root.model), X, name, opened))
    finally:
        for module, training in modes:
            module.training = training
    graph, in_eval = graphs
    # Where one is longer, it differs at the other's output already.
    for node, other in zip(graph.nodes, in_eval.nodes, strict=False):
        _tell_mode(graph, node, other, name)
    return graph


def _trace(root: _Root, X: Tensor, name: str, opened: dict[nn.Module, bool]) -> fx.Graph:
    try:
        return _Tracer(X, name, opened).trace(root)
    except NoChain:
        raise
    except Exception as error:
        line = str(error).strip().partition("\n")[0]
        raise NoChain(
            f"{name} could not be followed ({type(error).__name__}: {line}): write it as an "
            "nn.Sequential, with a module for what cannot be recorded"
        ) from error


def _tell_mode(graph: fx.Graph, node: fx.Node, other: fx.Node, name: str) -> None:
    """Let ``node`` see whether it is in train mode, where its arguments say so."""
    if node.op == other.op == "get_attr" and not _equal(node.meta["value"], other.meta["value"]):
        raise NoChain(
            f"{name} must not make a tensor in its forward that is another one each time, unless it "
            "depends on the input: draw random numbers like the input (torch.randn_like), or in a module"
        )
    mode: list[fx.Node] = []
    differs = node.op != other.op or node.target != other.target
    leaves: list[Any] = []
    map_aggregate((other.args, other.kwargs), leaves.append)
    in_eval = iter(leaves)

    def told(a: Any) -> Any:
        nonlocal differs
        b = next(in_eval, None)
        if a is True and b is False:
            if not mode:
                with graph.inserting_before(node):
                    mode.append(graph.create_node("get_attr", "training"))
                mode[0].meta.update(moves=False, value=True)
            return mode[0]
        same = a.name == b.name if isinstance(a, fx.Node) and isinstance(b, fx.Node) else a is b
        differs = differs or not (same or (not isinstance(a, Tensor) and a == b))
        return a

    node.args, node.kwargs = map_aggregate((node.args, node.kwargs), told)
    if differs:
        raise NoChain(
            f"{name} must do the same in train and in eval mode, but it does not: "
            f"{_what(node, name)} is other than {_what(other, name)}"
        )


def _equal(a: Any, b: Any) -> bool:
    return a is b or (isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b))


def _pieces(graph: fx.Graph, root: nn.Module) -> list[Piece]:
    """The record, cut wherever a single floating-point tensor carries everything on."""
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    result = output.args[0]
    if not isinstance(result, fx.Node) or not result.meta["moves"]:
        raise NoChain(f"model must return a tensor that depends on its input, got {result}")
    if not isinstance(result.meta["value"], Tensor):
        kind = type(result.meta["value"]).__name__
        raise NoChain(f"model must return one tensor, got {kind}")
    needed, waiting = {result}, [result]
    for node in waiting:
        for before in node.all_input_nodes:
            if before not in needed:
                needed.add(before)
                waiting.append(before)
    nodes = [node for node in graph.nodes if node in needed and node.meta["moves"]]
    for node in graph.nodes:
        if node not in needed and _writes(node):
            raise NoChain(
                f"model must not write into tensors in place by a statement of its own, but "
                f"{_what(node, 'model')} does: use its result, or an operation that makes a new one"
            )
    place = {node: i for i, node in enumerate(nodes)}
    last_use = [
        max((place[user] for user in node.users if user in place), default=0) for node in nodes
    ]
    last_use[-1] = len(nodes)
    pieces, start, live = [], 1, {0}
    for i, node in enumerate(nodes[1:], start=1):
        live = {j for j in live if last_use[j] > i} | {i}
        node.meta["live"] = [nodes[j] for j in live if j != i]
        value = node.meta["value"]
        if len(live) == 1 and isinstance(value, Tensor) and value.is_floating_point():
            pieces.append(Piece(nodes[start : i + 1], root))
            start = i + 1
    if start < len(nodes):
        raise NoChain(
            f"model must return a floating-point tensor, got {result.meta['value'].dtype}"
        )
    return pieces


def _in_the_way(piece: Piece, name: str) -> str:
    """What keeps two layers of one piece from being cut apart."""
    first, second = piece.weighted[:2]
    around = first.meta["live"]
    between = f"{_called(first, name)} and {_called(second, name)}"
    if not around:
        reason = f"{_what(first, name)} is no single floating-point tensor"
    else:
        position = {node: i for i, node in enumerate(first.graph.nodes)}
        user = next(
            user
            for user in sorted(around[-1].users, key=position.__getitem__)
            if position[user] > position[first]
        )
        into = _called(user, name) if user.op == "call_module" else f"a later {_operation(user)}"
        reason = f"{_what(around[-1], name)} goes around {_called(first, name)} into {into}"
    return (
        f"{name} is no chain of layers: {reason}, so that it cannot be cut between {between}. Make a "
        "module of what belongs together (a module with such a connection inside is one layer)"
    )


def _called(node: fx.Node, name: str) -> str:
    return str(node.target).replace("model", name, 1)


def _what(node: Any, name: str) -> str:
    """A value in words."""
    if node.op == "placeholder":
        return f"{name}'s input"
    if node.op == "call_module":
        return f"{_called(node, name)}'s output"
    if node.op == "get_attr":
        return _called(node, name)
    inputs = node.all_input_nodes
    return f"{_operation(node)} of {_what(inputs[0], name)}" if inputs else _operation(node)


def _operation(node: fx.Node) -> str:
    if node.target is getattr:
        return str(node.args[1])
    if node.target is operator.getitem:
        return f"[{node.args[1]}]"
    return str(getattr(node.target, "__name__", node.target))


def _writes(node: fx.Node) -> bool:
    """Whether an operation says by its name or arguments that it writes into its input."""
    if node.op not in ("call_function", "call_method"):
        return False
    name = str(getattr(node.target, "__name__", node.target))
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or node.kwargs.get("inplace") is True or node.target in _WRITING


_WRITING = {
    function
    for name, function in inspect.getmembers(operator, callable)
    if name in ("setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "ipow", "imatmul")
}


def _attribute(root: nn.Module, node: fx.Node) -> Any:
    value: Any = root
    for name in str(node.target).split("."):
        value = getattr(value, name)
    return value
