"""The feed-forward pass on its own, for code that takes gradients of its values itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torch2pc.checks import check_LossFun, check_model, check_tensor
from torch2pc.graph.apart import until_guarded
from torch2pc.graph.autograd import Graph, output_gradient
from torch2pc.graph.network import Network
from torch2pc.graph.nodes import PCGraph
from torch2pc.graph.state import Snapshot


def FwdPassPlus(
    model: nn.Sequential | PCGraph, LossFun: Callable[[Tensor, Any], Tensor], X: Tensor, Y: Any
) -> tuple[list[Tensor], Tensor, Tensor]:
    r"""Run a feed-forward pass and return all of its values, still attached to its autograd graph.

    ``vhat_0 = X``, ``vhat_l = f_l(vhat_{l-1})``, ``Loss = LossFun(vhat_L, Y)``,
    ``dLdy = dLoss/dvhat_L``. What ``PCInfer`` returns is detached; from these values gradients can be
    taken, with respect to parameters and to other values, as with ``model(X)``. ``.grad`` is left
    alone.

    Args:
        model: an ``nn.Sequential`` of L items ``f_l``, as for ``PCInfer``.
        LossFun: called as ``LossFun(output, Y)``; returns a scalar tensor.
        X: the input batch, ``(batch, *features)``.
        Y: the targets, handed to ``LossFun`` as they are.

    Returns:
        ``vhat``, a list of L+1 tensors (the first is a copy of X, so that no layer can write into X),
        the scalar ``Loss``, and ``dLdy`` with the shape of ``vhat[L]``. The graph is kept until
        ``vhat`` and ``Loss`` are gone; ``dLdy`` has none.

    Raises:
        TypeError, ValueError, RuntimeError: as ``PCInfer``, for the arguments that they share.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch2pc import FwdPassPlus
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.Tanh(), nn.Linear(8, 3)))
        >>> X, Y = torch.randn(16, 4), torch.randn(16, 3)
        >>> vhat, Loss, dLdy = FwdPassPlus(model, nn.MSELoss(), X, Y)
        >>> (update,) = torch.autograd.grad(vhat[2], model[1][1].weight, grad_outputs=dLdy)
        >>> update.shape
        torch.Size([3, 8])

    Source: the function of the same name in R. Rosenbaum's Torch2PC, published with PLOS ONE 17(3):
    e0266102 (2022).
    """
    check_model(model)
    check_LossFun(LossFun)
    check_tensor("X", X)

    def attempt() -> Graph:
        network = Network(model, LossFun, X, Y)
        with Snapshot(network.modules, network.devices):
            return network.feed_forward(from_X=True)

    with torch.inference_mode(False), torch.enable_grad():
        graph = until_guarded(attempt)
        dLdy = output_gradient(graph.Loss, graph.vhat[-1], keep_graph=True)
        return graph.vhat, graph.Loss, dLdy
