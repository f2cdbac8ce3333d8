"""Bad input: the right error, which names the argument, and nothing changed."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.cases import ERR_TYPES, Case, assert_close
from torch2pc import PCInfer, group_layers, steps

X, Y = torch.ones(6, 4), torch.zeros(6, 3)


class Overriding(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class TakesTheLast(nn.Module):
    """An in-place write that no ``inplace`` attribute announces."""

    def forward(self, x: Tensor) -> Tensor:
        x[:, -1] = 0
        return 2 * x


def under_inference_mode() -> Tensor:
    with torch.inference_mode():
        return torch.ones(6, 4)


def beliefs(**changed: Any) -> list[Any]:
    """A valid vinit for ``make_model()``, with entries 1 to 3 replaced as given."""
    valid = {f"v{l}": torch.zeros(6, 5) for l in (1, 2, 3)}
    return [None, *(valid | changed).values(), None]


def make_model(*more: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(), *more, nn.Linear(5, 3))


class LightningModule(nn.Module):
    """Lightning's class, as far as its name goes."""


class FSDPModule:
    """What ``fully_shard`` makes a base class of each module that it shards."""


class ShardedLinear(FSDPModule, nn.Linear):
    pass


class DistributedDataParallel(nn.Module):
    """PyTorch's needs other processes."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


class FullyShardedDataParallel(DistributedDataParallel):
    """As the older one that shards."""


class Complex(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.complex(x, x)


ARGUMENTS = [
    (dict(model=nn.Linear(4, 3)), TypeError, r"torch2pc\.group_layers\(model, X\)"),
    (dict(model=LightningModule()), TypeError, "automatic_optimization = False"),
    (
        dict(model=DistributedDataParallel(nn.Sequential(nn.Linear(4, 3)))),
        TypeError,
        r"pass the nn.Sequential that it wraps.*torch2pc\.distributed\.PCInfer",
    ),
    (
        dict(model=FullyShardedDataParallel(make_model())),
        TypeError,
        "got FullyShardedDataParallel: pass the nn.Sequential that it wraps",
    ),
    (
        dict(model=make_model(FullyShardedDataParallel(nn.Linear(5, 5)))),
        TypeError,
        "whole parameters, got FullyShardedDataParallel, whose parameters are sharded",
    ),
    (dict(model=nn.DataParallel(make_model())), TypeError, "pass the nn.Sequential that it wraps"),
    (
        dict(model=make_model(DistributedDataParallel(nn.Linear(5, 5)))),
        TypeError,
        r"items wrapped in DistributedDataParallel.*torch2pc\.distributed\.PCInfer",
    ),
    (
        dict(model=make_model(nn.Sequential(ShardedLinear(5, 5)))),
        TypeError,
        r"whole parameters, got ShardedLinear.*fully_shard.*torch2pc\.distributed\.PCInfer",
    ),
    (
        dict(model=nn.Linear(4, 3)),
        TypeError,
        "model must be an nn.Sequential or a PCGraph, got Linear",
    ),
    (dict(model=nn.ModuleList([nn.Linear(4, 3)])), TypeError, "model .* got ModuleList"),
    (dict(model=nn.Sequential()), ValueError, "model must have at least one layer"),
    (
        dict(model=Overriding(nn.Linear(4, 3))),
        TypeError,
        "model .* Overriding, .*group_layers",
    ),
    (dict(LossFun="mse"), TypeError, "LossFun must be a callable .* got str"),
    (dict(X=[[1.0]]), TypeError, "X must be a torch.Tensor, got list"),
    (dict(X=under_inference_mode()), ValueError, "X must be .*inference_mode"),
    (dict(ErrType="exact"), ValueError, "ErrType must be one of .*Exact.*, got 'exact'"),
    (dict(ErrType=["Exact"]), ValueError, "ErrType must be one of"),
    (
        dict(ErrType="FixedPred", eta="big"),
        ValueError,
        "eta must be a finite number or \"auto\", got 'big'",
    ),
    (dict(ErrType="Strict", eta="Auto"), ValueError, "eta must be .* or \"auto\", got 'Auto'"),
    (dict(ErrType="Strict", eta=[0.1]), TypeError, "eta must be a finite number or .*, got list"),
    (dict(ErrType="FixedPred", eta=torch.ones(2)), TypeError, r"eta .* got Tensor of shape \(2,\)"),
    (dict(ErrType="FixedPred", eta=torch.tensor(True)), TypeError, "eta must be .* got Tensor"),
    (dict(ErrType="Strict", eta=torch.tensor(1j)), TypeError, "eta must be .* got Tensor"),
    (dict(ErrType="Strict", eta=torch.tensor(torch.inf)), ValueError, "eta must be .* got inf"),
    (dict(ErrType="FixedPred", eta=float("nan")), ValueError, "eta must be a finite number"),
    (
        dict(ErrType="Strict", eta=float("inf")),
        ValueError,
        "eta must be a finite number or .*, got inf",
    ),
    (
        dict(ErrType="Strict", X=torch.ones(6, 4, device="meta")),
        ValueError,
        "X must hold numbers, .* on the meta device",
    ),
    (dict(ErrType="Strict", n=0), ValueError, "n must be an int >= 1, got 0"),
    (dict(ErrType="FixedPred", n=2.0), TypeError, "n must be an int >= 1, got float"),
    (dict(ErrType="Strict", n=True), TypeError, "n must be an int >= 1, got bool"),
    (dict(ErrType="Strict", vinit=torch.ones(5)), TypeError, "vinit must be None or a list"),
    (dict(ErrType="Strict", vinit=beliefs()[1:]), ValueError, r"vinit must have .* = 5 entries"),
    (dict(ErrType="Strict", vinit=beliefs(v2=None)), TypeError, r"vinit\[2\] must be a tensor"),
    (dict(ErrType="Strict", update_at="vhats"), ValueError, "update_at must be .* got 'vhats'"),
    (dict(ErrType="Strict", update_at=None), ValueError, "update_at must be .*v.*vhat.* got None"),
    (
        dict(ErrType="Strict", vinit=beliefs(v1=torch.ones(6, 4))),
        ValueError,
        r"vinit\[1\] .*\(6, 5\).* got shape \(6, 4\)",
    ),
    (
        dict(ErrType="Strict", vinit=beliefs(v3=torch.ones(6, 5).double())),
        ValueError,
        r"vinit\[3\] .*float32.*float64",
    ),
    (
        dict(ErrType="Strict", vinit=beliefs(v3=torch.ones(6, 5, device="meta"))),
        ValueError,
        r"vinit\[3\] .*on cpu.*on meta",
    ),
]

FOUND_ON_THE_WAY = [
    (
        dict(model=make_model(nn.LSTM(5, 5))),
        TypeError,
        r"model\[3\] \(LSTM\) must return one .*tuple",
    ),
    (
        dict(model=make_model(TakesTheLast())),
        RuntimeError,
        r"model\[3\] \(TakesTheLast\) wrote into",
    ),
    (
        dict(model=make_model(Complex())),
        TypeError,
        r"model\[3\] \(Complex\) .*complex64; beliefs are real: return torch.view_as_real",
    ),
    (dict(LossFun=nn.MSELoss(reduction="none")), ValueError, r"LossFun .*\(6, 3\).*reduction"),
    (dict(LossFun=lambda yhat, Y: 1.0), TypeError, "LossFun .*must return one .*tensor, got float"),
    (dict(LossFun=lambda yhat, Y: Y.sum()), ValueError, "LossFun must depend on the output"),
    (
        dict(LossFun=lambda yhat, Y: Y.requires_grad_().sum(), Y=Y.clone()),
        ValueError,
        "LossFun must depend on the output",
    ),
]


def check_raises(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    model = arguments.get("model", make_model())
    arguments = dict(model=model, LossFun=nn.MSELoss(), X=X, Y=Y, ErrType="Exact") | arguments
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    before = copy.deepcopy(model)
    random = torch.get_rng_state()
    with pytest.raises(error, match=message):
        PCInfer(**arguments)

    assert torch.equal(torch.get_rng_state(), random)
    assert_close(model.state_dict(), before.state_dict(), tolerance=0)
    assert all((p.grad == 7).all() and p.requires_grad for p in model.parameters())
    assert torch.equal(X, torch.ones(6, 4)) and X.grad is None


@pytest.mark.parametrize(("arguments", "error", "message"), ARGUMENTS)
def test_bad_argument(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    check_raises(arguments, error, message)


@pytest.mark.parametrize("ErrType", ERR_TYPES)
@pytest.mark.parametrize(("arguments", "error", "message"), FOUND_ON_THE_WAY)
def test_bad_layer_or_loss(
    ErrType: str, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    check_raises({"ErrType": ErrType, **arguments}, error, message)


@pytest.mark.parametrize("ErrType", ERR_TYPES)
def test_writing_into_X_is_an_error_that_leaves_it_as_it_was(ErrType: str) -> None:
    case = Case(nn.Sequential(TakesTheLast(), nn.Linear(4, 3)), nn.MSELoss(), X.clone(), Y)
    with pytest.raises(RuntimeError, match=r"model\[0\] \(TakesTheLast\) wrote into its input"):
        case.infer(ErrType)
    assert torch.equal(case.X, X)


@pytest.mark.parametrize("ErrType", ERR_TYPES)
def test_non_finite_values_pass_through(ErrType: str) -> None:
    case = Case(make_model(), nn.MSELoss(), torch.full((6, 4), torch.inf), Y)
    result = case.infer(ErrType)
    assert result.Loss.isnan() and case.model[0].weight.grad.isnan().any()


NAMES: list[tuple[str, Callable[[Any], object]]] = [
    ("ErrType", lambda x: PCInfer(make_model(), nn.MSELoss(), X, Y, x)),
    ("update_at", lambda x: PCInfer(make_model(), nn.MSELoss(), X, Y, "Strict", update_at=x)),
    ("sweep", lambda x: steps.Descent(0.1, sweep=x)),
    ("cut", lambda x: group_layers(make_model(), X, cut=x)),
]


@pytest.mark.parametrize(("argument", "call"), NAMES)
@pytest.mark.parametrize("several", [["Strict"], np.array(["before", "down"])])
def test_what_is_chosen_by_name_is_one_string(
    argument: str, call: Callable[[Any], object], several: Any
) -> None:
    """Of arrays each entry would be compared."""
    with pytest.raises(ValueError, match=f"{argument} must be .*got (array|\\[)"):
        call(several)


def test_scalars_of_numpy_and_torch_are_numbers() -> None:
    case = Case(make_model().eval(), nn.MSELoss(), X, Y)
    expected = case.infer("Strict", eta=0.5, n=3)
    etas = [
        np.float32(0.5),
        np.array(0.5),
        torch.tensor(0.5),
        torch.tensor(0.5, requires_grad=True),
    ]
    for eta in etas:
        found = case.infer("Strict", eta=eta, n=np.int64(3))
        assert_close(list(found), list(expected), tolerance=0)


@pytest.mark.parametrize("ErrType", ["FixedPred", "Strict"])
def test_n_of_None_is_the_number_of_layers(ErrType: str) -> None:
    case = Case(make_model().eval(), nn.MSELoss(), X, Y)
    expected = case.infer(ErrType, n=4)
    assert_close(list(case.infer(ErrType, n=None)), list(expected), tolerance=0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's compiler, when imported
def test_a_compiled_model_is_told_apart() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    check_raises(dict(model=torch.compile(model)), TypeError, "pass the model that was compiled")


def test_what_is_no_module_is_given_no_advice() -> None:
    with pytest.raises(TypeError, match=r"model must be an nn\.Sequential or a PCGraph, got list$"):
        PCInfer([nn.Linear(4, 3)], nn.MSELoss(), X, Y, "Exact")


def wrapped_by_accelerate(model: nn.Sequential) -> nn.Sequential:
    """As ``Accelerator.prepare`` does it with mixed precision."""

    def to_fp32(forward: Any) -> Any:
        @functools.wraps(forward)
        def converted(*args: Any) -> Tensor:
            return forward(*args).float()

        return converted

    autocast = torch.autocast("cpu", torch.bfloat16)
    model._original_forward = model.forward
    model.forward = MethodType(to_fp32(autocast(model.forward.__func__)), model)
    return model


@pytest.mark.parametrize("ErrType", ERR_TYPES)
def test_a_model_prepared_by_accelerate_is_accepted(ErrType: str) -> None:
    model = make_model().eval()
    plain = Case(copy.deepcopy(model), nn.MSELoss(), X, Y)
    prepared = plain._replace(model=wrapped_by_accelerate(model))
    assert prepared.model(X).dtype == torch.float32
    assert_close(list(prepared.infer(ErrType)), list(plain.infer(ErrType)), tolerance=0)


def test_other_wrappers_of_the_forward_are_not() -> None:
    model = make_model()

    @functools.wraps(nn.Sequential.forward)
    def doubled(self: nn.Sequential, x: Tensor) -> Tensor:
        return 2 * nn.Sequential.forward(self, x)

    # (A function of its own is no method.) Nor does it help to keep the original.
    for forward in MethodType(doubled, model), lambda x: 2 * x, MethodType(lambda m, x: x, model):
        model.forward = forward
        check_raises(dict(model=model), TypeError, "model must use nn.Sequential's forward")
    model = make_model()
    model._original_forward = model.forward
    for forward in lambda x: 2 * x, MethodType(lambda m, x: x, model):
        model.forward = forward
        check_raises(dict(model=model), TypeError, "model must use nn.Sequential's forward")


@pytest.mark.parametrize("ErrType", ERR_TYPES)
@pytest.mark.parametrize("transform", [torch.vmap, torch.func.grad])
def test_not_inside_a_transform(ErrType: str, transform: Any) -> None:
    model = make_model()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)

    def loss(x: Tensor) -> Tensor:
        return PCInfer(model, nn.MSELoss(), x, Y, ErrType).Loss

    with pytest.raises(RuntimeError, match=r"inside a torch\.func transform"):
        transform(loss)(X.expand(2, 6, 4))
    assert all((p.grad == 7).all() for p in model.parameters())
