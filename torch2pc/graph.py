"""Gradients and leaves of an autograd graph, and the tensors that come of them.

What a graph is the graph of, a layer or a whole feed-forward pass, is up to ``layers.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from torch2pc.apart import (
    Arrivals,
    Habits,
    UnguardedError,
    any_foreign,
    held_elsewhere,
    is_apart,
    is_foreign,
)
from torch2pc.apart import storage as storage  # for whoever knows it from here
from torch2pc.rules import belief_dtype
from torch2pc.rules.core import unit_of


class Graph:
    """A forward pass with its autograd graph, ready for one backward pass."""

    def __init__(self, vhat: list[Tensor], Loss: Tensor, habits: Habits | None = None) -> None:
        self.vhat, self.Loss = vhat, Loss
        self._habits = Habits() if habits is None else habits
        self._versions = [x._version for x in vhat]
        # The leaves (parameters, mostly), and the first layer that uses each; the loss counts as
        # layer L+1. The outputs of layers and what lies beyond them belong to none (0).
        nodes = [_node(x) for x in vhat]
        layer_of = dict.fromkeys([None, *nodes], 0)
        leaves: list[Any] = []
        self.shares_leaves = False
        for l, node in enumerate([*nodes[1:], Loss.grad_fn], start=1):
            # A layer that returns its input has that node itself, and no leaves.
            if node is not nodes[l - 1] and _claim(node, l, layer_of, leaves):
                self.shares_leaves = True
        self._leaves = [leaf.variable for leaf in leaves]
        self._l_of = [layer_of[leaf] for leaf in leaves]
        # The layers in which code runs that is not PyTorch's.
        self.foreign: set[int] = set()
        if any_foreign(layer_of) or any_foreign([Loss.grad_fn]):
            ends = enumerate([*nodes[1:], Loss.grad_fn], start=1)
            made = [*layer_of.items(), *[(node, l) for l, node in ends]]
            self.foreign = {l for node, l in made if l and is_foreign(type(node))}

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
        arrivals = Arrivals() if self._habits.watches or arrived is not None else None
        watches = None
        if arrivals is not None or self._habits.apart or self.foreign:
            watches = [
                self._watch(i, l, i - len(asked), arrivals, arrived)
                for i, l in enumerate([*asked, *self._l_of])
            ]
        found = gradient([self.Loss], inputs, keep_graph=keep_graph, watches=watches)
        self._check_arrived(found, asked, arrivals)
        if found[len(asked) - 1] is None:
            raise independent_loss()
        g: list[Any] = [None] * len(self.vhat)
        for l, g_l in zip(asked, found, strict=False):
            g[l] = torch.zeros_like(self.vhat[l]) if g_l is None else g_l
        if len(self.vhat) in self.foreign:
            g[-1] = g[-1].clone()  # the loss may hand out the same memory again
        of_leaves = zip(self._leaves, self._l_of, found[len(asked) :], strict=True)
        return g, [(leaf, l, of_leaf) for leaf, l, of_leaf in of_leaves if of_leaf is not None]

    def _watch(
        self, i: int, l: int, leaf: int, arrivals: Arrivals | None, arrived: Any
    ) -> Callable[[Tensor], Tensor | None] | None:
        """What is done with gradient ``i`` when it arrives, which is leaf number ``leaf``'s, if any."""
        is_apart = leaf >= 0 and (l - 1 in self._habits.apart or l in self.foreign)
        told = leaf >= 0 and arrived is not None
        if arrivals is None and not is_apart:
            return None

        def watch(g: Tensor) -> Tensor | None:
            # A copy may be kept, whatever is done to the gradient by what else takes it.
            copy = g.clone() if arrivals is None else arrivals.copy(i, g)
            if told:
                arrived(self._leaves[leaf], l, copy)
            return copy if is_apart else None

        return watch

    def _check_arrived(
        self, found: list[Tensor | None], asked: Sequence[int], arrivals: Arrivals | None
    ) -> None:
        """Put gradients right that were written into after they had arrived."""
        versions = [0 if x is None else x._version for x in found]
        if arrivals is None and not any(versions):
            return
        habits = self._habits
        # Whoever writes into g_l, or into the gradient of a leaf of layer l, is in layer l.
        places = [*asked, *self._l_of]
        counted = {pair for pair in zip(places, versions, strict=True) if pair[1]}
        if arrivals is not None:
            changed = arrivals.changed(found)
            for i, copy in changed.items():
                found[i] = copy
                habits.apart.add(places[i] - 1)
            habits.watches = bool(changed)
            if not changed:
                habits.versions.update(counted)
        elif not counted <= habits.versions:
            # Counted up by what PyTorch does, or by somebody else: to be seen with copies.
            habits.watches = True
            raise UnguardedError("a layer of the model")

    def values(self, looks: bool) -> list[Tensor]:
        """The feed-forward values, once the graph has been used.

        ``looks``: at whether anybody else holds their memory.
        """
        versions = [x._version for x in self.vhat]
        if versions != self._versions:
            pairs = zip(versions, self._versions, strict=True)
            raise changed_belief(next(l for l, (now, before) in enumerate(pairs) if now != before))
        if looks:
            self._habits.kept.update(held_elsewhere(self.vhat))
        vhat = [x.detach() for x in self.vhat]
        for l in self._habits.kept:
            vhat[l] = vhat[l].clone()
        return vhat

    def weighted_gradients(
        self, g: Sequence[Any], leaves: Sequence[Tensor], c: Sequence[float]
    ) -> list[Any]:
        """For each leaf, the sum over the layers l that use it of c[l] (df_l/dleaf)^T g_l.

        A second backward pass, for shared parameters, changed at each vhat_l so that c[l] g_l goes
        on from it: as g_l = J_{l+1}^T g_{l+1}, what arrives is c[l+1] g_l; the difference is added.
        """
        L = len(self.vhat) - 1
        added = [(c[l] - c[l + 1]) * g[l] for l in range(1, L)]
        start = torch.ones_like(self.Loss)
        return gradient([self.Loss, *self.vhat[1:L]], leaves, [start, *added])


def gradient(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    arriving: Sequence[Tensor] | None = None,
    keep_graph: bool = False,
    watches: Sequence[Callable[[Tensor], Any] | None] | None = None,
) -> list[Tensor | None]:
    """``J^T arriving`` for each input; None for one that the outputs do not depend on.

    watches: for each input, what is called with its result as soon as that is there.
    """
    if not inputs or not outputs[0].requires_grad:
        return [None] * len(inputs)
    hooked = has_hooks(inputs)
    if watches is None and is_apart(outputs[0]):
        watches = [torch.clone] * len(inputs)
    watched = [] if watches is None else zip(inputs, watches, strict=True)
    handles: list[Any] = [
        x.register_hook(watch)  # type: ignore[no-untyped-call]
        for x, watch in watched
        if watch is not None
    ]
    try:
        # Backward passes belong outside autocast: the types were chosen in the forward pass.
        with outside_autocast(outputs[0].device):
            found = torch.autograd.grad(
                outputs, inputs, arriving, retain_graph=keep_graph, allow_unused=True
            )
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
    unit = unit_of(error).clamp(max=1)
    scaled = (error * unit.reciprocal()).to(prediction.dtype)
    found = gradient([prediction], leaves, [scaled])
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
    in_autocast = kind != "meta" and torch.is_autocast_enabled(kind)
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


def leaves_between(output: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The leaves that require grad and were used to compute ``output``, except ``inputs``.

    Read off the autograd graph, so that it is right for shared, frozen, unused and parametrized
    parameters, and for those that belong to no module; faster than listing parameters, too. The
    inputs are leaves themselves.
    """
    return leaves_and_foreign(output, inputs)[0]


def leaves_and_foreign(output: Tensor, inputs: Sequence[Tensor]) -> tuple[list[Tensor], bool]:
    """These leaves, and whether code that is not PyTorch's runs between the inputs and the output."""
    leaves: list[Any] = []
    beyond = [x.grad_fn for x in inputs]
    nodes = dict.fromkeys([None, *beyond], 0)
    node = output.grad_fn
    if node in nodes:
        return [], False
    _claim(node, 1, nodes, leaves)
    for before in beyond:
        nodes.pop(before, None)
    nodes[node] = 1
    given = set(map(id, inputs))
    found = [leaf for leaf in [leaf.variable for leaf in leaves] if id(leaf) not in given]
    return found, any_foreign(nodes)


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


def _node(x: Tensor) -> Any:
    """The node of the autograd graph that makes ``x``, or takes its gradient; None without one."""
    return x.grad_fn or (get_gradient_edge(x).node if x.requires_grad else None)


def _claim(node: Any, l: int, layer_of: dict[Any, int], leaves: list[Any]) -> bool:
    """Enter layer ``l`` for all new nodes below ``node``, and append those of leaves to ``leaves``.

    Returns whether it met a node that another layer has claimed.
    """
    meets_other = False
    waiting = [node]
    for node in waiting:
        for before, _ in node.next_functions:
            if before not in layer_of:
                layer_of[before] = l
                (leaves if type(before) is _AccumulateGrad else waiting).append(before)
            elif layer_of[before] not in (0, l):
                meets_other = True
    return meets_other


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


def changed_belief(l: int) -> RuntimeError:
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
    return x.to(belief_dtype(x.dtype))


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
