"""Exact against autograd."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests import reference
from tests.cases import Case, assert_close, cases


@given(case=cases(), with_input_error=st.booleans())
def test_is_backpropagation(case: Case, with_input_error: bool) -> None:
    case.X.requires_grad_(with_input_error)
    Loss = case.LossFun(case.model(case.X), case.Y)
    if Loss.requires_grad:
        Loss.backward()
    expected, of_input = case.gradients(), case.X.grad
    case.model.zero_grad()
    case.X.grad = None

    result = case.infer("Exact")
    assert_close(result.Loss, Loss.detach())
    assert_close(case.gradients(), expected)
    assert_close(result.epsilon[0], of_input)
    assert_close(case.X.grad, of_input)
    assert_close(result.epsilon[-1], result.dLdy, tolerance=0)


@given(case=cases())
def test_errors_and_beliefs(case: Case) -> None:
    result = case.infer("Exact")
    expected = reference.exact(*case)
    assert_close(result.epsilon[1:], expected.epsilon[1:])
    assert_close(result.v, expected.v)
    for vhat_l, epsilon_l, v_l in zip(
        result.vhat[1:], result.epsilon[1:], result.v[1:], strict=True
    ):
        assert_close(v_l, vhat_l - epsilon_l, tolerance=0)


def test_ignores_eta_n_and_vinit() -> None:
    case = Case(nn.Sequential(nn.Linear(2, 1)), nn.MSELoss(), torch.ones(3, 2), torch.ones(3, 1))
    expected = case.infer("Exact")
    found = case.infer("Exact", eta=None, n="many", vinit="none")
    assert_close(list(found), list(expected), tolerance=0)


@pytest.mark.parametrize("ErrType", ["Exact", "FixedPred"])
def test_shapes_without_values(ErrType: str) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 5), nn.Sequential(nn.ReLU(), nn.Linear(5, 3)))
        case = Case(model, nn.MSELoss(), torch.empty(2, 4), torch.empty(2, 3))
    result = case.infer(ErrType)
    assert [tuple(e.shape) for e in result.epsilon[1:]] == [(2, 5), (2, 3)]
    assert all(p.grad.shape == p.shape and p.grad.is_meta for p in model.parameters())
