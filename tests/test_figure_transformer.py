"""The transformer's figure: its texts, its model wherever beliefs lie, and the command."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from paper_figures import __main__ as command
from paper_figures.report import Options
from paper_figures.transformer import figure_transformer as figure
from paper_figures.transformer.network import (
    BATCH,
    CONTEXT,
    PLACES,
    bits_per_character,
    layers,
    load_text,
    summed_cross_entropy,
)
from torch2pc import PCGraph, PCInfer


@pytest.mark.parametrize("name", figure.TEXTS)
def test_texts_are_split_in_three(name: str) -> None:
    text = load_text(name)
    parts = [text.training, text.held_out, text.test]
    assert [len(part) for part in parts] == [72_000, 9_000, 9_000]
    assert max(int(part.max()) for part in parts) < len(text.letters)
    (X, Y), (again, _) = next(text.batches(1, 3)), next(text.batches(1, 3))
    assert X.shape == Y.shape == (BATCH, CONTEXT)
    assert torch.equal(X[:, 1:], Y[:, :-1]) and torch.equal(X, again)


def test_the_model_is_the_same_wherever_beliefs_lie() -> None:
    X = torch.randint(50, (4, CONTEXT))
    chain, *graphs = (layers(50, places, seed=0) for places in PLACES)
    for graph, names in zip(graphs, [14, 16], strict=True):
        assert isinstance(graph, PCGraph) and len(graph) == names
        torch.testing.assert_close(graph(X), chain(X))


def test_no_character_is_told_of_later_ones() -> None:
    model, X = layers(50, "between blocks", seed=0), torch.randint(50, (4, CONTEXT))
    other = X.clone()
    other[:, 20:] = 49 - X[:, 20:]
    torch.testing.assert_close(model(X)[:, :20], model(other)[:, :20], rtol=0, atol=1e-5)


def test_bits_of_a_model_that_knows_nothing() -> None:
    text = load_text("federalist")
    model = layers(len(text.letters), "between blocks", seed=0)
    torch.nn.init.zeros_(model[-1][1].weight)
    torch.nn.init.zeros_(model[-1][1].bias)
    bits = bits_per_character(model, text, "test", batches=2)
    assert bits == pytest.approx(math.log2(len(text.letters)), rel=1e-5)


def test_the_errors_of_a_divergence_are_those_of_distributions() -> None:
    text = load_text("shakespeare")
    X, Y = next(text.batches(1, 0))
    method = figure.METHODS[figure.ONE_SWEEP]
    found = []
    for energies in (None, {"1_scores": figure.energies.Categorical(-1)}):
        model = layers(len(text.letters), figure.SCORES, seed=0)
        result = PCInfer(
            model, summed_cross_entropy, X, Y, "Strict", method.eta, method.n, energies=energies
        )
        found.append(dict(zip(model.names, result.epsilon, strict=True)))
    plain, other = found
    assert not torch.equal(plain["1_q"], other["1_q"])
    assert float(other["1_scores"].sum(-1).abs().max()) < 1e-5  # of two distributions


def test_the_command_draws_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = {
        figure.BETWEEN: [figure.BACKPROP, "Multipliers"],
        figure.INSIDE: [figure.BACKPROP, figure.ONE_SWEEP + figure.DIVERGENCE],
    }
    rows = {where: {row: figure.ROWS[where][row] for row in of} for where, of in kept.items()}
    monkeypatch.setattr(figure, "ROWS", rows)
    arguments = ["--figure", "transformer", "--quick", "--out", str(tmp_path), "--device", "cpu"]
    assert command.main(arguments) == 0
    record = json.loads((tmp_path / "figure_transformer.json").read_text())
    found = record["series"]["bits a character and seconds an update"]
    assert {where: [*of] for where, of in found.items()} == kept
    assert (tmp_path / "figure_transformer.png").read_bytes().startswith(b"\x89PNG")
    assert "A transformer by predictive coding" in capsys.readouterr().out


def test_the_best_rate_is_taken_and_lost_trainings_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(training: figure.Training, text: object, options: Options) -> dict[str, float]:
        bits = 3 + len(training.method) / 100
        bits = math.nan if training.lr == max(figure.RATES) else bits
        return {"held_out": bits, "test": bits, "seconds": bits / 10}

    monkeypatch.setattr(figure, "train", train)
    options = Options(None, tmp_path, torch.device("cpu"), full=True)
    figure.run(options)
    record = json.loads((tmp_path / "figure_transformer.json").read_text())
    assert {*record["settings"]["best rates"].values()} == {min(figure.RATES)}
    of_row = record["series"]["bits a character and seconds an update"][figure.INSIDE]["ErrorBased"]
    assert len(of_row) == 6
