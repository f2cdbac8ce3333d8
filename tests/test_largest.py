"""Memory of models that are large: the formula against measured peaks, and batches taken in parts."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import largest
from benchmarks.largest import FAMILIES, Layer, largest_depth, measured, middle_layer, strict_bytes
from benchmarks.report import Options
from tests.cases import assert_close
from torch2pc import PCInfer


@pytest.mark.parametrize("family", FAMILIES[:2], ids=lambda family: family.name.partition(":")[0])
def test_formula_is_what_is_measured(family: largest.Family) -> None:
    assert 0.7 < measured(family, 8) < 1.1


def test_sizes_of_a_layer() -> None:
    """ReLU keeps two tensors of its input's size, Linear none."""
    layer = middle_layer(FAMILIES[0], 32, 5)
    assert layer.parameters == 4 * (32 * 32 + 32)
    assert layer.output == 4 * 32
    assert layer.prepared == 2 * 4 * 32
    assert layer.saved == 4 * 32
    assert layer.flops == 2 * 32 * 32
    fetched, computed = 6 * 4 * 32 / 1e9, 2 * 2 * 32 * 32 / 1e12
    assert largest.offload(layer, link=1e9, flops=1e12) == pytest.approx(fetched / computed)


def test_largest_depth_is_the_largest() -> None:
    layer = Layer(1000, 30, 20, 40, 500, 1)
    depth = largest_depth(layer, 7, "Strict", memory=1e6)
    # Parameters besides; the first layer, prepared with nothing, is counted like the others.
    need = [strict_bytes(layer, d, 7, largest.ADAM) + 1000 * d + 7 * 20 for d in (depth, depth + 1)]
    assert need[0] <= 1e6 < need[1]


def test_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(largest, "FAMILIES", FAMILIES[:1])
    largest.run(Options(tmp_path, [], [1], 0.0, quick=True))
    assert "On 24 GiB" in (tmp_path / "largest.md").read_text("utf-8")


@pytest.mark.parametrize("ErrType", ["Exact", "FixedPred", "Strict"])
def test_a_batch_in_parts_gives_the_whole_batchs_updates(ErrType: str) -> None:
    """One example after the other, with a mean that is weighted by each part's share."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Sequential(nn.Tanh(), nn.Linear(6, 3))).double()
    twin = copy.deepcopy(model)
    X, Y = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 2, 1, 1, 0])
    PCInfer(twin, F.cross_entropy, X, Y, ErrType)
    for part in (slice(0, 1), slice(1, 3), slice(3, 5)):
        share = len(Y[part]) / len(Y)

        def weighted(prediction: Tensor, Y: Tensor, share: float = share) -> Tensor:
            return share * F.cross_entropy(prediction, Y)

        PCInfer(model, weighted, X[part], Y[part], ErrType, accumulate=True)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert_close(p.grad, q.grad, 1e-12)


def test_saved_tensors_may_be_kept_elsewhere() -> None:
    """Autograd's way to keep them in the CPU's memory works around a call."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Sequential(nn.Tanh(), nn.Linear(6, 3)))
    X, Y = torch.randn(5, 4), torch.randn(5, 3)
    expected = PCInfer(model, F.mse_loss, X, Y, "Strict").epsilon[1]
    with torch.autograd.graph.save_on_cpu():
        found = PCInfer(model, F.mse_loss, X, Y, "Strict").epsilon[1]
    assert_close(found, expected, 0)
