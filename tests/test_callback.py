"""``callback``, called after each iteration, and ``energy``, computed when it is read."""

from __future__ import annotations

import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.cases import ERR_TYPES, RELAXED, Case, assert_close, squared_error
from torch2pc import PCInferLatent, PCResult


def small_case() -> Case:
    model = nn.Sequential(
        nn.Linear(4, 5),
        nn.Sequential(nn.Tanh(), nn.Linear(5, 5)),
        nn.Sequential(nn.Tanh(), nn.Dropout(0.2), nn.Linear(5, 3)),
    ).double()
    return Case(model, squared_error, torch.randn(6, 4).double(), torch.randn(6, 3).double())


class Listener:
    """Keeps copies of what a callback is given."""

    def __init__(self) -> None:
        self.heard: list[tuple[int, list[Tensor], list[Tensor | None]]] = []

    def __call__(self, k: int, v: list[Tensor], epsilon: list[Tensor | None]) -> None:
        assert not torch.is_grad_enabled()
        copies = [None if e is None else e.clone() for e in epsilon]
        self.heard.append((k, [v_l.clone() for v_l in v], copies))


@pytest.mark.parametrize("ErrType", RELAXED)
@pytest.mark.parametrize("dX", [False, True])
def test_after_iteration_k_it_is_given_what_n_k_returns(ErrType: str, dX: bool) -> None:
    case, listener = small_case(), Listener()
    case.X.requires_grad_(dX)
    torch.manual_seed(1)
    result = case.infer(ErrType, n=4, callback=listener)
    grads = case.gradients()
    assert [k for k, _, _ in listener.heard] == [1, 2, 3, 4]
    for k, v, epsilon in listener.heard:
        torch.manual_seed(1)
        expected = case.infer(ErrType, n=k)
        assert_close(v, expected.v)
        assert epsilon[0] is None
        assert_close(epsilon[1:], expected.epsilon[1:])
    assert_close(case.gradients(), grads, tolerance=0)  # a listener changes nothing
    assert_close(list(result), list(expected), tolerance=0)


def test_of_the_latent() -> None:
    case, listener = small_case(), Listener()
    model, LossFun, X, Y = case
    model.eval()
    PCInferLatent(model, LossFun, Y, X, 0.1, 3, callback=listener)
    assert [k for k, _, _ in listener.heard] == [1, 2, 3]
    for k, v, _ in listener.heard:
        assert_close(v, PCInferLatent(model, LossFun, Y, X, 0.1, k).v)


@pytest.mark.parametrize("ErrType", RELAXED)
def test_one_that_raises_leaves_all_as_it_was(ErrType: str) -> None:
    case = small_case()
    before = torch.get_rng_state()

    def stop(k: int, v: Any, epsilon: Any) -> None:
        if k == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        case.infer(ErrType, n=4, callback=stop)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(g is None for g in case.gradients().values())


@pytest.mark.parametrize(
    ("ErrType", "options", "error", "match"),
    [
        ("Strict", dict(callback=3), TypeError, "callback must be None or a callable .* got int"),
        ("Strict", dict(callback=print, compile=True), ValueError, "None with compile=True"),
        ("ErrorBased", dict(callback=print, compile=True), ValueError, "None with compile=True"),
        ("Exact", dict(callback=print), ValueError, "None for Exact and FixedPred"),
        ("FixedPred", dict(callback=print), ValueError, "closed form.*torch2pc.follow"),
    ],
)
def test_bad_ones(ErrType: str, options: Any, error: type[Exception], match: str) -> None:
    case = small_case()
    with pytest.raises(error, match=match):
        case.infer(ErrType, **options)
    assert all(g is None for g in case.gradients().values())


@pytest.mark.parametrize("options", [dict(callback=print, compile=True), dict(callback="x")])
def test_bad_ones_of_the_latent(options: Any) -> None:
    model, LossFun, X, Y = small_case()
    with pytest.raises((TypeError, ValueError), match="callback must be None"):
        PCInferLatent(model, LossFun, Y, X, 0.1, 3, **options)


@pytest.mark.parametrize("ErrType", ERR_TYPES)
def test_the_energy_of_a_result(ErrType: str) -> None:
    result = small_case().infer(ErrType)
    *_, epsilon = result
    assert len(result) == 5
    expected = torch.stack([0.5 * e.square().sum() for e in epsilon[1:-1]])
    assert_close(result.energy, expected)
    assert result.energy.shape == (2,) and not result.energy.requires_grad
    assert_close(pickle.loads(pickle.dumps(result)).energy, expected)
    file = io.BytesIO()
    torch.save(result, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert isinstance(loaded, PCResult)
    assert_close(loaded.energy, expected)


def test_one_layer_has_no_energy() -> None:
    case = small_case()._replace(model=nn.Sequential(nn.Linear(4, 3)).double())
    assert case.infer("Strict").energy.shape == (0,)
