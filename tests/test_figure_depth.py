"""The figure on depth: its networks, its tuning, what it measures, and that it can be interrupted."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from paper_figures import __main__ as command
from paper_figures.data import Batch, load_digits
from paper_figures.depth import figure_depth as figure
from paper_figures.depth import networks
from paper_figures.report import Options
from torch2pc import PCInfer

CPU = torch.device("cpu")
QUICK = Options(None, Path(), CPU, quick=True)
NAMES = ["ReLU", "tanh", "ReLU residual", "GELU residual", "ReLU muPC"]


def batch_of(count: int, size: int = 64) -> Batch:
    return next(networks.batches_of(load_digits(None), 1, range(count), CPU))


@pytest.mark.parametrize("name", NAMES)
def test_a_network_is_cut_before_the_activation(name: str) -> None:
    model = networks.network(name, 6, [0, 1])
    assert len(model) == 6
    assert model(torch.rand(2, 3, 784)).shape == (2, 3, 10)
    inside = model[2]
    x = torch.randn(2, 3, networks.WIDTH)
    made = inside.scale * networks.ACTIVATIONS[name.split()[0]](x) @ inside.weight
    torch.testing.assert_close(inside(x), made + x if " " in name else made)


@pytest.mark.parametrize("name", NAMES)
def test_signal_and_gradient_keep_their_size_through_40_layers(name: str) -> None:
    model, batch = networks.network(name, 40, [0]), batch_of(1)
    result = PCInfer(model, networks.summed, batch.X, batch.labels, "Exact")
    for values in result.vhat[1:-1], result.epsilon[1:-1]:
        sizes = [value.norm().item() for value in values]
        assert max(sizes) < 12 * min(sizes)


# A step size that is found is one for all networks of a call.
@pytest.mark.parametrize(
    "method", [method for method in networks.METHODS if method != networks.FOUND]
)
def test_networks_side_by_side_have_the_updates_of_each_alone(method: str) -> None:
    seeds, batch = [3, 5], batch_of(2)
    together = networks.network("ReLU residual", 4, seeds)
    with networks.quietly():
        networks.update(method, together, batch)
        for k, seed in enumerate(seeds):
            alone = networks.network("ReLU residual", 4, [seed])
            own = Batch(batch.X[k : k + 1], batch.labels[k : k + 1])
            networks.update(method, alone, own)
            for one, other in zip(alone.parameters(), together.parameters(), strict=True):
                torch.testing.assert_close(one.grad[0], other.grad[k], rtol=1e-4, atol=1e-8)


def test_held_out_images_are_the_last_of_the_training_images() -> None:
    digits = load_digits(None)
    found = networks.held_out(digits)
    assert torch.equal(found.train_images, digits.train_images[:9000])
    assert torch.equal(found.test_images, digits.train_images[9000:])
    assert torch.equal(found.test_labels, digits.train_labels[9000:])


@pytest.mark.parametrize(
    ("method", "seeds"), [(networks.FEW_SWEEPS, (0, 1)), (networks.FOUND, (0,))]
)
def test_every_network_learns_at_its_own_rate_from_its_own_seed(
    method: str, seeds: tuple[int, ...]
) -> None:
    """As a training of torch's Adam has it, one network at a time."""
    grid = networks.Grid("ReLU", 3, method, (1e-4, 1e-3), seeds, 12)
    found = networks.train(grid, load_digits(None), CPU)["held out"]
    data = networks.held_out(load_digits(None))
    for rate, accuracies in zip(grid.rates, found, strict=True):
        for seed, accuracy in zip(grid.seeds, accuracies, strict=True):
            model = networks.network("ReLU", 3, [seed])
            optimizer = torch.optim.Adam(model.parameters(), lr=rate)
            for batch in networks.batches_of(data, 12, [seed], CPU):
                networks.update(method, model, batch)
                optimizer.step()
            assert accuracy == pytest.approx(networks.accuracies(model, data, CPU).item(), abs=0.3)


def test_the_best_rate_is_chosen_on_held_out_images_and_of_equal_ones_the_lowest() -> None:
    grid = next(figure.Plan().grids())
    found = {
        "held out": [[50.0, 52.0], [60.0, 70.0], [70.0, 60.0], [math.nan, 80.0]],
        "test": [[1.0, 2.0], [3.0, 5.0], [6.0, 7.0], [8.0, 9.0]],
    }
    outcome = figure.Outcome.of(grid, found)
    assert (outcome.rate, outcome.test, outcome.mean) == (3e-4, [3.0, 5.0], 4.0)


def test_incremental_makes_as_many_weight_updates_as_the_others() -> None:
    model = networks.network("ReLU", 3, [0])
    count = networks.BELIEF_STEPS
    made = networks.updates(networks.INCREMENTAL, model, iter([batch_of(1)] * 2))
    assert len(list(made)) == 2 * count


def test_stopped_it_draws_what_there_is_and_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[networks.Grid] = []

    def train(grid: networks.Grid, *_: object) -> dict[str, object]:
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(grid)
        return {"held out": [[90.0]], "test": [[80.0]]}

    monkeypatch.setattr(figure, "train", train)
    monkeypatch.setattr(figure, "draw", lambda *_: Figure(figsize=(1, 1)))
    monkeypatch.setattr(figure, "seconds_at", lambda *_: dict.fromkeys(networks.METHODS, 0.1))
    options = replace(QUICK, out=tmp_path)
    figure.run(options)
    record = json.loads((tmp_path / "figure_depth.json").read_text())
    assert [found["method"] for found in record["series"]["trainings"]] == [g.method for g in done]
    first = list(done)
    done.clear()
    figure.run(options)
    assert not {*first} & {*done} and len(done) == 5


def test_the_command_draws_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--figure", "depth", "--quick", "--out", str(tmp_path), "--device", "cpu"]
    assert command.main(arguments) == 0
    record = json.loads((tmp_path / "figure_depth.json").read_text())
    trained = {(found["network"], found["method"]) for found in record["series"]["trainings"]}
    assert {network for network, _ in trained} == {*figure.Plan().networks()}
    assert {method for network, method in trained if network == "ReLU"} == {*networks.METHODS}
    assert {found["method"] for found in record["series"]["search for eta and n"]} == {
        "Multipliers, η .5, n 3",
        "Multipliers, η .5, n 10",
    }
    for found in record["series"]["layers"].values():
        assert len(found["cosine"]) == len(found["length"]) == 4
    first, *_, last = record["series"]["distance from backprop's errors"]["by sweep"]["1.0"]
    assert last < first
    assert (tmp_path / "figure_depth.png").read_bytes().startswith(b"\x89PNG")
    assert "How deep predictive coding learns" in capsys.readouterr().out
