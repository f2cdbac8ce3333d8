"""FwdPassPlus: the values of a feed-forward pass, from which gradients can be taken."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import nn

from tests import reference
from tests.cases import Case, assert_close, cases
from torch2pc import FwdPassPlus


@given(case=cases())
def test_equals_the_reference(case: Case) -> None:
    vhat, Loss, dLdy = FwdPassPlus(*case)
    expected = reference.exact(*case)
    assert_close([x.detach() for x in vhat], expected.vhat)
    assert_close(Loss.detach(), expected.Loss)
    assert_close(dLdy, expected.dLdy)
    assert not dLdy.requires_grad
    assert all(parameter.grad is None for parameter in case.model.parameters())


@given(case=cases())
def test_gradients_can_be_taken_at_every_value(case: Case) -> None:
    vhat, Loss, dLdy = FwdPassPlus(*case)
    expected = reference.exact(*case)
    for l in range(1, len(vhat)):
        (found,) = torch.autograd.grad(
            Loss, vhat[l], retain_graph=True, allow_unused=True, materialize_grads=True
        )
        assert_close(found, expected.epsilon[l])
    parameters = [p for p in case.model.parameters() if p.requires_grad]
    if parameters:
        found = torch.autograd.grad(
            vhat[-1], parameters, dLdy, allow_unused=True, materialize_grads=True
        )
        zeros = {p: torch.zeros_like(p) for p in parameters}
        assert_close(dict(zip(parameters, found, strict=True)), zeros | expected.updates)


def small_case(**changed: Any) -> Case:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3))
    return Case(model, nn.MSELoss(), torch.randn(6, 4), torch.randn(6, 3))._replace(**changed)


def test_a_graph_goes_on_into_what_made_X() -> None:
    scale = torch.ones((), requires_grad=True)
    case = small_case()
    _, Loss, _ = FwdPassPlus(case.model, case.LossFun, scale * case.X, case.Y)
    (expected,) = torch.autograd.grad(case.LossFun(case.model(scale * case.X), case.Y), scale)
    (found,) = torch.autograd.grad(Loss, scale, retain_graph=True)
    assert_close(found, expected)
    Loss.backward()
    assert_close(scale.grad, expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_there_is_a_graph_with_gradients_switched_off(mode: Any) -> None:
    case = small_case()
    with mode():
        vhat, Loss, _ = FwdPassPlus(*case)
    assert Loss.requires_grad and all(x.requires_grad for x in vhat[1:])


def test_a_layer_in_place_leaves_the_values_and_X_as_they_were() -> None:
    case = small_case(model=nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 3)))
    before = case.X.clone()
    vhat, _, _ = FwdPassPlus(*case)
    assert torch.equal(case.X, before)
    assert torch.equal(vhat[0], before) and (vhat[0] < 0).any() and (vhat[1] >= 0).all()


def test_is_one_forward_pass_with_its_side_effects() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(), nn.Linear(5, 3))
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    case, twin = small_case(model=model), copy.deepcopy(model)
    torch.manual_seed(1)
    vhat, _, _ = FwdPassPlus(*case)
    random = torch.rand(3)
    assert len(calls) == 1
    torch.manual_seed(1)
    assert torch.equal(vhat[-1], twin(case.X))
    assert torch.equal(random, torch.rand(3))
    assert_close(model.state_dict(), twin.state_dict(), tolerance=0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            dict(model=nn.Linear(4, 3)),
            TypeError,
            "model must be an nn.Sequential or a PCGraph, got Linear",
        ),
        (dict(LossFun="mse"), TypeError, "LossFun must be a callable"),
        (dict(X=[[1.0]]), TypeError, "X must be a torch.Tensor, got list"),
        (dict(LossFun=lambda yhat, Y: yhat), ValueError, r"LossFun must return a scalar.*\(6, 3\)"),
        (
            dict(LossFun=lambda yhat, Y: Y.clone().requires_grad_().sum()),
            ValueError,
            "LossFun must depend on the output",
        ),
    ],
)
def test_bad_argument(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FwdPassPlus(*small_case(**arguments))
