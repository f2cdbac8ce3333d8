"""Step rules: how a variable is moved, given its gradient.

A rule is told where a relaxation begins, of each variable's gradient in a sweep, and of the sweep's end
(``relax.py``). It moves the variables in place, and writes into none of the parts that a gradient is given
in. The public ones are handed out by ``torch2pc.steps``. What a call is given says what to do and stays as
it is: the call works with a copy of its own, which keeps its state from ``begin`` on.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torch2pc.energy import Energy, Parts
from torch2pc.energy.curvature import (
    PASSES,
    alternating,
    hessian,
    lanczos,
    largest_in,
    safe_step,
    start_vector,
)

AUTO = "auto"
SWEEPS = ("together", "down")
# What a step size is multiplied by if the energy has risen, and how often at most.
SHRINK, MOST_TRIES = 0.25, 16


class Rule:
    """What a relaxation asks of a step rule; one of your own derives from it.

    ``begin`` is called before the first sweep, ``move`` with each variable's gradient in each sweep, from
    the top down, and ``end`` after each sweep. ``self.x[i]`` is variable i, a tensor to be moved in place:
    how far belief i has moved from its feed-forward value (ErrorBased: the error). Its gradient is the sum
    of c times tensor over ``parts``, which must not be written into; one of them may be ``self.x[i]``
    itself. Make all state in ``begin``: tensors, and dicts or lists of them, in attributes; a compiled call
    takes them from step to step, and holds what else there is for constant. What moves a variable
    otherwise than along its gradients (by noise, say) calls ``energy.wake()`` there.

    >>> import torch
    >>> from torch import nn
    >>> from torch2pc import PCInfer, steps
    >>> class Signs(steps.Rule):
    ...     def move(self, i, parts):
    ...         self.x[i] -= 0.01 * sum(c * part for part, c in parts).sign()
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
    >>> result = PCInfer(
    ...     model, nn.MSELoss(), torch.ones(2, 4), torch.zeros(2, 1), "Strict", Signs(), 5)
    """

    eta: Any = None
    """The step size, if there is one."""
    down = False
    """Whether a sweep moves a belief before its error goes on down."""
    numbers: tuple[str, ...] = ()
    """The attributes that are numbers which a compiled call is given as tensors without dimensions, so
    that it serves for all of them."""

    def fresh(self) -> Rule:
        """What a call works with in the place of this rule."""
        return copy.copy(self)

    def begin(self, energy: Energy) -> None:
        """Before the first sweep, or the first one after the energy was put back to its start."""
        self.x = energy.x

    def move(self, i: int, parts: Parts) -> None:
        """Move variable i, of which the gradient is the sum of ``parts``."""
        raise NotImplementedError

    def end(self) -> None:
        """After each sweep."""

    def noise(self, like: Tensor) -> Tensor:
        """Random numbers, in such a tensor: all that it draws in a call, it draws here."""
        raise NotImplementedError

    # What looks at values, and so waits for the device, is apart from what a compiled call traces.

    def choose(self) -> None:
        """After ``begin``: what has to be known before the first step."""

    def judge(self, energy: Energy) -> Tensor | None:
        """After the last sweep: what ``accepts`` decides by."""

    def accepts(self, verdict: Tensor | None) -> bool:
        """Whether to leave it at that, or else to begin again from the start."""
        return True

    def options(self) -> dict[str, Any]:
        """What it was made with."""
        return {}

    def __repr__(self) -> str:
        given = [f"{name}={value}" for name, value in self.options().items()]
        if self.down:
            given.append('sweep="down"')
        return f"{type(self).__name__}({', '.join(given)})"


class Descent(Rule):
    """``x <- x - eta dF/dx``: gradient descent, what a number for ``eta`` stands for.

    Args:
        eta: the step size.
        sweep: ``"together"`` moves all beliefs at once, by the gradients at the beliefs before the sweep.
            ``"down"`` moves them one after the other, from the top, and each error is taken anew once its
            own belief has moved, before it goes on to the one below: Gauss and Seidel's method on a
            chain (Strict and ``PCInferLatent``; the errors of ErrorBased have no such order). An error
            gets through m layers in one sweep, at a share of eta^m, where otherwise it takes m
            iterations; from ``vhat`` with eta = 1 one sweep gives backpropagation's errors. Each
            update is local, but the order is one of the whole network, as backpropagation's is.

    Raises:
        TypeError, ValueError: ``eta`` is no finite number; ``sweep`` is unknown.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch2pc import PCInfer, steps
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
        >>> X, Y = torch.ones(2, 4), torch.zeros(2, 1)
        >>> result = PCInfer(
        ...     model, nn.MSELoss(), X, Y, "Strict", steps.Descent(0.5, sweep="down"), n=2)

    Source: J. Whittington and R. Bogacz, Neural Computation 29(5) (2017); sweeps in sequence: Kerjan,
    Hoier and Scellier (2026).
    """

    numbers: tuple[str, ...] = ("eta",)

    def __init__(self, eta: float, sweep: str = "together") -> None:
        self.eta, self.down = number("eta", eta), is_down(sweep)

    def options(self) -> dict[str, Any]:
        """What it was made with."""
        return {"eta": self.eta}

    def move(self, i: int, parts: Parts) -> None:
        """x_i <- x_i - eta dF/dx_i"""
        for part, c in reversed(parts):  # its own error first
            _add(self.x[i], part, -self.eta * c)


class Momentum(Descent):
    """``w <- mu w + dF/dx``, ``x <- x - eta w``: descent with momentum, w = 0 at the start.

    With ``nesterov``, ``x <- x - eta (dF/dx + mu w)``; both as in ``torch.optim.SGD``. Where Strict converges
    slowly (deep networks) it needs far fewer iterations. Costs a tensor for each belief.

    Args:
        eta: the step size. Where F is quadratic it is stable for ``eta < 2 (1 + mu) / lambda``, lambda
            being the largest eigenvalue of F's Hessian (not with ``nesterov``, which bears less).
        mu: what is kept of the last step, from 0 to below 1.
        nesterov: whether the step looks ahead.
        sweep: as in ``Descent``.

    Raises:
        TypeError, ValueError: as ``Descent``; ``mu`` is no number of at least 0 and below 1.

    Example:
        >>> from torch2pc import steps
        >>> steps.Momentum(0.1, 0.9)
        Momentum(eta=0.1, mu=0.9, nesterov=False)

    Source: B. Polyak (1964), Y. Nesterov (1983); on beliefs: Pinchetti et al., arXiv:2407.01163 (2024).
    """

    numbers = ("eta", "mu")

    def __init__(
        self, eta: float, mu: float, nesterov: bool = False, sweep: str = "together"
    ) -> None:
        super().__init__(eta, sweep)
        self.mu = number("mu", mu, "a number >= 0 and < 1", lambda x: 0 <= x < 1)
        if not isinstance(nesterov, bool):
            raise TypeError(f"nesterov must be True or False, got {type(nesterov).__name__}")
        self.nesterov = nesterov

    def options(self) -> dict[str, Any]:
        """What it was made with."""
        return {**super().options(), "mu": self.mu, "nesterov": self.nesterov}

    def begin(self, energy: Energy) -> None:
        """From rest."""
        super().begin(energy)
        self._velocity = {i: torch.zeros_like(energy.x[i]) for i in energy.free}

    def move(self, i: int, parts: Parts) -> None:
        """One step along the velocity."""
        velocity = self._velocity[i].mul_(self.mu)
        for part, c in parts:
            _add(velocity, part, c)
        if self.nesterov:
            super().move(i, parts)
        _add(self.x[i], velocity, -self.eta * self.mu if self.nesterov else -self.eta)


class Halving(Descent):
    """Descent whose step size is multiplied by ``factor`` after each step that raised the energy.

    The step that raised it is kept, and the next ones are shorter, in each call from ``eta`` on; there is
    one step size for the whole batch. To know the energy after each step Strict makes one more pass up
    (ErrorBased and the start of its next step share it); nothing waits for the device.

    It is the field's ``x_lr_discount``, but for two things. That one looks at the energies before the
    steps, so that it acts one step later. And it takes an energy that stays the same for one that
    rose, so that near equilibrium round-off ends its descent; here a rise by less than the round-off of
    the energy's terms is none, and one that is no number is.

    Args:
        eta: the step size at the start.
        factor: above 0 and below 1.
        sweep: as in ``Descent``.

    Raises:
        TypeError, ValueError: as ``Descent``; ``factor`` is no number above 0 and below 1.

    Example:
        >>> from torch2pc import steps
        >>> steps.Halving(0.5)
        Halving(eta=0.5, factor=0.5)

    Source: Y. Song et al., Nature Neuroscience 27, 348-358 (2024), in their code.
    """

    numbers = ("eta", "factor")

    def __init__(self, eta: float, factor: float = 0.5, sweep: str = "together") -> None:
        super().__init__(eta, sweep)
        self.factor = number("factor", factor, "a number > 0 and < 1", lambda x: 0 < x < 1)

    def options(self) -> dict[str, Any]:
        """What it was made with."""
        return {**super().options(), "factor": self.factor}

    def begin(self, energy: Energy) -> None:
        """Note the energy at the start."""
        super().begin(energy)
        self._energy, self._round_off = energy, round_off(energy.vhat[-1].dtype)
        self._F, self._slack = self._look()
        self.eta = torch.zeros_like(self._F) + self.eta  # in the type of the beliefs

    def end(self) -> None:
        """Shorten the next step if this one raised the energy."""
        F, slack = self._look()
        self.eta = torch.where(self._F + self._slack >= F, self.eta, self.factor * self.eta)
        self._F, self._slack = F, slack

    def _look(self) -> tuple[Tensor, Tensor]:
        """F, and how much of it may be round-off."""
        terms = self._energy.terms()
        return terms.sum(), self._round_off * terms.abs().sum()


class Optim(Rule):
    """Any optimizer of ``torch.optim``, on the beliefs: ``Optim(lambda x: torch.optim.Adam(x, lr=0.05))``.

    What it moves is how far the beliefs have moved from their feed-forward values (ErrorBased: the
    errors), so that its ``weight_decay`` pulls back to these. Each call makes an optimizer of its own, and
    all beliefs are stepped from the first iteration on, those whose gradient is still 0 too.

    Args:
        make: called with the list of tensors to be moved; returns an optimizer of them that steps
            without a closure (LBFGS does not).
        sweep: as in ``Descent``; with ``"down"`` each belief has an optimizer of its own.

    Raises:
        TypeError: ``make`` cannot be called, or in a call returns no optimizer.
        ValueError: ``sweep`` is unknown; in a call, the optimizer needs a closure, or does not
            hold the tensors that it was given.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch2pc import PCInfer, steps
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
        >>> X, Y = torch.ones(2, 4), torch.zeros(2, 1)
        >>> adam = steps.Optim(lambda x: torch.optim.Adam(x, lr=0.05))
        >>> result = PCInfer(model, nn.MSELoss(), X, Y, "Strict", adam, n=10)

    Source: ``optimizer_x_fn`` of the Bogacz group's code; Pinchetti et al., arXiv:2407.01163 (2024).
    """

    def __init__(
        self,
        make: Callable[[list[Tensor]], torch.optim.Optimizer],
        sweep: str = "together",
    ) -> None:
        if not callable(make):
            raise TypeError(
                "make must be a callable from a list of tensors to an optimizer of them, got "
                f"{type(make).__name__}"
            )
        self.make, self.down = make, is_down(sweep)

    def options(self) -> dict[str, Any]:
        """What it was made with."""
        return {"make": getattr(self.make, "__qualname__", type(self.make).__name__)}

    def begin(self, energy: Energy) -> None:
        """Make the optimizer, or one for each belief."""
        super().begin(energy)
        energy.wake()
        if self.down:
            self._optimizers = {i: self._made([self.x[i]]) for i in energy.free}
        else:
            self._all = self._made(energy.variables) if energy.free else None

    def _made(self, x: list[Tensor]) -> torch.optim.Optimizer:
        made = self.make(x)
        if not isinstance(made, torch.optim.Optimizer):
            raise TypeError(f"make must return a torch.optim.Optimizer, got {type(made).__name__}")
        if isinstance(made, torch.optim.LBFGS):
            raise ValueError(
                "make must return an optimizer that steps without a closure, got LBFGS; "
                '"Equilibrium" is such a search'
            )
        held = {id(p) for group in made.param_groups for p in group["params"]}
        if held != set(map(id, x)):
            raise ValueError("make must return an optimizer of the very tensors that it is given")
        return made

    def move(self, i: int, parts: Parts) -> None:
        """Note the gradient; in sequence, step."""
        grad = torch.zeros_like(self.x[i])
        for part, c in parts:
            _add(grad, part, c)
        self.x[i].grad = grad
        if self.down:
            self._optimizers[i].step()
            self.x[i].grad = None

    def end(self) -> None:
        """Step all together."""
        if not self.down and self._all is not None:
            self._all.step()
            self._all.zero_grad()


class Langevin(Descent):
    """``x <- x - eta dF/dx + sqrt(2 eta T) xi``, xi ~ N(0, 1): samples of exp(-F / T), not a minimum.

    After many steps the beliefs are samples of that distribution, but for an error that falls with
    eta; the updates are taken at the last of them. At T = 0 it is descent.

    The noise comes of one number that is drawn from ``generator`` after the feed-forward pass, so that the
    same state of it gives the same call; without one, from PyTorch's default generator of the CPU, which then
    stands one draw further than a forward pass leaves it.

    Args:
        eta: the step size, at least 0.
        temperature: T, at least 0.
        generator: a ``torch.Generator``, of any device.
        sweep: as in ``Descent``.

    Raises:
        TypeError, ValueError: as ``Descent``; ``temperature`` is no number of at least 0, or ``generator`` no
            generator.

    Example:
        >>> import torch
        >>> from torch2pc import steps
        >>> steps.Langevin(0.01, temperature=1.0, generator=torch.Generator().manual_seed(0))
        Langevin(eta=0.01, temperature=1.0)

    Source: G. Oliviers, R. Bogacz and A. Meulemans, Learning probability distributions of sensory inputs with
    Monte Carlo predictive coding, PLOS Computational Biology 20(10) (2024).
    """

    numbers = ("eta", "temperature")

    def __init__(
        self,
        eta: float,
        temperature: float,
        generator: torch.Generator | None = None,
        sweep: str = "together",
    ) -> None:
        super().__init__(eta, sweep)
        number("eta", eta, "a number >= 0", lambda x: x >= 0)
        self.temperature = number("temperature", temperature, "a number >= 0", lambda x: x >= 0)
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(
                f"generator must be None or a torch.Generator, got {type(generator).__name__}"
            )
        self.generator = generator

    def options(self) -> dict[str, Any]:
        """What it was made with, but for the generator."""
        return {**super().options(), "temperature": self.temperature}

    def fresh(self) -> Rule:
        """A copy with noise of its own.

        Not drawn from the given generator while it runs: layers that are evaluated again put theirs back.
        """
        found = copy.copy(self)
        device = "cpu" if self.generator is None else self.generator.device
        drawn = torch.randint(2**62, (), generator=self.generator, device=device)
        found._seed, found._drawing = int(drawn) + self._stream, {}
        return found

    def of_stream(self, number: int) -> Langevin:
        """A copy whose noise is another one than that of other numbers, from the same generator's state."""
        found = copy.copy(self)
        found._stream = number
        return found

    def begin(self, energy: Energy) -> None:
        """Noise moves all beliefs, also those that no error has reached."""
        super().begin(energy)
        energy.wake()

    def move(self, i: int, parts: Parts) -> None:
        """A step of the descent, and noise."""
        super().move(i, parts)
        _add(self.x[i], self.noise(self.x[i]), (2 * self.eta * self.temperature) ** 0.5)

    def noise(self, like: Tensor) -> Tensor:
        """From N(0, 1)."""
        device = like.device
        if device not in self._drawing:
            self._drawing[device] = torch.Generator(device).manual_seed(self._seed)
        return torch.empty_like(like).normal_(generator=self._drawing[device])

    _seed: int
    _stream = 0
    _drawing: dict[torch.device, torch.Generator]


class Safe(Descent):
    """``eta="auto"``: descent with a step size that is found in each call.

    1/lambda, with lambda the largest eigenvalue of the Hessian at the start (``energy/curvature.py``); and
    for as long as the energy is higher in the end than it was, from the start again with a quarter of it.
    In sweeps from the top, which bear twice the reciprocal of the largest curvature of a single belief,
    three quarters of that, and 1 at most.
    It waits for the device once for the step size, and once each time that it has come to the end.
    """

    def __init__(self, sweep: str = "together") -> None:
        self.eta: Any = AUTO
        self.down = is_down(sweep)
        self._tries = 0

    def begin(self, energy: Energy) -> None:
        """Look at the curvature and the energy, the first time."""
        super().begin(energy)
        if self._tries == 0:
            self._entries = None
            if x := energy.variables:
                product = alternating(hessian(energy)) if self.down else hessian(energy)
                self._entries = lanczos(product, list(map(self.noise, x)), PASSES)
            terms = energy.terms()
            self._before = terms.sum()
            self._slack = most_rise(energy, energy.vhat[-1].dtype) * terms.abs().sum()

    def noise(self, like: Tensor) -> Tensor:
        """The vector that the curvature is looked for from."""
        return start_vector(like)

    def choose(self) -> None:
        """Find the step size, the first time."""
        if self._tries == 0:
            curvature = 0.0 if self._entries is None else largest_in(self._entries)
            self.eta = safe_step(curvature)
            if self.down:
                self.eta = min(1.0, 1.5 * self.eta)

    def judge(self, energy: Energy) -> Tensor:
        """Whether the energy is no higher than it was."""
        is_lower = energy.terms().sum() <= self._before + self._slack
        return is_lower | ~self._before.isfinite()

    def accepts(self, verdict: Tensor | None) -> bool:
        """So, or to try again with a smaller step."""
        self._tries += 1
        if verdict or self._tries > MOST_TRIES:
            return True
        self.eta *= SHRINK
        return False


def rule_of(eta: Any, sweep: str = "together") -> Rule:
    """The rule that a call's ``eta`` asks for, for this call alone; ``sweep``: of one that is none."""
    if isinstance(eta, Rule):
        return eta.fresh()
    return Safe(sweep) if isinstance(eta, str) else Descent(eta, sweep)


def is_plain(rule: Rule) -> bool:
    """Whether it is gradient descent, all variables together: what is known of stable steps is of that."""
    return type(rule) in (Descent, Safe) and not rule.down


def is_down(sweep: object) -> bool:
    """Whether a rule's ``sweep`` is ``"down"``, which it may be."""
    if not isinstance(sweep, str) or sweep not in SWEEPS:
        raise ValueError(f'sweep must be "together" or "down", got {sweep!r}')
    return sweep == "down"


def number(
    name: str,
    value: object,
    accepted: str = "a finite number",
    holds: Callable[[float], bool] = math.isfinite,
) -> float:
    """``value`` as a float: a number that ``holds``, which may be a tensor or an array without dimensions."""
    given = value.item() if isinstance(value, Tensor | np.ndarray) and value.ndim == 0 else value
    if isinstance(given, bool) or not isinstance(given, Real):
        shape = f" of shape {tuple(given.shape)}" if isinstance(given, Tensor | np.ndarray) else ""
        raise TypeError(f"{name} must be {accepted}, got {type(value).__name__}{shape}")
    if not (math.isfinite(given) and holds(float(given))):
        raise ValueError(f"{name} must be {accepted}, got {given}")
    return float(given)


def most_rise(energy: Energy, dtype: torch.dtype) -> float:
    """By which share of itself F may end higher than it started, if the loss is computed in ``dtype``.

    Multipliers let it fall and rise again, to the loss of the feed-forward pass, around which it may swing.
    """
    return 1.0 if energy.multiplied else round_off(dtype)


def round_off(dtype: torch.dtype) -> float:
    """How much of an energy may be round-off, if the loss is computed in ``dtype``."""
    return min(256 * torch.finfo(dtype).eps, 0.1)


def _add(x: Tensor, part: Tensor, c: Any) -> None:
    """x <- x + c part"""
    if type(c) is float:
        x.add_(part, alpha=c)
    else:  # a tensor without dimensions, in a compiled call
        x.add_(part * c.to(x.device))
