"""What the properties are tested on: networks, losses and batches, drawn by hypothesis."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import torch2pc
from tests import reference

ERR_TYPES = ["Exact", "FixedPred", "Strict", "ErrorBased", "Equilibrium"]
# Those that relax something, at points that move.
RELAXED = ERR_TYPES[2:]


class Case(NamedTuple):
    """A model in float64, a loss, a batch. A fresh copy of the whole is drawn for each example."""

    model: nn.Sequential
    LossFun: Callable[[Tensor, Any], Tensor]
    X: Tensor
    Y: Any

    def infer(self, ErrType: str, **options: Any) -> torch2pc.PCResult:
        return torch2pc.PCInfer(self.model, self.LossFun, self.X, self.Y, ErrType, **options)

    def gradients(self) -> dict[str, Tensor | None]:
        return {name: p.grad for name, p in self.model.named_parameters()}


def squared_error(yhat: Tensor, Y: Tensor) -> Tensor:
    """A loss that a user writes."""
    return 0.5 * (yhat - Y).square().sum()


SMOOTH = [nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Identity]
SMOOTH_LOSSES = [nn.MSELoss(), nn.MSELoss(reduction="sum"), squared_error]
ROUGH_LOSSES = [nn.L1Loss(), nn.L1Loss(reduction="sum")]
CLASS_LOSSES = [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum")]


@st.composite
def layers(
    draw: st.DrawFn, shape: tuple[int, ...], smooth: bool
) -> tuple[nn.Module, tuple[int, ...]]:
    """One layer for inputs of ``shape`` (without the batch), and the shape of its output."""
    kinds = ["elementwise", "linear" if len(shape) == 1 else "flatten"]
    if len(shape) == 3:
        kinds.append("conv")
        if min(shape[1:]) >= 2:
            kinds.append("pool")
    kind = draw(st.sampled_from(kinds))
    if kind == "elementwise":
        return draw(st.sampled_from(SMOOTH if smooth else [*SMOOTH, nn.ReLU]))(), shape
    if kind == "flatten":
        return nn.Flatten(), (shape[0] * shape[1] * shape[2],)
    if kind == "pool":
        pool = draw(st.sampled_from([nn.AvgPool2d] if smooth else [nn.AvgPool2d, nn.MaxPool2d]))
        return pool(2), (shape[0], shape[1] // 2, shape[2] // 2)
    size = draw(st.integers(1, 5))
    bias = draw(st.booleans())
    if kind == "conv":
        return nn.Conv2d(shape[0], size, 3, padding=1, bias=bias), (size, *shape[1:])
    return nn.Linear(shape[0], size, bias=bias), (size,)


@st.composite
def items(
    draw: st.DrawFn, shape: tuple[int, ...], smooth: bool
) -> tuple[nn.Module, tuple[int, ...]]:
    """One item of a model: a layer, or a nested Sequential of two or three."""
    depth = draw(st.sampled_from([1, 1, 2, 3]))
    parts = []
    for _ in range(depth):
        layer, shape = draw(layers(shape, smooth))
        parts.append(layer)
    return (parts[0] if depth == 1 else nn.Sequential(*parts)), shape


@st.composite
def cases(draw: st.DrawFn, max_layers: int = 6, smooth: bool = False) -> Case:
    """A model of 1 to ``max_layers`` items, with parameters or without, and data for it.

    ``smooth`` leaves out the layers and losses that are not differentiable everywhere.
    """
    torch.manual_seed(draw(st.integers(0, 2**16)))
    batch = draw(st.integers(1, 4))
    shape: tuple[int, ...] = draw(st.sampled_from([(3,), (5,), (1, 4, 4), (2, 5, 3)]))
    X = torch.randn(batch, *shape, dtype=torch.float64)
    model = nn.Sequential()
    for _ in range(draw(st.integers(1, max_layers))):
        item, shape = draw(items(shape, smooth))
        model.append(item)
    model.double()

    classes = len(shape) == 1 and shape[0] >= 2 and draw(st.booleans())
    if classes:
        LossFun: Any = draw(st.sampled_from(CLASS_LOSSES))
        Y = torch.randint(shape[0], (batch,))
    else:
        losses = SMOOTH_LOSSES if smooth else [*SMOOTH_LOSSES, *ROUGH_LOSSES]
        LossFun = draw(st.sampled_from(losses))
        Y = torch.randn(batch, *shape, dtype=torch.float64)
    return Case(model, LossFun, X, Y)


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-9) -> None:
    """Equal to within ``tolerance`` of the largest entry, in tensors, lists and dicts of them."""
    if isinstance(expected, dict):
        assert len(actual) == len(expected)
        for key in expected:
            assert_close(actual[key], expected[key], tolerance)
        return
    if isinstance(expected, list | tuple):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_close(one, other, tolerance)
    elif expected is None:
        assert actual is None
    else:
        assert actual.shape == expected.shape
        difference = (actual - expected).abs().max()
        assert difference <= tolerance * max(expected.abs().max(), 1e-4), difference


def random_beliefs(case: Case) -> list[Tensor]:
    """A vinit: the feed-forward values with noise added, the input and the output too."""
    beliefs = [case.X]
    for layer in case.model:
        beliefs.append(layer(beliefs[-1]).detach())
    return [belief + 0.3 * torch.randn_like(belief) for belief in beliefs]


def check_against_reference(case: Case, ErrType: str, seed: int = 1, **options: Any) -> None:
    """``case`` against the reference on the layers as the forward pass finds them."""
    twin = copy.deepcopy(case.model)
    torch.manual_seed(seed)
    frozen = reference.freeze(twin, case.X)
    of_frozen = case._replace(model=frozen)
    if ErrType == "Exact":
        expected = reference.exact(*of_frozen)
    elif ErrType == "FixedPred":
        expected = reference.fixed_pred(*of_frozen, 0.1, options.get("n", 20))
    elif ErrType == "Equilibrium":
        return _check_equilibrium(case, of_frozen, twin, seed, options)
    else:
        relax = {"Strict": reference.strict, "ErrorBased": reference.error_based}[ErrType]
        update_at = options.get("update_at", "v")
        expected = relax(*of_frozen, 0.1, options.get("n", 20), update_at=update_at)

    torch.manual_seed(seed)
    _check_inferred(case, case.infer(ErrType, **options), expected, twin)


def _check_equilibrium(
    case: Case, of_frozen: Case, twin: nn.Module, seed: int, options: dict[str, Any]
) -> None:
    """What it returns belongs together, and lies as low as where another minimiser ends.

    (Where units switch there is more than one such place.)
    """
    torch.manual_seed(seed)
    result = case.infer("Equilibrium", **{**options, "n": 40})
    errors = [None, *result.epsilon[1:-1]]
    at = options.get("update_at", "v")
    _check_inferred(case, result, reference.at_errors(*of_frozen, errors, at), twin)
    lowest = reference.equilibrium(*of_frozen, n=60).epsilon[:-1]
    start = [None, *(torch.zeros_like(e) for e in errors[1:])]
    F = [float(reference.energy_of_errors(*of_frozen, e).detach()) for e in (errors, lowest, start)]
    assert F[0] - F[1] <= 0.02 * (F[2] - F[1]) + 1e-9 * abs(F[2]), F


def _check_inferred(
    case: Case, result: torch2pc.PCResult, expected: reference.Reference, twin: nn.Module
) -> None:
    assert_close(result.v, expected.v)
    assert_close(result.epsilon[1:], expected.epsilon[1:])
    names = {p: name for name, p in twin.named_parameters()}
    updates = {names[p]: update for p, update in expected.updates.items()}
    found = {name: g for name, g in case.gradients().items() if g is not None}
    assert_close(found, updates)
