"""The parameters' updates: (df_i(v_parents)/dtheta)^T epsilon_i, layer by layer.

Each layer is evaluated where the updates are taken, and asked for the gradient of its own error alone. A
parameter that several layers share has the sum of what each of them makes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch2pc.energy.factors import Number, is_one
from torch2pc.graph.autograd import (
    Updates,
    add_updates,
    below,
    gradient,
    gradient_of_small,
    has_hooks,
    in_float16,
    leaves_between,
)
from torch2pc.graph.layer import Layer
from torch2pc.graph.network import Network


class OfLayer(NamedTuple):
    """What one layer's error makes: a gradient for each leaf and each input that is asked for."""

    leaves: list[Tensor]
    of_leaves: Sequence[Tensor | None]
    of_inputs: Sequence[Tensor | None]
    prediction: Tensor


def updates(
    network: Network,
    at: Sequence[Tensor],
    errors: Sequence[Any],
    v: Sequence[Tensor],
    known: Callable[[int, Tensor], OfLayer | None] | None = None,
    beta: Number = 1.0,
    of_above: Sequence[Tensor] = (),
) -> tuple[Tensor | None, dict[Tensor, Tensor]]:
    """The input's error (if the input requires grad) and the parameters' updates.

    Args:
        network: recorded.
        at: the beliefs that the updates are taken at, the input's among them.
        errors: for each place, the error of its layer, weighted by its precision.
        v: the beliefs that a prior's own parameters are asked at.
        known: for a layer and its error, what they make, where that is known otherwise.
        beta: what the loss is multiplied by.
        of_above: the weighted errors of second predictions, from above.
    """
    found = Updates(network.arrived)
    input_error: Tensor | None = None

    def add(of_layer: OfLayer) -> None:
        nonlocal input_error
        add_updates(found, of_layer.leaves, of_layer.of_leaves)
        for of_input in of_layer.of_inputs:
            of_input = torch.zeros_like(network.vhat[0]) if of_input is None else of_input
            input_error = of_input if input_error is None else input_error + of_input

    for l, (layer, node) in enumerate(zip(network.layers, network.nodes, strict=True), start=1):
        asks_input = network.asks_input and 0 in node.parents
        asks_loss = l == len(network.layers) and network.loss.has_leaves
        if not (layer.has_leaves or asks_input or asks_loss):
            continue
        of_layer = None if known is None else known(l, errors[l])
        if of_layer is None:
            kept, is_moving = network.kept.pop(l, None), bool(network.moving(l))
            of_layer = _of_layer(network, layer, node.parents, kept, is_moving, at, errors[l])
        add(of_layer)
        if asks_loss:
            output = of_layer.prediction.detach().requires_grad_()
            _add_own(found, network.loss.replay(output), [output], beta)
        del of_layer
    for part, error in zip(network.from_above, of_above, strict=True):
        if part.layer.has_leaves or (network.asks_input and 0 in part.parents):
            is_moving, kept, part.kept = bool(part.moving), part.kept, None
            add(_of_layer(network, part.layer, part.parents, kept, is_moving, at, error))
        if network.asks_input and part.target == 0:
            input_error = -error if input_error is None else input_error - error
    if network.prior is not None and network.prior.has_leaves:
        beliefs = [v_i.detach().requires_grad_() for v_i in v[:-1]]
        _add_own(found, network.prior.replay(beliefs), beliefs)
    return input_error, found


def _of_layer(
    network: Network,
    layer: Layer,
    parents: Sequence[int],
    kept: tuple[list[Tensor], Tensor] | None,
    is_moving: bool,
    at: Sequence[Tensor],
    error: Tensor,
) -> OfLayer:
    if kept is not None:
        given, prediction = kept
    else:
        given = network.given_at(parents, at)
        prediction = layer.replay(*given)
    leaves, foreign, *_ = below(prediction, given)
    inputs = []
    if network.asks_input:
        inputs = [x for p, x in zip(parents, given, strict=True) if p == 0]
    asked = [*leaves, *inputs]
    # PyTorch's own backward passes are linear in the error, unless a hook looks at it.
    is_linear = not (foreign or layer.uncovered or layer.own_backward or has_hooks(asked))
    if is_linear and (is_moving or in_float16(prediction)):
        found = gradient_of_small(prediction, asked, error)
    else:
        found = gradient([prediction], asked, [error.to(prediction.dtype)])
    return OfLayer(leaves, found[: len(leaves)], found[len(leaves) :], prediction)


def _add_own(
    updates: dict[Tensor, Tensor], energy: Tensor, inputs: Sequence[Tensor], beta: Number = 1.0
) -> None:
    """Add the gradients of a loss's or a prior's own parameters, times ``beta``, to ``updates``."""
    leaves = leaves_between(energy, inputs)
    found = gradient([energy], leaves)
    add_updates(updates, leaves, [g if g is None or is_one(beta) else beta * g for g in found])
