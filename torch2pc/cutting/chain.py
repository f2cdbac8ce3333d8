"""How a model's forward runs its modules one after the other.

``chain`` cuts the record of the forward wherever a single tensor carries everything on. How the pieces
become predictive coding layers is up to ``grouping.py``.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from torch2pc.cutting.between import Between, held_by
from torch2pc.cutting.forward import (
    NoLayers,
    Opens,
    Root,
    attribute,
    called,
    follow,
    follow_forward,
    has_weights,
    is_block,
    needed,
    operation,
    what,
)
from torch2pc.cutting.origin import Origin


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
        held = held_by(self.nodes)
        return any(isinstance(attribute(self.root, node), nn.Parameter) for node in held)


class Chain(NamedTuple):
    """A model's forward, cut."""

    pieces: list[Piece]
    """What is between all places where it can be cut, in order."""
    origin: Origin
    """What the record took from the model as it is now."""


def chain(model: nn.Module, X: Tensor, name: str = "model") -> Chain:
    """Cut ``model``'s forward wherever it can be.

    Containers whose children run one after the other are opened, others are one module. Raises
    ``NoLayers`` where two layers cannot be cut apart.
    """
    forward = follow_forward(model, X, name, _in_order(model, name, {}))
    pieces = cut(forward.needed(), forward.root)
    for piece in pieces:
        if len(piece.weighted) > 1:
            raise NoLayers(_in_the_way(piece, name))
    return Chain(pieces, forward.origin)


def _in_order(model: nn.Module, name: str, known: dict[nn.Module, bool]) -> Opens:
    """Opens the model, and containers whose children run one after the other."""

    def opens(m: nn.Module, x: Any) -> bool:
        if type(m).forward is nn.Sequential.forward:
            return True
        if type(m) is nn.TransformerEncoder:
            return x is not None
        if not is_block(m) or type(m).__module__.startswith("torch.nn.modules."):
            return False
        if m is not model and m not in known:
            known[m] = isinstance(x, Tensor) and _runs_in_order(m, x, name, known)
        return m is model or known[m]

    return opens


def _runs_in_order(m: nn.Module, x: Tensor, name: str, known: dict[nn.Module, bool]) -> bool:
    """Whether nothing goes around any of its children that have parameters."""
    root = Root(m)
    try:
        pieces = cut(needed(follow(root, x, name, _in_order(m, name, known)).graph), root)
    except Exception:
        return False
    named = [
        sum(next(module.parameters(), None) is not None for module in piece.modules)
        for piece in pieces
    ]
    return len(pieces) > 1 and all(
        count == 0 or len(piece.nodes) == 1 for count, piece in zip(named, pieces, strict=True)
    )


def cut(nodes: Sequence[fx.Node], root: nn.Module) -> list[Piece]:
    """What depends on nodes[0], cut wherever a single floating-point tensor carries everything on."""
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
    return pieces


def _in_the_way(piece: Piece, name: str) -> str:
    """What keeps two layers of one piece from being cut apart."""
    first, second = piece.weighted[:2]
    around = first.meta["live"]
    between = f"{called(first, name)} and {called(second, name)}"
    if not around:
        reason = f"{what(first, name)} is no single floating-point tensor"
    else:
        position = {node: i for i, node in enumerate(first.graph.nodes)}
        user = next(
            user
            for user in sorted(around[-1].users, key=position.__getitem__)
            if position[user] > position[first]
        )
        into = called(user, name) if user.op == "call_module" else f"a later {operation(user)}"
        reason = f"{what(around[-1], name)} goes around {called(first, name)} into {into}"
    return (
        f"{name} is no chain of layers: {reason}, so that it cannot be cut between {between}. Make a "
        "module of what belongs together (a module with such a connection inside is one layer), or let "
        "torch2pc.pc_graph(model, X) make a graph of it, whose layers may have such connections"
    )


def layer_of(pieces: Sequence[Piece]) -> nn.Module:
    """One module that runs the pieces; modules by themselves stay what they are."""
    items: list[nn.Module] = []
    for is_module, run in itertools.groupby(pieces, lambda piece: piece.module is not None):
        if is_module:
            items += [piece.module for piece in run if piece.module is not None]
        else:
            items.append(_between(list(run)))
    if any(getattr(part, "inplace", False) for item in items for part in item.modules()):
        # What they write into may be a view of the layer's input.
        for item in items:
            if isinstance(item, Between):
                item.inplace = True
    return items[0] if len(items) == 1 else nn.Sequential(*items)


def _between(pieces: Sequence[Piece]) -> nn.Module:
    """The operations as a module, PyTorch's own for flattening."""
    nodes = [node for piece in pieces for node in piece.nodes]
    if len(nodes) == 1 and nodes[0].target in (torch.flatten, "flatten"):
        axes = dict(zip(("start_dim", "end_dim"), nodes[0].args[1:], strict=False))
        axes = {"start_dim": 0, **axes, **nodes[0].kwargs}
        if all(isinstance(axis, int) for axis in axes.values()):
            return nn.Flatten(**axes)  # type: ignore[arg-type]
    entry = next(before for before in nodes[0].all_input_nodes if before.meta["moves"])
    return Between(pieces[0].root, nodes, [entry])
