"""PCInfer as a function, whatever the ErrType: what it returns, what it writes, what it accepts."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests import reference
from tests.cases import ERR_TYPES, Case, assert_close, cases
from torch2pc import PCResult

err_types = pytest.mark.parametrize("ErrType", ERR_TYPES)


def small_case(dtype: torch.dtype = torch.float64) -> Case:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
    X, Y = torch.randn(6, 4, dtype=dtype), torch.randn(6, 3, dtype=dtype)
    return Case(model, nn.MSELoss(), X, Y)


@err_types
def test_unpacks_like_a_tuple(ErrType: str) -> None:
    case = small_case()
    result = case.infer(ErrType)
    vhat, Loss, dLdy, v, epsilon = result
    assert isinstance(result, PCResult) and result.vhat is vhat and result.epsilon is epsilon
    assert len(vhat) == len(v) == len(epsilon) == 4
    assert Loss.shape == () and dLdy.shape == case.Y.shape
    assert [e.shape for e in epsilon[1:]] == [h.shape for h in vhat[1:]] == [b.shape for b in v[1:]]
    assert epsilon[0] is None


@err_types
@given(case=cases())
def test_feed_forward_values(ErrType: str, case: Case) -> None:
    result = case.infer(ErrType, n=3)
    vhat = reference.feed_forward(case.model, case.X)
    Loss, dLdy = reference.loss_gradient(case.LossFun, vhat[-1], case.Y)
    assert_close(result.vhat, vhat)
    assert_close(result.Loss, Loss)
    assert_close(result.dLdy, dLdy)
    assert torch.equal(result.v[0], case.X)


def storages(tensors: list[Any]) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in tensors if t is not None and t.numel()}


@err_types
@given(case=cases(), with_input_error=st.booleans())
def test_results_are_detached_and_share_no_memory(
    ErrType: str, case: Case, with_input_error: bool
) -> None:
    case.X.requires_grad_(with_input_error)
    vhat, Loss, dLdy, v, epsilon = case.infer(ErrType, n=3)
    parameters = list(case.model.parameters())
    assert v[0] is case.X or case.X.requires_grad
    groups = [vhat, [Loss], [dLdy], v[1:], epsilon, [p.grad for p in parameters], parameters]
    groups += [[case.X, case.Y], [case.X.grad]]
    for tensor in [*vhat, Loss, dLdy, *v, *epsilon[1:]]:
        assert not tensor.requires_grad and tensor.grad_fn is None
    for i, group in enumerate(groups):
        for other in groups[:i]:
            assert not storages(group) & storages(other)


class BiasOnly(nn.Module):
    """Its gradient is the error itself, and its second output a view of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(6, 3))
        self.second = nn.Parameter(torch.randn(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias + self.second


class Constant(nn.Module):
    """Ignores its input and returns a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.randn(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.value


@err_types
@pytest.mark.parametrize("layer", [BiasOnly, Constant])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_gradients_that_autograd_shares_are_separated(
    ErrType: str, layer: type[nn.Module], place: int
) -> None:
    items: list[nn.Module] = [nn.Identity(), nn.Flatten()]
    items.insert(place, layer())
    case = Case(nn.Sequential(*items), lambda yhat, Y: yhat.sum(), torch.randn(6, 3), None)
    vhat, _, dLdy, v, epsilon = case.infer(ErrType)
    before = copy.deepcopy([vhat, dLdy, v, epsilon])
    for parameter in case.model.parameters():
        assert torch.equal(parameter.grad, epsilon[place + 1])
    for parameter in case.model.parameters():
        parameter.grad.mul_(2)
        parameter.data.add_(1)
        assert torch.equal(parameter.grad, 2 * epsilon[place + 1])
    assert_close([vhat, dLdy, v, epsilon], before, tolerance=0)


@err_types
@given(case=cases())
def test_twice_gives_the_same(ErrType: str, case: Case) -> None:
    first = case.infer(ErrType, n=4)
    gradients = copy.deepcopy(case.gradients())
    second = case.infer(ErrType, n=4)
    assert_close(list(second), list(first), tolerance=0)
    assert_close(case.gradients(), gradients, tolerance=0)


def test_an_input_that_was_computed_gets_no_gradient_of_its_own() -> None:
    case = small_case()
    X = case.X.clone().requires_grad_().mul(2)
    X.retain_grad()
    assert case._replace(X=X).infer("Strict").epsilon[0] is not None
    assert X.grad is None


@err_types
@given(case=cases(), update_at=st.sampled_from(["v", "vhat", "before"]))
def test_replaces_or_accumulates(ErrType: str, case: Case, update_at: str) -> None:
    case.infer(ErrType, update_at=update_at)
    once = copy.deepcopy(case.gradients())
    case.infer(ErrType, accumulate=True, update_at=update_at)
    assert_close(case.gradients(), {k: None if g is None else 2 * g for k, g in once.items()})
    case.infer(ErrType, update_at=update_at)
    assert_close(case.gradients(), once, tolerance=0)


def test_can_be_imported_in_inference_mode_and_needs_matplotlib_to_draw_alone() -> None:
    code = (
        "import sys, torch\n"
        "with torch.inference_mode():\n"
        "    import torch2pc as t\n"
        "m, X = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)), torch.ones(1, 2)\n"
        "r = t.follow(m, torch.nn.MSELoss(), X, X, 'Strict', n=2)\n"
        "str(r), r.to_dict()\n"
        "assert 'matplotlib' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@err_types
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_works_with_gradients_switched_off(ErrType: str, mode: Any) -> None:
    case = small_case()
    case.infer(ErrType)
    expected = copy.deepcopy(case.gradients())
    with mode():
        result = case.infer(ErrType)
    assert_close(case.gradients(), expected)
    assert not any(t.is_inference() for t in [*result.vhat, *result.v, *result.epsilon[1:]])


@err_types
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keeps_the_dtype(ErrType: str, dtype: torch.dtype) -> None:
    case = small_case(dtype)
    vhat, Loss, dLdy, v, epsilon = case.infer(ErrType)
    gradients = [p.grad for p in case.model.parameters()]
    assert {t.dtype for t in [*vhat, Loss, dLdy, *v, *epsilon[1:], *gradients]} == {dtype}


@err_types
def test_integer_input_to_an_embedding(ErrType: str) -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(12, 2)).double()
    X, Y = torch.randint(7, (5, 3)), torch.randn(5, 2).double()
    case = Case(model, nn.MSELoss(), X, Y)
    result = case.infer(ErrType, n=30)
    names = {"FixedPred": "fixed_pred", "ErrorBased": "error_based"}
    algorithm = getattr(reference, names.get(ErrType, ErrType.lower()))
    options = () if ErrType == "Exact" else (0.1, 30)
    expected = algorithm(*case, *options)
    assert torch.equal(result.v[0], X) and result.epsilon[0] is None
    found = {p: p.grad for p in model.parameters()}
    assert_close(found, expected.updates, tolerance=1e-6 if ErrType == "Equilibrium" else 1e-9)


@err_types
@pytest.mark.parametrize("accumulate", [False, True])
def test_parameters_that_the_call_does_not_use(ErrType: str, accumulate: bool) -> None:
    """No optimizer shall step them again with an old gradient."""
    case = small_case()
    LossFun = nn.MSELoss()
    unused = [nn.Parameter(torch.ones(1)) for _ in range(3)]
    case.model[1].register_parameter("unused", unused[0])
    case.model.register_parameter("unused", unused[1])
    LossFun.register_parameter("unused", unused[2])
    frozen = case.model[0].weight.requires_grad_(False)
    without = [frozen, *unused]
    for parameter in without:
        parameter.grad = torch.full_like(parameter, 3.0)
    before = [parameter.grad for parameter in without]
    case._replace(LossFun=LossFun).infer(ErrType, accumulate=accumulate)
    for parameter, gradient in zip(without, before, strict=True):
        assert parameter.grad is (gradient if accumulate else None)
        assert (gradient == 3).all()
    assert case.model[0].bias.grad is not None


class DropsItself(nn.Module):
    """LayerDrop: every other evaluation leaves it out."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 5)
        self.drop = False

    def forward(self, x: Tensor) -> Tensor:
        return x if self.drop else self.inner(x)


def test_a_layer_that_drops_out_is_trained_as_by_backward() -> None:
    case = small_case()
    case.model.insert(1, DropsItself().double())
    twin = copy.deepcopy(case.model)
    optimizers = [torch.optim.Adam(model.parameters(), lr=0.01) for model in (case.model, twin)]
    for k in range(20):
        case.model[1].drop = twin[1].drop = k % 2 == 1
        case.infer("Exact")
        optimizers[1].zero_grad()
        case.LossFun(twin(case.X), case.Y).backward()
        for optimizer in optimizers:
            optimizer.step()
    assert_close(list(case.model.parameters()), list(twin.parameters()))


@pytest.mark.parametrize("ErrType", ["Exact", "FixedPred"])
def test_what_an_algorithm_has_no_use_for_is_ignored(ErrType: str) -> None:
    case = small_case()
    expected = case.infer(ErrType)
    assert_close(list(case.infer(ErrType, vinit=[1], update_at="nowhere")), list(expected))


@err_types
def test_a_layer_that_is_frozen_in_training_stays_where_it_is(ErrType: str) -> None:
    case = small_case()
    optimizer = torch.optim.Adam(case.model.parameters(), lr=0.01)
    for frozen in (False, False, True, True):
        case.model[0].requires_grad_(not frozen)
        before = [p.clone() for p in case.model.parameters()]
        case.infer(ErrType)
        optimizer.step()
        moved = [
            not torch.equal(p, q) for p, q in zip(case.model.parameters(), before, strict=True)
        ]
        own = len(list(case.model[0].parameters()))
        assert moved == [not frozen] * own + [True] * (len(moved) - own)


@err_types
def test_accumulates_in_place(ErrType: str) -> None:
    """The parameters' gradients may be views of one flat buffer, which stays so."""
    case = small_case()
    case.infer(ErrType)
    once = torch.cat([p.grad.flatten() for p in case.model.parameters()])
    flat = torch.zeros_like(once)
    views = flat.split([p.numel() for p in case.model.parameters()])
    for parameter, view in zip(case.model.parameters(), views, strict=True):
        parameter.grad = view.view_as(parameter)
    for _ in range(3):
        case.infer(ErrType, accumulate=True)
    assert_close(flat, 3 * once)


@err_types
def test_accumulating_into_a_gradient_that_cannot_be_written_changes_nothing(ErrType: str) -> None:
    case = small_case()
    *others, last = case.model.parameters()
    for parameter in others:
        parameter.grad = torch.full_like(parameter, 7.0)
    last.grad = torch.ones((), dtype=last.dtype).expand_as(last)  # all entries are one in memory
    before = [parameter.grad for parameter in case.model.parameters()]
    with pytest.raises(RuntimeError, match="single memory location"):
        case.infer(ErrType, accumulate=True)
    assert all(p.grad is g for p, g in zip(case.model.parameters(), before, strict=True))
    assert all((parameter.grad == 7).all() for parameter in others)


@err_types
def test_input_error_carries_on(ErrType: str) -> None:
    """A leaf X gets the error in its ``.grad``; through another X, backward() goes on."""
    case = small_case()
    X = case.X.clone().requires_grad_()
    epsilon = case._replace(X=X).infer(ErrType).epsilon
    assert_close(X.grad, epsilon[0])
    assert_close(epsilon[0], reference.input_vjp(case.model[0], case.X, epsilon[1]))

    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    X = scale * case.X
    epsilon = case._replace(X=X).infer(ErrType).epsilon
    X.backward(epsilon[0])
    assert_close(scale.grad, (case.X * epsilon[0]).sum())


@err_types
def test_optimizer_steps_it(ErrType: str) -> None:
    case = small_case()
    optimizer = torch.optim.Adam(case.model.parameters(), lr=0.01)
    first = case.infer(ErrType).Loss
    for _ in range(60):
        optimizer.step()
        last = case.infer(ErrType).Loss
    assert last < 0.8 * first


@err_types
def test_a_saved_result_is_loaded_by_default(ErrType: str) -> None:
    """``torch.load`` reads with weights_only=True."""
    result = small_case().infer(ErrType)
    file = io.BytesIO()
    torch.save(result, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert isinstance(loaded, PCResult)
    assert_close(list(loaded), list(result), tolerance=0)
