"""FixedPred's closed form against the iteration that it stands for."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests import reference
from tests.cases import Add, Case, assert_close, cases
from torch2pc import PCGraph, PCInfer
from torch2pc.inference.fixed_pred import error_factors

etas = st.one_of(st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.floats(-1, 2))


@given(case=cases(), eta=etas, n=st.integers(1, 25), with_input_error=st.booleans())
def test_equals_the_iteration(case: Case, eta: float, n: int, with_input_error: bool) -> None:
    expected = reference.fixed_pred(*case, eta, n)
    case.X.requires_grad_(with_input_error)
    result = case.infer("FixedPred", eta=eta, n=n)
    assert_close(result.v, expected.v)
    assert_close(result.epsilon[1:], expected.epsilon[1:])
    found = {p: p.grad for p in case.model.parameters() if p.grad is not None}
    assert found.keys() == expected.updates.keys()
    if found:  # relative to them all: a bias's update may be what is left of large ones that cancel
        assert_close(
            *[torch.cat([g[p].flatten() for p in found]) for g in (found, expected.updates)]
        )
    assert_close(result.epsilon[-1], result.dLdy, tolerance=0)
    if with_input_error:
        assert_close(result.epsilon[0], expected.epsilon[0])
        assert_close(case.X.grad, expected.epsilon[0])


@given(case=cases(), more=st.integers(0, 3))
def test_is_backpropagation_with_eta_1_and_enough_iterations(case: Case, more: int) -> None:
    case.infer("Exact")
    expected = copy.deepcopy(case.gradients())
    case.infer("FixedPred", eta=1, n=len(case.model) + more)
    assert_close(case.gradients(), expected)


@given(eta=st.floats(0.01, 0.99), k=st.integers(0, 60), L=st.integers(1, 8))
def test_factors_are_binomial_tails(eta: float, k: int, L: int) -> None:
    tails = [
        math.fsum(math.comb(k, j) * eta**j * (1 - eta) ** (k - j) for j in range(m, k + 1))
        for m in range(L)
    ]
    assert error_factors(eta, k, L) == pytest.approx(tails, rel=1e-12, abs=1e-300)


def test_factors_of_a_divergent_eta_are_not_an_error() -> None:
    factors = error_factors(3.0, 5000, 4)
    assert factors[0] == 1.0 and not any(math.isfinite(c) for c in factors[1:])


@pytest.mark.parametrize("tied", ["module", "weight"])
def test_each_use_of_a_shared_parameter_has_its_own_factor(tied: str) -> None:
    first, last = nn.Linear(4, 4), nn.Linear(4, 4)
    if tied == "module":
        last = first
    else:
        last.weight = first.weight
    model = nn.Sequential(first, nn.Tanh(), nn.Sequential(last, nn.Sigmoid()), nn.Linear(4, 2))
    case = Case(
        model.double(), nn.MSELoss(), torch.randn(3, 4).double(), torch.randn(3, 2).double()
    )
    expected = reference.fixed_pred(*case, 0.1, 20)
    case.infer("FixedPred")
    assert_close({p: p.grad for p in model.parameters()}, expected.updates)


def test_float32_keeps_the_precision_that_the_iteration_loses() -> None:
    """On 8 layers the float32 iteration is off by more than 100%, the closed form by 1e-5."""
    blocks = [nn.Sequential(nn.Linear(20, 20), nn.Sigmoid()) for _ in range(7)]
    model = nn.Sequential(*blocks, nn.Linear(20, 10))
    X, Y = torch.rand(300, 20), torch.randint(10, (300,))
    expected = reference.fixed_pred(
        copy.deepcopy(model).double(), nn.CrossEntropyLoss(), X.double(), Y, 0.1, 20
    )
    iterated = reference.fixed_pred(model, nn.CrossEntropyLoss(), X, Y, 0.1, 20)
    PCInfer(model, nn.CrossEntropyLoss(), X, Y, "FixedPred", eta=0.1, n=20)

    def largest_error(found: list[torch.Tensor]) -> float:
        pairs = zip(found, expected.updates.values(), strict=True)
        return max(((f - e).norm() / e.norm()).item() for f, e in pairs)

    assert largest_error(list(iterated.updates.values())) > 1
    assert largest_error([p.grad for p in model.parameters()]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_divergent_eta_gives_infinities(dtype: torch.dtype) -> None:
    blocks = [nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(5)]
    model = nn.Sequential(*blocks, nn.Linear(4, 2)).to(dtype)
    X, Y = torch.randn(3, 4).to(dtype), torch.randn(3, 2).to(dtype)
    for eta, n in [(3.0, 200), (-50.0, 400)]:
        result = PCInfer(model, nn.MSELoss(), X, Y, "FixedPred", eta=eta, n=n)
        diverges = dtype != torch.float64 or eta < 0
        assert result.v[1].isfinite().all() != diverges
        assert model[0][0].weight.grad.isfinite().all() != diverges
        assert result.epsilon[-1].isfinite().all()


def deep(L: int) -> Case:
    model = nn.Sequential(*[nn.Linear(3, 3) for _ in range(L)])
    return Case(model, nn.MSELoss(reduction="sum"), torch.randn(4, 3), torch.randn(4, 3))


both = pytest.mark.parametrize("ErrType", ["FixedPred", "Strict"])


@both
@pytest.mark.filterwarnings("error:The error hardly reaches")
@pytest.mark.parametrize(
    ("L", "eta", "n", "layers", "remedies"),
    [
        (12, 0.1, 20, "layer 1 of 12", "n=111, or eta=0.58,"),
        (15, 0.1, 20, "layers 1 to 4 of 15", "n=141, or eta=0.74,"),
        (21, 0.1, 20, "layers 1 to 10 of 21", "n=201 would"),
        (3, 0.5, 2, "layer 1 of 3", "n=5 would"),
        (3, 0.0, 9, "layers 1 to 2 of 3", "n=21 with eta=0.1, or eta=0.25,"),
        (9, 1.5, 2, "layers 1 to 7 of 9", "n=9 with eta=1.0 would"),
    ],
)
def test_says_once_which_layers_the_error_hardly_reaches(
    ErrType: str, L: int, eta: float, n: int, layers: str, remedies: str
) -> None:
    case = deep(L)
    message = re.escape(f"The error hardly reaches {layers} (model[0]")
    with pytest.warns(UserWarning, match=f"{message}.*{re.escape(remedies)}") as caught:
        case.infer(ErrType, eta=eta, n=n)
    # (Steps that are too long are named, too.)
    said = [w.filename for w in caught if "hardly reaches" in str(w.message)]
    assert said == [Case.infer.__code__.co_filename]
    case.infer(ErrType, eta=eta, n=n)  # warnings are errors here


@both
@pytest.mark.filterwarnings("error:The error hardly reaches")
def test_does_not_warn_where_the_error_arrives(ErrType: str) -> None:
    for L in range(1, 9):
        deep(L).infer(ErrType)
    for reaches_all in ("Exact", "ErrorBased", "Equilibrium"):
        deep(21).infer(reaches_all, n=1)
    case = deep(21)
    for item in case.model[:15]:
        item.requires_grad_(False)  # they learn nothing anyway
    case.infer(ErrType)
    case = deep(4)
    case.infer("Strict", n=1, vinit=[torch.zeros(4, 3)] * 5)  # errors are everywhere


@pytest.mark.filterwarnings("error:The error hardly reaches")
@pytest.mark.parametrize("options", [dict(eta=0.1, n=141), dict(eta=0.74, n=20)])
def test_what_the_warning_advises_brings_half_of_the_gradient_to_layer_1(
    options: dict[str, float],
) -> None:
    case = deep(15)
    case.infer("Exact")
    of_backward = case.model[0].weight.grad
    for ErrType, least in [("FixedPred", 0.5), ("Strict", 0.01)]:
        case.infer(ErrType, **options)
        assert case.model[0].weight.grad.norm() >= least * of_backward.norm()


def test_sparse_gradients_are_weighed_once() -> None:
    """Their values are those of the error that arrives at the embedding."""
    found = []
    for sparse in (False, True):
        torch.manual_seed(0)
        embedding = nn.Embedding(9, 4, sparse=sparse)
        model = nn.Sequential(embedding, nn.Linear(4, 3)).double()
        X, Y = torch.randint(9, (7,)), torch.randint(3, (7,))
        epsilon = PCInfer(model, nn.CrossEntropyLoss(), X, Y, "FixedPred", n=3).epsilon
        found.append([epsilon[1], embedding.weight.grad.to_dense()])
    assert_close(found[1], found[0])


def test_a_loss_of_no_output_is_named_where_ways_differ_in_length() -> None:
    graph = PCGraph(a=(nn.Linear(3, 3), "x"), b=(nn.Linear(3, 3), "a"), out=(Add(), "b", "a"))
    with pytest.raises(ValueError, match="LossFun must depend on the output of the model"):
        PCInfer(graph, lambda y, Y: Y.sum(), torch.ones(2, 3), torch.ones(2, 3), "FixedPred")
