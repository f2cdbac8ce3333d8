"""The memory figure: what its parts do, and a run of it that is far too short to learn anything."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from paper_figures import report
from paper_figures.letters import load_letters
from paper_figures.memory import figure_memory


def test_right_is_the_share_of_tries_that_found_their_target():
    index = torch.tensor([[[0, 1, 2], [0, 0, 0]], [[0, 1, 2], [0, 1, 2]], [[1, 2, 0], [2, 0, 1]]])
    assert figure_memory.right(index) == [4 / 6, 1, 0]


def test_bounds_hold_on_their_side():
    assert figure_memory.bound("share", "at least", 0.9, 0.95).agrees
    assert not figure_memory.bound("share", "at least", 0.9, 0.85).agrees
    assert figure_memory.bound("loss", "at most", 0.015, 0.01).agrees
    assert not figure_memory.bound("loss", "at most", 0.015, 0.02).agrees


def test_training_lowers_the_loss_and_makes_the_causes_the_centres(monkeypatch):
    monkeypatch.setattr(figure_memory, "TRAINING_STEPS", 60)
    targets = load_letters(None).trajectories
    for settings in figure_memory.REFERENCE, figure_memory.OURS:
        model = figure_memory.train(targets, settings, seed=0)
        assert model.centres.shape == (20, 2)
        assert 0 < figure_memory.relative_loss(model, targets) < 0.6


def test_the_figure_is_drawn_and_its_numbers_saved(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(figure_memory, "TRAINING_STEPS", 3)
    monkeypatch.setattr(figure_memory, "COMPARED_PASSES", 5)
    monkeypatch.setattr(figure_memory, "PAPER_RIGHT", {2: 0.66, 5: 0.74, 9: 0.74})
    monkeypatch.setattr(figure_memory, "PAPER_RIGHT_AT_BEST", {2: 0.99, 5: 1.0, 9: 1.0})
    options = report.Options(None, tmp_path, torch.device("cpu"), quick=True)
    numbers = figure_memory.run(options)
    assert len(numbers) == 9
    record = json.loads((tmp_path / "figure_memory.json").read_text())
    assert len(record["numbers"]) == 9
    assert record["data"]["letters"] == 20
    assert record["settings"]["seeds"] == [0, 1]
    ours = record["series"]["our settings"]
    assert [len(curve) for curve in ours["right"]] == [5, 5]
    assert (tmp_path / "figure_memory.png").stat().st_size > 10_000
    assert (tmp_path / "figure_memory.pdf").stat().st_size > 1_000
