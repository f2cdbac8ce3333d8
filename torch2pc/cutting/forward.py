"""How a model's forward is followed: what it computes with its modules, found by running it once.

``torch.fx`` records what the forward does between its modules (flattening, adding an embedding), and
each step is evaluated on a sample meanwhile, so that branches on shapes can be followed too. Which
containers are opened, so that their own forward is followed, is up to who asks. How the record is cut
into layers is up to ``chain.py`` and ``graph.py``, and what it took from the model as it was then, and
may be another one later, to ``origin.py``.
"""

from __future__ import annotations

import inspect
import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from torch2pc.checks import check_tensor, check_unwrapped
from torch2pc.cutting.origin import Attributes, Number, Origin, Reads
from torch2pc.graph.layer import HOOKS
from torch2pc.graph.warn import warn_caller


class NoLayers(ValueError):
    """The model cannot be cut into layers; the message says what is in the way."""


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


# Whether a container is opened, given what it is called with if that is one value alone.
Opens = Callable[[nn.Module, Any], bool]


def check_followable(model: object, X: object) -> None:
    """``model`` is a whole module with all its parameters, ``X`` a tensor."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    check_unwrapped(model)
    check_tensor("X", X)
    if any(map(torch.nn.parameter.is_lazy, itertools.chain(model.parameters(), model.buffers()))):
        raise ValueError(
            "model must have all its parameters, got lazy modules: call model(X) first"
        )


class Forward(NamedTuple):
    """A model's forward, followed."""

    graph: fx.Graph
    """Its record: each node has in ``meta`` its "value" on the sample, and whether it "moves" with X."""
    root: nn.Module
    """What the names in the record start from."""
    opened: dict[nn.Module, list[Any]]
    """The containers that were opened, and what each of their calls returned."""
    origin: Origin
    """What the record took from the model as it is now."""

    def outputs_of(self, module: nn.Module) -> list[Any]:
        """What each call of a module returned: a node, if that is one value."""
        if module in self.opened:
            return self.opened[module]
        calls = [node for node in self.graph.nodes if node.op == "call_module"]
        return [node for node in calls if self.root.get_submodule(str(node.target)) is module]

    def needed(self) -> list[fx.Node]:
        """What the output depends on, of what moves with the input: the input first, the output last."""
        return needed(self.graph)


def follow_forward(model: nn.Module, X: Tensor, name: str, opens: Opens) -> Forward:
    """Follow ``model``'s forward on X, which errors call ``name``, and leave it as it was."""
    root, before = Root(model), Attributes(model.modules())
    try:
        record = follow(root, X, name, opens, numbers=True)
        written = before.changed(record.opened)
    finally:
        before.restore()
    if written:
        warn_caller(
            f"{name}'s forward sets {', '.join(f'{name}.{w}' for w in written)}, which the layers do not: "
            "they run what it does between its modules, and its modules. Set it in a module, if it is "
            "needed"
        )
    called = [str(node.target) for node in record.graph.nodes if node.op == "call_module"]
    held = [str(node.target) for node in record.graph.nodes if node.op == "get_attr"]
    reads = [read for read in record.reads if not before.holds_other(read.module, read.name)]
    origin = Origin(model, name, reads, list(record.opened), called, held)
    return Forward(record.graph, root, record.opened, origin)


class Root(nn.Module):
    """A model with one input, whatever else its forward accepts; what it holds is 'model....'."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training

    def forward(self, x: Tensor) -> Any:
        return self.model(x)


class _Tracer(fx.Tracer):
    """Records the forward of the containers that are opened, and calls of the others."""

    proxy_buffer_attributes = True
    trace_asserts = True

    def __init__(self, X: Tensor, name: str, opens: Opens, reads: Reads | None = None) -> None:
        super().__init__()
        self._X, self._name, self._opens = X, name, opens
        self.reads = Reads() if reads is None else reads
        self._evaluates = False
        # The containers whose forward is being followed, and what all that were returned.
        self._inside: list[nn.Module] = []
        self.followed: dict[nn.Module, list[Any]] = {}

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
                return attribute(self.root, node)
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
            raise NoLayers(
                f"{self._name} must not branch on the values of tensors, but it does on "
                f"{what(obj.node, self._name)}"
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
        value = args[0].node.meta["value"] if alone and isinstance(args[0], fx.Proxy) else None
        with self._evaluating():  # what is evaluated to find out is not to be recorded here
            is_opened = self._opens(m, value)
        if not is_opened:
            return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)
        self._check_hooks(m)
        returned = self.followed.setdefault(m, [])
        self._inside.append(m)
        if type(m) is nn.TransformerEncoder and alone:  # without its own ways to be faster
            output = args[0]
            for layer in [*m.layers, *([] if m.norm is None else [m.norm])]:
                output = layer(output)
        else:
            output = forward(*args, **kwargs)
        self._inside.pop()
        returned.append(output.node if isinstance(output, fx.Proxy) else output)
        return output

    @property
    def where(self) -> str:
        """The container whose forward is being followed, in words."""
        with self._evaluating():
            path = self.path_of_module(self._inside[-1]) if self._inside else "model"
        return path.replace("model", self._name, 1)

    def _check_hooks(self, m: nn.Module) -> None:
        if any(getattr(m, table) for table in HOOKS):
            where = self.path_of_module(m).replace("model", self._name, 1)
            raise NoLayers(
                f"{where} has hooks, which would not run once its children are layers of their own: "
                "register them on its children"
            )


class _Record(NamedTuple):
    """What following a forward found."""

    graph: fx.Graph
    reads: Reads
    opened: dict[nn.Module, list[Any]]


def follow(root: nn.Module, X: Tensor, name: str, opens: Opens, numbers: bool = False) -> _Record:
    """The record of the model's forward, the same in train and in eval mode.

    Where an operation is told the mode, as by ``dropout(x, training=self.training)``, it will be.
    opened: which containers run their children in order, as far as it is known. numbers: find out
    which may be others later.
    """
    model: Any = root.model
    modules = list(root.modules())
    modes = [(module, module.training) for module in modules]

    def trace(into: nn.Module, training: bool, reads: Reads | None = None) -> _Record:
        for module in modules:
            module.training = training
        return _trace(into, X, name, opens, reads)

    def both(tensors_followed: bool) -> list[_Record]:
        # Each has a root of its own, as constants are put there.
        roots = (root, True), (Root(model), False)
        return [trace(into, mode, Reads(tensors_followed)) for into, mode in roots]

    try:
        try:
            record, in_eval = both(tensors_followed=True)
        except NoLayers:
            # It may do with a tensor what cannot be recorded, such as to take a number from it.
            record, in_eval = both(tensors_followed=False)
        reads = record.reads.joined(in_eval.reads)
        # Where one is longer, it differs at the other's output already.
        same: dict[fx.Node, fx.Node] = {}
        for node, other in zip(_live(record.graph), _live(in_eval.graph), strict=False):
            _tell_mode(record.graph, node, other, same, name)
            same[other] = node
        if numbers:
            _find_followed(reads, lambda others: trace(Root(model), True, others).graph)
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
        except NoLayers:
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


def _trace(root: nn.Module, X: Tensor, name: str, opens: Opens, reads: Reads | None) -> _Record:
    tracer = _Tracer(X, name, opens, reads)
    try:
        return _Record(tracer.trace(root), tracer.reads, tracer.followed)
    except NoLayers:
        raise
    except Exception as error:
        line = str(error).strip().partition("\n")[0]
        raise NoLayers(
            f"{tracer.where} could not be followed ({type(error).__name__}: {line}): write it as an "
            "nn.Sequential, with a module for what cannot be recorded"
        ) from error


def _tell_mode(
    graph: fx.Graph, node: fx.Node, other: fx.Node, same: dict[fx.Node, fx.Node], name: str
) -> None:
    """Let ``node`` see whether it is in train mode, where its arguments say so.

    ``other`` is what stands for it in eval mode, ``same`` says so of those before it.
    """
    if node.op == other.op == "get_attr" and not _equal(node.meta["value"], other.meta["value"]):
        raise NoLayers(
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
        is_same = same.get(b) is a if isinstance(b, fx.Node) else a is b
        differs = differs or not (is_same or (not isinstance(a, Tensor) and a == b))
        return a

    node.args, node.kwargs = map_aggregate((node.args, node.kwargs), told)
    if differs:
        raise NoLayers(
            f"{name} must do the same in train and in eval mode, but it does not: "
            f"{what(node, name)} is other than {what(other, name)}"
        )


def needed(graph: fx.Graph) -> list[fx.Node]:
    """What the output depends on, of what moves with the input: the input first, the output last."""
    result: Any = next(node for node in reversed(graph.nodes) if node.op == "output").args[0]
    if not isinstance(result, fx.Node) or not result.meta["moves"]:
        raise NoLayers(f"model must return a tensor that depends on its input, got {result}")
    if not isinstance(result.meta["value"], Tensor):
        kind = type(result.meta["value"]).__name__
        raise NoLayers(f"model must return one tensor, got {kind}")
    if not result.meta["value"].is_floating_point():
        dtype = result.meta["value"].dtype
        raise NoLayers(f"model must return a floating-point tensor, got {dtype}")
    found = _depended_on([result])
    for node in graph.nodes:
        if node not in found and writes(node):
            raise NoLayers(
                f"model must not write into tensors in place by a statement of its own, but "
                f"{what(node, 'model')} does: use its result, or an operation that makes a new one"
            )
    return [node for node in graph.nodes if node in found and node.meta["moves"]]


def _depended_on(results: Iterable[fx.Node]) -> set[fx.Node]:
    """Some nodes and all that they are computed from."""
    waiting = list(results)
    found = set(waiting)
    for node in waiting:
        new = [before for before in node.all_input_nodes if before not in found]
        found.update(new)
        waiting += new
    return found


def _live(graph: fx.Graph) -> list[fx.Node]:
    """All that the output depends on, and what writes into tensors.

    PyTorch's transformers look at more in eval mode, to see if there is a faster way.
    """
    live = _depended_on(node for node in graph.nodes if node.op == "output" or writes(node))
    return [node for node in graph.nodes if node in live]


def _equal(a: Any, b: Any) -> bool:
    return a is b or (isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b))


def called(node: fx.Node, name: str) -> str:
    """The name of the module or attribute that a node stands for."""
    return str(node.target).replace("model", name, 1)


def what(node: Any, name: str) -> str:
    """A value in words."""
    if node.op == "placeholder":
        return f"{name}'s input"
    if node.op == "call_module":
        return f"{called(node, name)}'s output"
    if node.op == "get_attr":
        return called(node, name)
    inputs = node.all_input_nodes
    return f"{operation(node)} of {what(inputs[0], name)}" if inputs else operation(node)


def operation(node: fx.Node) -> str:
    """What a node does, in a word."""
    if node.target is getattr:
        return str(node.args[1])
    if node.target is operator.getitem:
        return f"[{node.args[1]}]"
    return str(getattr(node.target, "__name__", node.target))


def writes(node: fx.Node) -> bool:
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


def attribute(root: nn.Module, node: fx.Node) -> Any:
    """What a node of kind ``get_attr`` finds."""
    value: Any = root
    for name in str(node.target).split("."):
        value = getattr(value, name)
    return value
