"""How a model's forward runs its modules one after the other, found by following it once.

``torch.fx`` records what the forward does between its modules (flattening, adding an embedding), and
each step is evaluated on a sample meanwhile, so that branches on shapes can be followed too. ``chain``
cuts the record wherever a single tensor carries everything on. How the pieces become predictive
coding layers is up to ``grouping.py``, and what the record took from the model as it was then, and
may be another one later, to ``origin.py``.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from torch2pc.cutting.origin import Attributes, Number, Origin, Reads
from torch2pc.graph.layers import HOOKS
from torch2pc.graph.warn import warn_caller


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
        return any(isinstance(_attribute(self.root, node), nn.Parameter) for node in self.held())

    def held(self) -> list[fx.Node]:
        """What its operations use of the model's attributes."""
        waiting, found = list(self.nodes), dict[fx.Node, None]()
        for node in waiting:
            for before in node.all_input_nodes:
                if not before.meta["moves"] and before not in found:
                    found[before] = None
                    waiting.append(before)
        return [node for node in found if node.op == "get_attr"]


class Between(nn.Module):
    """Operations that a model's forward does between its modules, as a module.

    Parameters and buffers that they use are those of the model, under the same names. Numbers and
    modes are read from the model in each call.
    """

    def __init__(self, pieces: Sequence[Piece]) -> None:
        super().__init__()
        graph, root = fx.Graph(), pieces[0].root
        nodes = [node for piece in pieces for node in piece.nodes]
        # What is neither an input that moves nor computed here is held: parameters, mostly.
        made: dict[fx.Node, fx.Node] = {}
        entry = next(before for before in nodes[0].all_input_nodes if before.meta["moves"])
        made[entry] = graph.placeholder("x")
        # (A list: they are not to be parts of this module.)
        self.reads: list[tuple[nn.Module, str]] = []
        for node in dict.fromkeys(held for piece in pieces for held in piece.held()):
            if (read := node.meta.get("read")) is not None:
                if read not in self.reads:
                    self.reads.append(read)
                    made[node] = graph.placeholder(read[1])
                else:
                    place = 1 + self.reads.index(read)
                    made[node] = list(graph.nodes)[place]

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
        return self.run(x, *[getattr(module, name) for module, name in self.reads])

    def train(self, mode: bool = True) -> Between:
        """Set the mode, also of the modules whose mode the operations ask for."""
        for module, name in self.reads:
            if name == "training":
                module.training = mode
        return super().train(mode)

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


class Chain(NamedTuple):
    """A model's forward, cut."""

    pieces: list[Piece]
    """What is between all places where it can be cut, in order."""
    origin: Origin
    """What the record took from the model as it is now."""


def chain(model: nn.Module, X: Tensor, name: str = "model") -> Chain:
    """Cut ``model``'s forward wherever it can be.

    Containers whose children run one after the other are opened, others are one module. Raises
    ``NoChain`` where two layers cannot be cut apart.
    """
    root, before = _Root(model), Attributes(model.modules())
    try:
        record = _follow(root, X, name, {}, numbers=True)
        written = before.changed(record.opened)
    finally:
        before.restore()
    if written:
        warn_caller(
            f"{name}'s forward sets {', '.join(f'{name}.{w}' for w in written)}, which the layers do not: "
            "they run what it does between its modules, and its modules. Set it in a module, if it is "
            "needed"
        )
    pieces = _pieces(record.graph, root)
    for piece in pieces:
        if len(piece.weighted) > 1:
            raise NoChain(_in_the_way(piece, name))
    called = [str(node.target) for node in record.graph.nodes if node.op == "call_module"]
    held = [str(node.target) for node in record.graph.nodes if node.op == "get_attr"]
    reads = [read for read in record.reads if not before.holds_other(read.module, read.name)]
    return Chain(pieces, Origin(model, name, reads, record.opened, called, held))


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

    def __init__(
        self, X: Tensor, name: str, opened: dict[nn.Module, bool], reads: Reads | None = None
    ) -> None:
        super().__init__()
        self._X, self._name, self._opened = X, name, opened
        self.reads = Reads() if reads is None else reads
        self._evaluates = False
        # The containers whose forward is being followed, and all that were.
        self._inside: list[nn.Module] = []
        self.followed: dict[nn.Module, None] = {}

    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        with self.reads.watched(self._read):
            return super().trace(root, concrete_args)

    def _read(self, module: nn.Module, name: str, value: Any) -> Any:
        """What a forward is given for an attribute that it reads."""
        if self._evaluates or module not in (self.submodule_paths or ()) or module is self.root:
            return value
        if isinstance(value, Tensor) and self.reads.tensors_followed:
            with self._evaluating():  # nothing that this reads is the forward's
                path = f"{self.path_of_module(module)}.{name}"
            return self.create_proxy("get_attr", path, (), {})
        return self.reads.note(module, name, value)

    def create_arg(self, a: Any) -> Any:
        if not isinstance(a, Number):
            return super().create_arg(a)
        a.read.is_operand = True
        with self._evaluating():
            path = f"{self.path_of_module(a.read.module)}.{a.read.name}"
        node = self.create_node("get_attr", path, (), {})
        node.meta.update(read=(a.read.module, a.read.name), value=a.read.given)
        return node

    def create_node(self, kind: str, *arguments: Any, **options: Any) -> fx.Node:
        node = super().create_node(kind, *arguments, **options)
        inputs = node.all_input_nodes
        node.meta["moves"] = kind == "placeholder" or any(n.meta["moves"] for n in inputs)
        node.meta["inside"] = self._inside[-1] if self._inside else self.root
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
            self.followed[m] = None
            for layer in [*m.layers, *([] if m.norm is None else [m.norm])]:
                x = layer(x)
            return x
        if self._is_opened(m, args[0] if alone else None):
            self._check_hooks(m)
            self.followed[m] = None
            self._inside.append(m)
            output = forward(*args, **kwargs)
            self._inside.pop()
            return output
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
                pieces = _pieces(_follow(root, x, self._name, self._opened).graph, root)
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


class _Record(NamedTuple):
    """What following a forward found."""

    graph: fx.Graph
    reads: Reads
    opened: list[nn.Module]


def _follow(
    root: _Root, X: Tensor, name: str, opened: dict[nn.Module, bool], numbers: bool = False
) -> _Record:
    """The record of the model's forward, the same in train and in eval mode.

    Where an operation is told the mode, as by ``dropout(x, training=self.training)``, it will be.
    opened: which containers run their children in order, as far as it is known. numbers: find out
    which may be others later.
    """
    modules = list(root.modules())
    modes = [(module, module.training) for module in modules]

    def trace(into: _Root, training: bool, reads: Reads | None = None) -> _Record:
        for module in modules:
            module.training = training
        return _trace(into, X, name, opened, reads)

    def both(tensors_followed: bool) -> list[_Record]:
        # Each has a root of its own, as constants are put there.
        roots = (root, True), (_Root(root.model), False)
        return [trace(into, mode, Reads(tensors_followed)) for into, mode in roots]

    try:
        try:
            record, in_eval = both(tensors_followed=True)
        except NoChain:
            # It may do with a tensor what cannot be recorded, such as to take a number from it.
            record, in_eval = both(tensors_followed=False)
        reads = record.reads.joined(in_eval.reads)
        # Where one is longer, it differs at the other's output already.
        for node, other in zip(record.graph.nodes, in_eval.graph.nodes, strict=False):
            _tell_mode(record.graph, node, other, name)
        if numbers:
            _find_followed(reads, lambda others: trace(_Root(root.model), True, others).graph)
    finally:
        for module, training in modes:
            module.training = training
    return record._replace(reads=reads)


def _find_followed(reads: Reads, trace: Callable[[Reads], fx.Graph]) -> None:
    """Mark the numbers that may change: with another one, the forward does the same but for them.

    They are operands in the record, and nothing else in it depends on them.
    """
    numbers = [read for read in reads if read.is_operand and not read.decides]
    if not numbers:
        return
    plain = trace(reads.tried(()))

    def may_change(chosen: Sequence[Any]) -> bool:
        others = reads.tried(chosen)
        try:
            graph = trace(others)
        except NoChain:
            return False
        return _same_graph(plain, graph) and not any(others.decides(read) for read in chosen)

    all_may = may_change(numbers)
    for read in numbers:
        read.is_followed = all_may or (len(numbers) > 1 and may_change([read]))


def _same_graph(graph: fx.Graph, other: fx.Graph) -> bool:
    """Whether two records have the same operations and constants, whatever numbers are followed."""
    if len(graph.nodes) != len(other.nodes):
        return False
    for a, b in zip(graph.nodes, other.nodes, strict=True):
        if (a.op, a.target, a.name) != (b.op, b.target, b.name):
            return False
        constant = a.op == "get_attr" and "read" not in a.meta
        if constant and not _equal(a.meta["value"], b.meta["value"]):
            return False
        if repr((a.args, a.kwargs)) != repr((b.args, b.kwargs)):
            return False
    return True


def _trace(
    root: _Root, X: Tensor, name: str, opened: dict[nn.Module, bool], reads: Reads | None
) -> _Record:
    tracer = _Tracer(X, name, opened, reads)
    try:
        return _Record(tracer.trace(root), tracer.reads, list(tracer.followed))
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
                inside = node.meta["inside"]
                mode[0].meta.update(moves=False, value=True, read=(inside, "training"))
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
