"""The curvature of the energy: the same energy made linear, and what is read off its Hessian.

``linearised(energy)`` is an energy of the same factors, each with the derivative of its displacement where
the variables are (Gauss and Newton: without the second derivatives of the layers). Its gradient at u is
H u, so that the one sweep multiplies with the Hessian in beliefs and in errors alike.

Gradient descent on F, x <- x - eta dF/dx, is stable where eta < 2 / lambda, with lambda the largest
eigenvalue of F's Hessian. ``largest_eigenvalue`` estimates it from a few products of the Hessian with
vectors by the method of C. Lanczos (1950), which needs far fewer than repeated multiplication.
``safe_step`` is 1 / lambda, half of what would be stable: the estimate is one from below, and the curvature
another one where the relaxation goes. Whoever takes that step still has to see that the energy has not
risen in the end.

The first vector is the same pseudo-random one each time, and nothing is carried from call to call, so
that the same call has the same step size whatever was called before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torch2pc.energy.energy import Beliefs, Energy
from torch2pc.energy.factors import Above, Between, Displaced, Factor, Output, Prediction, Prior
from torch2pc.graph.autograd import in_belief_dtype

# Products with the Hessian, each of which costs as much as an iteration.
PASSES = 4

Product = Callable[[list[Tensor]], Sequence[Tensor]]


def hessian(energy: Energy) -> Product:
    """Multiplies with the Hessian of F where the energy stands, but for second derivatives of layers."""
    linear = linearised(energy)

    def product(u: list[Tensor]) -> Sequence[Tensor]:
        linear.stand_at(u)
        return linear.gradient()

    return product


def alternating(product: Product) -> Product:
    """The same without what couples a variable to the next: on a chain, each one's own curvature."""

    def apart(u: list[Tensor]) -> Sequence[Tensor]:
        found: list[Tensor] = [*u]
        for first in (0, 1):
            kept = [x if i % 2 == first else torch.zeros_like(x) for i, x in enumerate(u)]
            found[first::2] = product(kept)[first::2]
        return found

    return apart


@torch.no_grad()
def linearised(energy: Energy) -> Energy:
    """The energy whose gradient at u is H u."""
    energy.settle()
    factors = [_linear(factor, energy) for factor in energy.factors]
    return type(energy)(factors, energy.vhat, energy.free)


def _linear(factor: Factor, energy: Energy) -> Any:
    if isinstance(factor, Prior):
        prior, v = factor.prior, factor.given(energy.delta)
        of_prior = second_derivative(lambda v: prior(v).reshape(()), v)
        return _LinearPrior(of_prior, factor.beliefs)
    assert isinstance(factor, Prediction | Output)
    d, before = None, None
    if factor.d is not None:
        # Where no belief has moved, neither has the prediction.
        is_asleep = isinstance(energy, Beliefs) and energy.moved.isdisjoint(factor.beliefs)
        with energy.outside_autocast():
            before = None if is_asleep else factor.displaced(energy.delta)[0]
        at = [(energy.vhat[p], energy.delta[p]) for p in factor.parents]
        own = energy.vhat[-1 if factor.target is None else factor.target]
        d = _LinearDisplacement(factor.d, at, before, own.dtype)
    if isinstance(factor, Between):
        return _LinearBetween(factor, d, before, energy.delta[factor.target])
    if isinstance(factor, Above):
        zero, is_clamped = torch.zeros_like(factor.first), factor.target not in energy.free
        return Above(d, factor.parents, factor.target, zero, factor.precision, is_clamped)
    if isinstance(factor, Prediction):
        vhat = energy.vhat[factor.target]
        return Prediction(d, factor.parents, factor.target, vhat, factor.precision)
    y = in_belief_dtype(factor.vhat)
    y = y if before is None else y + before
    of_loss = second_derivative(lambda y: factor.beta * factor.loss(y[0]), [y])
    return _LinearOutput(d, factor.parents, torch.zeros_like(y), of_loss)


class _LinearDisplacement:
    """The derivative of a displacement where its inputs have moved: ``at`` has (vhat, delta) of each.

    ``before``: how far the output has moved there.
    """

    def __init__(
        self,
        d: Displaced,
        at: Sequence[tuple[Tensor, Tensor]],
        before: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        self._d, self._before = d, before
        self._vhat, self._at = zip(*at, strict=True)
        self._dtype = max([dtype, *[a.dtype for a in self._vhat]], key=lambda t: torch.finfo(t).eps)

    def forward(self, *u: Tensor) -> tuple[Tensor, Any]:
        """J u, and what ``backward`` needs."""
        s = small_step(self._vhat, u, self._dtype)
        moved, saved = self._d.forward(*[a + s * b for a, b in zip(self._at, u, strict=True)])
        return (moved if self._before is None else moved - self._before) / s, saved

    def backward(self, saved: Any, e: Tensor) -> Any:
        """J^T e."""
        return self._d.backward(saved, e)


class _LinearBetween(Between):
    """Half of u^T H u, with H the Hessian of E in the prediction and the belief."""

    def __init__(self, of: Between, d: Any, before: Tensor | None, own: Tensor) -> None:
        super().__init__(d, of.parents, of.target, of.vhat, of.precision, of.is_awake, of.between)
        f = of.vhat if before is None else of.vhat + before
        self._of_energy = second_derivative(lambda at: of.between(*at), [f, of.vhat + own])

    def slopes(self, df: Tensor, dv: Tensor) -> tuple[Tensor, Tensor]:
        """H u."""
        of_prediction, of_belief = self._of_energy([df, dv])
        return of_prediction, of_belief


class _LinearOutput(Output):
    """Half of u^T H u, with H the loss's Hessian in the outputs."""

    def __init__(self, d: Any, parents: tuple[int, ...], zero: Tensor, of_loss: Product) -> None:
        super().__init__(d, parents, zero, zero, zero, of_loss)  # type: ignore[arg-type]
        self._of_loss = of_loss

    def loss_gradient(self, y: Tensor) -> tuple[Tensor | None, Tensor]:
        """H u as the error."""
        return self.Loss, self._of_loss([y])[0]


class _LinearPrior(Prior):
    """Half of u^T H u, with H the prior's Hessian in the beliefs."""

    def __init__(self, of_prior: Product, beliefs: frozenset[int]) -> None:
        self._of_prior, self.beliefs = of_prior, beliefs

    def gradient(self, x: Sequence[Any]) -> list[Tensor | None]:
        """H u."""
        return list(self._of_prior([x[i] for i in sorted(self.beliefs)]))


def safe_step(curvature: float) -> float:
    """1 / lambda for the largest eigenvalue lambda of a Hessian; 1 where nothing curves."""
    return 1 / curvature if curvature > 0 else 1.0


def largest_eigenvalue(product: Product, like: Sequence[Tensor], passes: int = PASSES) -> float:
    """The largest eigenvalue of a symmetric matrix, from below.

    Waits for the device once, at the end. Not a number if the products are not.

    Args:
        product: takes a vector, as a list of tensors like those of ``like``, to the matrix times it.
        like: the tensors' values are not used; 0 without any.
        passes: the number of products.

    Example:
        >>> A = torch.diag(torch.linspace(0, 3, 100))
        >>> largest_eigenvalue(lambda u: [A @ u[0]], [torch.empty(100)], passes=20)
        2.99...
    """
    return largest_in(lanczos(product, list(map(start_vector, like)), passes)) if like else 0.0


def largest_in(entries: Tensor) -> float:
    """The largest eigenvalue of the matrix whose entries ``lanczos`` has found; waits for the device."""
    T = tridiagonal(entries)
    return float("nan") if T is None else torch.linalg.eigvalsh(T)[-1].item()


def tridiagonal(entries: Tensor) -> Tensor | None:
    """The matrix whose entries ``lanczos`` has found, in float64 on the host; None if they are not finite.

    Its eigenvalues approach the outermost ones of the matrix that was multiplied with.
    """
    numbers = entries.double().cpu()
    if not numbers.isfinite().all():
        return None
    passes = (len(numbers) + 1) // 2
    T = torch.diag(numbers[:passes])
    return T + torch.diag(numbers[passes:], 1) + torch.diag(numbers[passes:], -1)


@torch.no_grad()
def lanczos(product: Product, start: list[Tensor], passes: int) -> Tensor:
    """The entries of a matrix in the first vectors of Lanczos' basis, from ``start`` on.

    ``passes`` of its diagonal, and those beside it; the others are 0.
    """
    u = start
    before, beta = u, _inner(u, u).sqrt()
    u = _multiplied(u, torch.where(beta == 0, 0.0, 1 / beta))
    diagonal, beside = [], []
    for k in range(passes):
        w = product(u)
        alpha = _inner(w, u)
        diagonal.append(alpha)
        if k == passes - 1:
            break
        w = _moved(w, -alpha, u)
        if k > 0:
            w = _moved(w, -beta, before)
        beta = _inner(w, w).sqrt()
        beside.append(beta)
        # Zeros, which change nothing, once the vectors have been used up.
        before, u = u, _multiplied(w, torch.where(beta == 0, 0.0, 1 / beta))
    return torch.stack([*diagonal, *beside])


def start_vector(like: Tensor) -> Tensor:
    """The same pseudo-random numbers each time."""
    generator = torch.Generator(like.device).manual_seed(0)
    drawn = torch.rand(like.shape, generator=generator, dtype=like.dtype, device=like.device)
    return drawn - 0.5


def _inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    products = [torch.dot(a_i.reshape(-1), b_i.reshape(-1)) for a_i, b_i in zip(a, b, strict=True)]
    return torch.stack([product.to(products[0]) for product in products]).sum()


def _multiplied(u: Sequence[Tensor], factor: Tensor) -> list[Tensor]:
    return [u_i * factor.to(u_i) for u_i in u]


def _moved(w: Sequence[Tensor], factor: Tensor, u: Sequence[Tensor]) -> list[Tensor]:
    """w + factor u"""
    return [torch.addcmul(w_i, factor.to(u_i), u_i) for w_i, u_i in zip(w, u, strict=True)]


def second_derivative(function: Callable[[list[Tensor]], Tensor], at: Sequence[Tensor]) -> Product:
    """The Hessian of a scalar function at ``at``, for ``largest_eigenvalue``, or as a part of one.

    A function whose gradient cannot be differentiated is evaluated a small step away instead.
    """

    def gradient_at(x: Sequence[Tensor], twice: bool = False) -> tuple[list[Tensor], Any]:
        with torch.enable_grad():
            moving = [x_i.detach().requires_grad_() for x_i in x]
            value = function(moving)
            if not value.requires_grad:
                return moving, [None for _ in x]
            return moving, torch.autograd.grad(value, moving, create_graph=twice, allow_unused=True)

    moving, gradient = gradient_at(at, twice=True)
    found = [g for g in gradient if g is not None]
    # A gradient of an operation that can be differentiated once may look like a constant.
    has_graph = all([g.requires_grad for g in found])

    def product(u: list[Tensor]) -> list[Tensor]:
        nothing = [torch.zeros_like(u_i) for u_i in u]
        if has_graph and found:
            arriving = [u_i for u_i, g in zip(u, gradient, strict=True) if g is not None]
            try:
                return list(
                    torch.autograd.grad(
                        found, moving, arriving, retain_graph=True, materialize_grads=True
                    )
                )
            except RuntimeError:  # it says that it has no derivative
                pass
        s = small_step(at, u)
        _, there = gradient_at(_moved(at, s, u))
        return [
            zero if g is None or after is None else (after - g.detach()) / s.to(g)
            for zero, g, after in zip(nothing, gradient, there, strict=True)
        ]

    return product


def small_step(
    at: Sequence[Tensor], u: Sequence[Tensor], dtype: torch.dtype | None = None
) -> Tensor:
    """s for which s u is small beside ``at``, though not too small for differences in ``dtype``."""
    size, length = _length(at), _length(u)
    s = torch.finfo(dtype or at[0].dtype).eps ** 0.5 * torch.where(size > 0, size, 1.0)
    return (s / torch.where(length > 0, length, 1.0)).to(u[0].dtype)


def _length(u: Sequence[Tensor]) -> Tensor:
    lengths = [torch.linalg.vector_norm(u_i) for u_i in u]
    return torch.linalg.vector_norm(torch.stack([length.to(lengths[0]) for length in lengths]))
