"""Inputs, buffers, losses and surroundings at the edge of what a call is made for."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from tests.cases import ERR_TYPES, RELAXED, assert_close
from torch2pc import PCInfer, PCInferLatent
from torch2pc.graph.state import Buffers, same_values

ALL = pytest.mark.parametrize("ErrType", ERR_TYPES)


def gradients(model: nn.Module) -> list[Tensor | None]:
    return [p.grad for p in model.parameters()]


def network(*middle: nn.Module) -> nn.Sequential:
    first = nn.Linear(4, 5)
    items = [
        nn.Sequential(nn.Tanh(), *middle, nn.Linear(5, 5)),
        nn.Sequential(nn.Tanh(), nn.Linear(5, 2)),
    ]
    return nn.Sequential(first, *items).double()


def batch(size: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 4).double(), torch.randn(size, 2).double()


# Buffers that are no plain tensors of floats.


class Holding(nn.Module):
    """Uses a buffer, and writes into it in each forward pass."""

    def __init__(
        self, buffer: Tensor, use: Callable[[Tensor, Tensor], Tensor], writes: bool
    ) -> None:
        super().__init__()
        self.linear, self.use, self.writes = nn.Linear(5, 5), use, writes
        self.register_buffer("held", buffer)

    def forward(self, x: Tensor) -> Tensor:
        if self.writes:
            with torch.no_grad():
                self.held.mul_(2)
        return self.use(self.held, self.linear(x))


def _graph() -> Tensor:
    return (torch.rand(6, 6, generator=torch.Generator().manual_seed(0)) > 0.5).double()


def _used(b: Tensor, y: Tensor) -> Tensor:
    return y * b.to_dense().sum()


SPARSE = {
    "coo": lambda: _graph().to_sparse(),
    "uncoalesced": lambda: torch.sparse_coo_tensor(
        torch.tensor([[0, 1, 0], [1, 2, 1]]), torch.ones(3).double(), (6, 6)
    ),
    "csr": lambda: _graph().to_sparse_csr(),
    "csc": lambda: _graph().to_sparse_csc(),
}
OTHERS: dict[str, tuple[Callable[[], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "bool": (lambda: torch.tensor([True, False] * 2 + [True]), lambda b, y: y * b),
    "int": (lambda: torch.arange(5), lambda b, y: y * b),
    "complex": (lambda: torch.arange(5) + 1j, lambda b, y: y * b.abs()),
    "conjugate": (lambda: (torch.arange(5) + 1j).conj(), lambda b, y: y * b.imag),
    "empty": (lambda: torch.zeros(0), lambda b, y: y + b.sum()),
    "quantized": (
        lambda: torch.quantize_per_tensor(torch.arange(5.0), 0.1, 0, torch.qint8),
        lambda b, y: y * b.dequantize(),
    ),
    "nested": (
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        lambda b, y: y * b.values(),
    ),
}


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
@pytest.mark.parametrize("kind", SPARSE)
@settings(max_examples=8)
@given(ErrType=st.sampled_from(ERR_TYPES), calls=st.integers(1, 2), writes=st.booleans())
def test_sparse_buffers_are_as_dense_ones(
    kind: str, ErrType: str, calls: int, writes: bool
) -> None:
    product = torch.mm if kind == "csc" else torch.sparse.mm
    torch.manual_seed(0)
    model = network(Holding(SPARSE[kind](), product, writes))
    torch.manual_seed(0)  # (Not every sparse tensor can be copied deeply.)
    twin = network(Holding(SPARSE[kind]().to_dense(), torch.mm, writes))
    X, Y = batch()
    for _ in range(calls):
        for each in (model, twin):
            PCInfer(each, F.mse_loss, X, Y, ErrType, n=5)
        assert_close(gradients(model), gradients(twin), 1e-9)
        assert_close(model[1][1].held.to_dense(), twin[1][1].held, 1e-12)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", OTHERS)
@settings(max_examples=5)
@given(ErrType=st.sampled_from(ERR_TYPES))
def test_other_buffers(kind: str, ErrType: str) -> None:
    """Whatever they are, a buffer that is constant gives what a constant gives."""
    make, use = OTHERS[kind]
    torch.manual_seed(0)
    model = network(Holding(make(), use, False))
    twin, constant = copy.deepcopy(model), make()
    twin[1][1].held, twin[1][1].use = None, lambda _, y: use(constant, y)
    X, Y = batch()
    for each in (model, twin):
        PCInfer(each, F.mse_loss, X, Y, ErrType, n=5)
    assert_close(gradients(model), gradients(twin), 1e-12)


@pytest.mark.filterwarnings(
    "ignore:Sparse:UserWarning", "ignore:The PyTorch API of nested:UserWarning"
)
def test_what_is_equal_is_seen_in_all_layouts() -> None:
    made = [
        *SPARSE.values(),
        lambda: _graph().to_sparse_bsr((2, 2)),
        lambda: _graph().to_sparse_bsc((2, 2)),
        OTHERS["nested"][0],
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    ]
    for k, make in enumerate(made):
        one, other = make(), make()
        assert same_values(one, other)
        module = nn.Module()
        module.register_buffer("held", one)
        buffers = Buffers([module])
        assert not buffers.differ()
        with torch.no_grad():
            one.mul_(3)
        assert not same_values(one, other)
        assert buffers.differ()
        buffers.restore(Exception())
        assert same_values(one, other)
        assert not any(same_values(one, different()) for different in made[:k] + made[k + 1 :])


# Nothing to learn from.


class Wide(nn.Module):
    """A loss of no shape in particular."""

    def __init__(self, mean: bool) -> None:
        super().__init__()
        self.scale, self.mean = nn.Parameter(torch.ones(()).double()), mean

    def forward(self, y: Tensor, Y: Tensor) -> Tensor:
        loss = self.scale * (y - Y).square()
        return loss.mean() if self.mean else loss.sum()


@settings(max_examples=30)
@given(
    ErrType=st.sampled_from(ERR_TYPES),
    normalised=st.booleans(),
    mean=st.booleans(),
    asks_X=st.booleans(),
    update_at=st.sampled_from(["v", "vhat"]),
    before=st.booleans(),
)
def test_an_empty_batch_is_as_in_autograd(
    ErrType: str, normalised: bool, mean: bool, asks_X: bool, update_at: str, before: bool
) -> None:
    """Zeros for the updates, a mean that is no number, buffers and X's gradient: before or after others."""
    torch.manual_seed(0)
    model = network(*([nn.BatchNorm1d(5)] if normalised else []), nn.Dropout(0.3))
    twin, LossFun = copy.deepcopy(model), Wide(mean)
    of_twin = copy.deepcopy(LossFun)
    (X, Y), full = batch(0), batch()
    X.requires_grad_(asks_X)
    if before:
        PCInfer(model, LossFun, *full, ErrType)
        twin.load_state_dict(model.state_dict())
    result = PCInfer(model, LossFun, X, Y, ErrType, update_at=update_at)
    expected = of_twin(twin(given_X := X.detach().clone().requires_grad_(asks_X)), Y)
    expected.backward()
    torch.testing.assert_close(result.Loss, expected.detach(), equal_nan=True)
    for one, other in ((model, twin), (LossFun, of_twin)):
        for found, wanted in zip(gradients(one), gradients(other), strict=True):
            torch.testing.assert_close(found, wanted, equal_nan=True)
        torch.testing.assert_close(one.state_dict(), other.state_dict(), equal_nan=True)
    torch.testing.assert_close(X.grad, given_X.grad)
    assert [v.shape for v in result.v] == [v.shape for v in result.vhat]
    # What it met in the empty batch has not been taken for checked.
    fresh = copy.deepcopy(model)
    for each in (model, fresh):
        torch.manual_seed(1)
        PCInfer(each, LossFun, *full, ErrType, n=5)
    assert all(map(torch.equal, gradients(model), gradients(fresh)))


def test_an_empty_batch_tells_nothing_of_a_layer() -> None:
    """One whose operations do not give its gradients is found out at the first batch with examples."""

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return 2 * g

    class Layer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Doubled.apply(x)

    model = network(Layer())
    twin = copy.deepcopy(model)
    PCInfer(model, F.mse_loss, *batch(0), "Strict")
    X, Y = batch()
    for each in (model, twin):
        PCInfer(each, F.mse_loss, X, Y, "Strict", n=5)
    assert_close(gradients(model), gradients(twin), 1e-12)


@ALL
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
def test_an_empty_latent_and_empty_layers(ErrType: str) -> None:
    decoder, (X, Y) = network(), batch(0)
    found = PCInferLatent(decoder, nn.MSELoss(reduction="sum"), Y, X, "auto", 3)
    assert found.v[0].shape == (0, 4)
    assert all(not g.any() for g in gradients(decoder) if g is not None)
    narrow = nn.Sequential(
        nn.Linear(4, 3), nn.Sequential(nn.Tanh(), nn.Unflatten(1, (3, 1)), nn.Flatten())
    )
    none = nn.Sequential(*narrow, nn.Linear(3, 0, bias=False), nn.Linear(0, 2)).double()
    twin, (X, Y) = copy.deepcopy(none), batch()
    PCInfer(none, F.mse_loss, X, Y, ErrType, n=3)
    F.mse_loss(twin(X), Y).backward()
    for found_l, wanted in zip(gradients(none), gradients(twin), strict=True):
        torch.testing.assert_close(found_l, wanted)  # no error gets past a layer of no units


@ALL
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested:UserWarning")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_a_nested_input_is_named(ErrType: str, layout: torch.layout) -> None:
    X = torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)], layout=layout)
    with pytest.raises(TypeError, match=r"X must .* got a nested one.*to_padded_tensor"):
        PCInfer(network().float(), lambda y, _: y.sum(), X, None, ErrType)


# What goes around the layers.


class Keeps(nn.Module):
    """Keeps something that depends on its input, or on its weights alone."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.linear, self.what = nn.Linear(5, 5), what

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        kept = {"output": y, "input": x, "weight": self.linear.weight, "detached": y.detach()}
        self.kept = kept[self.what].square().mean()
        return y


class Takes(nn.Module):
    """Adds what another layer has kept: a connection around the layers between."""

    def __init__(self, keeper: Keeps) -> None:
        super().__init__()
        self.linear, self.of = nn.Linear(5, 5), [keeper]

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.of[0].kept


def keeping(what: str, where: str) -> tuple[nn.Sequential, Callable[..., Tensor]]:
    keeper = Keeps(what).double()
    model = network(keeper)
    if where == "layer":
        model.insert(2, nn.Sequential(nn.Tanh(), Takes(keeper).double()))
        return model, F.mse_loss
    return model, lambda y, Y: F.mse_loss(y, Y) + model[1][1].kept


@settings(max_examples=60)
@given(
    ErrType=st.sampled_from(ERR_TYPES),
    what=st.sampled_from(["output", "input", "weight", "detached"]),
    where=st.sampled_from(["loss", "layer"]),
)
def test_what_a_layer_keeps(ErrType: str, what: str, where: str) -> None:
    """It is learnt from by Exact, and no part of the energy: the others say so.

    Unless it depends on no belief; then it is as if it were computed where it is used.
    """
    torch.manual_seed(0)
    model, LossFun = keeping(what, where)
    X, Y = batch()
    if what in ("output", "input") and ErrType != "Exact":
        with pytest.raises(RuntimeError, match=r'must not use a tensor.*detach\(\).*"Exact"'):
            PCInfer(model, LossFun, X, Y, ErrType)
        assert all(g is None for g in gradients(model))
        return
    PCInfer(model, LossFun, X, Y, ErrType, n=6)
    found = [g.clone() for g in gradients(model)]
    if ErrType == "Exact":
        model.zero_grad()
        LossFun(model(X), Y).backward()
        assert_close(found, gradients(model), 1e-9)
        return
    if (what, where) == ("detached", "layer") and ErrType != "FixedPred":
        return  # state outside buffers, which is another one when the updates are taken
    keeper, kept = model[1][1], model[1][1].kept.detach()
    if what == "weight":

        class Now(nn.Module):
            """Computes what would be kept."""

            @property
            def kept(self) -> Tensor:
                return keeper.linear.weight.square().mean()

        now: Any = Now()
    else:
        now = Keeps("detached")
        now.kept = kept
    if where == "layer":
        model[2][1].of = [now]
    else:
        LossFun = lambda y, Y: F.mse_loss(y, Y) + now.kept  # noqa: E731
    PCInfer(model, LossFun, X, Y, ErrType, n=6)
    assert_close(found, gradients(model), 1e-9)


@pytest.mark.parametrize("ErrType", RELAXED)
def test_a_part_of_the_way_to_the_output_that_is_kept(ErrType: str) -> None:
    class Squares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 5))

        def forward(self, x: Tensor) -> Tensor:
            self.kept = self.weight.square()
            return F.linear(x, self.kept)

    model, (X, Y) = network(Squares()), batch()
    with pytest.raises(RuntimeError, match=r"must not use a tensor.*kept"):
        PCInfer(model, lambda y, Y: F.mse_loss(y, Y) + model[1][1].kept.sum().sin(), X, Y, ErrType)


@ALL
def test_a_regulariser_made_before_the_call_is_no_kept_tensor(ErrType: str) -> None:
    model, (X, Y) = network(), batch()
    regulariser = sum(p.square().sum() for p in model.parameters())
    PCInfer(model, lambda y, Y: F.mse_loss(y, Y) + regulariser, X, Y, ErrType, n=4)
    found = [g for g in gradients(model) if g is not None]
    twin = copy.deepcopy(model)
    PCInfer(twin, F.mse_loss, X, Y, ErrType, n=4)
    assert_close(
        found, [g + 2 * p for g, p in zip(gradients(twin), twin.parameters(), strict=True)]
    )


@ALL
@pytest.mark.parametrize("of", ["X", "part", "what_made_X"])
@pytest.mark.parametrize("allow_unused", [False, True])
def test_derivatives_by_the_input_are_refused(ErrType: str, of: str, allow_unused: bool) -> None:
    model, (source, Y) = network(), batch()
    source.requires_grad_()
    X = source * 1.0 if of == "what_made_X" else source
    asked = {"X": X, "part": X[:, :1], "what_made_X": source}[of]

    def LossFun(y: Tensor, Y: Tensor) -> Tensor:
        options = {"materialize_grads": True} if allow_unused else {}
        (slope,) = torch.autograd.grad(y.sum(), asked, create_graph=True, **options)
        return F.mse_loss(y, Y) + slope.square().sum()

    with pytest.raises(RuntimeError, match=r"LossFun.*with respect to X.*loss\.backward"):
        PCInfer(model, LossFun, X, Y, ErrType)
    assert source.grad is None and all(g is None for g in gradients(model))


@ALL
def test_derivatives_by_the_input_that_an_item_takes_are_refused_too(ErrType: str) -> None:
    X, Y = batch()
    X.requires_grad_()

    class Differentiates(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            (slope,) = torch.autograd.grad(x.sum(), X, create_graph=True)
            return x + slope.sum()

    model = network().insert(1, Differentiates())
    message = r"model\[1\] \(Differentiates\) must not differentiate with respect to X"
    with pytest.raises(RuntimeError, match=message):
        PCInfer(model, F.mse_loss, X, Y, ErrType)
    assert X.grad is None and all(g is None for g in gradients(model))


@ALL
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_derivative_that_an_item_returns_is_learnt_from(ErrType: str) -> None:
    """The way out that the error names."""

    class WithSlope(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat(torch.func.jvp(self.net, (x,), (torch.ones_like(x),)), 1)

    model, (X, _) = nn.Sequential(WithSlope()), batch()
    twin = copy.deepcopy(model)
    PCInfer(model, lambda y, _: y.square().sum(), X, None, ErrType, n=2)
    twin(X).square().sum().backward()
    assert_close(gradients(model), gradients(twin), 1e-9)


@ALL
def test_the_loss_may_differentiate_what_it_computes(ErrType: str) -> None:
    model, (X, Y) = network(), batch()
    X.requires_grad_()

    def LossFun(y: Tensor, Y: Tensor) -> Tensor:
        (slope,) = torch.autograd.grad(y.pow(3).sum(), y, create_graph=True)
        return F.mse_loss(y, Y) + slope.square().mean()

    twin = copy.deepcopy(model)
    for each, loss in (
        (model, LossFun),
        (twin, lambda y, Y: F.mse_loss(y, Y) + 9 * y.pow(4).mean()),
    ):
        PCInfer(each, loss, X, Y, ErrType, n=4)
    assert_close(gradients(model), gradients(twin), 1e-9)


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.linear, self.use_reentrant = nn.Linear(5, 5), use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.linear, x, use_reentrant=self.use_reentrant)


@ALL
def test_reentrant_checkpoints_are_told_what_to_do(ErrType: str) -> None:
    torch.manual_seed(0)
    model, (X, Y) = network(Checkpointed(True)), batch()
    with pytest.raises(RuntimeError, match=r"pass use_reentrant=False to torch\.utils\.checkpoint"):
        PCInfer(model, F.mse_loss, X, Y, ErrType)
    model[1][1].use_reentrant = False
    PCInfer(model, F.mse_loss, X, Y, ErrType, n=4)
    plain = copy.deepcopy(model)
    plain[1][1] = plain[1][1].linear
    found = gradients(model)
    PCInfer(plain, F.mse_loss, X, Y, ErrType, n=4)
    assert_close(found, gradients(plain), 1e-9)


# What a call may run in.


class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


class Passing(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


SURROUNDINGS: dict[str, Callable[[], Any]] = {
    "flops": lambda: FlopCounterMode(display=False),
    "dispatch": Counting,
    "function": Passing,
    "saved_on_cpu": torch.autograd.graph.save_on_cpu,
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True),
    "no_grad": torch.no_grad,
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection:UserWarning")
@pytest.mark.parametrize("surroundings", SURROUNDINGS)
@settings(max_examples=10)
@given(ErrType=st.sampled_from(ERR_TYPES), asks_X=st.booleans(), as_module=st.booleans())
def test_modes_around_the_call_change_nothing(
    surroundings: str, ErrType: str, asks_X: bool, as_module: bool
) -> None:
    torch.manual_seed(0)
    model, (X, Y) = network(nn.LayerNorm(5), nn.Dropout(0.2)), batch()
    X.requires_grad_(asks_X)
    twin = copy.deepcopy(model)
    LossFun = nn.MSELoss() if as_module else F.mse_loss
    torch.manual_seed(1)
    expected = PCInfer(model, LossFun, X, Y, ErrType, n=5)
    torch.manual_seed(1)
    with SURROUNDINGS[surroundings]():
        found = PCInfer(twin, LossFun, X, Y, ErrType, n=5)
    assert_close(found.v, expected.v, 0)
    assert_close(found.epsilon, expected.epsilon, 0)
    assert_close(gradients(twin), gradients(model), 0)


def test_counted_flops_are_those_of_the_algorithms() -> None:
    """From the second call on; in the first one layers are held against their rules."""
    sizes, B, n = [4, 5, 3, 6, 2], 7, 6
    items = [nn.Sequential(nn.Tanh(), nn.Linear(a, b)) for a, b in itertools.pairwise(sizes[1:])]
    model = nn.Sequential(nn.Linear(4, 5), *items)
    X, Y = torch.randn(B, 4), torch.randn(B, 2)
    of_layer = [2 * B * a * b for a, b in itertools.pairwise(sizes)]
    L, forward = len(of_layer), sum(of_layer)
    above = forward - of_layer[0]  # layers 2 to L
    # In step k the error has reached layers L-k+1 and up; each is evaluated forward and back.
    steps = sum(
        2 * of_layer[l - 1] for k in range(1, n + 1) for l in range(max(2, L - k + 1), L + 1)
    )
    expected = {
        "Exact": forward + above + forward,
        "FixedPred": forward + above + forward,
        "Strict": forward + steps + above + forward,
    }
    for ErrType, count in expected.items():
        PCInfer(model, F.mse_loss, X, Y, ErrType, n=n)
        with FlopCounterMode(display=False) as counter:
            PCInfer(model, F.mse_loss, X, Y, ErrType, n=n)
        assert counter.get_total_flops() == count, ErrType


@pytest.mark.parametrize("ErrType", RELAXED)
def test_a_hook_of_the_users_still_sees_each_gradient(ErrType: str) -> None:
    """Trackers' hooks are passed over, a hook that may change a gradient is not."""

    class Hooked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = 1.0 * x
            if y.requires_grad:
                y.register_hook(lambda g: 2 * g)
            return y

    model, (X, Y) = network(Hooked()), batch()
    unhooked = copy.deepcopy(model)
    unhooked[1][1] = nn.Identity()
    PCInfer(unhooked, F.mse_loss, X, Y, ErrType, n=6)
    PCInfer(model, F.mse_loss, X, Y, ErrType, n=6)
    with FlopCounterMode(display=False):
        twin = copy.deepcopy(model)
        PCInfer(twin, F.mse_loss, X, Y, ErrType, n=6)
    assert_close(gradients(twin), gradients(model), 0)
    ratio = model[0].weight.grad.norm() / unhooked[0].weight.grad.norm()
    assert 1.5 < ratio < 2.5
