"""Beliefs that are predicted from both sides: ``PCGraph(above=...)``."""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests import reference
from tests.cases import Case, Gate, Join, assert_close, random_beliefs, squared_error
from torch2pc import PCGraph, PCInfer, PCInferLatent, follow, steps
from torch2pc.energy.curvature import hessian
from torch2pc.graph.network import Network
from torch2pc.inference.error_based import error_based
from torch2pc.inference.strict import strict


def tanh(into: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Tanh(), nn.Linear(into, out))


def layers() -> dict[str, tuple[Any, ...]]:
    return dict(
        a=(nn.Linear(5, 4), "x"),
        b=(tanh(4, 4), "a"),
        c=(Join(4), "b", "a"),
        out=(tanh(4, 3), "c"),
    )


ABOVE = {
    "x": lambda: (tanh(4, 5), "a"),
    "a": lambda: (Gate(), "b", "c"),
    "b": lambda: (nn.Sequential(nn.Linear(3, 4), nn.Softplus()), "out"),
    "c": lambda: (tanh(5, 4), "x"),
}
PI = {"a": 0.7, "c": 1.4, "above.x": 0.5, "above.a": 1.3, "above.b": 0.3, "above.c": 0.8}


def two_sided(targets: Any = tuple(ABOVE), batch: int = 6, seed: int = 0) -> Case:
    torch.manual_seed(seed)
    model = PCGraph(**layers(), above={t: ABOVE[t]() for t in targets}).double()
    X, Y = torch.randn(batch, 5).double(), torch.randn(batch, 3).double()
    return Case(model, squared_error, X, Y)


def of_pi(case: Case) -> dict[str, float]:
    accepted = [*case.model.names, *[f"above.{name}" for name in case.model.above_parents]]
    return {name: pi for name, pi in PI.items() if name in accepted}


def updates_of(case: Case) -> dict[Tensor, Tensor]:
    return {p: p.grad for p in case.model.parameters() if p.grad is not None}


targets = st.sets(st.sampled_from([*ABOVE]), min_size=1)


@pytest.mark.parametrize("ErrType", ["Strict", "ErrorBased"])
@given(
    targets=targets,
    n=st.integers(1, 8),
    eta=st.floats(0, 0.2),
    vinit=st.booleans(),
    dX=st.booleans(),
    update_at=st.sampled_from(["v", "vhat", "before"]),
)
def test_relaxations_equal_autograd_on_the_energy(
    ErrType: str,
    targets: set[str],
    n: int,
    eta: float,
    vinit: bool,
    dX: bool,
    update_at: str,
) -> None:
    case = two_sided(sorted(targets))
    beliefs, pi = random_beliefs(case) if vinit else None, of_pi(case)
    in_errors = ErrType == "ErrorBased"
    expected = reference.two_sided(*case, eta, n, pi, beliefs, update_at, in_errors)
    case.X.requires_grad_(dX)
    result = case.infer(ErrType, eta=eta, n=n, vinit=beliefs, update_at=update_at, precision=pi)
    assert_close(result.v, expected.v)
    assert_close(result.epsilon[1:], expected.epsilon[1:])
    assert_close(updates_of(case), expected.updates)
    if dX:
        assert_close(case.X.grad, expected.epsilon[0])


@given(targets=targets, n=st.integers(1, 8))
def test_latents_equal_autograd_on_the_energy(targets: set[str], n: int) -> None:
    case = two_sided(sorted(targets))
    model, LossFun, X, Y = case
    pi = of_pi(case)
    expected = reference.two_sided(*case, 0.1, n, pi, free_input=True)
    result = PCInferLatent(model, LossFun, Y, X, 0.1, n, precision=pi)
    assert_close(result.v, expected.v)
    assert_close(result.epsilon[1:], expected.epsilon[1:])
    assert_close(updates_of(case), expected.updates)


@given(targets=targets)
def test_equilibrium_is_where_the_energy_has_no_slope(targets: set[str]) -> None:
    """And so where Strict stays; the examples are separate problems."""
    case = two_sided(sorted(targets))
    pi = of_pi(case)
    result = case.infer("Equilibrium", n=200, precision=pi)
    assert result.distance.shape == (6,) and float(result.distance.max()) < 1e-6
    free = [v.detach().requires_grad_() for v in result.v[1:-1]]
    F = reference.two_sided_energy(
        case.model, case.LossFun, case.Y, [case.X, *free, result.v[-1]], pi
    )
    for slope in torch.autograd.grad(F, free):
        assert float(slope.abs().max()) < 1e-6
    updates = updates_of(case)
    relaxed = case.infer("Strict", vinit=result.v, n=3, precision=pi)
    assert_close(result.v, relaxed.v, 1e-6)
    assert_close(updates, updates_of(case), 1e-5)


class Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


def test_equilibrium_sees_that_a_layer_from_above_mixes_the_examples() -> None:
    case = two_sided(["x"])
    case.model.above.x.append(Centred())
    result = case.infer("Equilibrium", n=200)
    assert result.distance.shape == (1,) and float(result.distance) < 1e-6


def test_sweeps_all_together_and_from_the_top_end_at_the_equilibrium() -> None:
    case = two_sided()
    together = case.infer("Strict", eta=0.1, n=1000)
    down = case.infer("Strict", eta=steps.Descent(0.1, sweep="down"), n=1000)
    assert_close(down.v, together.v, 1e-8)
    assert_close(case.infer("Equilibrium", n=200).v, together.v, 1e-5)


@pytest.mark.parametrize("ErrType", ["Strict", "ErrorBased"])
def test_float32_keeps_the_digits_of_small_errors(ErrType: str) -> None:
    """Here all errors of the layers are some 1e-7 of the beliefs."""
    case = two_sided(batch=3)
    pi = {f"above.{name}": 1e-7 for name in ABOVE}
    LossFun = lambda y, Y: 1e-7 * squared_error(y, Y)  # noqa: E731
    expected = PCInfer(case.model, LossFun, case.X, case.Y, ErrType, n=30, precision=pi)
    updates = [p.grad.clone() for p in case.model.parameters()]
    single = [copy.deepcopy(case.model).float(), LossFun, case.X.float(), case.Y.float()]
    found = PCInfer(*single, ErrType, n=30, precision=pi)  # type: ignore[arg-type]
    for l in range(1, 5):
        assert float(expected.epsilon[l].abs().max()) < 1e-5
        assert_close(found.epsilon[l].double(), expected.epsilon[l], 1e-5)
    for p, update in zip(single[0].parameters(), updates, strict=True):  # type: ignore[attr-defined]
        assert_close(p.grad.double(), update, 1e-5)


@pytest.mark.parametrize("make", [strict, error_based])
def test_products_with_the_hessian_have_the_second_predictions(make: Any) -> None:
    """Gauss and Newton's is the Hessian itself where all layers are linear."""
    torch.manual_seed(0)
    model = PCGraph(
        a=(nn.Linear(5, 4), "x"),
        b=(nn.Linear(4, 4), "a"),
        out=(nn.Linear(4, 3), "b"),
        above={"a": (nn.Linear(4, 4), "b"), "x": (nn.Linear(4, 5), "a")},
    ).double()
    X, Y = torch.randn(2, 5).double(), torch.randn(2, 3).double()
    vhat = reference.feed_forward(model, X)
    with_errors = make is error_based

    def F(flat: Tensor) -> Tensor:
        a, b = flat.view(2, 2, 4).unbind()
        if with_errors:
            (*v,), _ = reference.perturbed_pass(model, X, [X, a, b])
        else:
            v = [X, a, b]
        return reference.two_sided_energy(model, squared_error, Y, [*v, vhat[-1]], {})

    start = torch.zeros(16).double() if with_errors else torch.cat([vhat[1], vhat[2]]).flatten()
    expected = torch.autograd.functional.hessian(F, start)
    network = Network(model, squared_error, X, Y)
    relaxation = make(network, 0.1)
    with network.replaying():
        product = hessian(relaxation.energy)
        columns = [
            torch.cat([g.flatten() for g in product([*u.view(2, 2, 4).clone()])])
            for u in torch.eye(16).double()
        ]
    assert_close(torch.stack(columns), expected, 1e-6)


def test_a_safe_step_lowers_the_energy_and_a_long_one_is_warned_of() -> None:
    case = two_sided()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = case.infer("Strict", eta="auto", n=30)
    F = lambda v: reference.two_sided_energy(case.model, squared_error, case.Y, v, {}).item()  # noqa: E731
    assert F(result.v) < F(result.vhat)
    with pytest.warns(UserWarning, match="The energy that Strict descends went from"):
        two_sided(seed=1).infer("Strict", eta=1.5, n=30)


class Noisy(nn.Module):
    """Draws a mask and counts its passes in a buffer; says that it works in place."""

    inplace = True

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(4, 5), nn.Dropout(0.5)
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return self.dropout(self.linear(x.mul_(2)))


@pytest.mark.parametrize("ErrType", ["Strict", "ErrorBased", "Equilibrium"])
def test_a_layer_from_above_runs_once_to_the_outside(ErrType: str) -> None:
    """One mask for the whole call, one step of its buffers, and no writing into beliefs."""
    torch.manual_seed(0)
    model = PCGraph(**layers(), above={"x": (Noisy(), "a")}).double()
    X, Y = torch.randn(6, 5).double(), torch.randn(6, 3).double()
    torch.manual_seed(1)
    first = PCInfer(model, squared_error, X, Y, ErrType, n=5)
    assert float(model.above.x.passes) == 1
    assert_close(first.vhat, reference.feed_forward(model, X))
    random = torch.get_rng_state()
    torch.manual_seed(1)
    model.above.x(torch.zeros(6, 4).double())
    assert torch.equal(torch.get_rng_state(), random)
    torch.manual_seed(1)
    mask = (nn.functional.dropout(torch.ones(6, 5).double(), 0.5)).detach()

    class Masked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return mask * model.above.x.linear(2 * x)

    twin = PCGraph(
        **{name: (model.get_submodule(name), *parents) for name, (_, *parents) in layers().items()},
        above={"x": (Masked(), "a")},
    )
    second = PCInfer(twin, squared_error, X, Y, ErrType, n=5)
    assert_close(first.v, second.v, 1e-12)


def test_a_target_of_classes_is_read_by_an_embedding() -> None:
    torch.manual_seed(0)
    model = PCGraph(
        hidden=(nn.Linear(5, 4), "x"),
        out=(tanh(4, 3), "hidden"),
        above={"hidden": (nn.Embedding(3, 4), "out")},
    ).double()
    X, Y = torch.randn(6, 5).double(), torch.tensor([0, 2, 0, 2, 2, 0])
    result = PCInfer(model, nn.CrossEntropyLoss(reduction="sum"), X, Y, "Strict")
    grad = model.above.hidden.weight.grad
    assert torch.equal(grad.abs().sum(1) > 0, torch.tensor([True, False, True]))
    error = model.above.hidden.weight.detach()[Y] - result.v[1]
    assert_close(grad[0], error[Y == 0].sum(0), 0.2)  # of the last iteration, before its step


def test_compiled_calls_run_plainly() -> None:
    case = two_sided()
    expected = case.infer("Strict", n=3)
    with pytest.warns(UserWarning, match="beliefs are predicted from above"):
        found = case.infer("Strict", n=3, compile=True)
    assert_close(found.v, expected.v, 0)


@pytest.mark.parametrize("ErrType", ["Strict", "ErrorBased", "Equilibrium"])
def test_follow_adds_up_the_whole_energy(ErrType: str) -> None:
    case = two_sided()
    record = follow(*case, ErrType, n=6, precision=PI)
    found = case.infer(ErrType, n=6, precision=PI)
    F = lambda v: reference.two_sided_energy(case.model, squared_error, case.Y, v, PI).item()  # noqa: E731
    assert float(record.F[0]) == pytest.approx(F(found.vhat))
    assert float(record.F[-1]) == pytest.approx(F(found.v))
    with pytest.raises(ValueError, match="no predictions from above for FixedPred"):
        follow(*case, "FixedPred")


def test_copies_pickles_and_pictures() -> None:
    case = two_sided()
    expected = case.infer("Strict", n=3)
    for twin in (copy.deepcopy(case.model), pickle.loads(pickle.dumps(case.model))):
        assert_close(case._replace(model=twin).infer("Strict", n=3).v, expected.v, 0)
    assert "above.x <- a" in repr(case.model) and "above.b <- out" in repr(case.model)
    assert case.model._repr_svg_().count("stroke-dasharray") == 5
    assert torch.equal(case.model(case.X), expected.vhat[-1])
    with pytest.raises(ValueError, match=r"above\.x' of a PCGraph must not be taken away"):
        case.model.above.x = None
        case.infer("Strict")


def test_what_cannot_be_is_refused_by_name() -> None:
    def refused(error: type[Exception], message: str, **above: Any) -> None:
        with pytest.raises(error, match=re.escape(message)):
            PCGraph(**layers(), above=above)

    linear = nn.Linear(4, 4)
    with pytest.raises(TypeError, match="above must be a dict"):
        PCGraph(**layers(), above=[linear])  # type: ignore[arg-type]
    refused(ValueError, "above must have the input or hidden layers", out=(linear, "a"))
    refused(ValueError, "above must have the input or hidden layers", d=(linear, "a"))
    refused(ValueError, "'above.a' has an unknown parent 'a'", a=(linear, "a"))
    refused(TypeError, "'above.a' must be (module, *names of its parents)", a=linear)
    refused(TypeError, "must take as many inputs as it has parents", a=(linear, "b", "c"))

    case = two_sided()
    for ErrType in ("Exact", "FixedPred"):
        with pytest.raises(ValueError, match=f"no predictions from above for {ErrType}"):
            case.infer(ErrType)
    with pytest.raises(ValueError, match="nudge must be None where beliefs are predicted"):
        case.infer("Strict", nudge=0.1)
    with pytest.raises(ValueError, match="precision must have hidden layers as keys"):
        case.infer("Strict", precision={"above.out": 1.0})
    with pytest.raises(ValueError, match=r"precision must have len\(model\) - 1 = 3 entries"):
        case.infer("Strict", precision=[1.0] * 7)
    narrow = PCGraph(**layers(), above={"x": (nn.Linear(4, 4), "a")}).double()
    with pytest.raises(
        ValueError, match=r"model.above.x .* must predict what the input is, \(6, 5\)"
    ):
        case._replace(model=narrow).infer("Strict")
    with pytest.raises(TypeError, match=r"Y must be a torch\.Tensor where a layer of PCGraph"):
        PCInfer(case.model, lambda y, Y: y.sum(), case.X, None, "Strict")
    words = PCGraph(
        a=(nn.Embedding(9, 4), "x"), out=(linear, "a"), above={"x": (nn.Linear(4, 5), "a")}
    )
    with pytest.raises(ValueError, match="must predict what the input is"):
        PCInfer(words, squared_error, torch.zeros(2, 5).long(), torch.zeros(2, 5, 4), "Strict")


def test_one_precision_is_that_of_the_predictions_from_above_too() -> None:
    torch.manual_seed(0)
    model = PCGraph(
        a=(nn.Linear(5, 4), "x"),
        b=(nn.Linear(4, 4), "a"),
        out=(nn.Linear(4, 3), "b"),
        above={"a": (nn.Linear(4, 4), "b")},
    ).double()
    X, Y = torch.randn(2, 5).double(), torch.randn(2, 3).double()
    everywhere, named = [
        PCInfer(model, nn.functional.mse_loss, X, Y, "Strict", n=4, precision=precision)
        for precision in (0.5, {"a": 0.5, "b": 0.5, "above.a": 0.5})
    ]
    for found, expected in zip(everywhere.epsilon[1:], named.epsilon[1:], strict=True):
        assert torch.equal(found, expected)
    plain = PCInfer(model, nn.functional.mse_loss, X, Y, "Strict", n=4)
    assert not torch.equal(plain.epsilon[1], named.epsilon[1])
