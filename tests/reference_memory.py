"""The recurrent network of `torch2pc.PCRNN`, written step by step for one sequence at a time."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from torch2pc import PCRNN


def score(c: Tensor, centres: Tensor, sigma_c: float) -> Tensor:
    """s(c) of causes (causes,) and centres (sequences, causes)."""
    exponents = torch.stack([-((c - mu) ** 2).sum() / (2 * sigma_c**2) for mu in centres])
    w = exponents.exp() / exponents.exp().sum()
    return -sum(w_k * (c - mu) for w_k, mu in zip(w, centres, strict=True)) / (2 * sigma_c**2)


def run(
    model: PCRNN,
    c: Tensor,
    targets: Tensor | None,
    steps: int,
    rates: SimpleNamespace,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """x_pred, h and c of each step: c (causes,), targets (steps, outputs), noise (steps, causes)."""
    tau, h = model.tau, model.h_0
    x_preds, hs, cs = [], [], []
    for t in range(steps):
        h_prior = (1 - 1 / tau) * h + (1 / tau) * (
            model.W_r @ torch.tanh(h) + model.W_c @ c + model.b_r
        )
        x_pred = model.W_o @ torch.tanh(h_prior) + model.b_o
        if targets is None:
            h = h_prior
        else:
            e_x = x_pred - targets[t]
            h = h_prior - rates.alpha_x * (1 - torch.tanh(h_prior) ** 2) * (model.W_o.T @ e_x)
            e_h = h_prior - h
            change = -rates.alpha_h * model.W_c.T @ e_h
            if noise is not None:
                change = change + rates.sigma_r * (e_h**2).sum().sqrt() * noise[t]
            if rates.alpha_c:
                change = change + rates.alpha_c * score(c, model.centres, rates.sigma_c)
            c = c + change
        x_preds.append(x_pred)
        hs.append(h)
        cs.append(c)
    return torch.stack(x_preds), torch.stack(hs), torch.stack(cs)
