r"""Energies between a layer's prediction f and its belief v, other than half the squared difference.

A layer is given one by ``energies=``. It is computed of displacements: how far prediction and belief have
moved from the feed-forward value, ``f = vhat + df`` and ``v = vhat + dv``, so that small errors keep all of
their digits. Those that ship depend on ``r = df - dv = f - v``, which is small where errors are, and nothing
else is subtracted:

    Huber          sum h(r),  h(r) = r^2/2 for \|r\| <= delta, else delta \|r\| - delta^2/2
    Laplace        sum sqrt(r^2 + s^2) - s,  smoothed absolute values
    Categorical    KL(softmax(v) || softmax(f)), beliefs that are logits of categories

Public through ``torch2pc.energies``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from torch2pc.graph.autograd import check_scalar


class LayerEnergy:
    """The energy E(f, v) between a layer's prediction and its belief; one of your own derives from it.

    ``__call__(f, v)`` has to return E as a scalar tensor, summed over the batch, by operations that can be
    differentiated. That is enough: gradients then come from autograd at f and v, and where these are
    nearly equal float32 leaves few of their digits. To keep them all, override ``slopes`` (and ``value``),
    which are given displacements. E need not be least where v = f.

    >>> import torch
    >>> from torch import nn
    >>> from torch2pc import PCInfer, energies
    >>> class Quartic(energies.LayerEnergy):
    ...     def __call__(self, f, v):
    ...         return 0.25 * (f - v).pow(4).sum()
    ...     def slopes(self, vhat, df, dv):
    ...         cube = (df - dv).pow(3)
    ...         return cube, -cube
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
    >>> X, Y = torch.ones(2, 4), torch.zeros(2, 1)
    >>> result = PCInfer(model, nn.MSELoss(), X, Y, "Strict", energies={2: Quartic()})
    """

    is_at_rest = False
    """Whether dE/df = dE/dv = 0 where v = f, so that it is asleep until an error has reached it."""

    def __call__(self, f: Tensor, v: Tensor) -> Tensor:
        """E, a scalar."""
        raise NotImplementedError

    def slopes(self, vhat: Tensor, df: Tensor, dv: Tensor) -> tuple[Tensor, Tensor]:
        """dE/df and dE/dv at f = vhat + df, v = vhat + dv, in new tensors."""
        with torch.enable_grad():
            at = [(vhat + d).detach().requires_grad_() for d in (df, dv)]
            found = torch.autograd.grad(self(*at), at, allow_unused=True, materialize_grads=True)
        return found[0], found[1]

    def value(self, vhat: Tensor, df: Tensor, dv: Tensor) -> Tensor:
        """E there."""
        with torch.enable_grad():
            return self((vhat + df).requires_grad_(), (vhat + dv).requires_grad_()).detach()


class OfCallable(LayerEnergy):
    """A function of f and v that is no ``LayerEnergy``."""

    def __init__(self, name: str, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.name, self.function = name, function

    def __call__(self, f: Tensor, v: Tensor) -> Tensor:
        """E, a scalar."""
        found = self.function(f, v)
        check_scalar(self.name, found)
        if not found.requires_grad:
            raise ValueError(f"{self.name} must depend on the prediction and the belief")
        return found.reshape(())


class _OfDifference(LayerEnergy):
    """The sum of a function of r = f - v."""

    is_at_rest = True

    def of(self, r: Tensor) -> Tensor:
        """The function, elementwise."""
        raise NotImplementedError

    def slope(self, r: Tensor) -> Tensor:
        """Its derivative."""
        raise NotImplementedError

    def __call__(self, f: Tensor, v: Tensor) -> Tensor:
        """E, a scalar."""
        return self.of(f - v).sum()

    def slopes(self, vhat: Tensor, df: Tensor, dv: Tensor) -> tuple[Tensor, Tensor]:
        """dE/df = -dE/dv."""
        slope = self.slope(df - dv)
        return slope, -slope

    def value(self, vhat: Tensor, df: Tensor, dv: Tensor) -> Tensor:
        """E there."""
        return self.of(df - dv).sum()


class Huber(_OfDifference):
    r"""Half the square of small errors, and ``delta`` times the size of large ones.

    ``E = sum h(f - v)``, ``h(r) = r^2/2`` for ``|r| <= delta``, else ``delta |r| - delta^2/2``: errors are
    cut off at delta, so that single units that are far off pull no harder than that.

    Args:
        delta: above 0.

    Raises:
        TypeError, ValueError: ``delta`` is no such number.

    Example:
        >>> import torch
        >>> from torch2pc import energies
        >>> energies.Huber(1.0)(torch.tensor([0.1, 3.0]), torch.zeros(2))
        tensor(2.5050)

    Source: P. Huber, Annals of Mathematical Statistics 35(1) (1964).
    """

    def __init__(self, delta: float = 1.0) -> None:
        self.delta = _positive("delta", delta)

    def of(self, r: Tensor) -> Tensor:
        """h(r)"""
        cut = r.clamp(-self.delta, self.delta)
        return cut * (r - 0.5 * cut)

    def slope(self, r: Tensor) -> Tensor:
        """The error, cut off at delta."""
        return r.clamp(-self.delta, self.delta)

    def __repr__(self) -> str:
        return f"Huber(delta={self.delta})"


class Laplace(_OfDifference):
    r"""The sum of the errors' sizes, smoothed: ``E = sum sqrt(r^2 + s^2) - s`` with ``r = f - v``.

    The energy of a Laplace distribution, whose errors are ``r / sqrt(r^2 + s^2)``, their signs but for those
    smaller than s. Its curvature is 1/s at 0, so that eta has to be about s at most. ``precision`` is 1/b of
    the distribution.

    Args:
        smoothing: s, above 0.

    Raises:
        TypeError, ValueError: ``smoothing`` is no such number.

    Example:
        >>> import torch
        >>> from torch2pc import energies
        >>> energies.Laplace(0.1)(torch.tensor([0.0, 3.0]), torch.zeros(2))
        tensor(2.9017)

    Source: L. Pinchetti et al., Predictive coding beyond Gaussian distributions, NeurIPS (2022), for energies
    of other distributions.
    """

    def __init__(self, smoothing: float = 0.1) -> None:
        self.smoothing = _positive("smoothing", smoothing)

    def of(self, r: Tensor) -> Tensor:
        """sqrt(r^2 + s^2) - s, without the difference."""
        return r * (r / (self._root(r) + self.smoothing))

    def slope(self, r: Tensor) -> Tensor:
        """The error's sign, smoothed."""
        return r / self._root(r)

    def _root(self, r: Tensor) -> Tensor:
        return torch.hypot(r, torch.full((), self.smoothing, dtype=r.dtype, device=r.device))

    def __repr__(self) -> str:
        return f"Laplace(smoothing={self.smoothing})"


class Categorical(LayerEnergy):
    r"""``KL(softmax(v) || softmax(f))``, summed: beliefs and predictions that are logits of categories.

    The error of the layer is ``dE/df = softmax(f) - softmax(v)``, the difference of the two distributions,
    and what pulls at the belief is ``dE/dv = -q (r - sum q r)`` with ``q = softmax(v)``, ``r = f - v``. For a
    layer that a softmax follows, as attention's does.

    Args:
        dim: the dimension of the categories, not that of the batch.

    Raises:
        TypeError: ``dim`` is no int.

    Example:
        >>> import torch
        >>> from torch2pc import energies
        >>> logits = torch.tensor([[0.0, 1.0, 2.0]])
        >>> energies.Categorical()(logits + 5, logits).abs() < 1e-6
        tensor(True)

    Source: L. Pinchetti et al., Predictive coding beyond Gaussian distributions, NeurIPS (2022).
    """

    is_at_rest = True

    def __init__(self, dim: int = -1) -> None:
        if isinstance(dim, bool) or not isinstance(dim, int):
            raise TypeError(f"dim must be an int, got {type(dim).__name__}")
        self.dim = dim

    def __call__(self, f: Tensor, v: Tensor) -> Tensor:
        """E, a scalar."""
        log_q, log_p = v.log_softmax(self.dim), f.log_softmax(self.dim)
        return (log_q.exp() * (log_q - log_p)).sum()

    def slopes(self, vhat: Tensor, df: Tensor, dv: Tensor) -> tuple[Tensor, Tensor]:
        """The difference of the distributions, and what pulls at the logits of the belief."""
        q, r, is_small = self._centred(vhat, df, dv)
        m = (q * _exp_beyond(r)).sum(self.dim, keepdim=True)
        near = q * ((r.expm1() - m) / (1 + m))
        return torch.where(is_small, near, (vhat + df).softmax(self.dim) - q), -q * r

    def value(self, vhat: Tensor, df: Tensor, dv: Tensor) -> Tensor:
        """log sum q exp(r), where the mean of r is 0."""
        q, r, is_small = self._centred(vhat, df, dv)
        near = (q * _exp_beyond(r)).sum(self.dim, keepdim=True).log1p()
        far = (q.log() + r).logsumexp(self.dim, keepdim=True)
        return torch.where(is_small, near, far).sum()

    def _centred(self, vhat: Tensor, df: Tensor, dv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, r less its mean in q, which no softmax sees, and where r is so small that differences matter."""
        q, r = (vhat + dv).softmax(self.dim), df - dv
        r = r - (q * r).sum(self.dim, keepdim=True)
        return q, r, r.abs().amax(self.dim, keepdim=True) < 1

    def __repr__(self) -> str:
        return f"Categorical(dim={self.dim})"


def _exp_beyond(r: Tensor) -> Tensor:
    """exp(r) - 1 - r, to all digits for |r| < 1."""
    found = torch.zeros_like(r)
    for k in range(17, 1, -1):  # r^2/2 (1 + r/3 (1 + r/4 (1 + ...)))
        found = (1 + found) * (r / k)
    return found * r


def _positive(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number > 0, got {type(value).__name__}")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a number > 0, got {value}")
    return float(value)
