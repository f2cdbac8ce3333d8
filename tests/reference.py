"""The plain algorithms, written for clarity: the oracle that the library is held against.

Every function takes a model without randomness or changing buffers, in float64, and evaluates the
layers as often as the equations name them. Parameter updates are returned in a dict, not written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Loss = Callable[[Tensor, Any], Tensor]


class Reference(NamedTuple):
    vhat: list[Tensor]
    Loss: Tensor
    dLdy: Tensor
    v: list[Tensor]
    epsilon: list[Tensor]
    updates: dict[nn.Parameter, Tensor]


def feed_forward(model: nn.Sequential, X: Tensor) -> list[Tensor]:
    """vhat_0 = X, vhat_l = f_l(vhat_{l-1})"""
    vhat = [X.detach()]
    for layer in model:
        vhat.append(layer(vhat[-1]).detach())
    return vhat


def input_vjp(layer: nn.Module, a: Tensor, e: Tensor) -> Tensor:
    """J(a)^T e"""
    a = a.detach().requires_grad_()
    output = layer(a)
    if not output.requires_grad:
        return torch.zeros_like(a)
    (result,) = torch.autograd.grad(output, a, e, allow_unused=True, materialize_grads=True)
    return result


def loss_gradient(LossFun: Loss, y: Tensor, Y: Any) -> tuple[Tensor, Tensor]:
    """LossFun(y, Y) and its gradient with respect to y"""
    y = y.detach().requires_grad_()
    value = LossFun(y, Y)
    return value.detach(), torch.autograd.grad(value, y)[0]


def parameter_updates(
    model: nn.Sequential, inputs: Sequence[Tensor], epsilon: Sequence[Tensor]
) -> dict[nn.Parameter, Tensor]:
    """sum over l of (df_l(inputs_{l-1}) / dtheta)^T epsilon_l, for every parameter"""
    updates: dict[nn.Parameter, Tensor] = {}
    for l, layer in enumerate(model, start=1):
        parameters = [p for p in layer.parameters() if p.requires_grad]
        if parameters:
            output = layer(inputs[l - 1].detach())
            found = torch.autograd.grad(output, parameters, epsilon[l], allow_unused=True)
            for p, update in zip(parameters, found, strict=True):
                if update is not None:
                    updates[p] = updates[p] + update if p in updates else update
    return updates


def input_error(model: nn.Sequential, X: Tensor, epsilon: Sequence[Tensor]) -> Tensor | None:
    """J_1(X)^T epsilon_1"""
    return input_vjp(model[0], X, epsilon[1]) if X.is_floating_point() else None


def exact(model: nn.Sequential, LossFun: Loss, X: Tensor, Y: Any) -> Reference:
    vhat = feed_forward(model, X)
    Loss, dLdy = loss_gradient(LossFun, vhat[-1], Y)
    L = len(model)
    epsilon: list[Any] = [None] * L + [dLdy]
    for l in range(L - 1, 0, -1):
        epsilon[l] = input_vjp(model[l], vhat[l], epsilon[l + 1])
    v = [X, *(vhat[l] - epsilon[l] for l in range(1, L + 1))]
    updates = parameter_updates(model, vhat, epsilon)
    epsilon[0] = input_error(model, X, epsilon)
    return Reference(vhat, Loss, dLdy, v, epsilon, updates)


def fixed_pred(
    model: nn.Sequential, LossFun: Loss, X: Tensor, Y: Any, eta: float, n: int
) -> Reference:
    vhat = feed_forward(model, X)
    Loss, dLdy = loss_gradient(LossFun, vhat[-1], Y)
    L = len(model)
    v = list(vhat)
    epsilon: list[Any] = [None] * L + [dLdy]
    for _ in range(n):
        for l in range(1, L):
            epsilon[l] = vhat[l] - v[l]
        v = [
            v[l] + eta * (epsilon[l] - input_vjp(model[l], vhat[l], epsilon[l + 1]))
            if 0 < l < L
            else v[l]
            for l in range(L + 1)
        ]
    updates = parameter_updates(model, vhat, epsilon)
    epsilon[0] = input_error(model, X, epsilon)
    return Reference(vhat, Loss, dLdy, v, epsilon, updates)


def strict(
    model: nn.Sequential,
    LossFun: Loss,
    X: Tensor,
    Y: Any,
    eta: float,
    n: int,
    vinit: Sequence[Any] | None = None,
    update_at: str = "v",
) -> Reference:
    vhat = feed_forward(model, X)
    Loss, dLdy = loss_gradient(LossFun, vhat[-1], Y)
    L = len(model)
    v = list(vhat) if vinit is None else [X, *vinit[1:L], vhat[L]]
    for _ in range(n):
        predictions = [None, *(model[l - 1](v[l - 1]).detach() for l in range(1, L + 1))]
        epsilon: list[Any] = [None, *(predictions[l] - v[l] for l in range(1, L)), None]
        _, epsilon[L] = loss_gradient(LossFun, predictions[L], Y)
        before = v
        v = [
            v[l] + eta * (epsilon[l] - input_vjp(model[l], v[l], epsilon[l + 1]))
            if 0 < l < L
            else v[l]
            for l in range(L + 1)
        ]
    places = {"v": v, "vhat": vhat, "before": before}
    updates = parameter_updates(model, places[update_at], epsilon)
    epsilon[0] = input_error(model, X, epsilon)
    return Reference(vhat, Loss, dLdy, v, epsilon, updates)


def perturbed_pass(
    model: nn.Sequential, X: Tensor, epsilon: Sequence[Tensor]
) -> tuple[list[Tensor], Tensor]:
    """v_0 = X, v_l = f_l(v_{l-1}) - epsilon_l for l < L, and the output f_L(v_{L-1})"""
    v = [X]
    for layer, epsilon_l in zip(model, epsilon[1:], strict=False):
        v.append(layer(v[-1]) - epsilon_l)
    return v, model[-1](v[-1])


def energy_of_errors(
    model: nn.Sequential, LossFun: Loss, X: Tensor, Y: Any, epsilon: Sequence[Tensor]
) -> Tensor:
    """F(epsilon) = LossFun(y, Y) + 1/2 sum_{l<L} ||epsilon_l||^2"""
    _, y = perturbed_pass(model, X, epsilon)
    squares = [e.square().sum() for e in epsilon[1:]]
    return LossFun(y, Y) + sum(squares, torch.zeros((), dtype=y.dtype)) / 2


def errors_of(model: nn.Sequential, X: Tensor, vinit: Sequence[Any] | None) -> list[Tensor]:
    """[None, epsilon_1..epsilon_{L-1}]: those of ``vinit``, f_l(v_{l-1}) - v_l, or else 0"""
    vhat, L = feed_forward(model, X), len(model)
    if vinit is None:
        return [None, *(torch.zeros_like(vhat[l]) for l in range(1, L))]
    v = [X, *vinit[1:L]]
    return [None, *(model[l - 1](v[l - 1]).detach() - v[l] for l in range(1, L))]


def at_errors(
    model: nn.Sequential,
    LossFun: Loss,
    X: Tensor,
    Y: Any,
    epsilon: Sequence[Tensor],
    update_at: str = "v",
) -> Reference:
    """What PCInfer returns of hidden errors, and the updates that they give"""
    vhat = feed_forward(model, X)
    Loss, dLdy = loss_gradient(LossFun, vhat[-1], Y)
    v, y = perturbed_pass(model, X.detach(), epsilon)
    v = [*(v_l.detach() for v_l in v), vhat[-1]]
    all_errors: list[Any] = [*epsilon, loss_gradient(LossFun, y.detach(), Y)[1]]
    updates = parameter_updates(model, vhat if update_at == "vhat" else v, all_errors)
    all_errors[0] = input_error(model, X, all_errors)
    return Reference(vhat, Loss, dLdy, v, all_errors, updates)


def error_based(
    model: nn.Sequential,
    LossFun: Loss,
    X: Tensor,
    Y: Any,
    eta: float,
    n: int,
    vinit: Sequence[Any] | None = None,
    update_at: str = "v",
) -> Reference:
    epsilon = errors_of(model, X, vinit)
    for _ in range(n):
        free = [e.detach().requires_grad_() for e in epsilon[1:]]
        F = energy_of_errors(model, LossFun, X, Y, [None, *free])
        gradients = (
            torch.autograd.grad(F, free, allow_unused=True, materialize_grads=True) if free else []
        )
        epsilon[1:] = [e.detach() - eta * dF for e, dF in zip(free, gradients, strict=True)]
    return at_errors(model, LossFun, X, Y, epsilon, update_at)


def equilibrium(
    model: nn.Sequential,
    LossFun: Loss,
    X: Tensor,
    Y: Any,
    eta: float = 0.0,
    n: int = 400,
    vinit: Sequence[Any] | None = None,
    update_at: str = "v",
) -> Reference:
    """The minimum of F that PyTorch's own L-BFGS descends to, for the whole batch at once"""
    free = [e.requires_grad_() for e in errors_of(model, X, vinit)[1:]]
    if free:
        optimizer = torch.optim.LBFGS(
            free,
            max_iter=n,
            tolerance_grad=1e-13,
            tolerance_change=0.0,
            history_size=50,
            line_search_fn="strong_wolfe",
        )

        def F() -> Tensor:
            optimizer.zero_grad()
            value = energy_of_errors(model, LossFun, X, Y, [None, *free])
            value.backward(inputs=free)
            return value

        optimizer.step(F)
    return at_errors(model, LossFun, X, Y, [None, *(e.detach() for e in free)], update_at)


def energy(model: nn.Sequential, LossFun: Loss, Y: Any, v: Sequence[Tensor]) -> Tensor:
    return energy_of_beliefs(model, LossFun, Y, v).detach()


def energy_of_beliefs(model: nn.Sequential, LossFun: Loss, Y: Any, v: Sequence[Tensor]) -> Tensor:
    """F(v) = LossFun(f_L(v_{L-1}), Y) + 1/2 sum_{l<L} ||f_l(v_{l-1}) - v_l||^2"""
    L = len(model)
    errors = [model[l - 1](v[l - 1]) - v[l] for l in range(1, L)]
    squares = sum((e.square().sum() for e in errors), torch.zeros((), dtype=v[-1].dtype))
    return LossFun(model[-1](v[L - 1]), Y) + squares / 2


class Step:
    """Gradient descent, one variable at a time; what follows are the other step rules."""

    def __init__(self, eta: float) -> None:
        self.eta = eta

    def __call__(self, l: int, x: Tensor, gradient: Tensor) -> Tensor:
        return x - self.eta * gradient

    def end(self, F: Tensor) -> None:
        """Told of the energy at the start, and after each iteration."""


class MomentumStep(Step):
    def __init__(self, eta: float, mu: float, nesterov: bool) -> None:
        super().__init__(eta)
        self.mu, self.nesterov, self.w = mu, nesterov, dict[int, Tensor]()

    def __call__(self, l: int, x: Tensor, gradient: Tensor) -> Tensor:
        self.w[l] = self.mu * self.w.get(l, torch.zeros_like(x)) + gradient
        along = gradient + self.mu * self.w[l] if self.nesterov else self.w[l]
        return x - self.eta * along


class HalvingStep(Step):
    def __init__(self, eta: float, factor: float) -> None:
        super().__init__(eta)
        self.factor, self.F = factor, float("inf")

    def end(self, F: Tensor) -> None:
        if not float(F) <= self.F + 1e-13 * abs(self.F):
            self.eta *= self.factor
        self.F = float(F)


class AdamStep(Step):
    def __init__(self, eta: float) -> None:
        super().__init__(eta)
        self.moments: dict[int, tuple[Tensor, Tensor, int]] = {}

    def __call__(self, l: int, x: Tensor, gradient: Tensor) -> Tensor:
        m, s, k = self.moments.get(l, (torch.zeros_like(x), torch.zeros_like(x), 0))
        m, s, k = 0.9 * m + 0.1 * gradient, 0.999 * s + 0.001 * gradient**2, k + 1
        self.moments[l] = m, s, k
        return x - self.eta * (m / (1 - 0.9**k)) / ((s / (1 - 0.999**k)).sqrt() + 1e-8)


def strict_by(
    model: nn.Sequential,
    LossFun: Loss,
    X: Tensor,
    Y: Any,
    step: Step,
    n: int,
    down: bool = False,
    F: Callable[[list[Tensor]], Tensor] | None = None,
    between: Mapping[int, Callable[[Tensor, Tensor], Tensor]] | None = None,
) -> tuple[list[Tensor], list[Any]]:
    """The beliefs and the errors after n iterations of a step rule, all at once or from the top down.

    Each gradient is that of the whole energy, by autograd, at the beliefs as they are then. ``F``: another
    energy of the beliefs [v_0..v_L]. ``between``: energies of layers whose error is the derivative in the
    prediction.
    """
    v, L = feed_forward(model, X), len(model)
    F = F or (lambda v: energy_of_beliefs(model, LossFun, Y, v))

    def gradients(v: list[Tensor]) -> list[Tensor]:
        free = [x.detach().requires_grad_() for x in v[1:L]]
        value = F([X, *free, v[L]])
        return list(torch.autograd.grad(value, free, allow_unused=True, materialize_grads=True))

    def error(l: int) -> Tensor:
        y = model[l - 1](v[l - 1]).detach()
        if between and l in between:
            return loss_gradient(between[l], y, v[l])[1]
        return loss_gradient(LossFun, y, Y)[1] if l == L else y - v[l]

    step.end(F(v).detach())
    epsilon: list[Any] = [None, *map(error, range(1, L + 1))]
    for _ in range(n):
        if down:
            epsilon[L] = error(L)
            for l in range(L - 1, 0, -1):
                v[l] = step(l, v[l], gradients(v)[l - 1])
                epsilon[l] = error(l)
        else:
            epsilon = [None, *map(error, range(1, L + 1))]
            found = gradients(v) if L > 1 else []
            v = [X, *(step(l, v[l], g) for l, g in enumerate(found, start=1)), v[L]]
        step.end(F(v).detach())
    return v, epsilon


def error_based_by(
    model: nn.Sequential,
    LossFun: Loss,
    X: Tensor,
    Y: Any,
    step: Step,
    n: int,
    F: Callable[[list[Any]], Tensor] | None = None,
) -> Reference:
    """The same in the errors; ``F``: another energy of [None, epsilon_1..epsilon_{L-1}]."""
    epsilon = errors_of(model, X, None)
    F = F or (lambda epsilon: energy_of_errors(model, LossFun, X, Y, epsilon))
    step.end(F(epsilon).detach())
    for _ in range(n):
        free = [e.detach().requires_grad_() for e in epsilon[1:]]
        value = F([None, *free])
        found: Sequence[Tensor] = []
        if free:
            found = torch.autograd.grad(value, free, allow_unused=True, materialize_grads=True)
        moved = [
            step(l, e.detach(), g) for l, (e, g) in enumerate(zip(free, found, strict=True), 1)
        ]
        epsilon = [None, *moved]
        step.end(F(epsilon).detach())
    return at_errors(model, LossFun, X, Y, epsilon)


class Frozen(nn.Module):
    """A layer that draws the same random numbers and finds the same buffers at each evaluation."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.random = torch.get_rng_state()
        self.values = [b.clone() for b in layer.buffers()]

    def forward(self, x: Tensor) -> Tensor:
        torch.set_rng_state(self.random)
        for buffer, value in zip(self.layer.buffers(), self.values, strict=True):
            buffer.data = value.clone()
        return self.layer(x.clone())  # it may work in place


def freeze(model: nn.Sequential, X: Tensor) -> nn.Sequential:
    """``model`` with each layer frozen as it is when a forward pass from ``X`` comes to it.

    The parameters are those of ``model``; use a copy, as its buffers move.
    """
    frozen = nn.Sequential()
    for layer in model:
        frozen.append(Frozen(layer))
        X = layer(X).detach()
    return frozen


def latent_energy(
    model: nn.Sequential,
    LossFun: Loss,
    Y: Any,
    v: Sequence[Tensor],
    pi: Sequence[float],
    prior: Callable[[list[Tensor]], Tensor] | None,
) -> Tensor:
    """F(v) = LossFun(f_L(v_{L-1}), Y) + 1/2 sum_{l<L} pi_l ||f_l(v_{l-1}) - v_l||^2 + prior(v)"""
    L = len(model)
    F = LossFun(model[-1](v[L - 1]), Y)
    for l in range(1, L):
        F = F + 0.5 * pi[l - 1] * (model[l - 1](v[l - 1]) - v[l]).square().sum()
    return F if prior is None else F + prior(list(v[:L]))


def latent(
    model: nn.Sequential,
    LossFun: Loss,
    Y: Any,
    Xinit: Tensor,
    eta: float,
    n: int,
    pi: Sequence[float],
    prior: Callable[[list[Tensor]], Tensor] | None = None,
) -> list[Tensor]:
    """The beliefs v_0..v_{L-1} after n steps of gradient descent on F, by autograd."""
    v = feed_forward(model, Xinit)[:-1]
    for _ in range(n):
        v = [v_l.detach().requires_grad_() for v_l in v]
        F = latent_energy(model, LossFun, Y, v, pi, prior)
        gradients = torch.autograd.grad(F, v, allow_unused=True, materialize_grads=True)
        v = [v_l - eta * gradient for v_l, gradient in zip(v, gradients, strict=True)]
    return [v_l.detach() for v_l in v]
