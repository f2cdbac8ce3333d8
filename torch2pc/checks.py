"""The checks of PCInfer's arguments, made before anything else is done.

What can only be found out on the way (what a layer or the loss returns) is in ``layer.py``.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

from torch2pc.energy.divergences import LayerEnergy, OfCallable
from torch2pc.graph.nodes import PCGraph
from torch2pc.graph.state import modules_in
from torch2pc.inference.multipliers import ALPHA
from torch2pc.inference.steps import AUTO, Halving, Langevin, Rule, is_plain, number


def check_model(model: object) -> None:
    """``model`` is an ``nn.Sequential`` with items, or a ``PCGraph``, with a forward of that class."""
    if not isinstance(model, nn.Sequential | PCGraph):
        raise TypeError(
            f"model must be an nn.Sequential or a PCGraph, got {type(model).__name__}{_way_out(model)}"
        )
    if len(model) == 0:
        raise ValueError("model must have at least one layer, got an empty nn.Sequential")
    if not _runs_its_items(model):
        base, way_out = "nn.Sequential", ", or let torch2pc.group_layers(model, X) do so"
        if isinstance(model, PCGraph):
            base, way_out = "PCGraph", ""
        raise TypeError(
            f"model must use {base}'s forward, got {type(model).__name__}, which overrides "
            "it: predictive coding runs the items one by one and would pass it over; move what it "
            f"adds into an item{way_out}"
        )
    if isinstance(model, PCGraph):
        model.check_layers()
    # (Of the class: a module without the attribute would take a slow way to say so.)
    if (check_origin := getattr(type(model), "check_origin", None)) is not None:
        check_origin(model)  # layers that group_layers has made


def _runs_its_items(model: nn.Sequential | PCGraph) -> bool:
    """Whether the forward is the class's own, or accelerate's wrapping of it."""
    plain = PCGraph.forward if isinstance(model, PCGraph) else nn.Sequential.forward
    forward: Any = getattr(model.forward, "__func__", None)
    original = getattr(model.__dict__.get("_original_forward"), "__func__", None)
    return forward is plain or (original is plain and inspect.unwrap(forward) is plain)


def _way_out(model: object) -> str:
    """How a model that is no ``nn.Sequential`` becomes one."""
    kind = type(model)
    if _base(kind, _WRAPPERS) is not None:
        return f": pass the nn.Sequential that it wraps. {_SEVERAL}"
    if hasattr(model, "_orig_mod"):
        return (
            ": pass the model that was compiled; PCInfer has a compile=True of its own, and its "
            "items may be compiled"
        )
    if _base(kind, ("LightningModule",)) is not None:
        return (
            ": make its layers an nn.Sequential and pass that, and set "
            "self.automatic_optimization = False, as PCInfer stands in for manual_backward()"
        )
    if isinstance(model, nn.Module):
        return (
            ": torch2pc.group_layers(model, X) makes one of it, which shares its parameters, if it runs "
            "its parts one after the other, and torch2pc.pc_graph(model, X) a graph of it if not; or write "
            "it as an nn.Sequential with one item for each block"
        )
    return ""


def check_unwrapped(model: nn.Module) -> None:
    """``model`` is no wrapper of a model, and whole."""
    if hasattr(model, "_orig_mod") or _base(type(model), _WRAPPERS) is not None:
        raise TypeError(f"model must not be wrapped, got {type(model).__name__}{_way_out(model)}")
    check_modules(modules_in(model))


_WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel", "DataParallel")
_SHARDED = ("FSDPModule", "FullyShardedDataParallel")
_SEVERAL = (
    "To train on several processes, each with a part of the batch, call torch2pc.distributed.PCInfer, "
    "which sums the updates"
)


def check_modules(modules: Iterable[nn.Module]) -> None:
    """None of the modules of a model or its loss has gradients that something else takes care of."""
    for kind in set(map(type, modules)):
        if kind.__module__.startswith("torch.nn.modules."):
            continue
        if _base(kind, _SHARDED) is not None:
            raise TypeError(
                f"model must have whole parameters, got {kind.__name__}, whose parameters are "
                "sharded (fully_shard, FSDP) and gathered in passes that PCInfer does not make: "
                f"leave the model whole on each process. {_SEVERAL}"
            )
        if _base(kind, ("DistributedDataParallel",)) is not None:
            raise TypeError(
                "model must not have items wrapped in DistributedDataParallel, which would not "
                f"synchronise their gradients: use the modules themselves. {_SEVERAL}"
            )


def _base(kind: type, names: Sequence[str]) -> str | None:
    """The name of the first of ``kind``'s base classes with one of these names."""
    return next((base.__name__ for base in kind.__mro__ if base.__name__ in names), None)


def check_no_transform() -> None:
    """The call is not inside ``torch.func.grad``, ``torch.vmap`` and the like."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise RuntimeError(
            "PCInfer must not be called inside a torch.func transform (grad, vjp, jvp, vmap): it "
            "takes gradients by autograd and writes them into .grad. Call it outside; a batch needs "
            "no vmap"
        )


def check_LossFun(LossFun: object) -> None:
    """``LossFun`` can be called."""
    if not callable(LossFun):
        raise TypeError(
            "LossFun must be a callable LossFun(prediction, Y) that returns a scalar tensor, "
            f"got {type(LossFun).__name__}"
        )


def check_tensor(name: str, value: object) -> None:
    """``value`` is a tensor that autograd can work with."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.is_nested:
        raise TypeError(
            f"{name} must be a strided tensor, got a nested one, whose examples have sizes of their "
            f"own: pass {name}.to_padded_tensor(0.0) with a mask, or examples of one size at a time"
        )
    if value.is_inference():
        raise ValueError(
            f"{name} must be a tensor that autograd can use, got one made under "
            f"torch.inference_mode(); pass {name}.clone() or make it under torch.no_grad()"
        )


def check_has_values(name: str, value: Tensor) -> None:
    """``value`` has numbers to relax from."""
    if value.is_meta:
        raise ValueError(
            f"{name} must hold numbers, which a relaxation looks at (Exact and FixedPred do not), but it is "
            "on the meta device, whose tensors hold none"
        )


def check_eta(eta: object) -> float | str | Rule:
    """``eta`` as a float: a finite number, which may be a tensor or an array without dimensions.

    Or ``"auto"`` or a step rule, which it stays; a rule that is plain descent is its number.
    """
    if isinstance(eta, Rule):
        return float(eta.eta) if is_plain(eta) else eta
    if isinstance(eta, str):
        if eta != AUTO:
            raise ValueError(f'eta must be a finite number or "auto", got {eta!r}')
        return eta
    if isinstance(eta, type) and issubclass(eta, Rule):
        raise TypeError(
            f"eta must be a rule, got the class {eta.__name__}: call it with its numbers"
        )
    return number("eta", eta, 'a finite number or "auto"')


def check_rule(eta: float | str | Rule, ErrType: str) -> None:
    """``eta`` is a rule that the algorithm can follow."""
    if not isinstance(eta, Rule):
        return
    if ErrType == "Multipliers" and isinstance(eta, Halving):
        raise ValueError(
            "eta must be a rule that looks at no energy for Multipliers, whose multipliers raise it as they "
            f"grow, got {eta}"
        )
    if ErrType == "FixedPred":
        raise ValueError(
            'eta must be a finite number or "auto" for FixedPred, whose closed form is that of plain '
            f"descent, got {eta}"
        )
    if ErrType == "ErrorBased" and eta.down:
        raise ValueError(
            'eta must have sweep="together" for ErrorBased, whose errors all follow from one pass down '
            f"and have no order, got {eta}"
        )


def check_from_above(model: nn.Sequential | PCGraph, ErrType: str, nudge: object = None) -> None:
    """Where beliefs have second predictions, the algorithm descends an energy that has them."""
    if not isinstance(model, PCGraph) or not model.above_parents:
        return
    if ErrType not in OF_BOTH_SIDES:
        raise ValueError(
            f"model must have no predictions from above for {ErrType}, whose errors are those of the loss "
            "alone, so that what predicts from above would never learn: they belong to "
            f"{', '.join(OF_BOTH_SIDES)} and PCInferLatent"
        )
    if nudge is not None:
        raise ValueError(
            "nudge must be None where beliefs are predicted from above: these errors are there without the "
            "loss, and would leave nothing but round-off of the difference of two relaxations"
        )


# The algorithms that descend the energy of whatever predicts a belief.
OF_BOTH_SIDES = ("Strict", "ErrorBased", "Equilibrium")


def check_n(n: object) -> int:
    """``n`` as an int: an integer of at least 1."""
    if isinstance(n, bool) or not isinstance(n, Integral):
        raise TypeError(f"n must be an int >= 1, got {type(n).__name__}")
    if n < 1:
        raise ValueError(f"n must be an int >= 1, got {n}")
    return int(n)


def check_energies(energies: object, model: nn.Sequential | PCGraph) -> dict[int, LayerEnergy]:
    """``energies`` by the places of hidden layers."""
    if not isinstance(energies, Mapping):
        raise TypeError(
            "energies must be a dict from places of hidden layers to energies, "
            f"got {type(energies).__name__}"
        )
    if isinstance(model, PCGraph):
        check_names("energies", {k: 0 for k in energies if not isinstance(k, int)}, model)
    found: dict[int, LayerEnergy] = {}
    for key, energy in energies.items():
        place = model.names.index(key) if isinstance(model, PCGraph) and key in model.names else key
        if isinstance(place, bool) or not isinstance(place, int) or not 1 <= place < len(model):
            raise ValueError(
                f"energies must have places of hidden layers as keys, 1 to {len(model) - 1}, as in v "
                f"and epsilon, got {key!r}"
            )
        name = f"energies[{key!r}]"
        if isinstance(energy, type) or not callable(energy):
            raise TypeError(
                f"{name} must be one of torch2pc.energies, or a callable (prediction, belief) -> scalar, "
                f"got {energy.__name__ if isinstance(energy, type) else type(energy).__name__}"
            )
        if isinstance(energy, nn.Module) and any([True for _ in energy.parameters()]):
            raise TypeError(f"{name} must have no parameters, as it would not learn, got {energy}")
        found[place] = energy if isinstance(energy, LayerEnergy) else OfCallable(name, energy)
    return found


def check_nudge(nudge: object, eta: object, vinit: object) -> float:
    """``nudge`` as a float: a finite number above 0, of a relaxation from the feed-forward pass."""
    beta = number("nudge", nudge, "None or a finite number > 0", lambda x: x > 0)
    if vinit is not None:
        raise ValueError(
            "vinit must be None with nudge, which takes the difference of two relaxations: what both "
            "have of other beliefs would leave nothing but round-off of it"
        )
    if isinstance(eta, Langevin):
        raise ValueError(
            f"eta must be a rule without noise with nudge, which divides by 2 beta, got {eta}"
        )
    return beta


def check_names(
    name: str,
    given: Mapping[Any, Any],
    model: nn.Sequential | PCGraph,
    others: Sequence[str] = (),
) -> list[str]:
    """The names of the hidden layers of a graph, and others, which the keys of ``given`` are among."""
    if not isinstance(model, PCGraph):
        raise TypeError(
            f"{name} must be no dict for an nn.Sequential, whose layers have no names: give a list"
        )
    accepted = [*model.names[1:-1], *others]
    for key in given:
        if key not in accepted:
            raise ValueError(f"{name} must have hidden layers as keys, {accepted}, got {key!r}")
    return accepted


def check_prior(prior: object) -> None:
    """``prior`` is None or can be called."""
    if prior is not None and not callable(prior):
        raise TypeError(
            "prior must be a callable from the list of beliefs to a scalar tensor, "
            f"got {type(prior).__name__}"
        )


def check_alpha(alpha: object, ErrType: str) -> float | None:
    """How fast multipliers grow, a finite number >= 0; None for algorithms that have none."""
    if ErrType == "Multipliers":
        accepted = "None or a finite number >= 0"
        return ALPHA if alpha is None else number("alpha", alpha, accepted, lambda x: x >= 0)
    if alpha is not None:
        raise ValueError(f"alpha must be None for {ErrType}, which has no multipliers, got {alpha}")
    return None


def check_callback(callback: object, compile: bool, has_iterations: bool = True) -> None:
    """``callback`` is None, or can be called after iterations that there are."""
    if callback is None:
        return
    if not callable(callback):
        raise TypeError(
            f"callback must be None or a callable of (k, v, epsilon), got {type(callback).__name__}"
        )
    if not has_iterations:
        raise ValueError(
            "callback must be None for Exact and FixedPred, which are computed in closed form, "
            "without iterations; torch2pc.follow shows those that FixedPred stands for"
        )
    if compile:
        raise ValueError(
            "callback must be None with compile=True, whose iterations run as one compiled program"
        )


def check_precise(precise: object, compile: bool) -> None:
    """``precise`` is True or False, and True where the call is compiled."""
    if not isinstance(precise, bool):
        raise TypeError(f"precise must be True or False, got {type(precise).__name__}")
    if compile and not precise:
        raise ValueError("precise must be True with compile=True, which compiles the rules")


def check_update_at(update_at: object) -> None:
    """``update_at`` is one of the places where Strict's updates can be taken."""
    if not isinstance(update_at, str) or update_at not in ("v", "vhat", "before"):
        raise ValueError(f'update_at must be "v", "vhat" or "before", got {update_at!r}')


def check_vinit_length(vinit: object, length: int) -> None:
    """``vinit`` is None or a sequence of ``length`` entries."""
    if vinit is None:
        return
    if not isinstance(vinit, Sequence) or isinstance(vinit, str):
        raise TypeError(f"vinit must be None or a list of tensors, got {type(vinit).__name__}")
    if len(vinit) != length:
        raise ValueError(
            f"vinit must have len(model) + 1 = {length} entries (entry 0 is the input), "
            f"got {len(vinit)}"
        )


def check_has_energy(name: str, reason: str, ErrType: str, has_iterations: bool) -> None:
    """What changes the energy, ``name``, is for algorithms that descend one."""
    if not has_iterations:
        raise ValueError(f"{name} must be None for {ErrType}, {reason}")


def check_precision(precision: object, model: nn.Sequential | PCGraph) -> list[float]:
    """``precision`` as a list of numbers, one for each hidden layer, then for each prediction from above."""
    length, above = len(model) - 1, []
    if isinstance(model, PCGraph):
        above = [f"above.{name}" for name in model.above_parents]
    if precision is None:
        return [1.0] * (length + len(above))
    if isinstance(precision, Real):
        values: Sequence[Any] = [precision] * (length + len(above))
    elif isinstance(precision, Mapping):
        names = check_names("precision", precision, model, above)
        values = [precision.get(name, 1.0) for name in names]
    elif isinstance(precision, Sequence) and not isinstance(precision, str):
        values = [*precision, *[1.0] * len(above)]
    else:
        raise TypeError(
            "precision must be a number or a list of numbers, or for a PCGraph a dict, "
            f"got {type(precision).__name__}"
        )
    if len(values) != length + len(above):
        raise ValueError(
            f"precision must have len(model) - 1 = {length} entries, one for each hidden belief, "
            f"got {len(values) - len(above)}"
        )
    for l, value in enumerate(values, start=1):
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"precision of layer {l} must be a number, got {type(value).__name__}")
        if not (math.isfinite(value) and float(value) > 0):
            raise ValueError(f"precision of layer {l} must be finite and > 0, got {value}")
    return [float(value) for value in values]
