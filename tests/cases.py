"""What the properties are tested on: networks, losses and batches, drawn by hypothesis."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import torch2pc
from tests import reference

ERR_TYPES = ["Exact", "FixedPred", "Strict", "Multipliers", "ErrorBased", "Equilibrium"]
# Those that relax something, at points that move.
RELAXED = ERR_TYPES[2:]
# The plain iterations, each called as ``(*case, eta, n, vinit, update_at)``.
ITERATIONS: dict[str, Callable[..., reference.Reference]] = {
    "Strict": reference.strict,
    "Multipliers": reference.multipliers,
    "ErrorBased": reference.error_based,
}


class Case(NamedTuple):
    """A model in float64, a loss, a batch. A fresh copy of the whole is drawn for each example."""

    model: Any
    """An ``nn.Sequential`` or a ``PCGraph``."""
    LossFun: Callable[[Tensor, Any], Tensor]
    X: Tensor
    Y: Any

    def infer(self, ErrType: str, **options: Any) -> torch2pc.PCResult:
        return torch2pc.PCInfer(self.model, self.LossFun, self.X, self.Y, ErrType, **options)

    def gradients(self) -> dict[str, Tensor | None]:
        return {name: p.grad for name, p in self.model.named_parameters()}


def calls_of(owner: object, name: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What ``owner.name`` is given from now on, call by call."""
    found: list[tuple[Any, ...]] = []
    function = getattr(owner, name)

    def noted(*arguments: Any, **options: Any) -> Any:
        found.append(arguments)
        return function(*arguments, **options)

    monkeypatch.setattr(owner, name, noted)
    return found


needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "cl"))),
    reason="torch.compile needs a C++ compiler",
)


def run_as_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs that are compiled from now on run as they were traced: it takes seconds less."""
    graphs = pytest.importorskip("torch2pc.compiled.graphs", reason="this PyTorch has no compiler")
    monkeypatch.setattr(graphs, "compiled_graph", lambda graph, given, options: lambda x: graph(*x))


def squared_error(yhat: Tensor, Y: Tensor) -> Tensor:
    """A loss that a user writes."""
    return 0.5 * (yhat - Y).square().sum()


class Does(nn.Module):
    """A module that does what a function does."""

    def __init__(self, function: Callable[..., Tensor], *parts: nn.Module) -> None:
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.parts)


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


class Add(nn.Module):
    def forward(self, *x: Tensor) -> Tensor:
        return torch.stack(x).sum(0)


class Gate(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a * torch.sigmoid(b)


class Join(nn.Module):
    """The end of a residual block, whose branch is a belief."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, a: Tensor, skip: Tensor) -> Tensor:
        return skip + self.linear(torch.tanh(a))


class Attend(nn.Module):
    """Attention, whose queries, keys and values are beliefs."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, -1) @ v


class Readout(nn.Module):
    """All that is left over, to a few numbers."""

    def __init__(self, inputs: int, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, out)

    def forward(self, *x: Tensor) -> Tensor:
        return self.linear(torch.cat(x, -1).mean(1))


WIDTH, TIME = 4, 3
# Layers of beliefs ``(batch, TIME, WIDTH)``, by how many they take.
OF_ONE: list[Callable[[], nn.Module]] = [
    lambda: nn.Linear(WIDTH, WIDTH),
    lambda: nn.Sequential(nn.Tanh(), nn.Linear(WIDTH, WIDTH)),
    lambda: nn.LayerNorm(WIDTH),
    lambda: nn.SiLU(inplace=True),
    nn.Tanh,
    nn.Identity,
]
RANDOM: list[Callable[[], nn.Module]] = [
    lambda: nn.Dropout(0.4),
    lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.4, inplace=True)),
    lambda: nn.BatchNorm1d(TIME),
]
OF_SEVERAL: list[tuple[int, Callable[[], nn.Module]]] = [
    (2, lambda: Join(WIDTH)),
    (2, Gate),
    (2, lambda: nn.Bilinear(WIDTH, WIDTH, WIDTH)),
    (3, Attend),
    (3, Add),
]


@st.composite
def graphs(
    draw: st.DrawFn, max_layers: int = 6, random: bool = False, integers: bool = False
) -> Case:
    """A graph with skips, branches, layers of several inputs and layers that are used twice.

    ``random``: layers among them that draw random numbers or have buffers that change, in train mode.
    ``integers``: the input is of integers, that embeddings take.
    """
    torch.manual_seed(draw(st.integers(0, 2**16)))
    batch = draw(st.integers(1, 4))
    X = torch.randn(batch, TIME, WIDTH, dtype=torch.float64)
    layers: dict[str, tuple[Any, ...]] = {}
    names = ["x"]
    if integers:
        X = torch.randint(9, (batch, TIME))
        layers = {name: (nn.Embedding(9, WIDTH), "x") for name in ("e0", "e1")}
        names = [*layers]
    used: list[tuple[int, nn.Module]] = []
    for l in range(draw(st.integers(1, max_layers))):
        kinds = ["one", "several", *(["used"] if used else []), *(["random"] if random else [])]
        kind = draw(st.sampled_from(kinds))
        if kind == "used":
            count, layer = draw(st.sampled_from(used))
        elif kind == "several":
            count, make = draw(st.sampled_from(OF_SEVERAL))
            layer = make()
        else:
            count, layer = 1, draw(st.sampled_from(OF_ONE if kind == "one" else RANDOM))()
        used.append((count, layer))
        parents = [draw(st.sampled_from(names)) for _ in range(count)]
        names.append(f"l{l}")
        layers[names[-1]] = layer, *parents
    fed = {parent for _, *parents in layers.values() for parent in parents}
    ends = [name for name in names if name not in fed]
    layers["out"] = Readout(WIDTH * len(ends), 3), *ends
    LossFun = draw(st.sampled_from(SMOOTH_LOSSES))
    model = torch2pc.PCGraph(**layers).double()
    return Case(model, LossFun, X, torch.randn(batch, 3, dtype=torch.float64))


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
    beliefs = reference.feed_forward(case.model, case.X)
    return [belief + 0.3 * torch.randn_like(belief.double()) for belief in beliefs]


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
        relax = ITERATIONS[ErrType]
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


def tanh_chain(dtype: torch.dtype = torch.float64) -> Case:
    """Four small layers, cut before the activation."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Linear(4, 6),
        *[nn.Sequential(nn.Tanh(), nn.Linear(6, 6)) for _ in range(2)],
        nn.Sequential(nn.Tanh(), nn.Linear(6, 3)),
    ).to(dtype)
    X, Y = torch.randn(8, 4, dtype=dtype), torch.randn(8, 3, dtype=dtype)
    return Case(model, squared_error, X, Y)
