"""The figure on Strict's stability: the networks it cuts, what it measures, what it keeps."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from paper_figures import __main__ as command
from paper_figures import figure_stability as stability
from paper_figures.data import load_digits
from paper_figures.nets import mnist_net
from paper_figures.report import Options

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "model", [mnist_net(), stability.mlp(3, 20, nn.ReLU), stability.mlp(8, 20, nn.Tanh)]
)
def test_the_other_cut_is_the_same_network(model: nn.Sequential) -> None:
    recut = stability.cut_before(model)
    X = torch.rand(3, 1, 28, 28)
    assert torch.equal(recut(X), model(X))
    assert [*map(id, recut.parameters())] == [*map(id, model.parameters())]
    assert len(recut) == len(model)
    activations = (nn.ReLU, nn.Tanh)
    assert not any(isinstance(module, activations) for module in recut[0])
    for item in recut[1:]:
        assert isinstance(item[0], activations)
        assert list(item[-1].parameters())


def test_modules_after_the_last_parameters_stay_with_them() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Sequential(nn.ReLU(), nn.Linear(3, 2)), nn.Softmax(1))
    recut = stability.cut_before(model)
    assert [[type(module) for module in item] for item in recut] == [
        [nn.Linear],
        [nn.ReLU, nn.Linear, nn.Softmax],
    ]


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([2.3] + [0.2] * 50, False),
        ([2.3, 4.0, 3.0] + [0.2] * 50, False),  # before it was low
        ([2.3] + [0.2] * 30 + [2.0] + [0.2] * 20, False),  # one batch
        ([2.3] + [0.2] * 30 + [0.9] * 10, True),
        ([2.3] + [0.2] * 30 + [0.9] * 10 + [0.2] * 10, True),
        ([2.3] * 50, True),
        ([2.3] + [0.7] * 30 + [0.9] * 10, False),  # slow
        ([2.3] + [0.2] * 30 + [math.nan], True),
        ([math.nan] * 20, True),
    ],
)
def test_blowing_up(losses: list[float], expected: bool) -> None:
    assert stability.blew_up(losses) == expected


@pytest.mark.parametrize("cut", [lambda model: model, stability.cut_before])
def test_the_growth_of_weights_that_leave_inactive_units(cut) -> None:
    """Of two units made inactive one leaves weights twice as long, the other four times."""
    torch.manual_seed(0)
    model = cut(stability.mlp(1, 300, nn.ReLU))
    first, last = [module for module in model.modules() if isinstance(module, nn.Linear)]
    with torch.no_grad():
        first.bias += 100  # all others are active
        first.bias[:2] = -1000
    measure = stability.OfInactiveUnits(model, torch.rand(5, 1, 28, 28))
    assert measure.growth() == 1
    with torch.no_grad():
        last.weight[:, 0] *= 2
        last.weight[:, 1] *= 4
        last.weight[:, 2:] *= 9
    assert measure.growth() == pytest.approx(3)


def test_without_inactive_units_there_is_no_growth_to_tell() -> None:
    model = stability.mlp(1, 300, nn.Tanh)
    assert math.isnan(stability.OfInactiveUnits(model, torch.rand(5, 1, 28, 28)).growth())


def test_all_methods_start_from_the_same_loss_and_see_the_same_batches(tmp_path: Path) -> None:
    data, options = load_digits(None), Options(None, tmp_path, CPU)
    found = [
        stability.train(
            stability.Training("2x30", "cross-entropy", 1e-3, method, 1, 4), data, options
        )
        for method in stability.METHODS
    ]
    first = found[0]["loss"][0]
    assert all(one["loss"][0] == pytest.approx(first) for one in found)
    assert len({one["loss"][-1] for one in found}) > 2


def test_finished_trainings_are_kept_and_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, options = load_digits(None), Options(None, tmp_path, CPU)
    done: list[stability.Training] = []

    def train(training: stability.Training, *_: object) -> dict[str, object]:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(training)
        return {"loss": [math.inf], "accuracy": 0.1, "growth": [math.nan]}

    monkeypatch.setattr(stability, "train", train)
    asked = [
        stability.Training("3x300", "cross-entropy", 1e-3, "at vhat", seed) for seed in (0, 1, 0, 2)
    ]
    with pytest.raises(KeyboardInterrupt):
        stability.Runs("figure_stability", stability.train, data, options).finish(asked)
    assert done == asked[:2]
    done.clear()
    runs = stability.Runs("figure_stability", stability.train, data, options)
    runs.finish(asked)
    assert done == asked[3:]
    assert [path.name for path in tmp_path.iterdir()] == ["figure_stability_runs.json"]
    assert runs[asked[0]]["loss"] == [math.inf] and math.isnan(runs[asked[1]]["growth"][0])
    with pytest.raises(KeyError):
        runs[stability.Training("8x300", "cross-entropy", 1e-3, "at vhat", 0)]


def test_the_command_draws_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--figure", "stability", "--quick", "--out", str(tmp_path), "--device", "cpu"]
    assert command.main(arguments) == 0
    record = json.loads((tmp_path / "figure_stability.json").read_text())
    methods = {training["method"] for training in record["series"]}
    assert methods == set(stability.METHODS)
    assert all(len(training["loss"]) == 12 for training in record["series"])
    assert (tmp_path / "figure_stability.png").read_bytes().startswith(b"\x89PNG")
    assert "Strict's training: where it blows up" in capsys.readouterr().out
