"""How the layers of a model are connected: in a chain, or in any graph without circles.

Place 0 is the input, and each layer predicts the belief at its own place from those of its parents. An
``nn.Sequential`` is the graph in which each layer's parent is the one before it; ``PCGraph`` has names for
the places, layers of several parents, and second predictions of beliefs from above. What the layers compute
is up to ``layer.py``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from torch import Tensor, nn

from torch2pc.graph.picture import drawn
from torch2pc.graph.state import modules_in

# For each layer, the places of its parents.
Parents = tuple[tuple[int, ...], ...]


class Node(NamedTuple):
    """A layer: a function of the beliefs at ``parents``, which predicts the belief at its place.

    The node of place i is entry i - 1 of a model's nodes.
    """

    function: Callable[..., Tensor]
    parents: tuple[int, ...]
    where: str
    """What errors call it."""


def nodes_of(model: nn.Module) -> list[Node]:
    """The layers of a model, each after its parents."""
    if isinstance(model, PCGraph):
        layers = zip(model.names[1:], model.parents, strict=True)
        return [Node(model._modules[name], p, f"model.{name}") for name, p in layers]  # type: ignore[arg-type]
    items = model._modules.values()
    pairs = zip(items, _chain(len(items)), strict=True)
    return [Node(item, p, f"model[{p[0]}]") for item, p in pairs]  # type: ignore[arg-type]


def nodes_from_above(model: nn.Module) -> dict[int, Node]:
    """The layers that predict a belief which has a layer of its own, or the input, by its place."""
    if not isinstance(model, PCGraph) or not model.above_parents:
        return {}
    layers = model.above._modules
    return {
        model.names.index(name): Node(layers[name], parents, f"model.above.{name}")  # type: ignore[arg-type]
        for name, parents in model.above_parents.items()
    }


def parents_of(model: nn.Module) -> Parents:
    """The places of each layer's parents."""
    return tuple(model.parents) if isinstance(model, PCGraph) else _chain(len(model._modules))


@lru_cache
def _chain(L: int) -> Parents:
    return tuple([(l,) for l in range(L)])


@lru_cache
def steps_above(parents: Parents, farthest: bool = False) -> tuple[int, ...]:
    """For each place, how many layers an error of the output goes through on its way there.

    On the shortest way, or on the farthest.
    """
    choose = max if farthest else min
    found = {len(parents): 0}
    for l in range(len(parents), 0, -1):
        for p in parents[l - 1]:
            steps = found[l] + 1
            found[p] = choose(found.get(p, steps), steps)
    return tuple([found[i] for i in range(len(parents) + 1)])


def depth(model: nn.Module) -> int:
    """How many layers there are on the longest way from the input to the output."""
    return steps_above(parents_of(model), farthest=True)[0]


def may_write_input(function: object) -> bool:
    """Whether a module says that it works in place, and may do so on its own input."""
    if type(function) is nn.Sequential:
        for child in function._modules.values():
            if may_write_input(child):
                return True
            if not _may_return_input(child):
                return False
        return False
    return any_in_place(modules_in(function))


def any_in_place(modules: list[nn.Module]) -> bool:
    """Whether any of the modules says that it works in place."""
    # Not getattr of the module: one without the attribute would take a slow way to say so.
    return any([module.__dict__.get("inplace") for module in modules]) or any(
        [getattr(kind, "inplace", False) for kind in set(map(type, modules))]
    )


def _may_return_input(module: object) -> bool:
    if type(module) is nn.Sequential:
        return all(_may_return_input(child) for child in module)
    return isinstance(module, _VIEWS)


_VIEWS = (nn.Identity, nn.Flatten, nn.Unflatten, nn.modules.dropout._DropoutNd)


class PCGraph(nn.Module):
    r"""A model whose layers are connected as a graph: skips, branches, several inputs to a layer.

    Each layer is given by name, as ``name=(module, *parents)``, after its parents: the names of the
    beliefs that it predicts its own from, in the order in which ``module.forward`` takes them. ``"x"`` is the
    input of the model, the last layer its output. ``PCInfer`` and the other functions take it wherever they
    take an ``nn.Sequential``: with the belief v_i at place i, each ErrType has ``f_i(v_parents)`` where it
    has ``f_l(v_{l-1})`` in a chain, and the errors of all its children arrive at a belief. The lists
    ``vhat``, ``v``, ``epsilon`` and ``vinit`` have an entry for each of ``names``.

    ``model(X)`` is the feed-forward pass. The same module may be given to several layers, which share its
    parameters.

    With ``above`` beliefs are predicted from both sides (bidirectional predictive coding): belief t has a
    second prediction g_t from any other beliefs, mostly those above it, and the energy has
    ``pi/2 ||g_t(v_parents) - v_t||^2`` more. ``"x"`` may be predicted too, and a layer that reads the last
    place is given the target Y, which is clamped there. A belief starts where its own layer predicts it, so
    that these errors have a value from the start, e_t = g_t(vhat_parents) - vhat_t. Strict, ErrorBased,
    Equilibrium and ``PCInferLatent`` descend such an energy; the modules of ``above`` learn from their own
    errors, ``(dg_t/dtheta)^T pi e_t``. ``model(X)`` does not run them.

    Args:
        above: by the name of a belief, ``(module, *parents)`` that predict it a second time.
        layers: for each layer its module and the names of its parents, at least one.

    Raises:
        TypeError: a layer is no pair of a module and names, or its module takes another number of inputs;
            ``above`` is no dict.
        ValueError: a parent is unknown, or comes later (as it would in a circle); a name is taken; a layer
            other than the last feeds no other one, so that there would be a second output; no layer takes
            the input; what ``above`` predicts is no hidden belief or input, or is its own parent.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch2pc import PCGraph, PCInfer
        >>> class Join(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.linear = nn.Linear(8, 8)
        ...     def forward(self, a, skip):
        ...         return skip + self.linear(torch.tanh(a))
        >>> model = PCGraph(
        ...     stem=(nn.Linear(4, 8), "x"),
        ...     body=(nn.Sequential(nn.Tanh(), nn.Linear(8, 8)), "stem"),
        ...     join=(Join(), "body", "stem"),
        ...     out=(nn.Linear(8, 3), "join"))
        >>> X, Y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> result = PCInfer(model, nn.CrossEntropyLoss(), X, Y, "Strict")
        >>> [(name, tuple(v.shape)) for name, v in zip(model.names, result.v)][:3]
        [('x', (16, 4)), ('stem', (16, 8)), ('body', (16, 8))]

        >>> both = PCGraph(
        ...     hidden=(nn.Linear(4, 8), "x"),
        ...     out=(nn.Sequential(nn.Tanh(), nn.Linear(8, 3)), "hidden"),
        ...     above={"x": (nn.Sequential(nn.Tanh(), nn.Linear(8, 4)), "hidden"),
        ...            "hidden": (nn.Embedding(3, 8), "out")})
        >>> result = PCInfer(
        ...     both, nn.CrossEntropyLoss(reduction="sum"), X, Y, "Strict",
        ...     precision={"above.x": 0.1, "above.hidden": 0.1})
        >>> both.above.hidden.weight.grad.shape
        torch.Size([3, 8])

    Source: Millidge, Tschantz and Buckley, arXiv:2006.04182 (2020); Salvatori et al., Learning on
    arbitrary graph topologies via predictive coding, NeurIPS (2022); predictions from both sides: Oliviers,
    Tang and Bogacz, Bidirectional predictive coding, arXiv:2505.23415 (2025).
    """

    names: list[str]
    """``"x"``, and the name of each layer."""
    parents: list[tuple[int, ...]]
    """For each layer, the places of its parents."""
    above_parents: dict[str, tuple[int, ...]]
    """For each belief that is predicted a second time, the places of those that it is predicted from."""

    def __init__(
        self, /, *, above: Mapping[str, tuple[Any, ...]] | None = None, **layers: tuple[Any, ...]
    ) -> None:
        super().__init__()
        if not layers:
            raise ValueError("PCGraph must have at least one layer, as name=(module, *parents)")
        self.names, self.parents = ["x"], []
        for name, layer in layers.items():
            if name == "x" or hasattr(self, name):
                raise ValueError(f"the name {name!r} of a layer is taken: choose another one")
            if "." in name or not name:
                raise ValueError(
                    f"the name {name!r} of a layer must not be empty, nor have a dot in it"
                )
            module, parents = _checked(name, layer, self.names, list(layers))
            self.add_module(name, module)
            self.parents.append(tuple([self.names.index(parent) for parent in parents]))
            self.names.append(name)
        fed = {p for parents in self.parents for p in parents}
        ends = [name for i, name in enumerate(self.names[:-1]) if i not in fed]
        if ends:
            what = "no layer takes the input" if ends == ["x"] else f"no layer takes {ends[-1]!r}"
            raise ValueError(f"each place but the last must be a parent of some layer: {what}")
        self.above_parents = {}
        if above is not None:
            self._add_above(above)

    def _add_above(self, above: Mapping[str, tuple[Any, ...]]) -> None:
        """Add the second predictions, whose modules are children of one called ``above``."""
        if not isinstance(above, Mapping):
            raise TypeError(
                "above must be a dict from names of beliefs to (module, *names of its parents), got "
                f"{type(above).__name__}"
            )
        self.above = nn.Module()
        for target, layer in above.items():
            if target not in self.names[:-1]:
                raise ValueError(
                    f"above must have the input or hidden layers as keys, {self.names[:-1]}, got {target!r}"
                )
            others = [name for name in self.names if name != target]
            module, parents = _checked(f"above.{target}", layer, others, [])
            self.above.add_module(target, module)
            self.above_parents[target] = tuple([self.names.index(parent) for parent in parents])

    def check_layers(self) -> None:
        """Each layer is still there, whatever has been assigned since."""
        for name in self.names[1:]:
            if self._modules.get(name) is None:
                raise ValueError(f"the layer {name!r} of a PCGraph must not be taken away")
        for name in self.above_parents:
            if self.above._modules.get(name) is None:
                raise ValueError(f"the layer 'above.{name}' of a PCGraph must not be taken away")

    def forward(self, x: Tensor) -> Tensor:
        """The feed-forward pass: the output of the last layer.

        As in an inference, a layer that works in place on its input is handed a copy.
        """
        values = [x]
        for node in nodes_of(self):
            given = [values[p] for p in node.parents]
            if may_write_input(node.function):
                given = [a.clone() for a in given]
            values.append(node.function(*given))
        return values[-1]

    def __len__(self) -> int:
        """The number of layers."""
        return len(self.parents)

    def extra_repr(self) -> str:
        """The connections."""
        pairs = [*zip(self.names[1:], self.parents, strict=True)]
        pairs += [(f"above.{name}", ps) for name, ps in self.above_parents.items()]
        return "\n".join(
            [f"{name} <- {', '.join([self.names[p] for p in ps])}" for name, ps in pairs]
        )

    def _repr_svg_(self) -> str:
        """What a notebook shows: a picture of the connections."""
        return drawn(self.names, self.parents, self.above_parents)


def _checked(
    name: str, layer: Any, before: Sequence[str], names: Sequence[str]
) -> tuple[nn.Module, Sequence[str]]:
    """The module and the parents of a layer, if they are such."""
    accepted = f"layer {name!r} must be (module, *names of its parents)"
    if not isinstance(layer, tuple | list) or len(layer) < 2:
        raise TypeError(f"{accepted}, got {layer!r}")
    module, *parents = layer
    if not isinstance(module, nn.Module) or not all([isinstance(p, str) for p in parents]):
        raise TypeError(f"{accepted}, got {type(module).__name__} and {parents!r}")
    for parent in parents:
        if parent == name or (parent in names and parent not in before):
            raise ValueError(
                f"layer {name!r} must come after its parents, but {parent!r} "
                f"{'is itself' if parent == name else 'comes later'}: the graph must have no circle"
            )
        if parent not in before:
            raise ValueError(
                f"layer {name!r} has an unknown parent {parent!r}; there are {[*before]}"
            )
    try:
        inspect.signature(module.forward).bind(*parents)
    except TypeError as error:
        count = len(parents)
        raise TypeError(
            f"layer {name!r} must take as many inputs as it has parents ({count}: "
            f"{', '.join(parents)}), but {type(module).__name__}.forward does not: {error}"
        ) from error
    except ValueError:  # it has no signature
        pass
    return module, parents
