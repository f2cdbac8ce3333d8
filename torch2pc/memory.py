"""A recurrent network that stores sequences and retrieves them by predictive coding.

`PCRNN` holds the network: generating a sequence from a cause, inferring the cause of a sequence,
and retrieving a stored sequence from a target. Training it is a plain loop of autograd and an
optimizer in the user's own code; predictive coding of feed-forward networks lives elsewhere.
"""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# Causes of several passes are generated from together: fewer, larger matrix products. More rows
# than this fall out of a CPU's cache and gain nothing.
_ROWS_GENERATED_TOGETHER = 2048


class Trajectory(NamedTuple):
    """What `PCRNN.forward` returns: one entry for each of the `time` steps."""

    x_pred: Tensor
    """Predicted outputs, `(time, batch, outputs)`."""
    h: Tensor
    """Hidden states after their correction, `(time, batch, hidden)`."""
    c: Tensor
    """Causes after their correction, `(time, batch, causes)`."""


class Retrieval(NamedTuple):
    """What `PCRNN.retrieve` returns."""

    paths: Tensor
    """Causes at the start and after each pass, `(passes + 1, tries, batch, causes)`."""
    errors: Tensor
    """Generation error after each pass, in the targets' units, `(passes, tries, batch)`."""
    nearest: Tensor
    """Index of the centre nearest to the cause after each pass, `(passes, tries, batch)`;
    `nearest[-1]` is what was retrieved in the end."""

    def best_so_far(self) -> Tensor:
        """The index if each try stopped at its pass of least error so far, like `nearest`."""
        # A NaN would count as the least; a diverged pass is never the best.
        errors = self.errors.nan_to_num(nan=math.inf, posinf=math.inf)
        return self.nearest.gather(0, errors.cummin(0).indices)


class _Rates(NamedTuple):
    """The constants of inference, as they are during one pass over the sequence."""

    alpha_x: float
    alpha_h: float
    alpha_c: float
    sigma_c: float
    sigma_r: float


class PCRNN(nn.Module):
    r"""Recurrent network whose hidden causes c select the sequence that it generates.

    With `c` the causes, `h` the hidden state, `x_t` the target and `x_pred` the output, a step is::

        h_prior = (1 - 1/tau) h + (1/tau) (W_r tanh(h) + W_c c + b_r)
        x_pred  = W_o tanh(h_prior) + b_o
        e_x     = x_pred - x_t
        h      <- h_prior - alpha_x (1 - tanh(h_prior)^2) * (W_o^T e_x)
        e_h     = h_prior - h
        c      <- c - alpha_h W_c^T e_h + sigma_r ||e_h|| xi + alpha_c s(c),    xi ~ N(0, I)
        s(c)    = - sum_k w_k (c - mu_k) / (2 sigma_c^2)

    where w_k is the softmax over k of `-||c - mu_k||^2 / (2 sigma_c^2)`: s(c) is half the gradient
    of the logarithm of a mixture of Gaussians of width sigma_c around the centres mu_k, the causes
    of the stored sequences. `h` starts at `h_0`, a random vector shared by all sequences.

    Model: L. Annabi, "Structured memory retrieval" (model PC-RNN-HC-A).

    Args:
        causes, hidden, outputs: sizes of c, h and x.
        tau: time constant of the hidden state in steps, at least 1.
        generator: source of the initial weights and of `h_0`; they are drawn on its device.
        device, dtype: of the weights, as for any `nn.Module`.

    Attributes:
        W_o, W_c, W_r: weights `(outputs, hidden)`, `(hidden, causes)`, `(hidden, hidden)`; standard
            normal divided by their input's width at the start.
        b_o, b_r: biases `(outputs,)`, `(hidden,)`; standard normal divided by 10 at the start.
        h_0: first hidden state `(hidden,)`; standard normal, not trained.
        centres: mixture centres `(sequences, causes)`, or None until `set_centres`. They are saved
            in the state dict.

    Raises:
        TypeError, ValueError: if a size is not a positive int or tau is not a number >= 1.

    >>> import torch
    >>> from torch2pc import PCRNN
    >>> model = PCRNN(2, 50, 2, tau=50, generator=torch.Generator().manual_seed(0))
    >>> causes = torch.zeros(3, 2)
    >>> model(causes, steps=60).x_pred.shape
    torch.Size([60, 3, 2])
    """

    centres: Tensor | None
    h_0: Tensor

    def __init__(
        self,
        causes: int,
        hidden: int,
        outputs: int,
        tau: float,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_count("causes", causes)
        _check_count("hidden", hidden)
        _check_count("outputs", outputs)
        _check_number("tau", tau, least=1.0)
        self.tau = float(tau)

        def normal(*shape: int) -> Tensor:
            return _normal(shape, generator, device, dtype)

        self.W_o = nn.Parameter(normal(outputs, hidden) / hidden)
        self.W_c = nn.Parameter(normal(hidden, causes) / causes)
        self.W_r = nn.Parameter(normal(hidden, hidden) / hidden)
        self.b_o = nn.Parameter(normal(outputs) / 10)
        self.b_r = nn.Parameter(normal(hidden) / 10)
        self.register_buffer("h_0", normal(hidden))
        # Not persistent, because a state dict with centres must load into a model that has none
        # yet, which buffers cannot do: get_extra_state carries them.
        self.register_buffer("centres", None, persistent=False)

    def extra_repr(self) -> str:
        (outputs, hidden), causes = self.W_o.shape, self.W_c.shape[1]
        return f"causes={causes}, hidden={hidden}, outputs={outputs}, tau={self.tau:g}"

    def get_extra_state(self) -> Tensor | None:
        """The centres, for the state dict."""
        return self.centres

    def set_extra_state(self, state: Any) -> None:
        """Take over the centres of a state dict."""
        self.centres = None
        if state is not None:
            self.set_centres(state.to(self.W_o))

    def set_centres(self, centres: Tensor) -> None:
        """Make the learned causes the centres mu_k of the mixture prior.

        Args:
            centres: `(sequences, causes)`; a copy is kept.

        Raises:
            TypeError, ValueError: if `centres` is no tensor of that shape, dtype and device.
        """
        self._check_tensor("centres", centres, ("sequences", self.W_c.shape[1]))
        self.centres = centres.detach().clone()

    def forward(
        self,
        c: Tensor,
        targets: Tensor | None = None,
        *,
        steps: int | None = None,
        alpha_x: float = 0.1,
        alpha_h: float = 0.019,
        alpha_c: float = 0.0,
        sigma_c: float = 0.096,
        sigma_r: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Trajectory:
        """Generate sequences from causes, or infer while the targets are clamped at the output.

        Without `targets` the network runs freely for `steps` steps: `h <- h_prior` and c stays as
        it is. With `targets` it runs the equations of the class for as many steps as they have.
        Both can be differentiated by autograd; training needs no inference, so it generates.

        Args:
            c: causes at the start, `(batch, causes)`.
            targets: `(time, batch, outputs)`, or None to generate.
            steps: number of steps to generate; only without `targets`.
            alpha_x, alpha_h: step sizes of the inference of h and c.
            alpha_c, sigma_c: weight and width of the mixture prior; alpha_c = 0 leaves it out.
            sigma_r: scale of the noise on c; 0 leaves it out.
            generator: source of the noise, which is drawn on its device.

        Returns:
            `Trajectory`: predicted outputs, hidden states and causes of each step.

        Raises:
            TypeError, ValueError: if an argument has the wrong type, shape, dtype, device or range.
            RuntimeError: if alpha_c is not 0 and there are no centres.

        >>> model = PCRNN(2, 50, 2, tau=50)
        >>> targets = model(torch.ones(3, 2), steps=60).x_pred
        >>> model(torch.zeros(3, 2), targets, alpha_h=0.1).c.shape
        torch.Size([60, 3, 2])
        """
        self._check_tensor("c", c, ("batch", self.W_c.shape[1]))
        rates = _check_rates(1, alpha_x, alpha_h, alpha_c, sigma_c, sigma_r)[0]
        if targets is None:
            if steps is None:
                raise ValueError("give either targets or steps: got neither")
            _check_count("steps", steps)
            h = torch.stack(list(self._generate(c, steps)))
            x_pred = h.tanh() @ self.W_o.mT + self.b_o
            return Trajectory(x_pred, h, c.expand(steps, *c.shape))

        if steps is not None:
            raise ValueError(f"give either targets or steps: got both (steps={steps!r})")
        self._check_tensor("targets", targets, ("time", c.shape[0], self.W_o.shape[0]))
        if rates.alpha_c != 0 and self.centres is None:
            raise RuntimeError(
                f"alpha_c = {alpha_c} needs the mixture's centres and there are none: "
                "call set_centres with the learned causes first, or pass alpha_c=0"
            )
        e_x, h_steps, c_steps = zip(*self._infer(c, targets, rates, generator), strict=True)
        return Trajectory(torch.stack(e_x) + targets, torch.stack(h_steps), torch.stack(c_steps))

    @torch.no_grad()
    def retrieve(
        self,
        targets: Tensor,
        tries: int = 4,
        passes: int = 1000,
        *,
        alpha_x: float | Sequence[float] = 0.1,
        alpha_h: float | Sequence[float] = 0.019,
        alpha_c: float | Sequence[float] = 0.0085,
        sigma_c: float | Sequence[float] = 0.096,
        sigma_r: float | Sequence[float] = 2.6,
        generator: torch.Generator | None = None,
        progress: bool = True,
    ) -> Retrieval:
        """Find the stored sequences that the targets resemble.

        Each try starts at its own cause c ~ N(0, I) and passes over its target again and again,
        carrying c from pass to pass while h starts anew at `h_0`. After each pass the sequence
        generated from the cause, without inference, is compared with the target: the generation
        error is the Euclidean distance between the two, averaged over time. All tries of all
        targets run in parallel. The defaults are those of the model's source.

        Args:
            targets: `(time, batch, outputs)`.
            tries: number of starts for each target.
            passes: number of passes over the sequence.
            alpha_x, alpha_h, alpha_c, sigma_c, sigma_r: as in `forward`; each is one number, or a
                sequence of `passes` numbers, one for each pass.
            generator: source of the first causes and of the noise, which are drawn on its device.
            progress: show a progress bar, if tqdm is installed.

        Returns:
            `Retrieval`: paths of the causes, generation errors, and index of the nearest centre.

        Raises:
            TypeError, ValueError: if an argument has the wrong type, shape, dtype, device or range.
            RuntimeError: if there are no centres: call `set_centres` first.

        >>> model = PCRNN(2, 50, 2, tau=50)
        >>> causes = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> model.set_centres(causes)
        >>> targets = model(causes, steps=60).x_pred.detach()
        >>> found = model.retrieve(targets, tries=2, passes=5, progress=False)
        >>> found.paths.shape, found.errors.shape, found.nearest[-1].shape
        (torch.Size([6, 2, 3, 2]), torch.Size([5, 2, 3]), torch.Size([2, 3]))
        """
        if self.centres is None:
            raise RuntimeError(
                "there are no mixture centres to retrieve: call set_centres with the learned causes"
            )
        self._check_tensor("targets", targets, ("time", "batch", self.W_o.shape[0]))
        _check_count("tries", tries)
        _check_count("passes", passes)
        rates = _check_rates(passes, alpha_x, alpha_h, alpha_c, sigma_c, sigma_r)

        batch = targets.shape[1]
        clamped = targets.repeat(1, tries, 1)
        paths = targets.new_empty(passes + 1, tries * batch, self.W_c.shape[1])
        paths[0] = self._normal_like(paths[0], generator)
        errors = targets.new_empty(passes, tries * batch)

        together = max(1, _ROWS_GENERATED_TOGETHER // (tries * batch))
        measured = 0
        for done, rates_of_pass in enumerate(_progress_bar(rates, progress), start=1):
            steps = self._infer(paths[done - 1], clamped, rates_of_pass, generator)
            _, _, paths[done] = deque(steps, maxlen=1)[0]
            if done - measured == together or done == passes:
                errors[measured:done] = self._generation_error(
                    paths[measured + 1 : done + 1], clamped
                )
                measured = done

        paths = paths.view(passes + 1, tries, batch, -1)
        return Retrieval(paths, errors.view(passes, tries, batch), self._nearest(paths[1:]))

    def _generate(self, c: Tensor, steps: int) -> Iterator[Tensor]:
        """Run freely from causes `(batch, causes)`; yield h `(batch, hidden)` at each step."""
        keep, gain = 1 - 1 / self.tau, 1 / self.tau
        W_r = gain * self.W_r.mT
        drive = torch.addmm(self.b_r, c, self.W_c.mT) * gain
        h = self.h_0.expand_as(drive)
        for _ in range(steps):
            h = torch.addmm(drive, h.tanh(), W_r).add(h, alpha=keep)
            yield h

    def _infer(
        self, c: Tensor, targets: Tensor, rates: _Rates, generator: torch.Generator | None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Run with the targets clamped; yield e_x, h and c after each step.

        The same equations as in the class's docstring, with constant factors moved into the
        weights once a call: a step then costs about a dozen small kernels, and their number, not
        their size, decides how long a retrieval takes.
        """
        keep, gain = 1 - 1 / self.tau, 1 / self.tau
        W_r, W_c, b_r = gain * self.W_r.mT, gain * self.W_c.mT, gain * self.b_r
        W_o = self.W_o.mT
        feedback_h, feedback_c = rates.alpha_x * self.W_o, -rates.alpha_h * self.W_c
        output_offset = self.b_o - targets
        h = self.h_0.expand(c.shape[0], -1)

        if has_prior := rates.alpha_c != 0:
            assert self.centres is not None
            # -||c - mu||^2 / (2 sigma_c^2) without its term in ||c||^2, which no softmax sees.
            precision = 1 / rates.sigma_c**2
            to_logits = precision * self.centres.mT
            logit_offset = -0.5 * precision * self.centres.square().sum(1)
            # alpha_c s(c) = pull (sum_k w_k mu_k - c), as the weights sum to one.
            pull = 0.5 * precision * rates.alpha_c
            pulling_centres = pull * self.centres
        if has_noise := rates.sigma_r != 0:
            noise = rates.sigma_r * self._normal_like(
                c.new_empty(()).expand(targets.shape[0], *c.shape), generator
            )

        for t in range(targets.shape[0]):
            h_prior = torch.addmm(torch.addmm(b_r, c, W_c), h.tanh(), W_r).add(h, alpha=keep)
            y = h_prior.tanh()
            e_x = torch.addmm(output_offset[t], y, W_o)
            # (1 - y^2) * (W_o^T e_x), which is what the derivative of tanh computes, in one kernel.
            e_h = torch.ops.aten.tanh_backward(e_x @ feedback_h, y)
            h = h_prior - e_h
            new_c = torch.addmm(c, e_h, feedback_c)
            if has_prior:
                w = torch.addmm(logit_offset, c, to_logits).softmax(1)
                new_c = torch.addmm(new_c, w, pulling_centres).sub(c, alpha=pull)
            if has_noise:
                size = torch.linalg.vector_norm(e_h, dim=1, keepdim=True)
                new_c = torch.addcmul(new_c, size, noise[t])
            c = new_c
            yield e_x, h, c

    def _generation_error(self, causes: Tensor, targets: Tensor) -> Tensor:
        """Mean over time of the distance between target and free run from each pass's cause.

        Args:
            causes: `(passes, batch, causes)`.
            targets: `(time, batch, outputs)`.

        Returns:
            `(passes, batch)`.
        """
        total = causes.new_zeros(causes.shape[:2])
        W_o = self.W_o.mT
        for h, x in zip(self._generate(causes.flatten(0, 1), len(targets)), targets, strict=True):
            x_pred = torch.addmm(self.b_o, h.tanh(), W_o).view(*causes.shape[:2], -1)
            total += torch.linalg.vector_norm(x_pred - x, dim=2)
        return total / len(targets)

    def _nearest(self, causes: Tensor) -> Tensor:
        """Index of the centre nearest to each of the causes `(..., causes)`."""
        assert self.centres is not None
        return torch.cdist(causes.flatten(0, -2), self.centres).argmin(1).view(causes.shape[:-1])

    def _normal_like(self, like: Tensor, generator: torch.Generator | None) -> Tensor:
        return _normal(like.shape, generator, like.device, like.dtype)

    def _check_tensor(self, name: str, value: Tensor, shape: tuple[int | str, ...]) -> None:
        """Raise unless `value` fits the model and has this shape, where a str is any size."""
        accepted = "(" + ", ".join(str(size) for size in shape) + ")"
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{name} must be a tensor of shape {accepted}, got {type(value).__name__}"
            )
        fits = value.dim() == len(shape) and all(
            given > 0 if isinstance(size, str) else given == size
            for given, size in zip(value.shape, shape, strict=False)
        )
        if not fits:
            raise ValueError(f"{name} must have shape {accepted}, got {tuple(value.shape)}")
        if value.dtype != self.W_o.dtype or value.device != self.W_o.device:
            raise ValueError(
                f"{name} must be {self.W_o.dtype} on {self.W_o.device} like the model's weights, "
                f"got {value.dtype} on {value.device}"
            )


def _normal(
    shape: Iterable[int],
    generator: torch.Generator | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> Tensor:
    # Drawn where the generator lives: a CPU generator then gives the same numbers on every device.
    source = device if generator is None else generator.device
    drawn = torch.randn(tuple(shape), generator=generator, device=source, dtype=dtype)
    return drawn.to(device if device is not None else torch.get_default_device())


def _progress_bar(rates: list[_Rates], show: bool) -> Iterable[_Rates]:
    if show:
        with contextlib.suppress(ImportError):
            from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

            bar: Iterable[_Rates] = tqdm(rates, desc="retrieving", unit="pass")
            return bar
    return rates


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int >= 1, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be an int >= 1, got {value}")


def _check_number(name: str, value: float, *, least: float) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value) or value < least:
        raise ValueError(f"{name} must be a finite number of at least {least:g}, got {value!r}")


def _check_rates(passes: int, *rates: float | Sequence[float]) -> list[_Rates]:
    """The rates of each pass, from numbers and sequences of numbers in the order of `_Rates`."""
    columns = []
    for name, rate in zip(_Rates._fields, rates, strict=True):
        if isinstance(rate, Real):
            column = [float(rate)] * passes
        else:
            try:
                column = [float(value) for value in rate]  # type: ignore[union-attr]
            except (TypeError, ValueError):
                accepted = "a number, or one number for each pass in retrieve"
                raise TypeError(f"{name} must be {accepted}, got {rate!r}") from None
            if len(column) != passes:
                raise ValueError(
                    f"{name} must have one number for each of {passes} passes, got {len(column)}"
                )
        for value in column:
            _check_number(name, value, least=0.0)
            if name == "sigma_c" and value == 0:
                raise ValueError("sigma_c must be above 0, got 0")
        columns.append(column)
    return [_Rates(*values) for values in zip(*columns, strict=True)]
