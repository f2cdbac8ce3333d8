"""Training inside other people's tools, where they are installed: the updates are those of backprop.

They are none of what the tests need, so that each of these is skipped where its tool is missing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.cases import assert_close
from torch2pc import PCInfer

# These warn of what does not matter here: few workers, no logger, deprecated parts of PyTorch.
pytestmark = pytest.mark.filterwarnings("ignore")
LossFun = nn.CrossEntropyLoss()


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
        nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Dropout(0.2), nn.Tanh()),
        nn.Linear(8, 3),
    )


def batches(size: int = 8) -> DataLoader[Any]:
    torch.manual_seed(1)
    X, Y = torch.randn(3 * size, 1, 6, 6), torch.randint(3, (3 * size,))
    return DataLoader(TensorDataset(X, Y), size)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.01)


def train(
    model: nn.Module, learn: Callable[[nn.Module, Tensor, Tensor], Any], optimizer: Any, data: Any
) -> list[Tensor]:
    """The parameters and buffers after an epoch."""
    for k, (X, Y) in enumerate(data):
        torch.manual_seed(k)
        learn(model, X, Y)
        optimizer.step()
    return [value.detach() for value in model.state_dict().values()]


def backprop(model: nn.Module, X: Tensor, Y: Tensor) -> None:
    model.zero_grad()
    LossFun(model(X), Y).backward()


def pc(ErrType: str) -> Callable[[nn.Module, Tensor, Tensor], Any]:
    return lambda model, X, Y: PCInfer(model, LossFun, X, Y, ErrType)


def by_backprop() -> list[Tensor]:
    model = make_model()
    return train(model, backprop, adam(model), batches())


@pytest.mark.parametrize("ErrType", ["Exact", "FixedPred", "Strict"])
def test_accelerate(ErrType: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    plain = make_model()
    expected = train(plain, pc(ErrType), adam(plain), batches())
    model = make_model()
    prepared = accelerate.Accelerator(cpu=True).prepare(model, adam(model), batches())
    found = train(prepared[0], pc(ErrType), *prepared[1:])
    assert_close(found, expected, 0.0)
    if ErrType == "Exact":
        assert_close(found, by_backprop(), 0.0)


@pytest.fixture
def quiet() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    yield
    logging.disable(before)


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("automatic", [False, True])
def test_lightning(automatic: bool, tmp_path: Any) -> None:
    lightning = pytest.importorskip("lightning")

    class Lit(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = make_model()
            self.automatic_optimization = automatic

        def training_step(self, batch: Any, k: int) -> Tensor:
            torch.manual_seed(k)
            result = PCInfer(self.model, LossFun, *batch, "Exact")
            if not automatic:
                self.optimizers().step()
            return result.Loss

        def configure_optimizers(self) -> Any:
            return adam(self.model)

    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=1, default_root_dir=tmp_path, **dict.fromkeys(off, False)
    )
    lit = Lit()
    with pytest.raises(TypeError, match="automatic_optimization = False"):
        PCInfer(lit, LossFun, *next(iter(batches())), "Exact")
    if automatic:  # Lightning calls Loss.backward()
        with pytest.raises(RuntimeError, match="does not require grad"):
            trainer.fit(lit, batches())
        return
    trainer.fit(lit, batches())
    assert_close([value.detach() for value in lit.model.state_dict().values()], by_backprop(), 0.0)


@pytest.mark.parametrize("learn", [backprop, pc("Exact")])
def test_opacus(learn: Callable[[nn.Module, Tensor, Tensor], Any]) -> None:
    """Without noise and clipping, what it gathers of each example is the batch's gradient."""
    opacus = pytest.importorskip("opacus")

    def make() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU()),
            nn.Sequential(nn.Flatten(), nn.Linear(64, 3)),
        )

    def sgd(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.5)

    model = make()
    expected = train(model, backprop, sgd(model), batches())
    model = make()
    private, optimizer, data = opacus.PrivacyEngine().make_private(
        module=model,
        optimizer=sgd(model),
        data_loader=batches(),
        noise_multiplier=0.0,
        max_grad_norm=1e6,
        poisson_sampling=False,
    )
    X, Y = next(iter(data))
    with pytest.raises(TypeError, match=r"model must be an nn\.Sequential"):
        PCInfer(private, LossFun, X, Y, "Exact")

    def step(_: nn.Module, X: Tensor, Y: Tensor) -> None:
        optimizer.zero_grad()  # what the hooks gathered is Opacus's
        learn(model, X, Y)

    assert_close(train(model, step, optimizer, data), expected, 1e-5)
