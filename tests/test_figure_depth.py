"""The figure on depth: its networks, its tuning, what it measures, and that it can be interrupted."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from paper_figures import __main__ as command
from paper_figures import figure_depth as depth
from paper_figures.data import Batch, load_digits
from paper_figures.report import Options
from paper_figures.runs import Runs
from torch2pc import PCInfer

CPU = torch.device("cpu")
QUICK = Options(None, Path(), CPU, quick=True)
NETWORKS = [f"{activation}{kind}" for activation in depth.ACTIVATIONS for kind in ("", " residual")]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_has_as_many_layers_cut_before_the_activation(name: str) -> None:
    model = depth.network(name, 6)
    assert len(model) == 6
    assert model(torch.rand(2, 1, 28, 28)).shape == (2, 10)
    kind = depth.ACTIVATIONS[name.removesuffix(" residual")]
    for item in model[1:]:
        modules = [module for module in item.modules() if not list(module.children())]
        assert [type(module) for module in modules] == [kind, nn.Linear]
    assert isinstance(model[1], depth.Residual) == name.endswith("residual")


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "GELU"])
def test_signal_and_gradient_keep_their_size_through_40_layers(name: str) -> None:
    torch.manual_seed(0)
    model = depth.network(name, 40)
    batch = next(load_digits(None).train_batches(1, 64, 0, CPU))
    result = PCInfer(model, depth.cross_entropy, batch.X, batch.labels, "Exact")
    for values in result.vhat[1:-1], result.epsilon[1:-1]:
        sizes = [value.norm().item() for value in values]
        assert max(sizes) < 12 * min(sizes)


def test_residual_items_add_to_their_input() -> None:
    x = torch.randn(3, 4)
    inner = nn.Linear(4, 4)
    torch.testing.assert_close(depth.Residual(inner, 0.5)(x), x + inner(x) / 2)


def test_test_images_are_held_out_from_the_choice_of_the_learning_rate() -> None:
    digits = load_digits(None)
    found = depth.held_out(digits)
    assert torch.equal(found.train_images, digits.train_images[:9000])
    assert torch.equal(found.test_images, digits.train_images[9000:])
    assert torch.equal(found.test_labels, digits.train_labels[9000:])


@pytest.mark.parametrize("method", [name for name in depth.METHODS if name != depth.INCREMENTAL])
def test_every_methods_updates_lower_the_loss(method: str) -> None:
    torch.manual_seed(0)
    model = depth.network("ReLU", 4)
    batch = Batch(torch.rand(8, 1, 28, 28), torch.arange(8))
    before = depth.cross_entropy(model(batch.X), batch.labels)
    with depth.quietly():
        depth.update(method, model, batch)
    assert all(parameter.grad is not None for parameter in model.parameters())
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    assert depth.cross_entropy(model(batch.X), batch.labels) < before


def test_updates_of_a_multiple_of_the_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(depth, "PCInfer", lambda *given, **_: asked.append(given[4:]))
    batch = Batch(torch.rand(8, 1, 28, 28), torch.arange(8))
    for layers in 3, 7:
        depth.update("Strict, η .1, n 4L", depth.network("ReLU", layers), batch)
    assert asked == [("Strict", 0.1, 12), ("Strict", 0.1, 28)]


def test_the_best_rate_is_chosen_and_of_equal_ones_the_lowest(tmp_path: Path) -> None:
    accuracy = {1e-4: 50.0, 3e-4: 60.0, 1e-3: 60.0, 3e-3: math.nan}
    plan = depth.Plan()
    runs = Runs(
        "figure_depth",
        lambda training, *_: {"accuracy": accuracy[training.lr]},
        load_digits(None),
        Options(None, tmp_path, CPU),
    )
    tunings = plan.tunings("ReLU", depth.BACKPROP, 5)
    runs.finish(tunings)
    assert depth.chosen_lr(tunings[:3], runs) == 3e-4
    assert all(training.held_out for training in tunings)
    finals = plan.finals("ReLU", depth.BACKPROP, 5, 3e-4)
    assert {training.seed for training in finals} == {0, 1, 2}
    assert not {training.seed for training in finals} & {training.seed for training in tunings}


def test_methods_with_too_many_iterations_are_left_out() -> None:
    points = list(depth.Plan().points("ReLU"))
    assert ("Strict, auto, n 4L", 20) in points
    assert ("Strict, auto, n 4L", 40) not in points
    assert {method for method, at in points if at == 3} == {*depth.METHODS}
    few = list(depth.Plan().points("tanh"))
    assert {method for method, _ in few} == {*depth.FEW}


def test_incremental_makes_as_many_weight_updates_as_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    step = torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: (made.append(1), step(self)))
    for method in depth.BACKPROP, depth.INCREMENTAL:
        made.clear()
        training = depth.Training("ReLU", 3, method, 1e-3, 0, 23, False)
        depth.train(training, load_digits(None), Options(None, tmp_path, CPU))
        assert len(made) == 23


def test_stopped_it_draws_what_there_is_and_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[depth.Training] = []

    def train(training: depth.Training, *_: object) -> dict[str, object]:
        if len(done) == 10:
            raise KeyboardInterrupt
        done.append(training)
        return {"accuracy": 90.0 + len(training.method) / 10}

    monkeypatch.setattr(depth, "train", train)
    method = depth.FEW[1]
    monkeypatch.setattr(depth, "seconds_at", lambda *_: {method: 0.1})
    monkeypatch.setattr(depth, "layers_of", lambda *_: {method: {"length": [1], "cosine": [1]}})
    monkeypatch.setattr(depth, "distances", lambda *_: dict.fromkeys(depth.RELAXATIONS, [1] * 3))
    options = replace(QUICK, out=tmp_path)
    depth.run(options)
    record = json.loads((tmp_path / "figure_depth.json").read_text())
    # Two rates and a seed for each.
    assert [found[1] for found in read(record)] == list(depth.METHODS)[:3]
    first = list(done)
    done.clear()
    depth.run(options)
    assert not {*first} & {*done} and len(done) == 10


def read(record: dict) -> list[list[object]]:
    return [list(found.values()) for found in record["series"]["trainings"]]


def test_the_command_draws_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--figure", "depth", "--quick", "--out", str(tmp_path), "--device", "cpu"]
    assert command.main(arguments) == 0
    record = json.loads((tmp_path / "figure_depth.json").read_text())
    trained = {(found["network"], found["method"]) for found in record["series"]["trainings"]}
    assert trained == {("ReLU", method) for method in depth.METHODS} | {
        ("tanh residual", method) for method in depth.FEW
    }
    assert {*record["series"]["layers"]} == {*depth.METHODS} - {depth.BACKPROP, depth.INCREMENTAL}
    for found in record["series"]["layers"].values():
        assert len(found["cosine"]) == len(found["length"]) == 6
    far, *_, near = record["series"]["distance from equilibrium"]["ErrorBased"]
    assert near < far
    assert (tmp_path / "figure_depth.png").read_bytes().startswith(b"\x89PNG")
    assert "How deep predictive coding learns" in capsys.readouterr().out
