"""Backward passes that are not PyTorch's own: they may change between calls, and add what they like."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests import reference
from tests.cases import ERR_TYPES, Case, assert_close, check_against_reference, squared_error
from torch2pc import PCInferLatent


class State:
    """What the backward passes here read when they run."""

    factor = 1.0
    added = 0.0


def changed(g: Tensor) -> Tensor:
    return State.factor * g + State.added


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return changed(g)


class ScaledIdentity(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return changed(g)


class ScaledInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.tanh_()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return changed(g)


@torch.library.custom_op("torch2pc_tests::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    return 2 * x


@doubled.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


doubled.register_autograd(lambda ctx, g: changed(2 * g))


def hooked(x: Tensor) -> Tensor:
    y = x.sin()
    if y.requires_grad:
        y.register_hook(changed)
    return y * y


def hooked_at_its_input(x: Tensor) -> Tensor:
    if x.requires_grad:
        x.register_hook(changed)
    return x.sin()


# Each is a function of the layer's numbers, whose gradient passes through ``changed``.
FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "function": Scaled.apply,
    "setup_context": ScaledIdentity.apply,
    "in place": lambda x: ScaledInPlace.apply(x * 1.5),
    "operation": lambda x: doubled(x),
    "tensor hook": hooked,
    "hook of the input": hooked_at_its_input,
    "checkpoint": lambda x: checkpoint(lambda x: Scaled.apply(x).cos(), x, use_reentrant=False),
    "behind a gate": lambda x: x.tanh() + 0.5 * Scaled.apply(x),
}


class Layer(nn.Module):
    """A linear layer, and after it, or on its weights, what has a backward of its own."""

    def __init__(self, form: str, on_weights: bool = False) -> None:
        super().__init__()
        self.linear, self.form, self.on_weights = nn.Linear(4, 4), form, on_weights

    def forward(self, x: Tensor) -> Tensor:
        function = FORMS[self.form]
        if self.on_weights:
            return nn.functional.linear(x, function(self.linear.weight), self.linear.bias).tanh()
        return function(self.linear(x))


def case_with(form: str, place: int, batch: int, on_weights: bool = False) -> Case:
    torch.manual_seed(batch)
    items: list[nn.Module] = [nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)]
    items.insert(place, Layer(form, on_weights))
    model = nn.Sequential(*items).double()
    return Case(model, squared_error, *torch.randn(2, batch, 4).double())


@pytest.fixture(autouse=True)
def _state() -> Any:
    yield
    State.factor, State.added = 1.0, 0.0


forms = st.sampled_from(sorted(FORMS))
places = st.integers(0, 3)


@given(
    form=forms,
    place=places,
    on_weights=st.booleans(),
    ErrType=st.sampled_from(ERR_TYPES),
    factors=st.lists(st.sampled_from([1.0, 0.0, -1.0, 0.3]), min_size=2, max_size=3),
    batches=st.lists(st.sampled_from([1, 2, 7]), min_size=3, max_size=3),
)
def test_what_a_backward_does_now_counts(
    form: str,
    place: int,
    on_weights: bool,
    ErrType: str,
    factors: list[float],
    batches: list[int],
) -> None:
    """In every call, whatever it did in earlier ones."""
    if on_weights and form == "hook of the input":
        return  # it would be a hook of the parameter, which is another thing
    case = case_with(form, place, 2, on_weights)
    for factor, batch in zip(factors, batches, strict=False):
        State.factor = factor
        case = case._replace(X=torch.randn(batch, 4).double(), Y=torch.randn(batch, 4).double())
        check(case, ErrType)


def check(case: Case, ErrType: str) -> None:
    """Against the iteration; what has no energy to go down against a model that was never used."""
    if ErrType != "Equilibrium":
        check_against_reference(case, ErrType, n=8)
        return
    fresh = case._replace(model=copy.deepcopy(case.model))
    result, expected = (c.infer(ErrType, n=8) for c in (case, fresh))
    assert_close(result.epsilon[1:], expected.epsilon[1:])
    assert_close(case.gradients(), fresh.gradients())
    errors = [None, *result.epsilon[1:-1]]
    updates = reference.at_errors(*case, errors, "v").updates
    assert_close({p: p.grad for p in updates}, updates)


@given(
    form=forms,
    place=places,
    on_weights=st.booleans(),
    ErrType=st.sampled_from(["Exact", "Strict", "ErrorBased"]),
    scale=st.sampled_from([1.0, 1e-3, 1e-8]),
    added=st.sampled_from([1e-6, 0.1]),
)
def test_what_a_backward_adds_is_not_multiplied(
    form: str, place: int, on_weights: bool, ErrType: str, scale: float, added: float
) -> None:
    """A loss that is attached in a backward pass arrives as it is, however small the errors are."""
    if on_weights and form == "hook of the input":
        return
    State.added = added
    case = case_with(form, place, 3, on_weights)
    case = case._replace(LossFun=lambda y, Y: scale * squared_error(y, Y))
    check_against_reference(case, ErrType, n=8)


@given(form=forms, place=places, factors=st.permutations([1.0, 0.0, -0.5]))
def test_latents(form: str, place: int, factors: list[float]) -> None:
    case = case_with(form, place, 3)
    for factor in factors:
        State.factor = factor
        expected = reference.latent(
            case.model, case.LossFun, case.Y, case.X, 0.1, 6, [1.0] * 3, None
        )
        found = PCInferLatent(case.model, case.LossFun, case.Y, case.X, 0.1, 6)
        assert_close(found.v[:4], expected)


@pytest.mark.parametrize("form", ["function", "tensor hook", "setup_context"])
def test_the_displacement_keeps_its_precision(form: str) -> None:
    """In float32: only the way back is the layer's own."""
    case = case_with(form, 1, 8)
    single = Case(copy.deepcopy(case.model).float(), case.LossFun, case.X.float(), case.Y.float())
    case = case._replace(LossFun=lambda y, Y: 1e-4 * squared_error(y, Y))
    expected = reference.strict(*case, 0.1, 10)
    found = single._replace(LossFun=case.LossFun).infer("Strict", n=10)
    assert_close([e.double() for e in found.epsilon[1:]], expected.epsilon[1:], 1e-5)
    for e, right in zip(found.epsilon[1:], expected.epsilon[1:], strict=True):
        assert (e - right).norm() <= 1e-5 * right.norm()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_operation_whose_backward_is_not_captured_runs_plainly() -> None:
    case = case_with("operation", 1, 2)
    with pytest.warns(UserWarning, match=r"runs without compilation.*backward of its own"):
        case.infer("Strict", compile=True)
    for factor in (1.0, 0.0):
        State.factor = factor
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            case.infer("Strict", n=8, compile=True)
        found = case.gradients()
        case.infer("Strict", n=8)
        assert_close(found, case.gradients())
