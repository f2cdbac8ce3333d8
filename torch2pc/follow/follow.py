"""Follow an inference: the same iterations as those of a call, with a record of each of them.

``follow`` and ``follow_latent`` take the arguments of ``PCInfer`` and ``PCInferLatent``, run the same
relaxation and look at it after each step (``Relaxation.here``); nothing is written into the model.
What they return is a ``Record`` (``record.py``), which says what it means.
How a relaxation would go on, and with which step sizes it would be stable, is found in ``outlook.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torch2pc.checks import check_modules, check_no_transform
from torch2pc.follow.look import look, wide
from torch2pc.follow.outlook import (
    ClosedForm,
    Landscape,
    Outlook,
    Stability,
    Ways,
    from_above,
    largest_stable,
    look_ahead,
)
from torch2pc.follow.record import Record
from torch2pc.graph.apart import until_guarded
from torch2pc.graph.autograd import add_updates, gradient, leaves_between
from torch2pc.graph.network import Network
from torch2pc.graph.nodes import PCGraph, steps_above
from torch2pc.graph.state import Snapshot, Source, generators_in, generators_kept, modules_in
from torch2pc.inference import RELAXATIONS
from torch2pc.inference.fixed_pred import AUTO_ETA, error_factors
from torch2pc.inference.relax import Relaxation
from torch2pc.inference.steps import Langevin, Rule, is_plain, round_off
from torch2pc.inference.strict import latent
from torch2pc.latent import check_latent_arguments
from torch2pc.pcinfer import check_arguments


def follow(
    model: nn.Sequential | PCGraph,
    LossFun: Callable[[Tensor, Any], Tensor],
    X: Tensor,
    Y: Any,
    ErrType: str,
    eta: float | Tensor | str | Rule = 0.1,
    n: int | None = 20,
    vinit: Sequence[Any] | None = None,
    *,
    update_at: str = "v",
    precision: float | Sequence[float] | Mapping[str, float] | None = None,
    alpha: float | None = None,
    energies: Mapping[int | str, Callable[[Tensor, Tensor], Tensor]] | None = None,
) -> Record:
    r"""Run the inference of ``PCInfer`` and return a record of it, without any other effect.

    It answers whether the inference has converged, which ``eta`` and ``n`` it needs, and how far its
    updates are from backpropagation's. Row k of the record's tables is about the state after k
    iterations, column l about layer l:

    - the energies :math:`\tfrac12\lVert\epsilon_l\rVert^2`, the loss at the output that the beliefs
      predict, and their sum F; how far each belief has moved in iteration k;
    - the cosine, and the relative size, of the update that ``PCInfer`` with ``n=k`` would write for
      layer l, against the gradient of backpropagation;
    - the distance from equilibrium, the length of F's gradient in units of the errors:
      :math:`\lVert a - \epsilon\rVert / \max(\lVert a\rVert, \lVert\epsilon\rVert)`, where
      :math:`a_l = J_{l+1}^T\epsilon_{l+1}` is what arrives at layer l. It is 1 at the start from the
      feed-forward pass, and 0 at equilibrium.

    And for the whole: the largest stable ``eta``, :math:`2/\lambda_{\max}` of F's Hessian along the way
    (where F was lowest, and where a descent from the start with nine tenths of it comes to in 100
    iterations, or raises F); the ``n`` that brings the distance to 1 %, tried for as many iterations and
    foretold beyond; and how much of each layer's errors would be left in float32 if they were computed
    as differences of predictions and beliefs. Where units switch, as ReLUs do, F has edges, and no
    step size keeps it from rising at them: ``falls`` is then False, and the largest stable ``eta`` is
    that between them.

    ``.grad``, parameters, buffers, training flags and random generators are afterwards as they were
    before; the forward hooks of modules fire more often than in a call. An iteration takes about five
    times as long as one of the call, and the end as long as some 200 to 800, whatever ``n`` is. With a
    number for ``eta`` it waits for the device only at the end (but for Equilibrium, which always does).

    With a rule of ``torch2pc.steps`` the rows are its iterations (Langevin's noise is that of a call with
    the same state of its generator). The largest stable ``eta`` and the ``n`` that would be needed are
    known of plain descent alone, and None otherwise.

    What the rows are for each ``ErrType``:

    - ``"Strict"``, ``"ErrorBased"``: the iterations. For ErrorBased the Hessian is that in epsilon.
    - ``"Multipliers"``: the sweeps. Errors are those with their multipliers, which the distance is about, and
      energies those of the differences alone. F falls, and rises to the loss as these vanish.
    - ``"Equilibrium"``: the evaluations of F; there is no step size.
    - ``"FixedPred"``: the iterations that its closed form stands for. They descend no energy,
      converge to the gradients, and are stable for ``eta`` up to 2 whatever the weights are.
    - ``"Exact"``: a single row after the start, at which the errors are the gradients.

    Args:
        model, LossFun, X, Y, ErrType, eta, n, vinit, update_at, precision, alpha, energies: as in
            ``PCInfer``.

    Returns:
        A ``Record``: print it, ``plot()`` it, or log its ``to_dict()``.

    Raises:
        TypeError, ValueError, RuntimeError: as ``PCInfer``, for the same arguments.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch2pc import follow
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.Tanh(), nn.Linear(8, 3)))
        >>> X, Y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> record = follow(model, nn.CrossEntropyLoss(), X, Y, "Strict", eta=0.1, n=60)
        >>> record.converged, record.stable_eta > 1
        (True, True)
        >>> record.energies.shape  # after 0, 1, ... 60 iterations; of layers 0, 1 and 2
        torch.Size([61, 3])
    """
    asked = check_arguments(
        model,
        LossFun,
        X,
        ErrType,
        eta,
        n,
        vinit,
        update_at,
        precision=precision,
        alpha=alpha,
        energies=energies,
    )

    def walk(network: Network) -> Record:
        if ErrType not in RELAXATIONS:
            assert not isinstance(asked.eta, Rule)
            return _follow_closed_form(network, ErrType, asked.eta, asked.n)
        relaxation = RELAXATIONS[ErrType](network, asked.eta, vinit, update_at, asked.terms)
        return _follow(relaxation, ErrType, asked.n)

    return _unchanged(walk, model, LossFun, X.detach(), Y, eta=eta)


def follow_latent(
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
) -> Record:
    """Run the inference of ``PCInferLatent`` and return a record of it, without any other effect.

    As ``follow``. Column 0 of the energies is the prior's, those of the hidden layers are weighed by
    their precisions, and column 0 of the moves is the latent's. Row k of the updates is what
    ``PCInferLatent`` with ``n=k`` would write, against the gradient of the loss of the feed-forward
    pass from ``Xinit``.

    Args:
        model, LossFun, Y, Xinit, eta, n, precision, energies, prior: as in ``PCInferLatent``.

    Returns:
        A ``Record``.

    Raises:
        TypeError, ValueError, RuntimeError: as ``PCInferLatent``, for the same arguments.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch2pc import follow_latent
        >>> decoder = nn.Sequential(nn.Sequential(nn.Linear(2, 16), nn.Tanh()), nn.Linear(16, 5))
        >>> record = follow_latent(
        ...     decoder, lambda yhat, Y: 0.5 * (yhat - Y).square().sum(), torch.randn(8, 5),
        ...     torch.zeros(8, 2), eta=0.05, n=50, prior=lambda v: 0.05 * v[0].square().sum())
        >>> record.rises_at is None
        True
    """
    step, n, terms = check_latent_arguments(
        model, LossFun, Xinit, eta, n, precision, prior, energies
    )

    def walk(network: Network) -> Record:
        return _follow(latent(network, step, terms), "Latent", n)

    return _unchanged(
        walk, model, LossFun, Xinit.detach(), Y, eta=eta, free_input=True, prior=prior
    )


def _unchanged(
    walk: Callable[[Network], Record],
    model: nn.Sequential | PCGraph,
    LossFun: Any,
    X: Tensor,
    Y: Any,
    *,
    eta: object,
    free_input: bool = False,
    prior: Any = None,
) -> Record:
    """What ``walk`` returns; whatever it draws and changes is put back."""
    if torch.is_inference_mode_enabled() or not torch.is_grad_enabled():
        with torch.inference_mode(False), torch.enable_grad():
            return _unchanged(
                walk, model, LossFun, X, Y, eta=eta, free_input=free_input, prior=prior
            )
    check_no_transform()
    modules = modules_in(model, LossFun, prior)
    check_modules(modules_in(model, *[f for f in (LossFun, prior) if isinstance(f, nn.Module)]))

    def attempt() -> Record:
        network = Network(model, LossFun, X, Y, modules, free_input=free_input, prior=prior)
        sources: list[Source] = [
            *network.devices,
            *generators_in(LossFun, modules),
            *generators_in(prior, []),
        ]
        if isinstance(eta, Langevin) and eta.generator is not None:
            sources.append(eta.generator)
        with generators_kept(sources), _state_kept(Snapshot(modules, network.devices)):
            return walk(network)

    return until_guarded(attempt)


@contextmanager
def _state_kept(before: Snapshot) -> Iterator[None]:
    with before:
        yield
    if before.differs():
        failed = RuntimeError("what the modules hold could not be put back")
        before.restore(failed)
        if failed.__context__ is not None:
            raise failed


def _follow(relaxation: Relaxation, ErrType: str, n: int) -> Record:
    """Run a relaxation and look at it after each step."""
    asked_rule = repr(relaxation.rule)  # before a call has changed its numbers
    network, energy = relaxation.network, relaxation.energy
    with network.replaying():
        contributions: list[dict[Tensor, Tensor]] = [{} for _ in network.layers]
        for way in _ways_down(network, apart=False):
            contributions[way.l - 1] = way.of_leaves
        looking = _Looking(relaxation, contributions)
        looking(0)
        relaxation.after_step = looking
        relaxation.run(n)
        relaxation.after_step = None
        resolved = _resolved(looking.errors, relaxation.v)
        rule = relaxation.rule
        is_descent = ErrType != "Multipliers" and is_plain(rule)
        has_steps = ErrType != "Equilibrium" and is_descent
        stability, outlook = None, None
        if energy.free and has_steps:
            landscape, lowest = Landscape(energy), looking.lowest
            row, eta = int(looking.row_of_lowest), float(rule.eta)
            outlook = look_ahead(landscape, lowest, row, eta)
            stability = largest_stable(landscape, looking.start, lowest)
    return _record(
        network,
        ErrType,
        looking.rows_on_host(),
        eta=float(rule.eta) if has_steps else None,
        rule=None if is_descent else asked_rule,
        stability=stability,
        outlook=outlook,
        resolved=resolved,
        dtype=network.vhat[-1].dtype,
    )


class _Looking:
    """Takes down a row of numbers after each step of a relaxation; they stay on its device."""

    def __init__(
        self,
        relaxation: Relaxation,
        contributions: list[dict[Tensor, Tensor]],
    ) -> None:
        self._relaxation = relaxation
        self._zero = _square(relaxation.network.Loss.new_zeros(()))
        self._leaves = [list(of_layer) for of_layer in contributions]
        # Those of backpropagation; a parameter that layers share has one.
        self._gradients: dict[Tensor, Tensor] = {}
        for of_layer in contributions:
            add_updates(self._gradients, of_layer.keys(), of_layer.values())
        self._squares = {leaf: _square(g) for leaf, g in self._gradients.items()}
        self._rows: list[list[Tensor]] = []
        # Where the beliefs were in the last two rows.
        self._delta: list[list[Tensor]] = []
        self.errors: list[Tensor] = []
        # Where F was lowest, and in which row.
        self._F, self.row_of_lowest = self._zero, self._zero
        self.lowest: list[Tensor] = []
        # The variables before the first step.
        self.start: list[Tensor] = []
        self._start: Any = None

    @torch.no_grad()
    def __call__(self, k: int) -> None:
        """After step k, or before the first one; again from 1 on if the relaxation starts anew."""
        if k == 1:
            self._F, self.lowest, self.row_of_lowest, self._delta = self._start
        elif k < len(self._rows):
            self._delta = self._delta[:-1]
        del self._rows[k:]
        relaxation, L, zero = self._relaxation, len(self._relaxation.network.layers), self._zero
        energy = relaxation.energy
        here = look(energy)
        self.errors = here.errors
        first = L - len(here.gradient)
        clamped = [zero] * first
        prior = zero if here.prior is None else here.prior
        energies = [prior, *here.energies, here.Loss]
        weighted = [zero, *map(_square, here.pulls)]
        gradients = [*clamped, *map(_square, here.gradient)]
        arriving = [*clamped, *map(_square, here.arriving)]
        moves = [zero] * L
        if k > 0:
            pairs = zip(energy.delta[first:L], self._delta[-1], strict=True)
            moves = [*clamped, *[_square(now - before) for now, before in pairs]]
        updates = self._of_updates() if k > 0 else [zero] * (3 * L)
        row = [*energies, *weighted, *gradients, *arriving, *moves, *updates]
        self._rows.append([number.to(zero) for number in row])

        F, free = torch.stack(self._rows[-1][: L + 1]).sum(), energy.variables
        if k == 0:
            self._F, self.lowest = F, [x.clone() for x in free]
            self.row_of_lowest = torch.zeros_like(F)
            self.start = self.lowest
        else:
            is_lower = F < self._F
            self._F = torch.where(is_lower, F, self._F)
            self.row_of_lowest = torch.where(is_lower, float(k), self.row_of_lowest)
            pairs = zip(free, self.lowest, strict=True)
            self.lowest = [torch.where(is_lower.to(x.device), x, kept) for x, kept in pairs]
        delta = [delta_l.clone() for delta_l in energy.delta[first:L]]
        self._delta = [*self._delta[-1:], delta]
        if k == 0:
            self._start = self._F, self.lowest, self.row_of_lowest, self._delta

    def _of_updates(self) -> list[Tensor]:
        """For each layer update . gradient, |update|^2 and |gradient|^2, over its parameters."""
        relaxation = self._relaxation
        with relaxation.energy.aside():
            if relaxation.takes_errors:
                relaxation.energy.retake()
            with torch.enable_grad():
                _, updates = relaxation.updates()
        of_leaf = {}
        for leaf, g in self._gradients.items():
            update = updates.get(leaf)
            pair = [self._zero] * 2
            if update is not None:
                pair = [_inner(update, g), _square(update)]
            of_leaf[leaf] = [*pair, self._squares[leaf]]
        numbers = []
        for leaves in self._leaves:
            for i in range(3):
                found = [of_leaf[leaf][i].to(self._zero) for leaf in leaves]
                numbers.append(torch.stack(found).sum() if found else self._zero)
        return numbers

    def rows_on_host(self) -> Tensor:
        """All numbers, in one transfer."""
        return torch.stack([torch.stack(row) for row in self._rows]).double().cpu()


def _square(x: Tensor) -> Tensor:
    x = x.to_dense() if x.is_sparse else x
    return torch.linalg.vector_norm(x, dtype=wide(x)).square()


def _inner(x: Tensor, y: Tensor) -> Tensor:
    x, y = (z.to_dense() if z.is_sparse else z for z in (x, y))
    return (x.to(wide(x)) * y.to(wide(y))).sum()


class _Way(NamedTuple):
    """A part of the gradient: what arrives at layer ``l`` along ways of ``m`` layers."""

    l: int
    m: int
    error: Tensor
    of_leaves: dict[Tensor, Tensor]
    """What it adds to the gradients of the layer's parameters."""


def _ways_down(network: Network, apart: bool) -> list[_Way]:
    """Backpropagation, one recorded layer after the other, so that nothing is drawn anew.

    ``apart``: ways of different lengths are told apart; otherwise they are one, as if of no length.
    """
    arriving: list[dict[int, Tensor]] = [{} for _ in network.vhat]
    arriving[-1][0] = network.dLdy
    found = []
    for l in range(len(network.layers), 0, -1):
        parents = network.nodes[l - 1].parents
        x = [network.vhat[p].detach() for p in parents]
        for a in x:
            a.requires_grad_(a.is_floating_point())
        prediction = network.layers[l - 1].replay(*x)
        leaves = leaves_between(prediction, x)
        inputs = [(p, a) for p, a in zip(parents, x, strict=True) if a.requires_grad]
        asked = [*leaves, *[a for _, a in inputs]]
        for m, error in arriving[l].items():
            of_asked = gradient([prediction], asked, [error.to(prediction.dtype)], keep_graph=True)
            for (p, _), g in zip(inputs, of_asked[len(leaves) :], strict=True):
                if g is not None:
                    further = m + 1 if apart else 0
                    kept = arriving[p].get(further)
                    arriving[p][further] = g if kept is None else kept + g
            pairs = zip(leaves, of_asked, strict=False)
            found.append(
                _Way(l, m, error, {leaf: g.detach() for leaf, g in pairs if g is not None})
            )
    return found


@torch.no_grad()
def _resolved(errors: Sequence[Tensor], v: Sequence[Tensor]) -> list[float]:
    """What of epsilon_l, for l = 1..L-1, is left in float32 if it is taken as a difference."""
    shares = []
    for epsilon_l, v_l in zip(errors[1:-1], v[1:-1], strict=True):
        dtype = wide(epsilon_l)
        epsilon, belief = epsilon_l.to(dtype), v_l.to(dtype)
        difference = (belief + epsilon).float() - belief.float()
        size, lost = epsilon.norm(), (difference.to(dtype) - epsilon).norm()
        shares.append(torch.where(size > 0, 1 - lost / size, 1.0).clamp(min=0))
    if not shares:
        return []
    return torch.stack([share.to(shares[0]) for share in shares]).tolist()


def _follow_closed_form(network: Network, ErrType: str, eta: float | str, n: int) -> Record:
    """The rows of Exact, or of the iterations of FixedPred: shares of the parts of the gradients."""
    network.record()
    vhat, Loss, L = network.vhat, network.Loss, len(network.layers)
    with network.replaying():
        ways = _ways_down(network, apart=True)
    step = AUTO_ETA if isinstance(eta, str) else eta
    is_stepping = ErrType == "FixedPred"
    longest = steps_above(network.parents, farthest=True)[0]
    # The shares of the parts after k iterations, by the lengths of their ways, and the updates'.
    if ErrType == "Exact":
        found = [(1.0, *[0.0] * (longest - 1)), (1.0,) * longest]
    else:
        found = [error_factors(step, k, longest) for k in range(n + 1)]
    shares = torch.tensor(found, dtype=torch.float64)
    of_updates = shares[:-1] if is_stepping else shares[1:]
    like = _square(Loss.new_zeros(()))
    rows = torch.zeros(len(shares), 8 * L + 1, dtype=torch.float64)
    energies, weighted, gradients, arriving, moves, updates = _parts(rows, L)
    above, hidden, errors = from_above(shares), [], [torch.zeros_like(vhat_l) for vhat_l in vhat]
    for l in range(1, L + 1):
        own = [way for way in ways if way.l == l]
        for way in own:
            errors[l] = errors[l] + way.error * shares[-1, way.m].item()
        if l == L or not own:
            continue
        products = [[_inner(a.error, b.error).to(like) for a in own] for b in own]
        of_l = Ways([way.m for way in own], _on_host(products))
        hidden.append(of_l)
        weighted[:, l] = of_l.square(shares)
        energies[:, l] = 0.5 * weighted[:, l]
        arriving[:, l] = of_l.square(above)
        gradients[:, l] = of_l.square(shares - above)
        moves[1:, l] = of_l.square(shares[1:] - shares[:-1])
    energies[:, L] = Loss.double().item()
    # update = sum_a c_a g_a and gradient = sum_b g_b, over the ways to the layers that share a parameter.
    for l, of_layer in enumerate(_products(ways, L, like)):
        for (a, b), product in of_layer.items():
            updates[1:, 3 * l] += of_updates[:, a] * product
            updates[1:, 3 * l + 1] += of_updates[:, a] * of_updates[:, b] * product
            updates[1:, 3 * l + 2] += product
    beliefs = [a.to(e.dtype) - e for a, e in zip(vhat, errors, strict=True)]
    return _record(
        network,
        ErrType,
        rows,
        eta=step if is_stepping else None,
        stability=Stability(2.0, True) if is_stepping and L > 1 else None,
        outlook=ClosedForm(hidden) if is_stepping and hidden else None,
        resolved=_resolved(errors, beliefs),
        dtype=vhat[-1].dtype,
    )


def _on_host(numbers: Sequence[Sequence[Tensor]]) -> Tensor:
    """A table of numbers, in float64."""
    return torch.stack([torch.stack([*row]) for row in numbers]).double().cpu()


def _products(ways: Sequence[_Way], L: int, like: Tensor) -> list[dict[tuple[int, int], float]]:
    """For each layer g_a . g_b, summed over its parameters and over what arrives at any layer that uses them
    along ways of a and of b layers."""
    users: dict[Tensor, list[_Way]] = {}
    leaves: list[dict[Tensor, None]] = [{} for _ in range(L)]
    for way in ways:
        for leaf in way.of_leaves:
            users.setdefault(leaf, []).append(way)
            leaves[way.l - 1][leaf] = None
    result: list[dict[tuple[int, int], float]] = [{} for _ in range(L)]
    for l, of_layer in enumerate(leaves):
        for leaf in of_layer:
            of_leaf = [way.of_leaves[leaf] for way in users[leaf]]
            table = _on_host([[_inner(a, b).to(like) for b in of_leaf] for a in of_leaf]).tolist()
            for one, row in zip(users[leaf], table, strict=True):
                for other, product in zip(users[leaf], row, strict=True):
                    pair = one.m, other.m
                    result[l][pair] = result[l].get(pair, 0.0) + product
    return result


def _parts(rows: Tensor, L: int) -> tuple[Tensor, ...]:
    """Views of a row's parts: energies, weighted errors, gradients, arriving, moves and updates."""
    return torch.split(rows, [L + 1, L, L, L, L, 3 * L], dim=1)


def _record(
    network: Network,
    ErrType: str,
    rows: Tensor,
    *,
    eta: float | None,
    rule: str | None = None,
    stability: Stability | None,
    outlook: Outlook | None,
    resolved: list[float],
    dtype: torch.dtype,
) -> Record:
    """The record of what was taken down: sums of squares become lengths and their ratios."""
    L = len(network.layers)
    energies, weighted, gradients, arriving, moves, updates = _parts(rows, L)
    scale = torch.maximum(weighted, arriving)
    whole = torch.maximum(weighted.sum(1), arriving.sum(1))
    scale[:, 0] = whole  # the latent has no error of its own
    product, square, of_backprop = updates.reshape(-1, L, 3).unbind(2)
    none = torch.full((len(rows), 1), torch.nan, dtype=rows.dtype)
    zero = torch.zeros_like(none)
    cosine = product / (square * of_backprop).sqrt()
    size = (square / of_backprop).sqrt()
    cosine[0], size[0] = torch.nan, torch.nan
    return Record(
        ErrType=ErrType,
        eta=eta,
        rule=rule,
        names=_names(network),
        parents=[node.parents for node in network.nodes],
        energies=energies.clone(),
        moves=torch.cat([moves.sqrt(), zero], dim=1),
        gradient=torch.cat([gradients.sqrt(), zero], dim=1),
        distance=_ratio(gradients.sum(1), whole),
        distances=torch.cat([_ratio(gradients, scale), zero], dim=1),
        cosine=torch.cat([none, cosine.clamp(-1, 1)], dim=1),
        size=torch.cat([none, size], dim=1),
        stable_eta=None if stability is None else stability.eta,
        falls=None if stability is None else stability.falls,
        resolved=[1.0, *resolved, 1.0],
        differences=[
            l for l, layer in enumerate(network.layers, start=1) if layer.uncovered is not None
        ],
        slack=round_off(dtype),
        outlook=outlook,
    )


def _names(network: Network) -> list[str]:
    model = network.model
    if isinstance(model, PCGraph):
        return list(model.names)
    return ["input", *[layer.name for layer in network.layers]]


def _ratio(square: Tensor, of: Tensor) -> Tensor:
    """The root of the quotient, 0 for 0/0."""
    return torch.where(square == 0, 0.0, square / of).sqrt()
