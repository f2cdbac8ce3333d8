"""Published architectures: models are cut where they should be, what is wrong is found, and some pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import architectures
from benchmarks.architectures import CHECKS


class Block(nn.Module):
    """Residual, with a convolution that starts as none."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.norm(self.conv(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.shift = nn.Conv2d(3, 4, 4, stride=4), nn.Parameter(torch.zeros(4, 1, 1))
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(4, 10)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.stem(x) + self.shift
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


class Skips(Net):
    """What comes out of the stem goes past all blocks."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = first = self.stem(x) + self.shift
        for block in self.blocks:
            x = block(x)
        return self.head((x + first).mean((2, 3)))


class Branches(Net):
    """Its forward pass depends on shapes, and hands on several tensors at a time."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, channels, *_ = x.shape
        if len(x) != batch or x.size(1) > 3:
            raise ValueError("other images")
        x = torch.cat([part + 1 for part in x.split(1)])
        return super().forward(x, mask).view(batch, 3 * channels + 1)


class Pair(Net):
    """Returns its input, too."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        return super().forward(x, mask), x


@pytest.mark.parametrize(
    ("kind", "shapes"),
    [
        (Net, [(4, 4, 4), (4, 4, 4), (4,), (10,)]),
        (Skips, [(4, 4, 4), (4,), (10,)]),
        (Branches, [(4, 4, 4), (4, 4, 4), (4,), (10,)]),
        (Pair, None),
    ],
)
def test_items_end_where_one_tensor_goes_on(kind: type[nn.Module], shapes: Any) -> None:
    model, X = kind(), torch.randn(2, 3, 16, 16)
    items = architectures.cut(model, X)
    if shapes is None:
        assert items is None
        return
    assert items is not None
    assert set(items.parameters()) == set(model.parameters())
    for item, shape in zip(items, shapes, strict=True):
        X = item(X)
        assert X.shape[1:] == shape


def test_all_is_right_of_a_small_network() -> None:
    count, found = architectures.check(Net)
    assert count == 4
    assert set(found) == {"Exact", "FixedPred", "Strict"}
    assert architectures.is_right(found)


@pytest.mark.parametrize("ErrType", list(CHECKS))
def test_what_is_wrong_is_found(ErrType: str, monkeypatch: pytest.MonkeyPatch) -> None:
    infer = architectures.PCInfer

    def slightly_wrong(items: nn.Sequential, *arguments: object, **options: object) -> None:
        infer(items, *arguments, **options)
        if arguments[3] == ErrType:
            next(items[-1].parameters()).grad[0, 0] += 1e-3

    monkeypatch.setattr(architectures, "PCInfer", slightly_wrong)
    _, found = architectures.check(Net)
    wrong = [name for name, (_, tolerance) in CHECKS.items() if not found[name] <= tolerance]
    assert wrong == [ErrType]


@pytest.mark.parametrize(
    ("library", "name"),
    [("torchvision", "shufflenet_v2_x0_5"), ("timm", "test_vit"), ("pytorchcv", "resnet10")],
)
def test_a_published_one_passes(
    library: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip(library, exc_type=ImportError)
    assert architectures.main(["--only", name]) == 0
    assert f"{library} {name}: " in capsys.readouterr().out
