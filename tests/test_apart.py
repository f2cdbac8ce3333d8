"""Memory that user code writes: what a layer, a loss or a hook is handed is needed afterwards.

Held against the same network written without such writes, which ``loss.backward()`` takes for the
same: where ``.grad`` is right there, everything is right here.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import Function

from tests.cases import ERR_TYPES
from torch2pc import FwdPassPlus, PCGraph, PCInfer, PCInferLatent, PCResult, follow
from torch2pc.graph.apart import (
    Habits,
    UnguardedError,
    habits_of,
    held_elsewhere,
    until_guarded,
)
from torch2pc.graph.autograd import gradient
from torch2pc.graph.layer import Layer

# How a write is made: counted by the version, hidden from it, hidden from PyTorch altogether.
WAYS = ["counted", "data", "numpy"]


def overwrite(x: Tensor, value: Tensor, way: str) -> Tensor:
    """Let ``value`` stand where ``x`` was."""
    if way == "numpy":
        x.detach().numpy()[...] = value.detach().numpy()
    else:
        (x.data if way == "data" else x.detach()).copy_(value)
    return x


class FusedSine(Function):
    """sin x, which writes where it is told: forward or backward, into its input or its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, where: str, way: str) -> Tensor:
        y, slope = x.sin(), x.cos()
        ctx.where, ctx.way = where, way
        if where == "input, forward":
            overwrite(x, slope, "numpy" if way == "counted" else way)
            ctx.save_for_backward(x)
        else:
            ctx.save_for_backward(slope, x)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        slope, *saved = ctx.saved_tensors
        if ctx.where == "input, backward":
            return overwrite(saved[0], slope * g, ctx.way), None, None
        if ctx.where == "gradient":
            return overwrite(g, slope * g, ctx.way), None, None
        return slope * g, None, None


class Sine(nn.Module):
    """A layer around it; PyTorch's own sine as long as ``where`` is None."""

    def __init__(self, where: str | None, way: str) -> None:
        super().__init__()
        self.where, self.way = where, way
        self.linear = nn.Linear(4, 4)
        self.memory: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        where = self.where
        if where is None:
            return x.sin()
        if where == "hook":
            h = x * 1
            h.register_hook(lambda g: (overwrite(g, 2 * g, self.way), None)[1])  # type: ignore
            return h.sin()
        if where == "twice":  # what the hook comes to
            h = x * 1
            h.register_hook(lambda g: 2 * g)
            return h.sin()
        y = FusedSine.apply(x, where, self.way)  # type: ignore[no-untyped-call]
        if where == "output":
            if self.memory is None or self.memory.shape != y.shape:
                self.memory = torch.empty_like(y)
            out = self.memory.detach()
            out.copy_(y)
            return out
        return y


class FusedLoss(Function):
    """Half of the squared error, whose gradient is stored where the output was."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, Y: Tensor, where: str, way: str) -> Tensor:
        ctx.where, ctx.way = where, way
        loss = 0.5 * ((y - Y) ** 2).sum()
        g = y - Y
        if where == "loss, forward":
            g = overwrite(y, g, "numpy" if way == "counted" else way)
        ctx.save_for_backward(g, y)
        return loss

    @staticmethod
    def backward(ctx: Any, e: Tensor) -> Any:  # type: ignore[override]
        g, y = ctx.saved_tensors
        if ctx.where == "loss, backward":
            g = overwrite(y, e * g, ctx.way)
            return g, None, None, None
        return e * g, None, None, None


LAYER_WRITES = ["input, forward", "input, backward", "gradient", "output"]
LOSS_WRITES = ["loss, forward", "loss, backward"]


def network(where: str | None, way: str, place: int, generator: torch.Generator) -> nn.Sequential:
    """Linear layers around one that writes."""
    items: list[nn.Module] = [nn.Linear(4, 4) for _ in range(4)]
    items.insert(place, Sine(where, way))
    model = nn.Sequential(*items).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


def everything(result: PCResult, model: nn.Module) -> dict[str, Tensor | None]:
    """All that a call has found, by name, as it is now."""
    found: dict[str, Tensor | None] = {"Loss": result.Loss, "dLdy": result.dLdy}
    for name in ("vhat", "v", "epsilon"):
        found |= {f"{name}[{l}]": x for l, x in enumerate(getattr(result, name))}
    found |= {f"{name}.grad": p.grad for name, p in model.named_parameters()}
    return {name: x if x is None else x.clone() for name, x in found.items()}


def assert_same(found: dict[str, Any], expected: dict[str, Any], of: str) -> None:
    for name, x in expected.items():
        if x is not None:
            assert torch.allclose(found[name], x, rtol=1e-6, atol=1e-8), f"{name} {of}"


def loss_of(where: str | None, way: str) -> Any:
    if where is None:
        return lambda y, Y: 0.5 * ((y - Y) ** 2).sum()
    return lambda y, Y: FusedLoss.apply(y, Y, where, way)  # type: ignore[no-untyped-call]


def infer(model: nn.Sequential, LossFun: Any, X: Tensor, Y: Tensor, ErrType: str) -> PCResult:
    if ErrType == "latent":
        return PCInferLatent(model, LossFun, Y, X, 0.1, 5)
    return PCInfer(model, LossFun, X, Y, ErrType, eta=0.1, n=6)


@settings(max_examples=60)
@given(
    ErrType=st.sampled_from([*ERR_TYPES, "latent"]),
    where=st.sampled_from([*LAYER_WRITES, *LOSS_WRITES, "hook"]),
    way=st.sampled_from(WAYS),
    place=st.integers(1, 3),
    first=st.sampled_from(["same", "another", "without"]),
    batches=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    seed=st.integers(0, 99),
)
def test_what_is_written_changes_nothing(
    ErrType: str, where: str, way: str, place: int, first: str, batches: list[int], seed: int
) -> None:
    """The first call and later ones; after another algorithm, or without the write until then."""
    generator = torch.Generator().manual_seed(seed)
    in_layer = where not in LOSS_WRITES
    model = network(where if in_layer else None, way, place, generator)
    plain = copy.deepcopy(model)
    plain[place].where = "twice" if where == "hook" else None  # type: ignore[union-attr]
    LossFun = loss_of(None if in_layer else where, way)
    if first != "same" and where != "hook":
        if first == "without":
            model[place].where = None  # type: ignore[union-attr]
        X, Y = torch.randn(2, 2, 4, generator=generator, dtype=torch.float64)
        infer(model, LossFun, X, Y, "Exact" if ErrType != "Exact" else "Strict")
        model[place].where = where if in_layer else None  # type: ignore[union-attr]
    before: list[tuple[PCResult, dict[str, Any]]] = []
    for k, batch in enumerate(batches):
        X, Y = torch.randn(2, batch, 4, generator=generator, dtype=torch.float64)
        found = infer(model, LossFun, X, Y, ErrType)
        got = everything(found, model)
        expected = everything(infer(plain, loss_of(None, way), X, Y, ErrType), plain)
        assert_same(got, expected, f"in call {k}")
        before.append((found, got))
        for result, was in before[:-1]:  # what was returned stays as it is
            kept = {name: x for name, x in was.items() if not name.endswith("grad")}
            assert_same(everything(result, nn.Module()), kept, "after another call")
    if where != "hook":
        plain.zero_grad()
        loss_of(None, way)(plain(X), Y).backward()
        if ErrType == "Exact":
            backprop = {f"{name}.grad": p.grad for name, p in plain.named_parameters()}
            assert_same(got, backprop, "of backpropagation")


class Joint(nn.Module):
    """A layer of two inputs, the second of which it has written into."""

    def __init__(self, where: str | None, way: str) -> None:
        super().__init__()
        self.sine = Sine(where, way)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        out: Tensor = self.sine(b) if self.sine.where == "output" else self.sine(b) * (1 + a)
        return out


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("where", [*LAYER_WRITES, "hook"])
def test_layers_of_several_inputs(where: str, way: str) -> None:
    """Inputs and error stay as they are, and the layer is what it is without the writes."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(5)]

    def recorded(joint: nn.Module) -> tuple[Layer, list[Tensor], Tensor]:
        habits = Habits()

        def attempt() -> tuple[Layer, list[Tensor], Tensor]:
            layer = Layer(joint, "model.joint", set(), habits=habits)
            x = [value.clone().requires_grad_() for value in values[:2]]
            output = layer.record(*x, moving=x)
            if layer.is_unguarded:
                raise UnguardedError([layer.name])
            return layer, x, output

        return until_guarded(attempt)

    plain = Joint("twice" if where == "hook" else None, way)
    if where == "output":
        plain.forward = lambda a, b: b.sin()  # type: ignore[method-assign, assignment]
    found = []
    for joint in (Joint(where, way), plain):
        layer, x, output = recorded(joint)
        e = values[4].clone()
        moved, saved = layer.displacement.forward(*[value.clone() for value in values[2:4]])
        moved = moved.clone()
        back = layer.displacement.backward(saved, e)
        again = [a.detach().clone().requires_grad_() for a in values[2:4]]
        updates = gradient([layer.replay(*again)], again, [e])
        found.append([*x, output, e, moved, *back, *updates])
        kept = {"a": (x[0], 0), "b": (x[1], 1), "e": (e, 4)}
        for name, (tensor, k) in kept.items():
            assert_same({name: tensor}, {name: values[k]}, "as it was")
    for k, (one, other) in enumerate(zip(*found, strict=True)):
        assert (one is None) == (other is None)
        assert_same({str(k): one}, {str(k): other}, "of one that writes nothing")


@pytest.mark.parametrize("ErrType", ERR_TYPES)
@pytest.mark.parametrize("where", ["input, forward", "input, backward", "gradient", "hook"])
def test_graphs_of_layers(where: str, ErrType: str) -> None:
    """The belief that is written into is another layer's input too."""
    generator = torch.Generator().manual_seed(0)

    def graph(joint: Joint) -> PCGraph:
        torch.manual_seed(0)
        a, b = nn.Linear(4, 4), nn.Linear(4, 4)
        layers: Any = dict(
            a=(a, "x"), b=(b, "a"), joint=(joint, "b", "a"), y=(nn.Linear(4, 4), "joint")
        )
        return PCGraph(**layers).double()

    model = graph(Joint(where, "data"))
    plain = graph(Joint("twice" if where == "hook" else None, "data"))
    for k in range(2):
        X, Y = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
        found, expected = [
            everything(PCInfer(m, nn.MSELoss(), X, Y, ErrType, eta=0.1, n=4), m)  # type: ignore[arg-type]
            for m in (model, plain)
        ]
        assert_same(found, expected, f"in call {k}")


@pytest.mark.parametrize("ErrType", ERR_TYPES)
def test_a_hook_that_starts_to_write_later(ErrType: str) -> None:
    generator = torch.Generator().manual_seed(0)
    model = network(None, "counted", 2, generator)
    plain = copy.deepcopy(model)
    for way in (None, "counted"):
        if way is not None:
            model[2].where, plain[2].where = "hook", "twice"  # type: ignore[union-attr]
        for batch in (3, 2):
            X, Y = torch.randn(2, batch, 4, generator=generator, dtype=torch.float64)
            found = everything(infer(model, nn.MSELoss(), X, Y, ErrType), model)
            expected = everything(infer(plain, nn.MSELoss(), X, Y, ErrType), plain)
            assert_same(found, expected, f"with {way}")


class DataWriter(nn.Module):
    """Clamps its input through ``.data``, without any function of its own."""

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        x.data.clamp_(-0.1, 0.1)
        return y


@pytest.mark.parametrize("ErrType", ERR_TYPES)
def test_a_forward_pass_that_writes_through_data(ErrType: str) -> None:
    class Doubles(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    model = nn.Sequential(nn.Linear(4, 4), DataWriter(), nn.Linear(4, 3)).double()
    plain = nn.Sequential(model[0], Doubles(), model[2])
    X, Y = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64)
    for k in range(2):
        found = everything(infer(model, nn.MSELoss(), X, Y, ErrType), model)
        expected = everything(infer(plain, nn.MSELoss(), X, Y, ErrType), plain)
        assert_same(found, expected, f"in call {k}")


class Keeps(nn.Linear):
    """Holds what it has put out, and changes it when its gradient arrives."""

    def forward(self, x: Tensor) -> Tensor:
        kept = super().forward(x)
        kept.register_hook(lambda g: (kept.detach().add_(1), None)[1])
        return kept


@pytest.mark.parametrize("ErrType", ["Exact", "FixedPred"])
def test_a_belief_that_is_changed_in_place_is_named(ErrType: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), Keeps(4, 4), nn.ReLU(), nn.Linear(4, 3))
    X, Y = torch.randn(3, 4), torch.randn(3, 3)
    with pytest.raises(RuntimeError, match=r"^the output of model\[2\] was changed in place"):
        PCInfer(model, nn.MSELoss(), X, Y, ErrType)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("failures", [0, 3, 4])
def test_a_call_is_begun_anew_four_times_at_most(failures: int) -> None:
    calls: list[int] = []

    def attempt() -> str:
        calls.append(1)
        if len(calls) <= failures:
            raise UnguardedError(["model[1]", "model[2]"])
        return "found"

    if failures < 4:
        assert until_guarded(attempt) == "found" and len(calls) == failures + 1
    else:
        with pytest.raises(UnguardedError, match=r"^model\[1\], model\[2\] has come.*call again"):
            until_guarded(attempt)
        assert len(calls) == 4


def test_whose_memory_is_held_elsewhere() -> None:
    """A sparse tensor has none that anybody could write through."""
    alone, shared = torch.ones(3), torch.ones(3)
    other = shared.detach()
    tensors = [alone, shared, torch.eye(3).to_sparse(), torch.from_numpy(np.ones(3)), alone[1:]]
    assert held_elsewhere(tensors) == [1, 3] and other is not None


@pytest.mark.parametrize("ErrType", ERR_TYPES)
def test_one_forward_pass_where_nothing_is_foreign(ErrType: str) -> None:
    """Plain layers are not evaluated more often than they were, nor kept apart."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    X, Y = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64)
    infer(model, nn.MSELoss(), X, Y, ErrType)
    assert not habits_of(model).apart


@pytest.mark.parametrize("ErrType", ERR_TYPES)
@pytest.mark.parametrize("place", [0, 2])
def test_hooks_of_modules_that_write(ErrType: str, place: int) -> None:
    """A backward pre-hook and a hook on a tensor within the layer, the first layer among them."""

    class Hooked(nn.Module):
        def __init__(self, writes: bool) -> None:
            super().__init__()
            self.linear, self.writes = nn.Linear(4, 4), writes

        def forward(self, x: Tensor) -> Tensor:
            h = self.linear(x)
            if h.requires_grad:
                h.register_hook(lambda g: (g.mul_(2), None)[1] if self.writes else 2 * g)
            return h * 1

    items = [nn.Linear(4, 4) for _ in range(3)]
    items.insert(place, Hooked(True))
    model = nn.Sequential(*items).double()
    model[1].register_full_backward_pre_hook(lambda m, g: (g[0].mul_(3), None)[1])
    plain = copy.deepcopy(model)
    plain[place].writes = False  # type: ignore[union-attr]
    plain[1]._backward_pre_hooks.clear()
    plain[1].register_full_backward_pre_hook(lambda m, g: (3 * g[0],))
    X, Y = torch.randn(2, 3, 4, dtype=torch.float64)
    for k in range(2):
        found = everything(infer(model, nn.MSELoss(), X, Y, ErrType), model)
        expected = everything(infer(plain, nn.MSELoss(), X, Y, ErrType), plain)
        assert_same(found, expected, f"in call {k}")


@pytest.mark.parametrize("where", [*LAYER_WRITES, *LOSS_WRITES])
def test_follow_and_the_feed_forward_pass_begin_anew_too(where: str) -> None:
    generator = torch.Generator().manual_seed(0)
    in_layer = where not in LOSS_WRITES
    model = network(where if in_layer else None, "data", 2, generator)
    plain = copy.deepcopy(model)
    plain[2].where = None  # type: ignore[union-attr]
    LossFun, other = loss_of(None if in_layer else where, "data"), loss_of(None, "data")
    X, Y = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    for ErrType in ("Strict", "Exact"):
        found = follow(copy.deepcopy(model), LossFun, X, Y, ErrType, 0.1, 4)
        expected = follow(copy.deepcopy(plain), other, X, Y, ErrType, 0.1, 4)
        assert torch.allclose(found.F, expected.F), ErrType
    vhat, Loss, _ = FwdPassPlus(model, LossFun, X, Y)
    vhat_plain, Loss_plain, _ = FwdPassPlus(plain, other, X, Y)
    assert_same(
        {"Loss": Loss, **{f"vhat[{l}]": x for l, x in enumerate(vhat)}},
        {"Loss": Loss_plain, **{f"vhat[{l}]": x for l, x in enumerate(vhat_plain)}},
        "of FwdPassPlus",
    )
