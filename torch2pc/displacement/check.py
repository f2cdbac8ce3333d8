"""Whether what was recorded of a layer is the layer: its lines, held against it at another input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from torch2pc.displacement.lines import Displacement, Reevaluation
from torch2pc.displacement.recorder import by_user
from torch2pc.displacement.rules import (
    belief_dtype,
)

# For each item of a model, what its recorded operations were found to be: right or not.
# (By the hash of the operations, as these may name the item, which must not be kept by it.)
_found: WeakKeyDictionary[Any, dict[int, bool]] = WeakKeyDictionary()
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}


def is_new(item: object) -> bool:
    """Whether no operations of ``item`` have been held against it yet."""
    return item not in _found


def agrees(
    item: object,
    recorded: Displacement,
    reevaluation: Callable[[], Reevaluation],
    x: Sequence[Tensor],
    forward_only: bool,
    aside: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> bool:
    """Whether a displacement and its vector-Jacobian product are those of the layer itself.

    Compared once for each sequence of operations of an item, at a random input as far from ``x`` as
    x is large. (An empty batch tells nothing.) ``forward_only``: the product is taken from the layer
    itself anyway. ``aside``: what they are compared in.
    """
    if x[0].numel() == 0:
        return True
    known = _found.setdefault(item, {})
    key = hash((recorded.key, forward_only))
    if key not in known:
        with aside():
            known[key] = _agree(recorded, reevaluation(), x, forward_only)
    return known[key]


def _agree(
    recorded: Displacement, other: Reevaluation, x: Sequence[Tensor], forward_only: bool
) -> bool:
    generator = torch.Generator().manual_seed(0)
    dtype = belief_dtype(x[0].dtype)

    def random(like: Tensor) -> Tensor:
        drawn = torch.randn(like.shape, generator=generator, dtype=dtype, device="cpu")
        return drawn.to(like.device)

    sizes = [a.detach().to(dtype).square().mean().sqrt() for a in x]
    d = [random(a) * torch.where(size > 0, size, 1.0) for a, size in zip(x, sizes, strict=True)]
    plain, graph = other.forward(*d)
    e = random(plain).to(plain.dtype)
    expected_back = [] if forward_only else other.backward(graph, e)
    try:
        moved, saved = recorded.forward(*d)
        pairs: list[tuple[Any, Any, Tensor]] = [(moved, plain, plain)]
        if not forward_only:
            pairs += zip(recorded.backward(saved, e), expected_back, x, strict=True)
    except Exception:
        if any([line.rule.forward is by_user for line in recorded.lines]):
            raise
        return False
    used = {*[a.dtype for a in x], *[t.dtype for line in recorded.lines for t in line.tensors]}
    in_half = any([belief_dtype(dtype) != dtype for dtype in used])
    tolerance = 0.2 if in_half else _TOLERANCE[dtype]
    for found, expected, like in pairs:
        found = torch.zeros_like(like) if found is None else found
        expected = torch.zeros_like(like) if expected is None else expected
        distance, scale = (found - expected).norm(), expected.norm()
        if not bool(distance <= tolerance * scale) and bool(scale.isfinite()):
            return False
    return True
