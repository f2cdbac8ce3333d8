"""Gradients and leaves of an autograd graph, and the tensors that come of them.

What a graph is the graph of, a layer or a whole feed-forward pass, is up to ``layer.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import get_gradient_edge
from torch.nn.modules._functions import BackwardHookFunction

from torch2pc.displacement.rules.core import HALF, storage, unit_of
from torch2pc.displacement.vjp import kept_tensor, node_of, nodes_below, reaches, vjp
from torch2pc.graph.apart import APART, Habits, UnguardedError, held_elsewhere, unchanged


class Graph:
    """A forward pass with its autograd graph, ready for one backward pass."""

    def __init__(
        self,
        vhat: list[Tensor],
        Loss: Tensor,
        parents: Sequence[Sequence[int]],
        habits: Habits,
    ) -> None:
        self.vhat, self.Loss, self._habits = vhat, Loss, habits
        self._versions = [x._version for x in vhat]
        self._looks = habits.watches
        # The leaves (parameters, mostly), and the first layer that uses each; the loss counts as
        # layer L+1. The outputs of layers belong to none, nor does what lies beyond the input (0).
        nodes = [node_of(x) for x in vhat]
        layer_of = {**dict.fromkeys(nodes, _BETWEEN), None: 0}
        leaves: list[Any] = []
        shared: list[Any] = []
        ends = zip([*nodes[1:], Loss.grad_fn], [*parents, (len(parents),)], strict=True)
        for l, (node, of_l) in enumerate(ends, start=1):
            given = [nodes[p] for p in of_l]
            # A layer that returns its input has that node itself, and no leaves.
            if node not in given:
                shared += _claim(node, l, layer_of, leaves, given)
        self.shares_leaves = bool(shared)
        # Something goes from one layer, past the next one's input, to another layer or the loss.
        self._goes_around = any(
            [layer_of[x] == _BETWEEN or type(x) is not _AccumulateGrad for x in shared]
        )
        self._leaves = [leaf.variable for leaf in leaves]
        self._l_of = [layer_of[leaf] for leaf in leaves]
        # The layers in which code runs that is not PyTorch's; L+1 is the loss.
        self.foreign: set[int] = set()
        layer_of[Loss.grad_fn] = len(nodes)
        if found := foreign_of(layer_of):
            layer_of.update({node: l for l, node in enumerate(nodes)})
            self.foreign = {layer_of[node] for node in found} - {0}

    def backpropagate(
        self, keep_graph: bool = False, arrived: Callable[[Tensor, int, Tensor], None] | None = None
    ) -> tuple[list[Any], list[tuple[Tensor, int, Tensor]]]:
        """The gradients of the loss, in one backward pass.

        Returns g_l = dLoss/dvhat_l for l = 0..L (entry 0 is None unless the input requires grad),
        and (leaf, l, gradient) for every leaf that the loss depends on, with the first layer l that
        uses it. ``arrived`` is called with the same three as soon as each is there.
        """
        asked = [l for l, vhat_l in enumerate(self.vhat) if vhat_l.requires_grad]
        inputs = [*[self.vhat[l] for l in asked], *self._leaves]
        copies: list[Any] = [None] * len(inputs)
        watches = None
        if self._habits.watches or self.foreign or arrived is not None:
            # What follows may write into a gradient once it has arrived.
            def watch(i: int, g: Tensor) -> None:
                copies[i] = g.clone()
                if arrived is not None and i >= len(asked):
                    k = i - len(asked)
                    arrived(self._leaves[k], self._l_of[k], copies[i])

            watches = [partial(watch, i) for i in range(len(inputs))]
        found = gradient([self.Loss], inputs, keep_graph=keep_graph, watches=watches)
        versions = tuple([0 if x is None else x._version for x in found])
        if watches is not None:
            self._learn(found, copies, versions)
            found = copies
        elif any(versions) and versions not in self._habits.versions:
            # PyTorch counts what it does itself too: to be seen with copies.
            self._habits.watches = True
            raise UnguardedError(["a layer of the model"])
        if found[len(asked) - 1] is None:
            raise independent_loss()
        g: list[Any] = [None] * len(self.vhat)
        for l, g_l in zip(asked, found, strict=False):
            g[l] = torch.zeros_like(self.vhat[l]) if g_l is None else g_l
        of_leaves = zip(self._leaves, self._l_of, found[len(asked) :], strict=True)
        return g, [(leaf, l, of_leaf) for leaf, l, of_leaf in of_leaves if of_leaf is not None]

    def _learn(
        self, found: Sequence[Tensor | None], copies: Sequence[Any], versions: tuple[int, ...]
    ) -> None:
        """Whether anybody has written into the gradients since they arrived, who may do so again."""
        habits = self._habits
        if habits.watches:
            habits.watches = not unchanged(found, copies)
            if not habits.watches:
                habits.versions.add(versions)

    def values(self) -> list[Tensor]:
        """The feed-forward values, once the graph has been used."""
        versions = [x._version for x in self.vhat]
        if versions != self._versions:
            pairs = zip(versions, self._versions, strict=True)
            raise _changed_belief(next(l for l, (now, before) in enumerate(pairs) if now != before))
        if self._looks:
            self._habits.held.update(held_elsewhere(self.vhat))
        vhat = [x.detach() for x in self.vhat]
        for l in self._habits.held:
            vhat[l] = vhat[l].clone()
        return vhat

    def weighted_gradients(
        self,
        g: Sequence[Any],
        leaves: Sequence[Tensor],
        c: Sequence[float],
        above: Sequence[float],
    ) -> list[Any]:
        """For each leaf, the sum over the layers l that use it of c[l] (df_l/dleaf)^T g_l.

        A second backward pass, for shared parameters, changed at each vhat_l so that c[l] g_l goes
        on from it: as g_l is made of the children's, what arrives is ``above[l]`` g_l; the difference
        is added.
        """
        if self._goes_around:
            raise kept_tensor("A layer, or LossFun,")
        L = len(self.vhat) - 1
        added = [(c[l] - above[l]) * g[l] for l in range(1, L)]
        start = torch.ones_like(self.Loss)
        return gradient([self.Loss, *self.vhat[1:L]], leaves, [start, *added])


def gradient(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    arriving: Sequence[Tensor] | None = None,
    keep_graph: bool = False,
    watches: Sequence[Callable[[Tensor], Tensor | None]] | None = None,
) -> list[Tensor | None]:
    """``J^T arriving`` for each input; None for one that the outputs do not depend on.

    watches: for each input, what is called with its result as soon as that is there.
    """
    if not inputs or not outputs[0].requires_grad:
        return [None] * len(inputs)
    hooked = has_hooks(inputs)
    if watches is None and type(outputs[0].grad_fn) is APART:
        watches = [torch.clone] * len(inputs)
    watched = [] if watches is None else zip(inputs, watches, strict=True)
    handles: list[Any] = [
        x.register_hook(watch)  # type: ignore[no-untyped-call]
        for x, watch in watched
    ]
    try:
        # Backward passes belong outside autocast: the types were chosen in the forward pass.
        with outside_autocast(outputs[0].device):
            found = vjp(outputs, inputs, arriving, keep_graph)
    finally:
        for handle in handles:
            handle.remove()
    if hooked:
        # A tensor hook may have returned a tensor that is not ours to write into.
        found = tuple(None if of_x is None else of_x.clone() for of_x in found)
    return list(found)


def gradient_of_small(
    prediction: Tensor, leaves: Sequence[Tensor], error: Tensor
) -> list[Tensor | None]:
    """``J^T error``, for errors of any size.

    In deep networks they are so small that their products with small beliefs (those of inactive units)
    fall below 1e-38, where processors are many times slower in float32, and float16 has no number as
    small as they are. So they are divided by a power of two first, and what comes of them is multiplied
    by it: nothing is rounded.
    """
    unit = unit_of(error, largest=0)
    found = gradient([prediction], leaves, [(error / unit).to(prediction.dtype)])
    # In place where no two share memory: they are as large as the weights.
    storages = [0 if x is None or x.is_sparse else storage(x) for x in found]
    return [
        x
        if x is None
        else x.mul_(unit)
        if where and storages.count(where) == 1 and 0 not in x.stride()
        else x * unit
        for x, where in zip(found, storages, strict=True)
    ]


def in_float16(x: Tensor) -> bool:
    """Whether what made ``x`` may have computed in float16."""
    kind = x.device.type
    in_autocast = torch.is_autocast_enabled(kind)
    return torch.float16 in (x.dtype, torch.get_autocast_dtype(kind) if in_autocast else None)


def has_hooks(tensors: Iterable[Tensor]) -> bool:
    """Whether any of them has a hook that sees its gradient."""
    return any([x._backward_hooks for x in tensors])


def output_gradient(Loss: Tensor, output: Tensor, keep_graph: bool = False) -> Tensor:
    """dLdy, which there must be."""
    (dLdy,) = gradient([Loss], [output], keep_graph=keep_graph)
    if dLdy is None:
        raise independent_loss()
    return dLdy


def outside_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Switches autocast off for the body, if it is on."""
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


class Below(NamedTuple):
    """What a graph is made of, from an output down to the inputs of the function that made it."""

    leaves: list[Tensor]
    """Those that require grad and were used, except the inputs."""
    foreign: list[Any]
    """The nodes whose backward is not PyTorch's own: it need not be linear in the error."""
    is_foreign: bool
    """Whether such a one is on the way to the inputs: J^T is not that of the operations."""
    nodes: list[Any]
    """All of them."""


def below(output: Tensor, inputs: Sequence[Tensor]) -> Below:
    """What the graph between ``inputs``, which are leaves, and ``output`` is made of.

    Read off the autograd graph, so that it is right for shared, frozen, unused and parametrized
    parameters, and for those that belong to no module; faster than listing parameters, too.
    """
    if output.is_leaf:
        return Below([], [], False, [])
    nodes = nodes_below(output.grad_fn)
    foreign = foreign_of(nodes)
    leaves = leaves_of(nodes, inputs)
    return Below(leaves, foreign, bool(foreign) and reaches(foreign, inputs), nodes)


def leaves_between(output: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The leaves that require grad and were used to compute ``output``, except ``inputs``."""
    return below(output, inputs).leaves


def leaves_of(nodes: Sequence[Any], inputs: Sequence[Tensor]) -> list[Tensor]:
    """The leaves among ``nodes``, except ``inputs``."""
    chosen: list[Any] = [node for node in nodes if type(node) is _AccumulateGrad]
    leaves: list[Tensor] = [node.variable for node in chosen]
    given = set(map(id, inputs))
    return [leaf for leaf in leaves if id(leaf) not in given]


def next_node() -> int:
    """The number that the next node of the autograd graph will have, in this thread."""
    return torch._C._autograd._get_sequence_nr()


# Types of nodes that are not foreign: those of our own, of what calls the hooks of a module's backward
# pass (which is looked for on the modules), and of PyTorch's operations, as far as they were met.
_native: set[type] = {type(None), APART, BackwardHookFunction._backward_cls}


def foreign_of(nodes: Collection[Any]) -> list[Any]:
    """Those of the nodes whose backward is written in Python, or in C++ outside PyTorch.

    Such are an ``autograd.Function``'s and a custom operation's. What it does is its own: it may use a
    state that changes, add what has nothing to do with the error, and write into what it is given.
    """
    if _native.issuperset(map(type, nodes)):
        return []
    kinds = set(map(type, nodes)) - _native
    may_be = {kind for kind in kinds if _is_python(kind) or _is_cpp(kind)}
    _native.update(kinds - may_be)  # PyTorch's own types, which are there for good
    chosen = [node for node in nodes if type(node) in may_be]
    return [x for x in chosen if not _is_cpp(type(x)) or x.name().startswith(_CPP_FUNCTION)]


def _is_python(kind: type) -> bool:
    """Whether a function in Python made the nodes, other than those that ``torch.cond`` and its like are."""
    if not issubclass(kind, BackwardCFunction):
        return False
    function = getattr(kind, "_forward_cls", None)
    return not getattr(function, "__module__", "").startswith("torch._higher_order_ops.")


def _is_cpp(kind: type) -> bool:
    return kind.__name__ == "CppFunction"


_CPP_FUNCTION = "torch::autograd::CppNode"


# By the names of autograd's nodes: activations that are constant over a range, and what keeps a
# constant one.
_FLAT = re.compile(
    "(Relu|Threshold|Hardtanh|Clamp|ClampMin|ClampMax|Hardshrink|Softshrink|Hardsigmoid|Hardswish)"
    "Backward"
)
_KEEPS_CONSTANT = re.compile(
    "(View|UnsafeView|ReshapeAlias|Alias|Clone|ToCopy|Permute|Transpose|T|Squeeze|Unsqueeze|Slice|"
    r"Select|Mean|Mul|Div|NativeDropout|\w*Pool\w*)Backward"
)


def ends_flat(output: Tensor) -> bool:
    """Whether the last thing that a layer does to its units can hold them at a constant.

    A ReLU or its like, with or without pooling, dropout and reshaping after it. Read off the graph,
    since to look for constants in the values would wait for their device, and would miss the units
    that fall silent in training.
    """
    node = output.grad_fn
    while node is not None:
        if _FLAT.match(type(node).__name__):
            return True
        before = [other for other, _ in node.next_functions if other is not None]
        if len(before) != 1 or not _KEEPS_CONSTANT.match(type(node).__name__):
            return False
        node = before[0]
    return False


# Stands for a layer where a node is the output of one and the input of the next.
_BETWEEN = -1


def _claim(
    node: Any, l: int, layer_of: dict[Any, int], leaves: list[Any], given: Sequence[Any] = ()
) -> list[Any]:
    """Enter layer ``l`` for all new nodes below ``node``, and append those of leaves to ``leaves``.

    Returns the nodes that it met and are another layer's; ``given`` are those that it starts from.
    """
    claimed: list[Any] = []
    waiting = [node]
    for node in waiting:
        for before, _ in node.next_functions:
            if before not in layer_of:
                layer_of[before] = l
                (leaves if type(before) is _AccumulateGrad else waiting).append(before)
            elif layer_of[before] not in (0, l) and before not in given:
                claimed.append(before)
    return claimed


with torch.inference_mode(False), torch.enable_grad():  # whatever mode this is imported in
    # The type of the node that takes the gradient of a leaf.
    _AccumulateGrad = type(get_gradient_edge(torch.empty(0, requires_grad=True)).node)


class Updates(dict[Tensor, Tensor]):
    """The updates of parameters; ``arrived`` is called with each that is entered, or changed."""

    def __init__(self, arrived: Callable[[Tensor, Tensor], None] | None) -> None:
        self._arrived = arrived

    def __setitem__(self, parameter: Tensor, update: Tensor) -> None:
        super().__setitem__(parameter, update)
        if self._arrived is not None:
            self._arrived(parameter, update)


def add_updates(
    updates: dict[Tensor, Tensor], leaves: Iterable[Tensor], found: Iterable[Tensor | None]
) -> None:
    """Add the gradients found for ``leaves`` to ``updates``; a shared parameter sums its own."""
    for leaf, update in zip(leaves, found, strict=True):
        if update is not None:
            updates[leaf] = updates[leaf] + update if leaf in updates else update


def check_loss(Loss: Tensor) -> Tensor:
    """The loss is one number that gradients can flow from."""
    check_scalar("LossFun", Loss)
    if not Loss.requires_grad:
        raise independent_loss()
    return Loss


def check_scalar(name: str, energy: Tensor) -> None:
    """What a loss or a prior returned is one number."""
    if energy.numel() != 1:
        raise ValueError(
            f"{name} must return a scalar, got shape {tuple(energy.shape)}; "
            "for a loss, use reduction='mean' or 'sum'"
        )


def _changed_belief(l: int) -> RuntimeError:
    """What layer l has put out, or the input, is no longer what it was."""
    what = f"the output of model[{l - 1}]" if l else "the input of model[0]"
    return RuntimeError(
        f"{what} was changed in place after the layer had returned it, which destroys the belief "
        "stored there; let what changes it (a hook, a later layer) work on a copy"
    )


def independent_loss() -> ValueError:
    return ValueError(
        "LossFun must depend on the output of the model, got a loss with no gradient for it"
    )


def in_belief_dtype(x: Tensor) -> Tensor:
    """``x`` in the type that beliefs and errors are held in."""
    return x.to(torch.float32) if x.dtype in HALF else x


def own(tensors: list[Tensor]) -> list[Tensor]:
    """The same values, each tensor with memory of its own (copied only where it is shared)."""
    strided = [tensor for tensor in tensors if not tensor.is_sparse]
    starts = set(map(Tensor.data_ptr, strided))
    if len(starts) == len(tensors) and all(map(Tensor.is_contiguous, strided)):
        return tensors
    starts.clear()
    result = []
    for tensor in tensors:
        if tensor.is_sparse:
            tensor = tensor.clone()  # its values may be those of the error that it came of
        else:
            if tensor.data_ptr() in starts or 0 in tensor.stride():
                tensor = tensor.clone(memory_format=torch.contiguous_format)
            starts.add(tensor.data_ptr())
        result.append(tensor)
    return result
