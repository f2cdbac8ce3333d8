"""The benchmark's figure: its network and settings, incremental steps, Fashion-MNIST beside MNIST."""

from __future__ import annotations

import copy
import json
import struct
from pathlib import Path

import pytest
import torch
from torch import nn

from paper_figures import __main__ as command
from paper_figures import training
from paper_figures.data import FASHION_FILES, Batch, fashion_folder, load_digits
from paper_figures.pcx import figure_pcx_benchmark as benchmark
from paper_figures.report import Options
from torch2pc import PCInfer, steps

CPU = torch.device("cpu")


@pytest.mark.parametrize("activation", benchmark.ACTIVATIONS)
def test_the_network_is_cut_before_the_activations(activation: str) -> None:
    model = benchmark.network(activation)
    assert model(torch.rand(2, 1, 28, 28)).shape == (2, 10)
    assert [layer[-1].out_features for layer in model] == [128, 128, 128, 10]
    assert [type(layer[0]) for layer in model[1:]] == [
        type(benchmark.ACTIVATIONS[activation]())
    ] * 3
    extremes = model[0][0](torch.tensor([0.0, 1.0]))
    assert extremes.tolist() == [-1, 1]


def test_errors_are_summed_over_the_batch() -> None:
    output, labels = torch.randn(6, 10), torch.arange(6)
    for LossFun in benchmark.LOSSES.values():
        singly = [LossFun(output[k : k + 1], labels[k : k + 1]) for k in range(6)]
        torch.testing.assert_close(LossFun(output, labels), torch.stack(singly).sum())


def test_the_learning_rate_climbs_for_a_tenth_of_the_steps_and_then_goes_down() -> None:
    shares = [benchmark.share_of_lr(k / 100) for k in range(101)]
    assert shares[0] == 1
    assert shares[10] == pytest.approx(1.1) == max(shares)
    assert shares[100] == pytest.approx(0.1) == min(shares)
    assert shares[10:] == sorted(shares[10:], reverse=True)


@pytest.mark.parametrize("mu", [0.0, 0.4])
def test_incremental_steps_without_steps_of_the_weights_are_those_of_strict(mu: float) -> None:
    """With momentum too, which goes on from one to the next."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Sequential(nn.Tanh(), nn.Linear(4, 3))).double()
    batch = Batch(torch.randn(6, 5).double(), torch.arange(6) % 3)
    together = copy.deepcopy(model)
    arguments = training.cross_entropy, *vars(batch).values(), "Strict", steps.Momentum(0.2, mu), 7
    expected = PCInfer(together, *arguments, update_at="before")
    rule = benchmark.Kept(0.2, mu)
    *_, last = training.incremental_steps(model, training.cross_entropy, batch, rule, 7)
    for ours, theirs in zip(last.v, expected.v, strict=True):
        torch.testing.assert_close(ours, theirs)
    for ours, theirs in zip(model.parameters(), together.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_incremental_steps_see_weights_that_move() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Sequential(nn.Tanh(), nn.Linear(4, 3)))
    batch = Batch(torch.randn(6, 5), torch.arange(6) % 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for result in training.incremental_steps(model, training.cross_entropy, batch, 0.2, 5):
        losses.append(result.Loss.item())
        optimizer.step()
    assert losses == sorted(losses, reverse=True) and len(set(losses)) == 5


def test_every_row_learns(tmp_path: Path) -> None:
    data, options = load_digits(None), Options(None, tmp_path, CPU)
    for row in benchmark.ROWS["MNIST"]:
        count = 10 if row.startswith("iPC") else 30  # of batches: iPC makes 8 updates of each
        found = benchmark.train(benchmark.Training("MNIST", row, 0, count), data, options)
        assert len(found["accuracy"]) == 1 and found["accuracy"][0] > 25


def test_the_command_draws_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--figure", "pcx_benchmark", "--quick", "--out", str(tmp_path), "--device", "cpu"]
    assert command.main(arguments) == 0
    record = json.loads((tmp_path / "figure_pcx_benchmark.json").read_text())
    assert [*record["data"]] == ["MNIST"]
    assert {*record["series"]["test accuracy (%) by epoch, seeds"]["MNIST"]} == {
        *benchmark.ROWS["MNIST"]
    }
    assert (tmp_path / "figure_pcx_benchmark.png").read_bytes().startswith(b"\x89PNG")
    assert "The perceptrons of PCX's benchmark" in capsys.readouterr().out


def write_small_set(place: Path, count: int) -> None:
    """Four IDX files with MNIST's names."""
    place.mkdir()
    for name in FASHION_FILES:
        sizes = (count, 28, 28) if "images" in name else (count,)
        values = torch.randint(256 if "images" in name else 10, sizes, dtype=torch.uint8)
        header = b"\0\0\x08" + bytes([len(sizes)]) + struct.pack(f">{len(sizes)}I", *sizes)
        (place / name).write_bytes(header + values.numpy().tobytes())


def test_fashion_mnist_is_drawn_beside_mnist_if_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = {name: {"BP-SE": rows["BP-SE"]} for name, rows in benchmark.ROWS.items()}
    monkeypatch.setattr(benchmark, "ROWS", first)
    assert fashion_folder(None) is None and fashion_folder(tmp_path) is None
    place = tmp_path / "fashion-mnist"
    write_small_set(place, 150)
    assert fashion_folder(tmp_path) == place and {*FASHION_FILES} == {
        path.name for path in place.iterdir()
    }
    benchmark.run(Options(tmp_path, tmp_path / "out", CPU, quick=True))
    record = json.loads((tmp_path / "out" / "figure_pcx_benchmark.json").read_text())
    assert [*record["data"]] == ["MNIST", "Fashion-MNIST"]
    assert record["data"]["MNIST"]["name"] == "embedded digits"
    assert record["data"]["Fashion-MNIST"]["training images"] == 150
