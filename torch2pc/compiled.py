"""Strict's steps as one function for ``torch.compile``, kept for as long as its model lives.

It computes what ``Relaxation.step`` computes, layer by layer, but for all layers in every step, and
written with ``torch.func``, so that it traces whole. Parameters, beliefs, targets and the step
sizes are its inputs: new values of them do not compile it again. A call of it makes a few steps, as
every call takes some time of its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.func import grad, vjp

# None for a model that torch.compile could not take.
_compiled: WeakKeyDictionary[nn.Module, Callable[..., Any] | None] = WeakKeyDictionary()
_warned: WeakSet[nn.Module] = WeakSet()

# A call makes up to so many steps, fewer of deep models: what it evaluates has to be compiled first,
# and the more that is, the less a call's own time counts.
MOST_STEPS, MOST_LAYERS = 4, 40


def compiled_steps(model: nn.Module) -> Callable[..., Any] | None:
    """``steps``, compiled for this model; None if that has failed before."""
    if model not in _compiled:
        # Its own code object: what is compiled for a model is kept with the code, so it goes when
        # the model does, and one model's shapes do not count against another's recompilations.
        code = steps.__code__.replace(co_name=f"steps_of_{id(model)}")
        own = FunctionType(code, steps.__globals__)
        _compiled[model] = torch.compile(own, fullgraph=True, options=_options())
    return _compiled[model]


def _options() -> dict[str, Any]:
    try:
        # Not at the top, as it imports the compiler, and parts of it that another PyTorch may lack.
        from torch2pc.products import fast_products
    except ImportError:
        return {}
    return fast_products()


def run_plainly(model: nn.Module, reason: object, for_good: bool = False) -> None:
    """Say, the first time, that the model's relaxation runs without compilation.

    ``for_good``: nor is it tried again.
    """
    if for_good:
        _compiled[model] = None
    if model not in _warned:
        _warned.add(model)
        first_line = str(reason).strip().partition("\n")[0]
        warnings.warn(
            f"compile=True: {type(model).__name__} runs without compilation, because {first_line}",
            stacklevel=2,
        )


def steps(
    layers: Sequence[Callable[..., Tensor]],
    copies_input: Sequence[bool],
    dtypes: Sequence[torch.dtype],
    LossFun: Callable[[Tensor, Any], Tensor],
    prior: Callable[[list[Tensor]], Tensor] | None,
    Y: Any,
    first_prediction: Tensor | None,
    precision: Sequence[Tensor | None],
    v: list[Tensor],
    eta: Tensor,
    reached: Tensor,
) -> tuple[list[Tensor], list[Tensor]]:
    """The beliefs after as many steps from ``v`` as ``eta`` has entries, and the last one's errors.

    ``first_prediction`` is layer 1's if the input is clamped, None if the input is free; a
    precision of None is 1. Step k has the size ``eta[k]``, and ``reached[k, l]`` is 0 for a layer
    that no error has reached by then: its error is zero, and not the difference between two ways to
    round its prediction.
    """
    L = len(layers)
    for k in range(len(eta)):
        moved, epsilon = list(v), list(v)
        if first_prediction is not None:
            epsilon[1] = reached[k, 1] * (first_prediction - v[1])
        of_prior = None if prior is None else grad(prior)(v[:-1])
        for l in range(1 if first_prediction is None else 2, L + 1):
            predict = partial(_predict, layers[l - 1], copies_input[l - 1])
            prediction, pull_back = vjp(predict, v[l - 1].to(dtypes[l - 1]))  # type: ignore[misc]
            if l < L:
                epsilon[l] = reached[k, l] * (prediction - v[l])
            else:
                epsilon[L] = grad(lambda output: LossFun(output, Y).reshape(()))(prediction)
            (arriving,) = pull_back(_weighted(epsilon[l], precision[l]).to(prediction.dtype))
            descended = arriving.to(v[l - 1].dtype)
            if of_prior is not None:
                descended = descended + of_prior[l - 1]
            if l > 1:
                descended = descended - _weighted(epsilon[l - 1], precision[l - 1])
            moved[l - 1] = v[l - 1] - eta[k] * descended
        v = moved
    epsilon[L] = epsilon[L].to(v[L].dtype)
    return v, epsilon


@lru_cache(maxsize=8)
def schedule(
    n: int, eta: float, lowest: int, count: int, dtype: torch.dtype, device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """``eta`` and ``reached`` for each call that ``n`` steps take, with ``count`` beliefs.

    Errors have reached layer ``lowest`` in the first step and climb down a layer in each. Steps of
    size 0 come before it, so that all calls make the same number of steps, whatever ``n`` is.
    """
    in_a_call = max(1, min(MOST_STEPS, MOST_LAYERS // (count - 1)))
    k = torch.arange(1 - (-n % in_a_call), n + 1, device="cpu")
    etas = eta * (k > 0).double()
    reached = torch.arange(count, device="cpu") > lowest - k[:, None]
    parts = zip(etas.split(in_a_call), reached.split(in_a_call), strict=True)  # type: ignore[no-untyped-call]
    return [(sizes.to(device, dtype), which.to(device, dtype)) for sizes, which in parts]


def _predict(layer: Callable[..., Tensor], copies_input: bool, x: Tensor) -> Tensor:
    return layer(x.clone() if copies_input else x)


def _weighted(error: Tensor, precision: Tensor | None) -> Tensor:
    return error if precision is None else precision * error
