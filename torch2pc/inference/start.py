"""What is known of a call's start only once the feed-forward values are there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from torch2pc.displacement.rules import belief_dtype


def check_vinit_entries(vinit: Sequence[Any] | None, vhat: Sequence[Tensor]) -> None:
    """``vinit`` is None, or its entries 1..L-1 are tensors like the beliefs; the two ends are not used.

    Where the beliefs about a half-precision ``vhat`` are held in float32, both types are accepted.
    """
    if vinit is None:
        return
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
