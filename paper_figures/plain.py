"""Strict iterated as it is written, for the figures that show what round-off does to it.

With v = vhat at the start, n times, all layers at once,

    today      epsilon_l = f_l(v_{l-1}) - v_l,    v_l <- v_l + eta (epsilon_l - J_{l+1}(v_l)^T epsilon_{l+1})
    published  epsilon_l = v_l - f_l(v_{l-1}),    v_l <- v_l + eta (J_{l+1}(v_l)^T epsilon_{l+1} - epsilon_l)

and epsilon_L = dLoss/dy at y = f_L(v_{L-1}). ``today`` descends the energy F, and its updates
(df_l(v_{l-1})/dtheta)^T epsilon_l are F's gradients at the beliefs. ``published`` is how the paper's
figures 1 and 2 were made: hidden beliefs climb the loss, and the updates of figure 1 are taken at the
feed-forward values vhat. Errors are differences of nearly equal tensors here, and the type of the
model and of the batch decides how much of them is round-off; `torch2pc` subtracts displacements.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from paper_figures.data import Batch
from paper_figures.training import LossFunction, Setup, weights_of
from torch2pc.pcinfer import PCResult


class Plain:
    """The iteration, one step at a time, of a model without randomness or changing buffers."""

    def __init__(
        self,
        model: nn.Sequential,
        LossFun: LossFunction,
        batch: Batch,
        eta: float,
        published: bool = False,
    ) -> None:
        self.model, self.LossFun, self.batch, self.eta = model, LossFun, batch, eta
        self.sign = -1 if published else 1
        self.vhat = [batch.X]
        with torch.no_grad():
            for layer in model:
                self.vhat.append(layer(self.vhat[-1]))
        self.v = list(self.vhat)
        self.epsilon = [torch.zeros_like(v_l) for v_l in self.v]

    def step(self) -> None:
        """Take all errors, then move all beliefs."""
        v, epsilon, L = self.v, self.epsilon, len(self.model)
        inputs = [v_l.detach().requires_grad_() for v_l in v[:L]]
        # The input does not move, and layer 1's prediction of it stays what it is.
        predictions = [self.vhat[1] if L > 1 else self.model[0](inputs[0])]
        predictions += [self.model[l](inputs[l]) for l in range(1, L)]
        for l in range(1, L):
            epsilon[l] = self.sign * (predictions[l - 1].detach() - v[l])
        y = predictions[-1].detach().requires_grad_()
        (epsilon[L],) = torch.autograd.grad(self.LossFun(y, self.batch.labels), y)
        for l in range(1, L):
            (descended,) = torch.autograd.grad(predictions[l], inputs[l], epsilon[l + 1])
            v[l] = v[l] + self.sign * self.eta * (epsilon[l] - descended)

    def updates(self, at: Sequence[Tensor]) -> dict[Tensor, Tensor]:
        """Every parameter's update with the inputs ``at``: ``self.v`` or ``self.vhat``."""
        found: dict[Tensor, Tensor] = {}
        for layer, x, error in zip(self.model, at, self.epsilon[1:], strict=False):
            parameters = list(layer.parameters())
            updates = torch.autograd.grad(layer(x.detach()), parameters, error)
            found.update(zip(parameters, updates, strict=True))
        return found


def plain_updates(model: nn.Sequential, batch: Batch, setup: Setup) -> list[Tensor]:
    """The weights' updates of today's Strict, by the plain iteration in the model's type."""
    plain = Plain(model, setup.LossFun, batch, setup.eta)
    for _ in range(setup.n):
        plain.step()
    updates = plain.updates(plain.v)
    return [updates[weight] for weight in weights_of(model)]


def published_updates(model: nn.Sequential, batch: Batch, setup: Setup) -> list[Tensor]:
    """The weights' updates as published, in float64."""
    precise = copy.deepcopy(model).double()
    _, updates = as_published(precise, Batch(batch.X.double(), batch.labels), setup)
    return [updates[weight] for weight in weights_of(precise)]


def infer_as_published(model: nn.Sequential, batch: Batch, setup: Setup) -> PCResult:
    """Infer as published and write the updates into ``.grad``."""
    result, updates = as_published(model, batch, setup)
    for parameter, update in updates.items():
        parameter.grad = update
    return result


def as_published(
    model: nn.Sequential, batch: Batch, setup: Setup
) -> tuple[PCResult, dict[Tensor, Tensor]]:
    """What is inferred, and every parameter's update at the feed-forward values."""
    plain = Plain(model, setup.LossFun, batch, setup.eta, published=True)
    output = plain.vhat[-1].detach().requires_grad_()
    Loss = setup.LossFun(output, batch.labels)
    (dLdy,) = torch.autograd.grad(Loss, output)
    for _ in range(setup.n):
        plain.step()
    result = PCResult(plain.vhat, Loss.detach(), dLdy, plain.v, plain.epsilon)
    return result, plain.updates(plain.vhat)
