"""How a descent would go on from where it stands, and with which step sizes it would be stable.

What is descended is a function F of some tensors, the variables, of which nothing is known here but its
gradient g wherever one asks (``Landscape``): the energy in the beliefs, or in the errors for
``"ErrorBased"``. Products with F's Hessian H are central differences of g, along the vectors of
Lanczos' method. From a random vector they give the largest eigenvalue lambda of H: gradient
descent is stable there for step sizes below 2 / lambda. From g itself they give the nodes theta_i and
the weights w_i of a quadrature (G. Golub and G. Meurant, 1994) for the gradient j steps later,

    ||(1 - eta H)^j g||^2  =  ||g||^2 sum_i w_i (1 - eta theta_i)^(2j)

which is exact where F is quadratic and j less than the number of nodes, and for larger j it is right in
so far as the nodes lie where the eigenvalues do.

Both are about one point, and a descent goes elsewhere. So what can be tried is tried:

- The descent goes on for some steps more, and the quadrature is taken where it has come to. If further
  steps do not lead where it says, nothing is foretold.
- A descent from the start with nearly 2 / lambda has to lower F in each step, and the curvature where
  it comes to must not be larger. If it is not so, the curvature is taken where F has risen, too, and
  shorter steps are tried.
- Where units switch, as in networks of ReLUs, g jumps. No curvature bounds that: however short the
  steps are, a descent may rattle between the pieces. It is looked for and said, and the step size is
  the one that is stable within the pieces.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from torch2pc.energy import Energy
from torch2pc.energy.curvature import Product, lanczos, largest_eigenvalue, tridiagonal
from torch2pc.follow.look import look, wide
from torch2pc.inference.fixed_pred import error_factors
from torch2pc.inference.steps import round_off

# The distance from equilibrium at which an inference counts as converged.
NEAR = 0.01
# Products with the Hessian from each of the vectors.
PASSES = 16
# Steps by which the descent goes on, and those that follow to see whether what is foretold comes true.
AHEAD, CHECKED = 100, 32
# By how much the logarithm of a distance may be off then, and by which share of what it falls.
LEAST_OFF, SHARE_OFF = 0.005, 0.2
# Descents that are tried, of how many steps, with which share of the step size that should be stable;
# by how much it is shortened if one raises F.
TRIALS, TRIED, SHARE, SHORTER = 4, 100, 0.9, 0.7
# Halvings of a step on the way to where its gradient jumps. If no more than this share of the change is
# lost in each of the last few, it is a jump: of a smooth change each of them would lose about a half.
HALVINGS, LAST, LOST = 12, 3, 0.1
# Further than this nothing is foretold.
FARTHEST = 10**6


class Point(NamedTuple):
    """A place in the landscape, and what there is to see there."""

    x: list[Tensor]
    gradient: list[Tensor]
    F: float
    slack: float
    """How much of F may be round-off."""
    distance: float
    """The distance from equilibrium, in units of the errors there (see ``follow``)."""

    def is_below(self, before: Point) -> bool:
        """Whether the step here has not raised F, but for round-off."""
        return before.F + before.slack >= self.F


class Landscape:
    """The function that a relaxation descends. The energy stands elsewhere afterwards."""

    def __init__(self, energy: Energy) -> None:
        self._energy = energy

    @torch.no_grad()
    def gradient(self, x: Sequence[Tensor]) -> list[Tensor]:
        """F's gradient there."""
        self._energy.stand_at(x)
        return self._energy.gradient()

    @torch.no_grad()
    def look(self, x: Sequence[Tensor]) -> Point:
        """Waits for the device."""
        energy = self._energy
        energy.stand_at(x)
        here = look(energy)
        terms = [here.Loss, *here.energies]
        if here.prior is not None:
            terms.append(here.prior)
        zero = terms[0].new_zeros((), dtype=wide(terms[0]))
        energies = torch.stack([term.to(zero) for term in terms])
        lengths = [
            _length(here.pulls) if here.pulls else zero,
            _length(here.arriving),
            _length(here.gradient),
        ]
        numbers = [energies.sum(), energies.abs().sum(), *[length.to(zero) for length in lengths]]
        F, size, errors, arriving, off = torch.stack(numbers).tolist()
        distance = off / max(errors, arriving) if off != 0 else 0.0
        slack = round_off(energy.vhat[-1].dtype) * size
        return Point(list(x), here.gradient, F, slack, distance)

    def descend(self, x: Sequence[Tensor], eta: float, steps: int) -> Iterator[Point]:
        """``x`` and the ``steps`` that follow from it."""
        point = self.look(x)
        yield point
        for _ in range(steps):
            point = self.look(_along(point, eta))
            yield point

    def hessian(self, x: Sequence[Tensor]) -> Product:
        """Multiplies with F's Hessian at ``x``."""
        vhat = self._energy.vhat
        beliefs = [vhat[i] for i in self._energy.free]
        # In half precision that is what limits the gradient, whatever it is held in.
        eps = max([torch.finfo(b.dtype).eps for b in [*beliefs, vhat[-1]]])
        size = _length(beliefs)
        reach = eps ** (1 / 3) * torch.where(size > 0, size, 1.0)

        def product(u: list[Tensor]) -> list[Tensor]:
            length = _length(u)
            s = reach / torch.where(length > 0, length, 1.0)
            sides = []
            for step in (s, -s):
                pairs = zip(x, u, strict=True)
                sides.append(
                    self.gradient([x_i + step.to(x_i) * u_i.to(x_i) for x_i, u_i in pairs])
                )
            return [(a - b) / (2 * s).to(a) for a, b in zip(*sides, strict=True)]

        return product


def _along(point: Point, eta: float) -> list[Tensor]:
    return [x - eta * g for x, g in zip(point.x, point.gradient, strict=True)]


# ------------------------------------------------------------------------------ how it would go on


@dataclass(frozen=True)
class Spectrum:
    """What a descent has come to, and the quadrature for its gradient from there on."""

    row: int
    """The iteration after which it went on."""
    ahead: tuple[float, ...]
    """The distance from equilibrium after that iteration and each one that followed."""
    taken: int
    """How many had followed where the quadrature is taken."""
    theta: tuple[float, ...]
    """Its nodes; none if what it says has not come true."""
    weight: tuple[float, ...]

    def distance(self, more: int, eta: float) -> float:
        """The distance ``more`` steps of ``eta`` after the place where the quadrature is taken."""
        return self.ahead[self.taken] * _decay(self.theta, self.weight, more, eta)

    def iterations_to(self, distance: float, eta: float, now: float) -> int | None:
        """About how many iterations with ``eta`` from the start would come as near as ``distance``.

        Those that were made count by how far they have led, k ``now`` = k' ``eta``.
        """
        far = [k for k, d in enumerate(self.ahead) if not d <= distance]
        seen = far[-1] + 1 if far else 0
        if seen < len(self.ahead):
            return _as_far(self.row + seen, now, eta)
        if not self.theta:
            return None
        more = _first(lambda j: self.distance(j, eta) <= distance)
        return None if more is None else _as_far(self.row + self.taken, now, eta) + more


def _decay(theta: Sequence[float], weight: Sequence[float], steps: int, eta: float) -> float:
    logs = [2 * steps * math.log(max(abs(1 - eta * node), 1e-300)) for node in theta]
    return math.sqrt(
        sum([w * math.exp(min(log, 700)) for w, log in zip(weight, logs, strict=True)])
    )


def _as_far(made: int, now: float, eta: float) -> int:
    """How many steps of ``eta`` lead as far as those that were ``made`` with ``now``."""
    # 6 steps of .1 are 2 of .3, not 3 by round-off.
    return made if eta == now else math.ceil(made * now / eta * (1 - 1e-12))


class Ways(NamedTuple):
    """The parts of a gradient, by the lengths of their ways; FixedPred's errors are made of them."""

    lengths: list[int]
    products: Tensor
    """Their inner products, in float64 on the host."""

    def square(self, shares: Tensor) -> Tensor:
        """The squared length of the sum of the parts times their shares, for each row ``(rows, lengths)``."""
        chosen = shares[:, self.lengths]
        return (chosen @ self.products * chosen).sum(1)


def from_above(shares: Tensor) -> Tensor:
    """The shares of what arrives, where these are those of the errors: it has come a layer further."""
    return torch.nn.functional.pad(shares[:, :-1], (1, 0))


@dataclass(frozen=True)
class ClosedForm:
    """FixedPred's, for the hidden layers."""

    ways: list[Ways]

    def distance(self, k: int, eta: float) -> float:
        """The distance from equilibrium after k iterations with ``eta``."""
        longest = max([max(ways.lengths) for ways in self.ways])
        here = torch.tensor([error_factors(eta, k, longest + 1)], dtype=torch.float64)
        above = from_above(here)
        of_here, of_above, off = (
            sum([ways.square(shares).item() for ways in self.ways])
            for shares in (here, above, here - above)
        )
        return math.sqrt(off / max(of_here, of_above)) if off > 0 else 0.0

    def iterations_to(self, distance: float, eta: float, now: float) -> int | None:
        """How many iterations with ``eta`` come as near as ``distance``."""
        return _first(lambda k: self.distance(k, eta) <= distance)


Outlook = Spectrum | ClosedForm


def _first(is_enough: Callable[[int], bool]) -> int | None:
    """The least number for which it is, if it is for all larger ones."""
    above = 1
    while not is_enough(above):
        above *= 2
        if above > FARTHEST:
            return None
    below = above // 2
    while above - below > 1:
        middle = (above + below) // 2
        below, above = (below, middle) if is_enough(middle) else (middle, above)
    return 0 if above == 1 and is_enough(0) else above


def look_ahead(landscape: Landscape, x: Sequence[Tensor], row: int, eta: float) -> Spectrum | None:
    """How the descent goes on from ``x``, to which it came after ``row`` steps.

    None where it comes to values that are not finite.
    """
    ahead: list[float] = []
    at = None
    for point in landscape.descend(x, eta, AHEAD):
        if not math.isfinite(point.distance):
            return None
        at = point
        ahead.append(point.distance)
        if point.distance <= NEAR:
            break
    assert at is not None
    taken = len(ahead) - 1
    theta, weight = _quadrature(landscape, at)
    after = at
    for after in landscape.descend(_along(at, eta), eta, CHECKED - 1):
        ahead.append(after.distance)
    foretold = _decay(theta, weight, CHECKED, eta)
    seen = _ratio_of_lengths(after.gradient, at.gradient)
    if not _is_near(seen, foretold):
        theta, weight = (), ()
    return Spectrum(row, tuple(ahead), taken, theta, weight)


def _is_near(seen: float, foretold: float) -> bool:
    if not (seen > 0 and foretold > 0):
        return seen == foretold == 0
    decay = math.log(foretold)
    return abs(math.log(seen) - decay) <= LEAST_OFF + SHARE_OFF * abs(decay)


def _quadrature(landscape: Landscape, at: Point) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The nodes and the weights; none where the products are not finite."""
    g = at.gradient
    largest = torch.stack([g_i.abs().max().to(g[0]) for g_i in g if g_i.numel()]).max()
    # Not squares of numbers that are very small.
    unit = torch.where(largest > 0, largest, 1.0)
    T = tridiagonal(lanczos(landscape.hessian(at.x), [g_i / unit.to(g_i) for g_i in g], PASSES))
    if T is None:
        return (), ()
    theta, vectors = torch.linalg.eigh(T)
    return tuple(theta.tolist()), tuple(vectors[0].square().tolist())


# --------------------------------------------------------------------------- which steps are stable


class Stability(NamedTuple):
    """The largest stable step size, and how far that is known."""

    eta: float | None
    """None where F is not finite."""
    falls: bool
    """Whether F fell in each of the steps that were tried with nearly this size, from the start on."""


def largest_stable(
    landscape: Landscape, start: Sequence[Tensor], lowest: Sequence[Tensor]
) -> Stability:
    """The largest step size for a descent from ``start`` that has come to ``lowest`` with another one."""
    curvature = _curvature(landscape, lowest)
    if math.isnan(curvature):
        return Stability(None, False)
    eta = 2 / curvature if curvature > 0 else math.inf
    for _ in range(TRIALS):
        if eta == math.inf:
            return Stability(eta, True)
        *before, last = _descent(landscape, start, SHARE * eta)
        rises = bool(before)
        jumps = rises and _jumps(landscape, before[0], last)
        # Where the last step leads to counts, unless it was an edge that has led there.
        places = before if jumps else [*before, last]
        shortest = 2 / _largest([_curvature(landscape, point.x) for point in places])
        if not rises and shortest >= SHARE * eta:
            return Stability(min(eta, shortest), True)
        eta = min(SHORTER * eta if rises and not jumps else eta, shortest)
        if jumps:
            break
    return Stability(eta, False)


def _largest(curvatures: Sequence[float]) -> float:
    """Above 0; what is not a number, where a step has led too far, does not count."""
    return max([c for c in curvatures if c > 0], default=1e-300)


def _curvature(landscape: Landscape, x: Sequence[Tensor]) -> float:
    return largest_eigenvalue(landscape.hessian(x), x, PASSES)


def _descent(landscape: Landscape, start: Sequence[Tensor], eta: float) -> list[Point]:
    """Where a descent comes to; if a step raises F by more than round-off, the point before it and after."""
    before: Point | None = None
    for point in landscape.descend(start, eta, TRIED):
        if before is not None and not point.is_below(before):
            return [before, point]
        if point.distance <= 0.1 * NEAR:
            break
        before = point
    return [point]


def _jumps(landscape: Landscape, before: Point, after: Point) -> bool:
    """Whether F's gradient jumps on the way from ``before`` to ``after``.

    Along the half of the way in which the slope changes more, and again along the half of that.
    """
    step = [b - a for a, b in zip(before.x, after.x, strict=True)]

    def slope(t: float) -> float:
        x = [a + t * u for a, u in zip(before.x, step, strict=True)]
        return _inner(landscape.gradient(x), step).item()

    low, high = 0.0, 1.0
    slopes = slope(low), slope(high)
    kept = []
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        between = slope(middle)
        changes = between - slopes[0], slopes[1] - between
        whole, larger = slopes[1] - slopes[0], max(changes, key=abs)
        if not (math.isfinite(whole) and whole != 0):
            return False
        kept.append(larger / whole)
        if larger == changes[0]:
            high, slopes = middle, (slopes[0], between)
        else:
            low, slopes = middle, (between, slopes[1])
    return all([abs(share - 1) <= LOST for share in kept[-LAST:]])


# ------------------------------------------------------------------------------------------ lengths


def _length(tensors: Sequence[Tensor]) -> Tensor:
    lengths = [torch.linalg.vector_norm(x, dtype=wide(x)) for x in tensors]
    return torch.linalg.vector_norm(torch.stack([length.to(lengths[0]) for length in lengths]))


def _inner(x: Sequence[Tensor], y: Sequence[Tensor]) -> Tensor:
    products = [(a.to(wide(a)) * b.to(wide(b))).sum() for a, b in zip(x, y, strict=True)]
    return torch.stack([product.to(products[0]) for product in products]).sum()


def _ratio_of_lengths(x: Sequence[Tensor], y: Sequence[Tensor]) -> float:
    length, of = torch.stack([_length(x), _length(y)]).tolist()
    return length / of if of else length
