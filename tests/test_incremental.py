"""Incremental predictive coding: Strict with n=1 that goes on from the last beliefs."""

from __future__ import annotations

import copy
import re
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests import reference
from tests.cases import Case, assert_close, calls_of, cases
from torch2pc import PCInfer
from torch2pc.displacement.lines import Displacement

EXAMPLE = Path(__file__).parent.parent / "examples" / "incremental.py"


def together(case: Case, eta: float, rate: float, steps: int) -> list[Tensor]:
    """The plain algorithm: v_l <- v_l - eta dF/dv_l and theta <- theta - rate dF/dtheta, at once."""
    L, v = len(case.model), reference.feed_forward(case.model, case.X)
    theta = list(case.model.parameters())
    for _ in range(steps):
        beliefs = [v_l.detach().requires_grad_() for v_l in v[1:L]]
        F = reference.energy_of_beliefs(case.model, case.LossFun, case.Y, [case.X, *beliefs])
        of_F = gradients(F, [*beliefs, *theta])
        v[1:L] = [v_l - eta * g for v_l, g in zip(v[1:L], of_F, strict=False)]
        with torch.no_grad():
            for parameter, g in zip(theta, of_F[L - 1 :], strict=True):
                parameter -= rate * g
    return v


def gradients(F: Tensor, at: list[Tensor]) -> list[Tensor]:
    if not F.requires_grad:
        return [torch.zeros_like(x) for x in at]
    return list(torch.autograd.grad(F, at, allow_unused=True, materialize_grads=True)) if at else []


def by_calls(case: Case, eta: float, rate: float, steps: int) -> list[Tensor]:
    optimizer = torch.optim.SGD(case.model.parameters(), rate) if any_parameters(case) else None
    v: list[Tensor] | None = None
    for _ in range(steps):
        v = case.infer("Strict", eta=eta, n=1, vinit=v, update_at="before").v
        if optimizer is not None:
            optimizer.step()
    return v


def any_parameters(case: Case) -> bool:
    return next(case.model.parameters(), None) is not None


@settings(max_examples=25)
@given(case=cases(), eta=st.floats(0.01, 0.3), steps=st.integers(1, 6))
def test_beliefs_and_weights_descend_the_energy_together(
    case: Case, eta: float, steps: int
) -> None:
    twin = case._replace(model=copy.deepcopy(case.model))
    expected = together(twin, eta, 0.05, steps)
    found = by_calls(case, eta, 0.05, steps)
    assert_close(found[:-1], expected[:-1], tolerance=1e-8)
    assert_close(list(case.model.parameters()), list(twin.model.parameters()), tolerance=1e-8)


def test_in_float32_the_beliefs_lose_nothing_on_the_way_from_call_to_call() -> None:
    """A belief is handed on as rounded as float32 is, and its error with it: to 1e-7 of the belief."""
    model = nn.Sequential(
        nn.Linear(4, 8), *(nn.Sequential(nn.Tanh(), nn.Linear(8, 8)) for _ in range(4))
    )
    X, Y = torch.randn(16, 4), torch.randn(16, 8)
    single = Case(model, nn.MSELoss(reduction="sum"), X, Y)
    double = Case(copy.deepcopy(model).double(), single.LossFun, X.double(), Y.double())
    found, expected = by_calls(single, 0.1, 0.01, 20), by_calls(double, 0.1, 0.01, 20)
    assert_close([v.double() for v in found], expected, tolerance=2e-6)
    for p, q in zip(model.parameters(), double.model.parameters(), strict=True):
        assert_close(p.detach().double(), q.detach(), tolerance=1e-5)


def test_a_call_evaluates_each_layer_once_where_its_beliefs_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Besides, the layers run in the feed-forward pass, and for their updates."""
    calls = [0] * 4
    model = nn.Sequential(*(nn.Linear(5, 5) for _ in range(4)))
    for l, layer in enumerate(model):
        layer.register_forward_hook(lambda *_, l=l: calls.__setitem__(l, calls[l] + 1))
    X, Y = torch.randn(6, 5), torch.randn(6, 5)
    v = PCInfer(model, nn.MSELoss(), X, Y, "Strict", n=1).v
    displaced = calls_of(Displacement, "forward", monkeypatch)
    calls[:] = [0] * 4
    PCInfer(model, nn.MSELoss(), X, Y, "Strict", n=1, vinit=v, update_at="before")
    assert calls == [1, 2, 2, 2] and len(displaced) == 3


def test_the_first_step_does_not_warn_of_errors_that_have_not_arrived_yet() -> None:
    case = Case(
        nn.Sequential(*(nn.Linear(5, 5) for _ in range(4))),
        nn.MSELoss(),
        torch.randn(6, 5),
        torch.randn(6, 5),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        by_calls(case, 0.1, 0.01, 3)
    with pytest.warns(UserWarning, match="The error hardly reaches"):
        case.infer("Strict", n=2)


def test_the_example_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    monkeypatch.setattr(pyplot, "show", lambda: None)
    source = EXAMPLE.read_text("utf-8")
    short = re.sub(r"= \d+  # short: (\d+)", r"= \1", source)
    assert short != source
    exec(compile(short, str(EXAMPLE), "exec"), {"__name__": "__main__"})
    pyplot.close("all")
    printed = capsys.readouterr().out
    assert "usual        accuracy" in printed and "after 40 belief steps" in printed
