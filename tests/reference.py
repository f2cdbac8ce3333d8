"""The plain algorithms, written for clarity: the oracle that the library is held against.

Every function takes a model without randomness or changing buffers, in float64, and evaluates the
layers as often as the equations name them. Parameter updates are returned in a dict, not written.

Layer i predicts belief i from those of its parents, f_i(v_parents); in an ``nn.Sequential`` that is the one
before, so that the equations of a chain have l-1 for "parents".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torch2pc import PCGraph

Loss = Callable[[Tensor, Any], Tensor]


class Reference(NamedTuple):
    vhat: list[Tensor]
    Loss: Tensor
    dLdy: Tensor
    v: list[Tensor]
    epsilon: list[Tensor]
    updates: dict[nn.Parameter, Tensor]


class Node(NamedTuple):
    layer: Callable[..., Tensor]
    parents: Sequence[int]

    def __call__(self, v: Sequence[Any]) -> Tensor:
        """f_i(v_parents), on copies, as the layer may work in place"""
        return self.layer(*[v[p].clone() for p in self.parents])


def nodes(model: nn.Module) -> list[Node]:
    """The layers 1..L; place 0 is the input."""
    if isinstance(model, PCGraph):
        return [
            Node(model.get_submodule(name), parents)
            for name, parents in zip(model.names[1:], model.parents, strict=True)
        ]
    assert isinstance(model, nn.Sequential)
    return [Node(layer, [l]) for l, layer in enumerate(model)]


def feed_forward(model: nn.Module, X: Tensor) -> list[Tensor]:
    """vhat_0 = X, vhat_i = f_i(vhat_parents)"""
    vhat = [X.detach()]
    for node in nodes(model):
        vhat.append(node(vhat).detach())
    return vhat


def input_vjp(layer: Callable[..., Tensor], a: Tensor, e: Tensor) -> Tensor:
    """J(a)^T e"""
    (result,) = input_vjps(layer, [a], e)
    return result


def input_vjps(layer: Callable[..., Tensor], a: Sequence[Tensor], e: Tensor) -> list[Tensor]:
    """J(a)^T e for each input; 0 for integers"""
    a = [x.detach().requires_grad_(x.is_floating_point()) for x in a]
    asked, output = [x for x in a if x.requires_grad], layer(*[x.clone() for x in a])
    found: list[Any] = [torch.zeros_like(x) for x in asked]
    if output.requires_grad and asked:
        found = list(
            torch.autograd.grad(output, asked, e, allow_unused=True, materialize_grads=True)
        )
    return [found.pop(0) if x.requires_grad else torch.zeros_like(x) for x in a]


def arriving(model: nn.Module, at: Sequence[Tensor], epsilon: Sequence[Any]) -> list[Tensor]:
    """For each place, sum over its children c of J_c(at)^T epsilon_c"""
    found = [torch.zeros_like(x) for x in at]
    for node, error in zip(nodes(model), epsilon[1:], strict=True):
        vjps = input_vjps(node.layer, [at[p] for p in node.parents], error)
        for p, vjp in zip(node.parents, vjps, strict=True):
            found[p] = found[p] + vjp
    return found


def loss_gradient(LossFun: Loss, y: Tensor, Y: Any) -> tuple[Tensor, Tensor]:
    """LossFun(y, Y) and its gradient with respect to y"""
    y = y.detach().requires_grad_()
    value = LossFun(y, Y)
    return value.detach(), torch.autograd.grad(value, y)[0]


def parameter_updates(
    model: nn.Module, inputs: Sequence[Tensor], epsilon: Sequence[Tensor]
) -> dict[nn.Parameter, Tensor]:
    """sum over i of (df_i(inputs_parents) / dtheta)^T epsilon_i, for every parameter"""
    updates: dict[nn.Parameter, Tensor] = {}
    inputs = [x.detach() for x in inputs]
    for i, node in enumerate(nodes(model), start=1):
        assert isinstance(node.layer, nn.Module)
        parameters = [p for p in node.layer.parameters() if p.requires_grad]
        if parameters:
            found = torch.autograd.grad(node(inputs), parameters, epsilon[i], allow_unused=True)
            for p, update in zip(parameters, found, strict=True):
                if update is not None:
                    updates[p] = updates[p] + update if p in updates else update
    return updates


def input_error(model: nn.Module, at: Sequence[Tensor], epsilon: Sequence[Tensor]) -> Tensor | None:
    """What arrives at the input, where the beliefs are ``at``"""
    return arriving(model, at, epsilon)[0] if at[0].is_floating_point() else None


def exact(model: nn.Module, LossFun: Loss, X: Tensor, Y: Any) -> Reference:
    vhat = feed_forward(model, X)
    Loss, dLdy = loss_gradient(LossFun, vhat[-1], Y)
    L = len(vhat) - 1
    epsilon: list[Any] = [*map(torch.zeros_like, vhat[:-1]), dLdy]
    for node, l in zip(reversed(nodes(model)), range(L, 0, -1), strict=True):
        vjps = input_vjps(node.layer, [vhat[p] for p in node.parents], epsilon[l])
        for p, vjp in zip(node.parents, vjps, strict=True):
            epsilon[p] = epsilon[p] + vjp
    v = [X, *(vhat[l] - epsilon[l] for l in range(1, L + 1))]
    updates = parameter_updates(model, vhat, epsilon)
    epsilon[0] = epsilon[0] if X.is_floating_point() else None
    return Reference(vhat, Loss, dLdy, v, epsilon, updates)


def fixed_pred(model: nn.Module, LossFun: Loss, X: Tensor, Y: Any, eta: float, n: int) -> Reference:
    vhat = feed_forward(model, X)
    Loss, dLdy = loss_gradient(LossFun, vhat[-1], Y)
    L = len(vhat) - 1
    v = list(vhat)
    for _ in range(n):
        epsilon: list[Any] = [None, *(vhat[l] - v[l] for l in range(1, L)), dLdy]
        above = arriving(model, vhat, epsilon)
        hidden = [v[l] + eta * (epsilon[l] - above[l]) for l in range(1, L)]
        v = [v[0], *hidden, v[L]]
    updates = parameter_updates(model, vhat, epsilon)
    epsilon[0] = input_error(model, vhat, epsilon)
    return Reference(vhat, Loss, dLdy, v, epsilon, updates)


def strict(
    model: nn.Module,
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
    L = len(vhat) - 1
    v = list(vhat) if vinit is None else [X, *vinit[1:L], vhat[L]]
    for _ in range(n):
        predictions = [None, *(node(v).detach() for node in nodes(model))]
        epsilon: list[Any] = [None, *(predictions[l] - v[l] for l in range(1, L)), None]
        _, epsilon[L] = loss_gradient(LossFun, predictions[L], Y)
        before, above = v, arriving(model, v, epsilon)
        hidden = [v[l] + eta * (epsilon[l] - above[l]) for l in range(1, L)]
        v = [v[0], *hidden, v[L]]
    places = {"v": v, "vhat": vhat, "before": before}
    updates = parameter_updates(model, places[update_at], epsilon)
    epsilon[0] = input_error(model, places[update_at], epsilon)
    return Reference(vhat, Loss, dLdy, v, epsilon, updates)


def multipliers(
    model: nn.Module,
    LossFun: Loss,
    X: Tensor,
    Y: Any,
    eta: float,
    n: int,
    vinit: Sequence[Any] | None = None,
    update_at: str = "v",
    alpha: float = 1.0,
    pi: Sequence[float] | None = None,
    down: bool = True,
) -> Reference:
    """Sweeps from the top, in each of which belief i moves once all its children have told what they pull;
    or, not ``down``, all at once"""
    vhat = feed_forward(model, X)
    Loss, dLdy = loss_gradient(LossFun, vhat[-1], Y)
    L = len(vhat) - 1
    v = list(vhat) if vinit is None else [X, *vinit[1:L], vhat[L]]
    difference = [torch.zeros_like(x) for x in v]  # f_i(v_parents) - v_i
    multiplier = [torch.zeros_like(x) for x in v]
    error: list[Any] = [None] * (L + 1)
    weight = [1.0, *([1.0] * (L - 1) if pi is None else pi), 1.0]
    for _ in range(n):
        before, above = list(v), [torch.zeros_like(x) for x in v]
        for i, node in reversed(list(enumerate(nodes(model), start=1))):
            prediction = node(v).detach()
            if i == L:
                _, error[L] = loss_gradient(LossFun, prediction, Y)
            else:
                multiplier[i] = multiplier[i] + alpha * difference[i]
                v[i] = v[i] + eta * (weight[i] * (prediction - v[i] + multiplier[i]) - above[i])
                difference[i] = prediction - (v if down else before)[i]
                error[i] = difference[i] + multiplier[i]
            vjps = input_vjps(node.layer, [v[p] for p in node.parents], weight[i] * error[i])
            for p, vjp in zip(node.parents, vjps, strict=True):
                above[p] = above[p] + vjp
    places = {"v": v, "vhat": vhat, "before": before}
    weighted = [None, *(w * e for w, e in zip(weight[1:], error[1:], strict=True))]
    updates = parameter_updates(model, places[update_at], weighted)
    error[0] = input_error(model, places[update_at], weighted)
    return Reference(vhat, Loss, dLdy, v, error, updates)


def perturbed_pass(
    model: nn.Module, X: Tensor, epsilon: Sequence[Tensor]
) -> tuple[list[Tensor], Tensor]:
    """v_0 = X, v_i = f_i(v_parents) - epsilon_i for i < L, and the output f_L(v_parents)"""
    v, (*hidden, last) = [X], nodes(model)
    for node, epsilon_i in zip(hidden, epsilon[1:], strict=True):
        v.append(node(v) - epsilon_i)
    return v, last(v)


def energy_of_errors(
    model: nn.Module, LossFun: Loss, X: Tensor, Y: Any, epsilon: Sequence[Tensor]
) -> Tensor:
    """F(epsilon) = LossFun(y, Y) + 1/2 sum_{i<L} ||epsilon_i||^2"""
    _, y = perturbed_pass(model, X, epsilon)
    squares = [e.square().sum() for e in epsilon[1:]]
    return LossFun(y, Y) + sum(squares, torch.zeros((), dtype=y.dtype)) / 2


def errors_of(model: nn.Module, X: Tensor, vinit: Sequence[Any] | None) -> list[Any]:
    """[None, epsilon_1..epsilon_{L-1}]: those of ``vinit``, f_i(v_parents) - v_i, or else 0"""
    vhat = feed_forward(model, X)
    L = len(vhat) - 1
    if vinit is None:
        return [None, *(torch.zeros_like(vhat[l]) for l in range(1, L))]
    v = [X, *vinit[1:L]]
    hidden = enumerate(nodes(model)[:-1], start=1)
    return [None, *(node(v).detach() - v[l] for l, node in hidden)]


def at_errors(
    model: nn.Module,
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
    at = vhat if update_at == "vhat" else v
    updates = parameter_updates(model, at, all_errors)
    all_errors[0] = input_error(model, at, all_errors)
    return Reference(vhat, Loss, dLdy, v, all_errors, updates)


def error_based(
    model: nn.Module,
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
    model: nn.Module,
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


def energy(model: nn.Module, LossFun: Loss, Y: Any, v: Sequence[Tensor]) -> Tensor:
    return energy_of_beliefs(model, LossFun, Y, v).detach()


def energy_of_beliefs(model: nn.Module, LossFun: Loss, Y: Any, v: Sequence[Tensor]) -> Tensor:
    """F(v) = LossFun(f_L(v_parents), Y) + 1/2 sum_{i<L} ||f_i(v_parents) - v_i||^2"""
    ones = [1.0] * (len(nodes(model)) - 1)
    return latent_energy(model, LossFun, Y, v, ones, None)


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


# Bidirectional models: belief t has a second prediction g_t(v_parents), where the last place is Y's.


def from_above(model: PCGraph) -> list[tuple[str, int, Node]]:
    """For each second prediction its name among the precisions, its place, and what it is made by."""
    return [
        (
            f"above.{name}",
            model.names.index(name),
            Node(model.above.get_submodule(name), parents),
        )
        for name, parents in model.above_parents.items()
    ]


def two_sided_energy(
    model: PCGraph, LossFun: Loss, Y: Any, v: Sequence[Tensor], pi: Mapping[str, float]
) -> Tensor:
    """LossFun + 1/2 sum_i pi_i ||f_i(v_parents) - v_i||^2 + 1/2 sum_t pi_t ||g_t(v_parents) - v_t||^2"""
    own = [pi.get(name, 1.0) for name in model.names[1:-1]]
    F = latent_energy(model, LossFun, Y, v, own, None)
    for name, t, node in from_above(model):
        F = F + 0.5 * pi.get(name, 1.0) * (node([*v[:-1], Y]) - v[t]).square().sum()
    return F


def two_sided(
    model: PCGraph,
    LossFun: Loss,
    X: Tensor,
    Y: Any,
    eta: float,
    n: int,
    pi: Mapping[str, float],
    vinit: Sequence[Any] | None = None,
    update_at: str = "v",
    in_errors: bool = False,
    free_input: bool = False,
) -> Reference:
    """Strict, ErrorBased (``in_errors``) or PCInferLatent (``free_input``), by autograd on F."""
    vhat = feed_forward(model, X)
    Loss, dLdy = loss_gradient(LossFun, vhat[-1], Y)
    L, first = len(vhat) - 1, 0 if free_input else 1
    *hidden, last = nodes(model)
    v = list(vhat) if vinit is None else [X, *vinit[1:L], vhat[L]]

    def beliefs(x: list[Tensor]) -> list[Tensor]:
        """Those that the variables stand for."""
        if in_errors:
            return [*perturbed_pass(model, X, [None, *x])[0], vhat[L]]  # type: ignore[list-item]
        return [*([] if free_input else [X]), *x, vhat[L]]

    def errors(v: list[Tensor]) -> list[Any]:
        y = last(v).detach()
        own = [(node(v) - v[l]).detach() for l, node in enumerate(hidden, start=1)]
        return [None, *own, loss_gradient(LossFun, y, Y)[1]]

    def errors_from_above(v: list[Tensor]) -> list[Tensor]:
        return [(node([*v[:-1], Y]) - v[t]).detach() for _, t, node in from_above(model)]

    x = errors(v)[1:L] if in_errors else v[first:L]
    for _ in range(n):
        before = v
        epsilon, above = errors(v), errors_from_above(v)
        free = [x_i.detach().requires_grad_() for x_i in x]
        F = two_sided_energy(model, LossFun, Y, beliefs(free), pi)
        gradients = torch.autograd.grad(F, free, allow_unused=True, materialize_grads=True)
        x = [x_i.detach() - eta * g for x_i, g in zip(free, gradients, strict=True)]
        v = [v_i.detach() for v_i in beliefs(x)]
    if in_errors or free_input:
        epsilon, above, before = errors(v), errors_from_above(v), v
    at = [a.detach() for a in {"v": v, "vhat": vhat, "before": before}[update_at]]
    at[0] = at[0].clone().requires_grad_()
    # What each layer predicts times its weighted error, whose derivatives are the updates.
    sum_of_products = (last(at) * epsilon[L]).sum()
    for name, e, node in zip(model.names[1:], epsilon[1:], hidden, strict=False):
        sum_of_products = sum_of_products + pi.get(name, 1.0) * (node(at) * e).sum()
    for e, (name, t, node) in zip(above, from_above(model), strict=True):
        product = (node([*at[:-1], Y]) - (at[0] if t == 0 else 0)) * e
        sum_of_products = sum_of_products + pi.get(name, 1.0) * product.sum()
    parameters = list(model.parameters())
    found = torch.autograd.grad(sum_of_products, [at[0], *parameters], materialize_grads=True)
    epsilon[0] = found[0]
    updates = dict(zip(parameters, found[1:], strict=True))
    return Reference(vhat, Loss, dLdy, v, epsilon, updates)


class Frozen(nn.Module):
    """A layer that draws the same random numbers and finds the same buffers at each evaluation."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.random = torch.get_rng_state()
        self.values = [b.clone() for b in layer.buffers()]

    def forward(self, *x: Tensor) -> Tensor:
        torch.set_rng_state(self.random)
        for buffer, value in zip(self.layer.buffers(), self.values, strict=True):
            buffer.data = value.clone()
        return self.layer(*x)


def freeze(model: nn.Module, X: Tensor) -> Any:
    """``model`` with each layer frozen as it is when a forward pass from ``X`` comes to it.

    The parameters are those of ``model``; use a copy, as its buffers move.
    """
    frozen, values = [], [X]
    for node in nodes(model):
        assert isinstance(node.layer, nn.Module)
        frozen.append(Frozen(node.layer))
        values.append(node.layer(*[values[p].clone() for p in node.parents]).detach())
    if not isinstance(model, PCGraph):
        return nn.Sequential(*frozen)
    names = [[model.names[p] for p in parents] for parents in model.parents]
    layers = zip(model.names[1:], frozen, names, strict=True)
    return PCGraph(**{name: (layer, *parents) for name, layer, parents in layers})


def latent_energy(
    model: nn.Module,
    LossFun: Loss,
    Y: Any,
    v: Sequence[Tensor],
    pi: Sequence[float],
    prior: Callable[[list[Tensor]], Tensor] | None,
) -> Tensor:
    """F(v) = LossFun(f_L(v_parents), Y) + 1/2 sum_{i<L} pi_i ||f_i(v_parents) - v_i||^2 + prior(v)"""
    *hidden, last = nodes(model)
    F = LossFun(last(v), Y)
    for l, node in enumerate(hidden, start=1):
        F = F + 0.5 * pi[l - 1] * (node(v) - v[l]).square().sum()
    return F if prior is None else F + prior(list(v[: len(hidden) + 1]))


def latent(
    model: nn.Module,
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
