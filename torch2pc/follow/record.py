"""The record of an inference that ``follow`` returns: its tables, what they say, and their picture."""

from __future__ import annotations

import base64
import html
import io
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from torch2pc.follow.outlook import NEAR, Outlook

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What of an error is left to be called resolved, and of backpropagation's update to have arrived.
RESOLVED, ARRIVED, ALIGNED = 0.99, 0.5, 0.9


@dataclass(frozen=True, eq=False, repr=False)
class Record:
    """What an inference did. ``str(record)`` is its summary; in a notebook it shows itself.

    Tables are float64 tensors ``(n + 1, L + 1)`` on the host: row k is after k iterations, and column l
    about layer l, 0 being the input.

    >>> import torch
    >>> from torch import nn
    >>> from torch2pc import follow
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.Tanh(), nn.Linear(8, 3)))
    >>> X, Y = torch.randn(16, 4), torch.randint(3, (16,))
    >>> record = follow(model, nn.CrossEntropyLoss(reduction="sum"), X, Y, "ErrorBased", eta=0.5)
    >>> print(record)
    ErrorBased, eta = 0.5, n = 20, 2 layers
    ...
    Converged: ...
    """

    ErrType: str
    """The algorithm; ``"Latent"`` from ``follow_latent``."""
    eta: float | None
    """The step size that was used, a number for ``"auto"`` too; None where there is none, or a rule."""
    rule: str | None
    """The step rule; None for plain descent."""
    names: list[str]
    """What the layers are called; a ``PCGraph``'s places by their names."""
    parents: list[tuple[int, ...]]
    """For each layer the places of its parents."""
    energies: Tensor
    """``pi_l ||epsilon_l||^2 / 2`` for l = 1..L-1; in column L the loss, in column 0 the prior's energy."""
    moves: Tensor
    """How far belief l was moved in iteration k, ``||v_l(k) - v_l(k-1)||``."""
    gradient: Tensor
    """The length of F's gradient in the variables of layer l, which are v_l, or epsilon_l."""
    distance: Tensor
    """``(n + 1,)``: the distance from equilibrium, from 0 to 2; 1 at the start from ``vhat``."""
    distances: Tensor
    """The same for each layer."""
    cosine: Tensor
    """Between the update of layer l after k iterations and backpropagation's. Not a number if either
    is 0, there are no parameters, or k = 0."""
    size: Tensor
    """The length of the update of layer l in units of backpropagation's."""
    stable_eta: float | None
    """The largest stable step size along the way. None if nothing is stepped, or F is not finite."""
    falls: bool | None
    """Whether F fell in each step of a descent from the start with nine tenths of ``stable_eta``, of 100
    steps or as many as it took to converge. If not, it may rise below ``stable_eta``, too, which is then
    that of the points where F's curvature was taken: where units switch, as ReLUs do, F has edges, at
    which it may rise with any step size."""
    resolved: list[float]
    """What share of epsilon_l would be left if it were the difference of float32 tensors."""
    differences: list[int]
    """The layers whose errors Strict and its like do compute as differences, for want of rules."""
    slack: float
    """How much of F, relative to its terms, may be round-off."""
    outlook: Outlook | None
    """How it would go on (``outlook.py``)."""

    @property
    def n(self) -> int:
        """The number of iterations; for ``"Equilibrium"``, of evaluations."""
        return len(self.energies) - 1

    @property
    def L(self) -> int:
        """The number of layers."""
        return len(self.names) - 1

    @property
    def loss(self) -> Tensor:
        """``(n + 1,)``: the loss at the output that the beliefs predict."""
        return self.energies[:, -1]

    @property
    def prior(self) -> Tensor:
        """``(n + 1,)``: the prior's energy, 0 without a prior."""
        return self.energies[:, 0]

    @property
    def F(self) -> Tensor:
        """``(n + 1,)``: the energy. Exact and FixedPred do not descend it."""
        return self.energies.sum(1)

    @property
    def descends(self) -> bool:
        """Whether the algorithm descends F at all."""
        return self.ErrType not in ("Exact", "FixedPred")

    @property
    def rises_at(self) -> int | None:
        """The first iteration that raised F by more than round-off, or left it not finite.

        None for Multipliers, which raise it as they grow.
        """
        if not self.descends or self.ErrType == "Multipliers":
            return None
        slack = self.slack * self.energies.abs().sum(1)[:-1]
        falls = self.F[1:] <= self.F[:-1] + slack
        return None if bool(falls.all()) else 1 + int((~falls).nonzero()[0])

    @property
    def converged(self) -> bool:
        """Whether it ended within 1 % of equilibrium."""
        return self.n_reached is not None

    @property
    def n_reached(self) -> int | None:
        """The first iteration from which on the distance from equilibrium was at most 1 %, if any."""
        far = (~(self.distance <= NEAR)).nonzero()
        k = 0 if len(far) == 0 else 1 + int(far[-1])
        return k if k <= self.n else None

    @property
    def n_needed(self) -> int | None:
        """The ``n`` that brings the distance to 1 %: found, or else foretold; None if it cannot be."""
        return self.n_reached if self.converged else self.iterations_to(NEAR)

    def iterations_to(self, distance: float, eta: float | None = None) -> int | None:
        """About what ``n`` would bring the distance from equilibrium to ``distance``.

        With the step size of the record, or another one. None if that is not stable, or if nothing can
        be foretold.
        """
        if self.outlook is None or self.eta is None or self.stable_eta is None:
            return None
        chosen = self.eta if eta is None else eta
        if not 0 < chosen < self.stable_eta:
            return None
        found = self.outlook.iterations_to(distance, chosen, self.eta)
        # It has been there, and is not where it should be.
        was_there = chosen == self.eta and found is not None and found <= self.n
        return None if was_there and not self.distance[-1] <= distance else found

    # ------------------------------------------------------------------------------------ in words

    @property
    def verdict(self) -> list[str]:
        """What the record says, and what it advises, one sentence or two each."""
        if self.ErrType == "Exact":
            return ["The errors are the gradients of the loss: there is nothing to choose."]
        said = [*self._of_stability()]
        if not said or self.rule is not None:  # with momentum, say, F rises and falls
            said += self._of_convergence()
        return [*said, *self._of_updates(), *self._of_precision()]

    def _of_stability(self) -> list[str]:
        eta, limit, k = self.eta, self.stable_eta, self.rises_at
        said = ""
        if k is not None:
            is_finite = bool(self.F[k].isfinite())
            said = f"F {'rises from' if is_finite else 'is not finite after'} iteration {k}"
        if eta is None:
            return [f"{said}."] if said and self.rule is not None else []
        if limit is not None and eta > 0 and eta >= limit:
            if not said:
                said = "it had not yet shown" if self.descends else "the errors grow"
            known = f"eta = {eta:.3g} is above the largest stable {limit:.2g}: {said}"
            return [f"{known}; try eta = {_rounded(limit / 2)}."]
        if eta < 0:
            return [f"eta = {eta:.3g} is below 0, which goes up the energy instead of down."]
        if not said:
            return []
        if limit is None:
            return [f"{said}, nor is its Hessian finite where F was lowest."]
        return [
            f"{said}, though eta = {eta:.3g} is below {limit:.2g}, the largest stable "
            f"{self._of_limit()}: F has edges, or curves more elsewhere. A smaller eta overshoots less."
        ]

    def _of_convergence(self) -> list[str]:
        if self.L == 1:
            return ["One layer has no beliefs to infer: its errors are the gradients."]
        how = "Converged" if self.converged else "Not converged"
        said = f"{how}: {100 * self.distance[-1].item():.2g} % from equilibrium"
        if self.ErrType == "Equilibrium":
            return [f"{said} after {self.n} evaluations."]
        if self.converged:
            return [f"{said}; 1 % was reached at n = {self.n_reached}."]
        advice = []
        if (needed := self.n_needed) is not None:
            advice.append(f"n = {needed} with this eta")
        better = self._better_eta()
        if better is not None:
            advice.append(f"n = {better[1]} with eta = {better[0]}")
        if not advice:
            if self.rule is not None:
                return [f"{said} after {self.n} iterations."]
            if self.eta == 0:
                return [f"{said}, and steps of 0 lead no nearer."]
            return [f"{said}; what n it takes cannot be foretold from here."]
        about = "" if self.ErrType == "FixedPred" else "about "
        return [f"{said}; 1 % takes {about}{' or '.join(advice)}."]

    def _better_eta(self) -> tuple[str, int] | None:
        """A stable step size that needs at most two thirds of the iterations, and how many."""
        if self.stable_eta is None or not math.isfinite(self.stable_eta):
            return None
        eta = _rounded(self.stable_eta / 2)
        n, now = self.iterations_to(NEAR, float(eta)), self.n_needed
        return (eta, n) if n is not None and (now is None or 3 * n <= 2 * now) else None

    def _of_updates(self) -> list[str]:
        said = []
        last, cosines = self.size[-1].tolist(), self.cosine[-1].tolist()
        layers = range(1, self.L + 1)
        none = [l for l in layers if last[l] == 0]
        if none:
            what = "it does" if len(none) == 1 else "they do"
            said.append(f"No error has reached {_layers(none)}: {what} not learn.")
        if short := [l for l in layers if 0 < last[l] < ARRIVED]:
            least = min(short, key=lambda l: last[l])
            said.append(
                f"The update of {_layers(short)} is less than half as long as backprop's"
                f"{_at(least, short)}: {last[least]:.2g} of it."
            )
        if turned := [l for l in layers if cosines[l] < ALIGNED]:
            least = min(turned, key=lambda l: cosines[l])
            said.append(
                f"The update of {_layers(turned)} has another direction than backprop's"
                f"{_at(least, turned)}: cosine {cosines[least]:.2g}."
            )
        if not said:
            known = [c for c in cosines[1:] if not math.isnan(c)]
            if known:
                said.append(f"Updates are backprop's to within cosines of {min(known):.4g}.")
        return said

    def _of_precision(self) -> list[str]:
        if not self.descends:
            return []
        lost = [l for l in self.differences if self.resolved[l] < RESOLVED]
        if not lost:
            return []
        least = min(lost, key=lambda l: self.resolved[l])
        return [
            f"The errors of {_layers(lost)} are computed as differences, of which float32 leaves "
            f"{100 * self.resolved[least]:.0f} % at layer {least}: float64, or a displacement_rule, "
            "would resolve them."
        ]

    def _of_limit(self) -> str:
        """Where ``stable_eta`` is the largest stable one."""
        return (
            "along the way" if self.falls else "between edges of F, at which it may rise below it"
        )

    def _head(self) -> str:
        step = "" if self.eta is None else f"eta = {self.eta:.4g}, "
        step = step if self.rule is None else f"{self.rule}, "
        count = "evaluations: " if self.ErrType == "Equilibrium" else "n = "
        return f"{self.ErrType}, {step}{count}{self.n}, {self.L} layer{'s' * (self.L > 1)}"

    def _table(self) -> list[list[str]]:
        """The end of the inference, layer by layer."""
        table = [["layer", "", "energy", "distance", "cosine", "size", "float32"]]
        # The input counts where it is inferred, or predicted from above.
        is_latent = self.ErrType == "Latent"
        first = 0 if is_latent or bool(self.prior.any()) else 1
        for l in range(first, self.L + 1):
            is_hidden = l < self.L
            table.append(
                [
                    str(l),
                    "latent" if l == 0 and is_latent else self.names[l],
                    f"{self.energies[-1, l].item():.3g}",
                    f"{self.distances[-1, l].item():.1%}" if is_hidden else "",
                    _number(self.cosine[-1, l].item(), ".4f"),
                    _number(self.size[-1, l].item(), ".3g"),
                    f"{self.resolved[l]:.0%}" if 0 < l < self.L else "",
                ]
            )
        return table

    def _numbers(self) -> list[tuple[str, str]]:
        numbers = []
        if self.descends:
            numbers.append(("F", f"{self.F[0].item():.5g} -> {self.F[-1].item():.5g}"))
        numbers.append(("loss", f"{self.loss[0].item():.5g} -> {self.loss[-1].item():.5g}"))
        numbers.append(("distance from equilibrium", f"{self.distance[-1].item():.2%}"))
        if self.stable_eta is not None:
            numbers.append(("largest stable eta", f"{self.stable_eta:.3g} {self._of_limit()}"))
        return numbers

    def __str__(self) -> str:
        table = self._table()
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [self._head()]
        for row in table:
            cells = [
                cell.ljust(width) if i < 2 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append("  ".join(cells).rstrip())
        lines.append(", ".join([f"{name} {number}" for name, number in self._numbers()]))
        return "\n".join([*lines, *self.verdict])

    def __repr__(self) -> str:
        return f"<Record of {self._head()}>"

    def summary(self) -> None:
        """Print a short table of how the inference ended, and the verdict.

        Its columns: the energy of each layer (of the last one, the loss), its distance from equilibrium,
        cosine and relative size of its update against backpropagation's, and what share of its errors
        would be left if they were differences of float32 tensors.
        """
        print(self)

    def to_dict(self) -> dict[str, float]:
        """The end of the inference as named numbers, for TensorBoard, wandb and the like.

        What is not a number here (the cosine of a layer without parameters) is left out.
        """
        numbers: dict[str, float | None] = {
            "loss": self.loss[-1].item(),
            "distance": self.distance[-1].item(),
            "eta": self.eta,
            "stable_eta": self.stable_eta,
            "n": self.n,
            "n_needed": self.n_needed,
        }
        if self.descends:
            numbers["F"] = self.F[-1].item()
            numbers["prior"] = self.prior[-1].item()
        for l in range(1, self.L + 1):
            if l < self.L:
                numbers[f"energy/{l}"] = self.energies[-1, l].item()
                numbers[f"distance/{l}"] = self.distances[-1, l].item()
                numbers[f"resolved/{l}"] = self.resolved[l]
            numbers[f"cosine/{l}"] = self.cosine[-1, l].item()
            numbers[f"size/{l}"] = self.size[-1, l].item()
        return {k: float(x) for k, x in numbers.items() if x is not None and not math.isnan(x)}

    # --------------------------------------------------------------------------------- in pictures

    def plot(self, figure: Figure | None = None) -> Figure:
        """Draw the record: energies of the layers, F and the distance, cosines and sizes of updates.

        For a graph, the first panel is the graph, with the energies at the end as colours.

        Args:
            figure: a matplotlib figure to draw into; a new one of pyplot's if none is given.

        Raises:
            ImportError: matplotlib is not installed.
        """
        if figure is None:
            import matplotlib.pyplot as plt

            figure = plt.figure(figsize=(10, 5.6), layout="constrained")
        from torch2pc.follow.plot import draw

        draw(self, figure)
        return figure

    def _repr_html_(self) -> str:
        """What a notebook shows: the table, the verdict, and the picture if matplotlib is there."""
        head, *rows = self._table()
        cells = "".join([f"<th>{html.escape(cell)}</th>" for cell in head])
        lines = [f"<p><b>{html.escape(self._head())}</b></p><table><tr>{cells}</tr>"]
        for row in rows:
            cells = "".join([f"<td>{html.escape(cell)}</td>" for cell in row])
            lines.append(f"<tr>{cells}</tr>")
        numbers = ", ".join([f"{name} {number}" for name, number in self._numbers()])
        lines.append(f"</table><p>{html.escape(numbers)}</p>")
        lines += [f"<p>{html.escape(said)}</p>" for said in self.verdict]
        if (picture := self._png()) is not None:
            encoded = base64.b64encode(picture).decode()
            lines.append(f'<img alt="record" src="data:image/png;base64,{encoded}">')
        return "\n".join(lines)

    def _png(self) -> bytes | None:
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return None
        file = io.BytesIO()
        self.plot(Figure(figsize=(10, 5.6), layout="constrained")).savefig(file, format="png")
        return file.getvalue()


def _rounded(eta: float) -> str:
    """Two digits, downwards."""
    unit = 10.0 ** (math.floor(math.log10(eta)) - 1)
    return f"{math.floor(eta / unit * (1 + 1e-12)) * unit:.2g}"


def _number(x: float, form: str) -> str:
    return "" if math.isnan(x) else f"{x:{form}}"


def _at(l: int, which: list[int]) -> str:
    return "" if len(which) == 1 else f", most of all at layer {l}"


def _layers(which: list[int]) -> str:
    """``layer 1``, ``layers 1 to 4`` or ``layers 1, 3 and 4``."""
    if len(which) == 1:
        return f"layer {which[0]}"
    if len(which) > 2 and which == list(range(which[0], which[-1] + 1)):
        return f"layers {which[0]} to {which[-1]}"
    return f"layers {', '.join(map(str, which[:-1]))} and {which[-1]}"
