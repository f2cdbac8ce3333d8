"""Real networks, all algorithms, train and eval mode, in float32, bfloat16 and on a GPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paper_figures.data import load_digits
from paper_figures.nets import mnist_net
from tests.cases import ERR_TYPES, RELAXED, Case, assert_close, check_against_reference
from torch2pc import PCInfer

err_types = pytest.mark.parametrize("ErrType", ERR_TYPES)
relaxed = pytest.mark.parametrize("ErrType", RELAXED)
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


class Residual(nn.Module):
    """A basic residual block."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(channels, out, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(inplace=True),
            nn.Conv2d(out, out, 3, padding=1, bias=False),
            nn.BatchNorm2d(out),
        )
        self.skip = nn.Conv2d(channels, out, 1, stride) if stride > 1 else nn.Identity()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.main(x) + self.skip(x))


class LastState(nn.Module):
    """An LSTM that returns one tensor: its output at the last time."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(features, hidden, num_layers=2, dropout=0.3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0][:, -1]


class MeanOverTime(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def lenet() -> tuple[nn.Sequential, Tensor]:
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 4, 5), nn.Tanh(), nn.AvgPool2d(2)),
        nn.Sequential(nn.Conv2d(4, 6, 3), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten()),
        nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Dropout()),
        nn.Linear(20, 5),
    )
    return model, torch.rand(6, 1, 12, 12)


def vgg() -> tuple[nn.Sequential, Tensor]:
    def block(channels: int, out: int) -> list[nn.Module]:
        return [nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]

    model = nn.Sequential(
        *block(3, 4), *block(4, 4), nn.MaxPool2d(2), nn.Sequential(*block(4, 8)), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32, 16), nn.ReLU(inplace=True), nn.Dropout(),
        nn.Linear(16, 5),
    )  # fmt: skip
    return model, torch.rand(6, 3, 8, 8)


def resnet() -> tuple[nn.Sequential, Tensor]:
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
        Residual(4, 4, 1),
        Residual(4, 8, 2),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)),
    )
    return model, torch.rand(6, 3, 8, 8)


def transformer() -> tuple[nn.Sequential, Tensor]:
    layers = [
        nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True, norm_first=first)
        for first in (False, True)
    ]
    return nn.Sequential(nn.Linear(3, 8), *layers, MeanOverTime(), nn.Linear(8, 5)), torch.rand(
        6, 4, 3
    )


def mlp_layernorm() -> tuple[nn.Sequential, Tensor]:
    blocks = [
        nn.Sequential(nn.Linear(10, 10), nn.LayerNorm(10), nn.GELU(), nn.Dropout(0.2))
        for _ in range(3)
    ]
    return nn.Sequential(*blocks, nn.Linear(10, 5)), torch.rand(6, 10)


def groupnorm() -> tuple[nn.Sequential, Tensor]:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(inplace=True), nn.Dropout2d(0.3),
        nn.Conv2d(4, 4, 3), nn.GroupNorm(4, 4), nn.SiLU(), nn.Flatten(), nn.Linear(64, 5),
    )  # fmt: skip
    return model, torch.rand(6, 3, 8, 8)


def conv1d() -> tuple[nn.Sequential, Tensor]:
    model = nn.Sequential(
        nn.Sequential(nn.Conv1d(2, 4, 5), nn.BatchNorm1d(4), nn.LeakyReLU(inplace=True)),
        nn.Sequential(nn.Conv1d(4, 4, 3, dilation=2), nn.Hardswish(inplace=True), nn.MaxPool1d(2)),
        nn.Flatten(),
        nn.Linear(16, 5),
    )
    return model, torch.rand(6, 2, 16)


def text() -> tuple[nn.Sequential, Tensor]:
    model = nn.Sequential(
        nn.Embedding(20, 8, padding_idx=0),
        nn.Dropout(0.2),
        nn.Linear(8, 8),
        nn.ReLU(inplace=True),
        MeanOverTime(),
        nn.Linear(8, 5),
    )
    return model, torch.randint(20, (6, 7))


def lstm() -> tuple[nn.Sequential, Tensor]:
    return nn.Sequential(nn.Linear(3, 6), LastState(6, 8), nn.Linear(8, 5)), torch.rand(6, 7, 3)


MODELS = [lenet, vgg, resnet, transformer, mlp_layernorm, groupnorm, conv1d, text, lstm]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("train", [True, False])
@err_types
@pytest.mark.parametrize("make", MODELS)
def test_stands_in_for_backward(
    make: Callable[[], tuple[nn.Sequential, Tensor]], ErrType: str, train: bool, device: str
) -> None:
    torch.manual_seed(1)
    model, X = make()
    model.train(train).double().to(device)
    X = (X.double() if X.is_floating_point() else X).to(device)
    Y = torch.randint(5, (6,), device=device)
    case = Case(model, nn.CrossEntropyLoss(), X, Y)

    twin = copy.deepcopy(model)
    torch.manual_seed(2)
    Loss = case.LossFun(twin(X), Y)
    Loss.backward()
    random = torch.get_rng_state(), torch.rand(3, device=device)

    torch.manual_seed(2)
    result = case.infer(ErrType, n=10)
    assert torch.equal(torch.get_rng_state(), random[0])
    assert torch.equal(torch.rand(3, device=device), random[1])
    assert_close(result.Loss, Loss.detach())
    assert_close(model.state_dict(), twin.state_dict(), tolerance=1e-12)
    if ErrType == "Exact":
        assert_close(case.gradients(), {name: p.grad for name, p in twin.named_parameters()})


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    ("ErrType", "options"),
    [
        ("FixedPred", {}),
        ("Strict", {}),
        ("Strict", {"update_at": "vhat"}),
        ("ErrorBased", {}),
        ("ErrorBased", {"update_at": "vhat"}),
        ("Equilibrium", {}),
    ],
)
@pytest.mark.parametrize("make", MODELS)
def test_equals_the_iteration(
    make: Callable[[], tuple[nn.Sequential, Tensor]],
    ErrType: str,
    options: dict[str, str],
    train: bool,
) -> None:
    torch.manual_seed(1)
    model, X = make()
    model.train(train).double()
    X = X.double() if X.is_floating_point() else X
    check_against_reference(
        Case(model, nn.CrossEntropyLoss(), X, torch.randint(5, (6,))), ErrType, n=10, **options
    )


def cast(dtype: torch.dtype) -> Case:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Sequential(nn.Linear(12, 16), nn.ReLU()), nn.Sequential(nn.Linear(16, 16), nn.Tanh()),
        nn.Linear(16, 3),
    ).to(dtype)  # fmt: skip
    return Case(
        model, nn.CrossEntropyLoss(), torch.randn(32, 12).to(dtype), torch.randint(3, (32,))
    )


@err_types
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_hold_beliefs_in_float32(ErrType: str, dtype: torch.dtype) -> None:
    case = cast(dtype)
    result = case.infer(ErrType)
    expected = case._replace(model=copy.deepcopy(case.model).float(), X=case.X.float())
    of_float32 = expected.infer(ErrType)
    assert (
        {v.dtype for v in result.v[1:]} == {e.dtype for e in result.epsilon[1:]} == {torch.float32}
    )
    assert {p.grad.dtype for p in case.model.parameters()} == {dtype}
    # Strict's errors are differences of predictions in half precision, the others' are not.
    tolerance = 0.3 if ErrType == "Strict" else 0.05
    for found, wanted in zip(result.epsilon[1:], of_float32.epsilon[1:], strict=True):
        assert (found - wanted).norm() < tolerance * wanted.norm()
    for found, wanted in zip(case.gradients().values(), expected.gradients().values(), strict=True):
        assert (found.float() - wanted).norm() < tolerance * wanted.norm()


@err_types
def test_a_loss_is_given_what_the_model_returns(ErrType: str) -> None:
    case, given = cast(torch.bfloat16), set()

    def loss(yhat: Tensor, Y: Tensor) -> Tensor:
        given.add(yhat.dtype)
        return nn.functional.cross_entropy(yhat, Y)

    for eta in (0.1, "auto"):
        case._replace(LossFun=loss).infer(ErrType, eta=eta)
    assert given == {torch.bfloat16}


def test_half_precision_beliefs_move_by_less_than_their_rounding() -> None:
    """A bfloat16 belief near 1 would need a step of 1/256 to move at all."""
    case = cast(torch.bfloat16)
    result = case.infer("Strict", eta=1e-4, n=1)
    moved = result.v[2] - result.vhat[2].float()
    assert 0 < moved.abs().max() < 1e-4


@relaxed
def test_vinit_of_a_half_precision_model_is_what_was_returned(ErrType: str) -> None:
    case = cast(torch.bfloat16)
    once = case.infer(ErrType, n=5)
    for vinit in (once.v, [v.bfloat16() for v in once.v]):
        case.infer(ErrType, n=5, vinit=vinit)


@err_types
@pytest.mark.parametrize("device", DEVICES)
def test_autocast(ErrType: str, device: str) -> None:
    case = cast(torch.float32)
    case.model.to(device)
    case = case._replace(X=case.X.to(device), Y=case.Y.to(device))
    twin = copy.deepcopy(case.model)
    with torch.autocast(device, torch.bfloat16):
        Loss = case.LossFun(twin(case.X), case.Y)
        result = case.infer(ErrType)
        outputs = {h.dtype for h in result.vhat[1:]}
        assert torch.is_autocast_enabled(device)
    Loss.backward()
    assert outputs == {torch.bfloat16}
    assert {v.dtype for v in result.v} == {torch.float32}
    assert {p.grad.dtype for p in case.model.parameters()} == {torch.float32}
    if ErrType == "Exact":
        assert_close(
            case.gradients(), {k: p.grad for k, p in twin.named_parameters()}, tolerance=1e-6
        )


def accuracy_after_training(ErrType: str, autocast: bool, seed: int, steps: int = 60) -> float:
    """Percent of 2000 test digits, trained by Adam on 100 digits a step."""
    torch.manual_seed(seed)
    items = [nn.Sequential(nn.ReLU(), nn.Linear(64, out)) for out in (64, 10)]
    model = nn.Sequential(nn.Sequential(nn.Flatten(), nn.Linear(784, 64)), *items)
    data = load_digits(None)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    device = torch.device("cpu")
    for batch in data.train_batches(steps, 100, seed, device):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            PCInfer(model, nn.CrossEntropyLoss(), batch.X, batch.labels, ErrType, n=6)
        optimizer.step()
    test = next(iter(data.all_test_batches(2000, device)))
    with torch.no_grad():
        return 100 * (model(test.X).argmax(1) == test.labels).float().mean().item()


@pytest.mark.parametrize("ErrType", ["FixedPred", "Strict"])
def test_bfloat16_autocast_learns_as_well_as_float32(ErrType: str) -> None:
    """In the mean of two seeds: one moves by a point or two, with backpropagation too."""
    of_float32, of_bfloat16 = (
        sum(accuracy_after_training(ErrType, autocast, seed) for seed in range(2)) / 2
        for autocast in (False, True)
    )
    assert of_float32 > 80
    assert abs(of_bfloat16 - of_float32) < 2


def updates_of_each_layer(model: nn.Sequential, ErrType: str, kind: str) -> list[Tensor]:
    """All of a layer's update in one vector, on a batch of digits."""
    model = copy.deepcopy(model)
    batch = next(iter(load_digits(None).train_batches(1, 100, 0, torch.device("cpu"))))
    X = batch.X
    if kind == "bfloat16 model":
        model, X = model.bfloat16(), X.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        PCInfer(model, nn.CrossEntropyLoss(), X, batch.labels, ErrType)
    return [torch.cat([p.grad.double().flatten() for p in layer.parameters()]) for layer in model]


@pytest.mark.parametrize("kind", ["autocast", "bfloat16 model"])
@relaxed
def test_half_precision_costs_no_more_than_in_backpropagation(ErrType: str, kind: str) -> None:
    """Within 2% in each layer of a smooth network; where units switch, as much as Exact loses."""
    smooth = nn.Sequential(
        nn.Sequential(nn.Flatten(), nn.Linear(784, 100), nn.Tanh()),
        *(nn.Sequential(nn.Linear(100, 100), nn.Tanh()) for _ in range(5)),
        nn.Linear(100, 10),
    )
    for model in smooth, mnist_net():
        off = {}
        for algorithm in "Exact", ErrType:
            pairs = zip(
                updates_of_each_layer(model, algorithm, kind),
                updates_of_each_layer(model, algorithm, "float32"),
                strict=True,
            )
            off[algorithm] = [
                ((found - right).norm() / right.norm()).item() for found, right in pairs
            ]
        if model is smooth:
            assert max(off[ErrType]) < 0.02
        assert max(off[ErrType]) < 1.5 * max(off["Exact"])


class Single(nn.Module):
    """Hands on float32, as layers do that normalise in it."""

    def forward(self, x: Tensor) -> Tensor:
        return x.float()


@pytest.mark.parametrize("kind", ["dense", "dense, to float32", "convolutional", "attention"])
@pytest.mark.parametrize(("ErrType", "n", "eta"), [("Strict", 6, 0.1), ("ErrorBased", 1, 1e-6)])
def test_errors_too_small_for_float16_arrive(ErrType: str, n: int, eta: float, kind: str) -> None:
    """Under its autocast; the largest of them in layer 1 are about 1e-9, and float16 ends at 6e-8."""
    if kind == "convolutional":
        items = [nn.Sequential(nn.Conv2d(c, 3, 3, padding=1), nn.Tanh()) for c in (1, 3, 3, 3, 3)]
        model, X = nn.Sequential(*items, nn.Sequential(nn.Flatten(), nn.Linear(75, 4))), (1, 5, 5)
    elif kind.startswith("dense"):
        last = Single() if "float32" in kind else nn.Identity()
        items = [nn.Sequential(nn.Linear(20, 20), nn.Tanh(), last) for _ in range(5)]
        model, X = nn.Sequential(*items, nn.Linear(20, 4)), (20,)
    else:
        items = [nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True) for _ in range(5)]
        model, X = nn.Sequential(*items, nn.Sequential(nn.Flatten(), nn.Linear(32, 4))), (4, 8)
    case = Case(model, nn.MSELoss(), torch.randn(50, *X), torch.randn(50, 4))
    case.infer(ErrType, n=n, eta=eta)
    right = copy.deepcopy(case.gradients())
    with torch.autocast("cpu", torch.float16):
        result = case.infer(ErrType, n=n, eta=eta)
    assert result.epsilon[1].abs().max() < 1e-7
    for name, update in case.gradients().items():
        # Units of the attention's ReLU switch.
        tolerance = 0.05 if kind == "attention" else 0.01
        assert (update - right[name]).norm() < tolerance * right[name].norm(), name


def test_grad_scaler() -> None:
    """A scaled loss scales Exact's and FixedPred's updates, which unscale_ takes back."""
    for ErrType in ("Exact", "FixedPred"):
        case = cast(torch.float32)
        case.infer(ErrType)
        expected = copy.deepcopy(case.gradients())
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        optimizer = torch.optim.SGD(case.model.parameters(), 0.1)

        def scaled(yhat: Tensor, Y: Any, case: Case = case, scaler: Any = scaler) -> Tensor:
            return scaler.scale(case.LossFun(yhat, Y))

        PCInfer(case.model, scaled, case.X, case.Y, ErrType)
        scaler.unscale_(optimizer)
        assert_close(case.gradients(), expected, tolerance=1e-5)
        scaler.step(optimizer)
        scaler.update()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("ErrType", ERR_TYPES[:5])
def test_it_does_not_wait_for_the_gpu(ErrType: str) -> None:
    case = cast(torch.float32)
    case.model.cuda()
    case = case._replace(X=case.X.cuda(), Y=case.Y.cuda())
    case.infer(ErrType)
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.infer(ErrType, n=20)
    finally:
        torch.cuda.set_sync_debug_mode("default")
