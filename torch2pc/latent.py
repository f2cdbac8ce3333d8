"""Predictive coding without labels: the first belief is free, and is inferred with the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from torch2pc.checks import (
    check_callback,
    check_energies,
    check_eta,
    check_has_values,
    check_LossFun,
    check_model,
    check_n,
    check_precision,
    check_prior,
    check_tensor,
)
from torch2pc.compiled import Relaxing, compiled_or_plain
from torch2pc.energy.factors import Terms
from torch2pc.graph.network import Inference, Network
from torch2pc.graph.nodes import PCGraph
from torch2pc.inference.relax import Callback, infer_by
from torch2pc.inference.steps import Rule
from torch2pc.inference.strict import latent
from torch2pc.pcinfer import PCResult, infer


def PCInferLatent(
    model: nn.Sequential | PCGraph,
    LossFun: Callable[[Tensor, Any], Tensor],
    Y: Any,
    Xinit: Tensor,
    eta: float | Tensor | str | Rule,
    n: int,
    *,
    precision: float | Sequence[float] | Mapping[str, float] | None = None,
    energies: Mapping[int | str, Callable[[Tensor, Tensor], Tensor]] | None = None,
    prior: Callable[[list[Tensor]], Tensor] | None = None,
    accumulate: bool = False,
    compile: bool = False,
    callback: Callback | None = None,
) -> PCResult:
    r"""Infer the latent causes of a batch and write the model's updates into ``.grad``.

    ``model`` is a decoder: it predicts the data ``Y``, clamped at its output, from a latent ``v_0``,
    which is free. All beliefs descend the energy::

        F(v_0..v_{L-1}) = LossFun(f_L(v_{L-1}), Y)
                          + 1/2 sum_{l=1}^{L-1} pi_l ||f_l(v_{l-1}) - v_l||^2 + prior(v)

    together, ``v_l <- v_l - eta dF/dv_l`` for l = 0..L-1, n times, from ``v_0 = Xinit`` and the
    feed-forward values that follow from it. Then dF/dtheta at the final beliefs is written into
    ``.grad``, so that any optimizer steps it. Side effects and half precision are as in
    ``PCInfer``.

    Args:
        model: an ``nn.Sequential`` from latents to data; each item is one layer ``f_l``.
        LossFun: called as ``LossFun(output, Y)``; returns a scalar tensor. For a batch of
            independent examples it should sum over the batch (``0.5 * squares.sum()``), as the
            other terms do: with a mean, the data would weigh less the larger the batch is.
        Y: the data, handed to ``LossFun`` as they are.
        Xinit: the latent to start from, ``(batch, *features)``, floating-point. It is not changed.
        eta: the step size of the beliefs, a number, ``"auto"`` or a rule of ``torch2pc.steps``, as in
            ``PCInfer``.
        n: the number of iterations, at least 1.
        precision: pi_l = 1/sigma_l^2, one number for all hidden layers, a sequence of L-1
            (l = 1..L-1), or for a ``PCGraph`` a dict by the layers' names; 1 where not given.
        energies: other energies of hidden layers, as in ``PCInfer``.
        prior: a callable from the list ``[v_0, ..., v_{L-1}]`` to a scalar energy. If it has
            parameters, they get their gradient too.
        accumulate: add to ``.grad`` in place instead of replacing it, for micro-batches.
        compile: run it as a compiled call, as in ``PCInfer``.
        callback: called after each iteration, as in ``PCInfer``; ``v[0]`` is the latent.

    Returns:
        ``PCResult(vhat, Loss, dLdy, v, epsilon)``: ``v[0]`` is the inferred latent, and
        ``epsilon[l] = f_l(v_{l-1}) - v_l`` and ``epsilon[L]`` (the loss's gradient at f_L(v_{L-1}))
        are taken at the final beliefs. ``epsilon[0]`` is None. ``vhat``, ``Loss`` and ``dLdy`` belong
        to the feed-forward pass from ``Xinit``, and ``v[L]`` stays ``vhat[L]``; the reconstruction is
        ``model[-1](v[-2])``.

    Raises:
        TypeError, ValueError, RuntimeError: as ``PCInfer``, for the arguments that they share;
            ``precision`` is no number > 0 or has another length than L-1; ``prior`` is not
            callable or returns no scalar.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch2pc import PCInferLatent
        >>> decoder = nn.Sequential(nn.Sequential(nn.Linear(2, 16), nn.Tanh()), nn.Linear(16, 5))
        >>> optimizer = torch.optim.Adam(decoder.parameters(), lr=0.01)
        >>> Y = torch.randn(8, 5)
        >>> result = PCInferLatent(
        ...     decoder, lambda yhat, Y: 0.5 * (yhat - Y).square().sum(), Y, torch.zeros(8, 2),
        ...     eta=0.05, n=50, prior=lambda v: 0.05 * v[0].square().sum())
        >>> optimizer.step()
        >>> result.v[0].shape
        torch.Size([8, 2])

    Source: R. Rao and D. Ballard, Predictive coding in the visual cortex, Nature Neuroscience 2,
    79-87 (1999); the energy with precisions follows J. Whittington and R. Bogacz, Neural
    Computation 29(5) (2017).
    """
    eta, n, terms = check_latent_arguments(
        model, LossFun, Xinit, eta, n, precision, prior, energies
    )
    check_callback(callback, compile)

    def algorithm(network: Network) -> Inference:
        def relax() -> Inference:
            return infer_by(latent(network, eta, terms), n, callback, "PCInferLatent")

        if not compile:
            return relax()
        call = Relaxing(network, "Latent", eta, n, terms=terms)
        return compiled_or_plain(call, relax)

    X = Xinit.detach()
    return infer(algorithm, model, LossFun, X, Y, accumulate, free_input=True, prior=prior)


def check_latent_arguments(
    model: nn.Sequential | PCGraph,
    LossFun: Callable[[Tensor, Any], Tensor],
    Xinit: Tensor,
    eta: float | Tensor | str | Rule,
    n: int,
    precision: float | Sequence[float] | Mapping[str, float] | None,
    prior: Callable[[list[Tensor]], Tensor] | None,
    energies: Mapping[int | str, Callable[[Tensor, Tensor], Tensor]] | None = None,
) -> tuple[float | str | Rule, int, Terms]:
    """Check what describes an inference of latents; returns eta, n and the energy's terms."""
    check_model(model)
    check_LossFun(LossFun)
    check_tensor("Xinit", Xinit)
    check_has_values("Xinit", Xinit)
    if not Xinit.is_floating_point():
        raise TypeError(f"Xinit must be a floating-point tensor, got {Xinit.dtype}")
    step, n, pi = check_eta(eta), check_n(n), check_precision(precision, model)
    check_prior(prior)
    between = {} if energies is None else check_energies(energies, model)
    return step, n, Terms(pi, between=between)
