"""Autograd's vector-Jacobian product, with errors whose advice a user of the library can follow."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def vjp(
    outputs: Sequence[Tensor] | Tensor,
    inputs: Sequence[Tensor] | Tensor,
    arriving: Sequence[Tensor] | Tensor | None,
    keep_graph: bool = False,
) -> tuple[Tensor | None, ...]:
    """``torch.autograd.grad``, with an error for reentrant checkpoints whose advice can be followed."""
    try:
        return torch.autograd.grad(
            outputs, inputs, arriving, retain_graph=keep_graph, allow_unused=True
        )
    except RuntimeError as error:
        if "use_reentrant=True" in str(error):
            raise RuntimeError(
                "model must not checkpoint with use_reentrant=True, which can only be differentiated "
                "by loss.backward(): pass use_reentrant=False to torch.utils.checkpoint.checkpoint "
                "(or checkpoint_sequential) where a module calls it; in a model of the transformers "
                'package, gradient_checkpointing_enable({"use_reentrant": False})'
            ) from error
        if "through the graph a second time" in str(error):
            raise kept_tensor("A layer, or LossFun,") from error
        raise


def kept_tensor(user: str) -> RuntimeError:
    return RuntimeError(
        f"{user} must not use a tensor that a layer has computed in this forward pass and kept (an "
        "auxiliary loss on a module, a skip connection around an item): it goes around the beliefs, "
        "which would be relaxed without it. detach() it if it is not to be "
        "learnt from; or let the layers hand it on in their outputs, to LossFun too; or compute it in "
        'LossFun, from the output or from parameters; or take ErrType="Exact", where it is '
        "backpropagated"
    )
