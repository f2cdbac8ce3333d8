"""The one loop: an energy, a step rule, n sweeps; and what is made of where it ends.

``Relaxation`` is what the algorithms, ``follow`` and the figures hold: a batch that was recorded, its
energy and a rule. Where the energy comes from is up to ``strict.py``, ``error_based.py`` and their like.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from torch2pc.energy import Energy
from torch2pc.graph.autograd import own
from torch2pc.graph.network import Inference, Network, detached
from torch2pc.graph.warn import warn_caller
from torch2pc.inference.steps import Langevin, Rule, most_rise
from torch2pc.inference.updates import updates

# What PCInfer calls after each iteration, with its number, v and epsilon.
Callback = Callable[[int, list[Tensor], list[Tensor | None]], object]


def relax(
    energy: Energy,
    rule: Rule,
    n: int,
    before_step: Callable[[int], object] | None = None,
    after_step: Callable[[int], object] | None = None,
) -> None:
    """``n`` sweeps, in each of which the rule moves all variables."""
    while True:
        rule.begin(energy)
        rule.choose()
        for k in range(1, n + 1):
            if before_step is not None:
                before_step(k)
            take_step(energy, rule)
            if after_step is not None:
                after_step(k)
        energy.settle()
        if rule.accepts(rule.judge(energy)):
            return
        energy.restart()


def take_step(energy: Energy, rule: Rule) -> None:
    """One sweep, in which the rule moves all variables, and what changes from one to the next."""
    energy.raise_multipliers()
    energy.sweep(rule.move, rule.down)
    rule.end()


class Relaxation:
    """A relaxation of one batch; iterating over it yields (v, epsilon) after each step.

    The list epsilon that it yields is its own and changes with the next step: copy what is to be
    kept. Steps, ``updates`` and ``result`` belong inside ``with network.replaying()``.

    ``update_at``: where the parameters' updates are taken, ``"v"``, ``"vhat"`` or ``"before"`` the last step.
    ``takes_errors``: whether the errors are taken once more at the final beliefs.
    """

    after_step: Callable[[int], object] | None = None
    """Called after each step of ``run`` with how many there have been."""
    distance: Tensor | None = None
    """What a search knows of how far it came (``equilibrium.py``)."""
    evaluations = 0
    """How often a search has evaluated F."""

    def __init__(
        self,
        network: Network,
        energy: Energy,
        rule: Rule,
        update_at: str = "v",
        takes_errors: bool = False,
    ) -> None:
        self.network, self.energy, self.rule = network, energy, rule
        self.update_at, self.takes_errors = update_at, takes_errors
        self._before: list[Any] | None = None
        self._has_begun = False

    @property
    def vhat(self) -> list[Tensor]:
        """The feed-forward values."""
        return self.network.vhat

    @property
    def v(self) -> list[Tensor]:
        """The beliefs; the input itself where it is clamped."""
        return self._with_input(self.energy.beliefs())

    @property
    def epsilon(self) -> list[Any]:
        """The errors, as they were last taken; None for the input."""
        return self.energy.epsilon

    def __iter__(self) -> Iterator[tuple[list[Tensor], list[Any]]]:
        while True:
            self.step()
            yield self.v, self.epsilon

    @torch.no_grad()
    def step(self) -> None:
        """Move all variables once."""
        if not self._has_begun:
            self.rule.begin(self.energy)
            self.rule.choose()
            self._has_begun = True
        take_step(self.energy, self.rule)
        self.energy.settle()

    @torch.no_grad()
    def run(self, n: int) -> None:
        """``n`` steps, begun anew for as long as the rule is not content with where they led."""

        def before_step(k: int) -> None:
            if self.update_at == "before" and (k == n or self.after_step is not None):
                self._before = [None if d is None else d.clone() for d in self.energy.delta]

        def after_step(k: int) -> None:
            self.energy.settle()
            self.after_step(k)  # type: ignore[misc]

        relax(
            self.energy,
            self.rule,
            n,
            before_step,
            None if self.after_step is None else after_step,
        )
        if self.takes_errors:
            self.energy.retake()

    def call_back(self, callback: Callback | None) -> None:
        """Let ``callback`` be called after each step with (k, v, epsilon)."""
        if callback is not None:
            self.after_step = lambda k: callback(k, self.v, self.epsilon)

    def updates(self) -> tuple[Tensor | None, dict[Tensor, Tensor]]:
        """The input's error (if the input requires grad) and the parameters' updates."""
        return self._updates(self.energy.beliefs())

    def _updates(self, v: list[Tensor]) -> tuple[Tensor | None, dict[Tensor, Tensor]]:
        at = self.vhat if self.update_at == "vhat" else v
        if self.update_at == "before" and self._before is not None:
            moved = zip(self.vhat, self._before, strict=True)
            at = [vhat if d is None else vhat + d for vhat, d in moved]
        beta = self.energy.output.beta
        of_above = [factor.weighted() for factor in self.energy.above]
        return updates(self.network, at, self.energy.weighted, v, beta=beta, of_above=of_above)

    def result(self) -> Inference:
        """What was inferred, in tensors that share no memory; no step can follow."""
        network = self.network
        v = self.energy.finish()
        for layer in [*network.layers, *[part.layer for part in network.from_above]]:
            layer.forget()
        input_error, of_parameters = self._updates(v)
        L = len(network.layers)
        found = own([*self.epsilon[1:], *of_parameters.values()])
        return Inference(
            network.vhat,
            network.Loss,
            network.dLdy,
            self._with_input(v),
            [input_error, *found[:L]],
            list(zip(of_parameters, found[L:], strict=True)),
        )

    def _with_input(self, v: list[Tensor]) -> list[Tensor]:
        return v if 0 in self.network.free else [detached(self.network.X), *v[1:]]


def infer_by(
    relaxation: Relaxation, n: int, callback: Callback | None = None, name: str = "PCInfer"
) -> Inference:
    """What ``n`` steps of a relaxation infer; ``name``: what a warning calls it."""
    relaxation.call_back(callback)
    with relaxation.network.replaying():
        relaxation.run(n)
        _warn_if_risen(relaxation, n, name)
        return relaxation.result()


# How many calls there were for each model.
_calls: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
_LOOKS = {8**k for k in range(12)}
_risen: WeakSet[nn.Module] = WeakSet()


def _warn_if_risen(relaxation: Relaxation, n: int, name: str) -> None:
    """Say, once for each model, if an inference ended where it should not: higher, or not finite.

    Looked at in calls 1, 8, 64, ... of a model, as it waits for the device; later in training the energy
    may be steeper than at first.
    """
    network, energy = relaxation.network, relaxation.energy
    model = network.model
    _calls[model] = call = _calls.get(model, 0) + 1
    if call not in _LOOKS or model in _risen:
        return
    F = energy.last()
    # From the feed-forward pass on, where no layer has an error but those that predict from above.
    knows_start = energy.start is None and network.prior is None
    # (Samples of Langevin's are about a minimum, not at it.)
    start = network.Loss if knows_start and not isinstance(relaxation.rule, Langevin) else None
    if start is not None:
        start = sum([factor.energy_at_first() for factor in energy.above], start)
    # One sweep from the top leaves shares of the gradient as errors, whatever F is. (A free input is sought.)
    is_one_sweep = n == 1 and getattr(relaxation.rule, "down", False) and 0 not in network.free
    is_higher = (
        start is not None
        and not is_one_sweep
        and bool(start + most_rise(energy, start.dtype) * start.abs() < F)
    )
    if bool(F.isfinite()) and not is_higher:
        return
    if start is not None and not bool(start.isfinite()):
        return  # then it is the model's or the loss's
    _risen.add(model)
    end = (
        f"from {start.item():.3g} to {F.item():.3g}" if start is not None else f"to {F.item():.3g}"
    )
    eta = getattr(relaxation.rule, "eta", None)
    warn_caller(
        f"The energy that {name} descends went {end} in n={n} iterations with eta={eta}, so that its "
        'errors and updates are of no use: the steps are too long. eta="auto" finds a stable size in each '
        "call; torch2pc.follow shows which are stable"
    )


_warned: WeakSet[nn.Module] = WeakSet()


def warn_of_flat_items(network: Network, ErrType: str, update_at: str) -> None:
    """Say, once for each model, where updates at v feed themselves.

    A unit j that its item's activation holds at 0 has the belief v_j = -epsilon_j, which is
    -W_j . epsilon_{l+1} at equilibrium. At v, the weights W_j that leave it get the gradient
    v_j epsilon_{l+1}: a step along it lets them grow along epsilon_{l+1}, and the larger they are,
    the larger is the next step.
    """
    if update_at == "vhat" or network.model in _warned:
        return
    # The places from which a layer that trains is reached.
    feeds = {p for part in network.from_above if part.layer.has_leaves for p in part.parents}
    for l in range(len(network.layers), 0, -1):
        if l in feeds or network.layers[l - 1].has_leaves:
            feeds.update(network.nodes[l - 1].parents)
    flat = [
        layer.name
        for l, layer in enumerate(network.layers, start=1)
        if layer.ends_flat and l in feeds
    ]
    if flat:
        _warned.add(network.model)
        warn_caller(
            f"{ErrType} takes its updates at v, where those of units that an activation holds at a "
            "constant feed themselves, so that training may blow up. "
            f"Such an activation is the last in {', '.join(flat)}. "
            'Pass update_at="vhat", or cut the model before the activations '
            "(items Linear | ReLU, Linear | ReLU, Linear)"
        )
