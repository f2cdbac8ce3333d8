"""What is timed: one training step (without the optimizer's) by backprop or by PCInfer, and two floors.

Each function prepares what need not be repeated and returns the step to call.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.nets import Case
from torch2pc import PCInfer

Step = Callable[[], Any]


def backprop(case: Case) -> Step:
    """BP: zero_grad, forward, loss.backward()."""
    model, LossFun, X, Y = case.model, case.LossFun, case.X, case.Y

    def step() -> None:
        model.zero_grad()
        LossFun(model(X), Y).backward()

    return step


def floor(case: Case, n: int) -> Step:
    """What n iterations of Strict cannot do without: n forward passes and vjps of layers 2..L.

    Layer by layer from fixed inputs, with frozen parameters, and nothing else: no loss, no
    prediction error, no belief that moves. Layer 1 is left out because its input is clamped.
    """
    model = copy.deepcopy(case.model).requires_grad_(False)
    x, work = case.X, []
    for layer in model:
        y = layer(x).detach()
        work.append((layer, x.requires_grad_(x is not case.X), torch.randn_like(y)))
        x = y
    del work[0]

    def step() -> None:
        for _ in range(n):
            for layer, x, e in work:
                torch.autograd.grad(layer(x), x, e)

    return step


def products(case: Case, n: int) -> Step:
    """The products of matrices in ``n`` iterations of Strict on an MLP, and nothing else.

    The feed-forward pass, in each iteration the layers that errors have reached, up and down, and the
    updates. They are written where there is memory already.
    """
    linear = [m for m in case.model.modules() if isinstance(m, torch.nn.Linear)]
    W, b = [m.weight.detach() for m in linear], [m.bias.detach() for m in linear]
    x = [torch.rand_like(case.X), *[torch.rand(len(case.X), len(b_l)).to(case.X) for b_l in b]]
    y, g, L = [x_l.clone() for x_l in x], [torch.empty_like(W_l) for W_l in W], len(W)

    @torch.no_grad()
    def step() -> None:
        for l in range(L):
            torch.addmm(b[l], x[l], W[l].t(), out=y[l + 1])
        for k in range(n):
            reached = range(max(1, L - 1 - k), L)
            for l in reached:
                if k >= L - 1 or l != L - 1 - k:  # whose belief has not moved yet
                    torch.mm(x[l], W[l].t(), out=y[l + 1])
            for l in reached:
                torch.mm(x[l + 1], W[l], out=y[l])
        for l in range(L):
            torch.mm(x[l + 1].t(), x[l], out=g[l])
            if l:
                torch.addmm(b[l], x[l], W[l].t(), out=y[l + 1])

    return step


def infer(case: Case, ErrType: str, *, from_vinit: bool = False, **options: Any) -> Step:
    """PCInfer with these options.

    from_vinit: hand over initial beliefs (the feed-forward ones), so that Strict cannot know that
    some layers carry no error yet and evaluates all of them in every iteration.
    """
    if from_vinit:
        options["vinit"] = PCInfer(case.model, case.LossFun, case.X, case.Y, "Exact").vhat

    def step() -> None:
        PCInfer(case.model, case.LossFun, case.X, case.Y, ErrType, **options)

    return step
