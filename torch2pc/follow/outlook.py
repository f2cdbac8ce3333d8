"""How a relaxation would go on from where it stands, and with which step sizes it would be stable.

Both are read off the Hessian H of the energy F, in the variables in which F is descended (beliefs, or
errors for ``"ErrorBased"``). Products with H are central differences of F's gradient g, along the
vectors of Lanczos' method. From a random vector they give the largest eigenvalue lambda of H: gradient
descent is stable there for step sizes below 2 / lambda. From g itself they give the nodes theta_i and
the weights w_i of a quadrature (G. Golub and G. Meurant, 1994) for the gradient j steps later,

    ||(1 - eta H)^j g||^2  =  ||g||^2 sum_i w_i (1 - eta theta_i)^(2j)

which is exact where F is quadratic and j less than the number of nodes, and for larger j it is right in
so far as the nodes lie where the eigenvalues do. Where F is not smooth, as in networks of ReLUs, the
descent may rattle between the pieces and not come nearer. So some steps are made, and if they do
not lead where they should, nothing is foretold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torch2pc.energy import Energy
from torch2pc.energy.curvature import Product, largest_eigenvalue, tridiagonal
from torch2pc.inference.fixed_pred import error_factors

# Products with the Hessian from each of the two vectors.
PASSES = 16
# Steps that are made to see whether what is foretold comes true, and by how much it may not.
TRIED, LEAST_OFF, SHARE_OFF = PASSES - 1, 0.1, 0.2
# Further than this nothing is foretold.
FARTHEST = 10**6


@dataclass(frozen=True)
class Spectrum:
    """The quadrature for the gradient of a relaxation at iteration ``row``."""

    theta: tuple[float, ...]
    weight: tuple[float, ...]
    row: int

    def distance(self, known: Sequence[float] | dict[int, float], k: int, eta: float) -> float:
        """The distance from equilibrium at iteration k, if it went on with the step size ``eta``."""
        logs = [
            2 * (k - self.row) * math.log(max(abs(1 - eta * theta), 1e-300)) for theta in self.theta
        ]
        shares = [w * math.exp(min(log, 700)) for w, log in zip(self.weight, logs, strict=True)]
        return known[self.row] * math.sqrt(sum(shares))

    def iterations_to(
        self, known: Sequence[float], distance: float, eta: float, now: float
    ) -> int | None:
        """About how many iterations with ``eta`` from the start would come as near as ``distance``.

        Those that were made count by how far they have led, k ``now`` = k' ``eta``.
        """
        made = self.row if eta == now else math.ceil(self.row * now / eta) if eta > 0 else 0
        more = _first(lambda j: self.distance(known, self.row + j, eta) <= distance)
        return None if more is None else made + more


@dataclass(frozen=True)
class ClosedForm:
    """FixedPred's: the squared lengths of the gradients g_1..g_{L-1}, which its errors are shares of."""

    squares: tuple[float, ...]

    def distance(self, known: Sequence[float] | dict[int, float], k: int, eta: float) -> float:
        """The distance from equilibrium after k iterations with ``eta``."""
        c = error_factors(eta, k, len(self.squares) + 1)[::-1]
        here = sum([s * c_l**2 for s, c_l in zip(self.squares, c, strict=False)])
        above = sum([s * c_l**2 for s, c_l in zip(self.squares, c[1:], strict=True)])
        off = sum([s * (a - b) ** 2 for s, a, b in zip(self.squares, c, c[1:], strict=False)])
        return math.sqrt(off / max(here, above)) if off else 0.0

    def iterations_to(
        self, known: Sequence[float], distance: float, eta: float, now: float
    ) -> int | None:
        """How many iterations with ``eta`` come as near as ``distance``."""
        return _first(lambda k: self.distance(known, k, eta) <= distance)


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


def largest_stable(energy: Energy, at: Sequence[Tensor]) -> float | None:
    """2 / lambda where the energy's variables are ``at``; None where F is not finite.

    The energy stands elsewhere afterwards. It waits for the device once.
    """
    curvature = largest_eigenvalue(_hessian(energy, at), at, PASSES)
    if math.isnan(curvature):
        return None
    return 2 / curvature if curvature > 0 else math.inf


@torch.no_grad()
def spectrum(energy: Energy, at: Sequence[Tensor], row: int, eta: float) -> Spectrum | None:
    """The quadrature where the energy's variables are ``at``, to which it came after ``row`` steps."""
    energy.stand_at([x.clone() for x in at])
    g = energy.gradient()
    largest = torch.stack([g_i.abs().max().to(g[0]) for g_i in g if g_i.numel()]).max()
    # Not squares of numbers that are very small.
    unit = torch.where(largest > 0, largest, 1.0)
    T = tridiagonal(_hessian(energy, at), [g_i / unit.to(g_i) for g_i in g], PASSES)
    if T is None:
        return None
    theta, vectors = torch.linalg.eigh(T)
    found = Spectrum(tuple(theta.tolist()), tuple(vectors[0].square().tolist()), row)
    return found if _comes_true(found, energy, at, eta) else None


def _comes_true(found: Spectrum, energy: Energy, at: Sequence[Tensor], eta: float) -> bool:
    """Whether the gradient is as long after some steps from ``at`` as it should be."""
    energy.stand_at([x.clone() for x in at])
    start = g = energy.gradient()
    for _ in range(TRIED):
        pairs = zip(energy.variables, g, strict=True)
        energy.stand_at([x - eta * g_i for x, g_i in pairs])
        g = energy.gradient()
    lengths = torch.stack([_length(start), _length(g)]).tolist()
    known = {found.row: 1.0}
    foretold = found.distance(known, found.row + TRIED, eta)
    if not (lengths[0] > 0 and lengths[1] > 0 and foretold > 0):
        return lengths[0] == lengths[1] == 0
    decay = math.log(foretold)
    return abs(math.log(lengths[1] / lengths[0]) - decay) <= LEAST_OFF + SHARE_OFF * abs(decay)


def _hessian(energy: Energy, at: Sequence[Tensor]) -> Product:
    """Multiplies with F's Hessian at ``at``."""
    beliefs = [energy.vhat[i] for i in energy.free]
    # In half precision that is what limits the gradient, whatever it is held in.
    eps = max([torch.finfo(x.dtype).eps for x in [*beliefs, energy.vhat[-1]]])
    size = _length(beliefs)
    reach = eps ** (1 / 3) * torch.where(size > 0, size, 1.0)

    def product(u: list[Tensor]) -> list[Tensor]:
        length = _length(u)
        s = reach / torch.where(length > 0, length, 1.0)
        sides = []
        for step in (s, -s):
            pairs = zip(at, u, strict=True)
            energy.stand_at([x + step.to(x) * u_i.to(x) for x, u_i in pairs])
            sides.append(energy.gradient())
        return [(a - b) / (2 * s).to(a) for a, b in zip(*sides, strict=True)]

    return product


def wide(x: Tensor) -> torch.dtype:
    """What to sum squares in: those of small float32 numbers are 0. Apple's GPUs have nothing wider."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def _length(tensors: Sequence[Tensor]) -> Tensor:
    lengths = [torch.linalg.vector_norm(x, dtype=wide(x)) for x in tensors]
    return torch.linalg.vector_norm(torch.stack([length.to(lengths[0]) for length in lengths]))
