"""The checks of PCInfer's arguments, made before anything else is done.

What can only be found out on the way (what a layer or the loss returns) is in ``layers.py``.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

from torch import Tensor, nn

from torch2pc.rules import belief_dtype


def warn_caller(message: str) -> None:
    """Warn at the line that called the library."""
    level, of_library = 1, 1
    frame = sys._getframe()
    while frame is not None:
        if str(frame.f_globals.get("__name__")).startswith("torch2pc."):
            of_library = level
        frame, level = frame.f_back, level + 1  # type: ignore[assignment]
    warnings.warn(message, stacklevel=of_library + 1)


def check_model(model: object) -> None:
    """``model`` is a non-empty ``nn.Sequential`` that runs its items one after the other."""
    if not isinstance(model, nn.Sequential):
        raise TypeError(f"model must be an nn.Sequential, got {type(model).__name__}")
    if len(model) == 0:
        raise ValueError("model must have at least one layer, got an empty nn.Sequential")
    if getattr(model.forward, "__func__", None) is not nn.Sequential.forward:
        raise TypeError(
            f"model must use nn.Sequential's forward, got {type(model).__name__}, which overrides "
            "it: predictive coding runs the items one by one and would pass it over"
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
    if value.is_inference():
        raise ValueError(
            f"{name} must be a tensor that autograd can use, got one made under "
            f"torch.inference_mode(); pass {name}.clone() or make it under torch.no_grad()"
        )


def check_eta(eta: object) -> None:
    """``eta`` is a finite number."""
    if isinstance(eta, bool) or not isinstance(eta, Real):
        raise TypeError(f"eta must be a finite number, got {type(eta).__name__}")
    if not math.isfinite(eta):
        raise ValueError(f"eta must be a finite number, got {eta}")


def check_n(n: object) -> None:
    """``n`` is an integer of at least 1."""
    if isinstance(n, bool) or not isinstance(n, Integral):
        raise TypeError(f"n must be an int >= 1, got {type(n).__name__}")
    if n < 1:
        raise ValueError(f"n must be an int >= 1, got {n}")


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


def check_vinit_entries(vinit: Sequence[Any], vhat: Sequence[Tensor]) -> None:
    """Entries 1..L-1 of ``vinit`` are tensors like the beliefs; the two ends are not used.

    Where the beliefs about a half-precision ``vhat`` are held in float32, both types are accepted.
    """
    for l in range(1, len(vhat) - 1):
        given, like, dtype = vinit[l], vhat[l], belief_dtype(vhat[l].dtype)
        accepted = f"a tensor of shape {tuple(like.shape)}, {dtype}, on {like.device}"
        if not isinstance(given, Tensor):
            raise TypeError(f"vinit[{l}] must be {accepted}, got {type(given).__name__}")
        if (
            given.shape != like.shape
            or given.device != like.device
            or given.dtype not in (dtype, like.dtype)
        ):
            raise ValueError(
                f"vinit[{l}] must be {accepted}, "
                f"got shape {tuple(given.shape)}, {given.dtype}, on {given.device}"
            )


def check_precision(precision: object, length: int) -> list[float]:
    """``precision`` as a list of ``length`` numbers, one for each hidden layer."""
    if precision is None:
        return [1.0] * length
    if isinstance(precision, Real):
        values: Sequence[Any] = [precision] * length
    elif isinstance(precision, Sequence) and not isinstance(precision, str):
        values = precision
    else:
        raise TypeError(
            f"precision must be a number or a list of numbers, got {type(precision).__name__}"
        )
    if len(values) != length:
        raise ValueError(
            f"precision must have len(model) - 1 = {length} entries, one for each hidden belief, "
            f"got {len(values)}"
        )
    for l, value in enumerate(values, start=1):
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"precision of layer {l} must be a number, got {type(value).__name__}")
        if not (math.isfinite(value) and float(value) > 0):
            raise ValueError(f"precision of layer {l} must be finite and > 0, got {value}")
    return [float(value) for value in values]
