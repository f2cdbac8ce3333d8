"""Autograd's vector-Jacobian product and graph: errors whose advice can be followed, what lies below what."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, _engine_run_backward, get_gradient_edge


def vjp(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor | GradientEdge],
    arriving: Sequence[Tensor] | None = None,
    keep_graph: bool = False,
) -> tuple[Tensor | None, ...]:
    """``torch.autograd.grad``, with an error for reentrant checkpoints whose advice can be followed.

    ``arriving``: one for each output; 1 if not given. The engine is called as ``grad`` calls it, which looks
    at each tensor several times before: a sixth of the time that small networks take for a backward pass.
    """
    arriving = [torch.ones_like(y) for y in outputs] if arriving is None else arriving
    try:
        return _engine_run_backward(
            tuple(outputs),
            tuple(arriving),
            keep_graph,
            False,
            tuple(inputs),
            True,
            accumulate_grad=False,
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


def node_of(x: Tensor) -> Any:
    """The node of the autograd graph that makes ``x``, or takes its gradient; None without one."""
    return x.grad_fn or (get_gradient_edge(x).node if x.requires_grad else None)


def nodes_below(*nodes: Any) -> list[Any]:
    """All nodes of the autograd graph that a backward pass from ``nodes`` arrives at, and these."""
    seen = dict.fromkeys([node for node in nodes if node is not None])
    waiting = list(seen)
    for node in waiting:
        for before, _ in node.next_functions:
            if before is not None and before not in seen:
                seen[before] = None
                waiting.append(before)
    return waiting


def reaches(nodes: Iterable[Any], inputs: Sequence[Tensor]) -> bool:
    """Whether a gradient that arrives at one of the nodes goes on to one of the inputs, or may."""
    ends = {node_of(x) for x in inputs} - {None}
    return not ends.isdisjoint(nodes_below(*nodes))
