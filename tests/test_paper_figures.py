"""The figures' shared parts: data files, networks, measures, saved files and the command line.

Each figure's own numbers are tested in the neighbouring files.
"""

from __future__ import annotations

import gzip
import json
import math
import struct
from pathlib import Path

import pytest
import torch
from torch import nn

from paper_figures import __main__ as command
from paper_figures import data, progress, report, training
from paper_figures.nets import cifar_net, mnist_net

CPU = torch.device("cpu")


def write_idx(path: Path, values: torch.Tensor) -> None:
    header = b"\0\0\x08" + bytes([values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    content = header + values.numpy().tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def idx_folder(tmp_path: Path) -> Path:
    """Four small IDX files, gzipped and plain: 12 training and 6 test images of 4 x 3 pixels."""
    generator = torch.Generator().manual_seed(0)
    for part, count, ending in ("train", 12, ".gz"), ("t10k", 6, ""):
        images = torch.randint(256, (count, 4, 3), generator=generator, dtype=torch.uint8)
        write_idx(tmp_path / f"{part}-images-idx3-ubyte{ending}", images)
        labels = torch.arange(count, dtype=torch.uint8) % 10
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte{ending}", labels)
    return tmp_path


def test_the_embedded_digits_are_what_their_readme_says():
    digits = data.load_digits(None)
    assert digits.name == data.EMBEDDED_NAME
    assert digits.train_images.shape == (10_000, 1, 28, 28)
    assert digits.test_images.shape == (2_000, 1, 28, 28)
    # MNIST's well-known first labels.
    assert digits.train_labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert digits.test_labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert digits.train_images.max() == 255 and digits.train_images.min() == 0


def test_idx_files_are_read_plain_and_gzipped(idx_folder: Path):
    digits = data.load_digits(idx_folder)
    generator = torch.Generator().manual_seed(0)
    written = torch.randint(256, (12, 4, 3), generator=generator, dtype=torch.uint8)
    torch.testing.assert_close(digits.train_images, written.unsqueeze(1))
    assert digits.test_labels.tolist() == [0, 1, 2, 3, 4, 5]
    assert digits.name == f"IDX files of {idx_folder.name}"


@pytest.mark.parametrize("inside", ["mnist", "MNIST/raw"])
def test_idx_files_are_found_in_the_usual_folders(idx_folder: Path, inside: str):
    place = idx_folder / inside
    place.mkdir(parents=True)
    for path in list(idx_folder.glob("*ubyte*")):
        path.rename(place / path.name)
    assert len(data.load_digits(idx_folder).train_images) == 12


def test_a_folder_without_digits_gives_the_embedded_ones(tmp_path: Path):
    assert data.load_digits(tmp_path).name == data.EMBEDDED_NAME


def test_a_missing_idx_file_is_named(idx_folder: Path):
    (idx_folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(data.MissingData, match=r"lacks t10k-labels-idx1-ubyte \(plain or .gz\)"):
        data.load_digits(idx_folder)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", r"starts with the bytes \(none\)"),
        (b"\0\0", "starts with the bytes 00 00,"),
        (b"\0\0\x0d\x01\0\0\0\x01\0\0\0\0", "starts with the bytes 00 00 0d 01"),
        (b"<html>", "starts with the bytes 3c 68 74 6d"),
        (b"\0\0\x08\x03\0\0", "header of 3 dimensions"),
        (b"\0\0\x08\x01\0\0\0\x05abcd", "holds 12 bytes.* announces 13"),
        (b"\0\0\x08\x01\0\0\0\x03abcd", "holds 12 bytes.* announces 11"),
        (b"\0\0\x08\x01\0\0\0\0", "holds nothing"),
    ],
)
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_a_malformed_idx_file_is_named_with_the_mend(
    tmp_path: Path, content: bytes, complaint: str, ending: str
):
    path = tmp_path / f"file{ending}"
    path.write_bytes(gzip.compress(content) if ending else content)
    with pytest.raises(data.DataError, match=f"file{ending} .*{complaint}.*fetch the file again"):
        data.read_idx(path)


def test_a_truncated_gzip_file_is_named(idx_folder: Path):
    path = idx_folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(data.DataError, match=r"train-images-idx3-ubyte.gz is not a complete gzip"):
        data.load_digits(idx_folder)


def test_a_plain_file_named_gz_is_named(tmp_path: Path):
    (tmp_path / "file.gz").write_bytes(b"\0\0\x08\x01\0\0\0\x01a")
    with pytest.raises(data.DataError, match=r"file.gz is not a complete gzip"):
        data.read_idx(tmp_path / "file.gz")


def test_labels_that_do_not_match_the_images_are_named(idx_folder: Path):
    write_idx(idx_folder / "t10k-labels-idx1-ubyte", torch.zeros(5, dtype=torch.uint8))
    with pytest.raises(data.DataError, match=r"t10k-images.*\(6, 4, 3\).*t10k-labels.*\(5,\)"):
        data.load_digits(idx_folder)


def test_batches_show_every_training_image_once_an_epoch(idx_folder: Path):
    digits = data.load_digits(idx_folder)
    first = list(digits.train_batches(6, 4, seed=1, device=CPU))
    for epoch in first[:3], first[3:]:
        shown = torch.cat([batch.X for batch in epoch]).flatten(1)
        known = (digits.train_images / 255).flatten(1)
        assert sorted(shown.tolist()) == sorted(known.tolist())
    again = list(digits.train_batches(6, 4, seed=1, device=CPU))
    assert all(torch.equal(a.X, b.X) for a, b in zip(first, again, strict=True))
    other = list(digits.train_batches(6, 4, seed=2, device=CPU))
    assert not all(torch.equal(a.X, b.X) for a, b in zip(first, other, strict=True))


def test_a_batch_keeps_images_with_their_labels(idx_folder: Path):
    digits = data.load_digits(idx_folder)
    for batch in digits.train_batches(3, 4, seed=0, device=CPU):
        for image, label in zip(batch.X, batch.labels, strict=True):
            same = (digits.train_images / 255 == image).flatten(1).all(1)
            assert digits.train_labels[same].tolist() == [label]


def test_too_few_images_for_a_batch_are_refused(idx_folder: Path):
    digits = data.load_digits(idx_folder)
    with pytest.raises(data.DataError, match="12 training images, fewer than one batch of 13"):
        next(digits.train_batches(1, 13, seed=0, device=CPU))


@pytest.mark.parametrize(
    ("net", "image", "layers", "parameters"),
    [(mnist_net, (1, 28, 28), 5, 32_695), (cifar_net, (3, 32, 32), 6, 4_633_738)],
)
def test_the_networks_have_the_papers_sizes(net, image, layers, parameters):
    model = net()
    assert len(model) == layers
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert model(torch.zeros(2, *image)).shape == (2, 10)
    assert len(training.weights_of(model)) == layers


def test_relative_error_and_angle_of_known_vectors():
    gradient = torch.tensor([[3.0, 4.0]])
    assert training.relative_error(gradient, gradient) == 0
    assert training.angle(0.1 * gradient, gradient) == pytest.approx(0, abs=1e-5)
    assert training.relative_error(torch.tensor([[3.0, 1.5]]), gradient) == pytest.approx(0.5)
    assert training.angle(torch.tensor([[-4.0, 3.0]]), gradient) == pytest.approx(90)
    assert training.angle(-gradient, gradient) == pytest.approx(180)


def test_squared_error_is_the_mean_over_one_hot_targets():
    output = torch.tensor([[0.5, 0.0], [0.0, 1.0]])
    loss = training.squared_error(output, torch.tensor([0, 1]))
    assert loss.item() == pytest.approx(0.25 / 4)


def test_exact_predictive_coding_trains_as_backprop_does(idx_folder: Path):
    digits = data.load_digits(idx_folder)

    def net() -> nn.Sequential:
        first = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh())
        return nn.Sequential(first, nn.Sequential(nn.Linear(8, 10)))

    setup = training.Setup("Exact", 0.1, 20, training.cross_entropy, 9, 4, 0.01)
    comparison = training.compare_with_backprop(
        net, digits, setup, report.Options(None, idx_folder, CPU), "test"
    )
    assert comparison.PC.train_loss == pytest.approx(comparison.BP.train_loss, rel=1e-5)
    assert comparison.PC.test_loss == pytest.approx(comparison.BP.test_loss, rel=1e-5)
    assert len(comparison.relative_error) == 9
    assert all(max(errors) < 1e-5 for errors in comparison.relative_error)
    assert comparison.PC.train_loss[-1] < comparison.PC.train_loss[0]


def test_backprop_trains_once_for_all_figures_that_look_at_it(
    idx_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    steps: list[int] = []
    backprop_step = training.backprop_step
    monkeypatch.setattr(
        training, "backprop_step", lambda *args: steps.append(1) or backprop_step(*args)
    )

    def net() -> nn.Sequential:
        return nn.Sequential(nn.Flatten(), nn.Linear(12, 10))

    def trained(eta: float = 0.1, steps: int = 3, seed: int = 0):
        setup = training.Setup("FixedPred", eta, 20, training.cross_entropy, steps, 4, 0.01)
        digits = data.load_digits(idx_folder)
        return training.trained_by_backprop(
            net, digits, setup, report.Options(None, idx_folder, CPU, seed)
        )

    first, curves = trained()
    with torch.no_grad():
        first[1].weight.zero_()
    again, same_curves = trained(eta=1)
    assert len(steps) == 3 and again[1].weight.any() and curves == same_curves
    assert len(trained(steps=4)[1].train_loss) == 4
    assert not torch.equal(trained(seed=1)[0][1].weight, again[1].weight)
    assert len(steps) == 3 + 4 + 3
    write_idx(idx_folder / "t10k-labels-idx1-ubyte", torch.zeros(6, dtype=torch.uint8))
    assert trained()[1].test_loss != curves.test_loss


def test_a_run_of_each_length_gets_its_own():
    def picked(**length: bool) -> int:
        return report.Options(None, Path(), CPU, **length).pick(quick=1, default=2, full=3)

    assert (picked(quick=True), picked(), picked(full=True)) == (1, 2, 3)


def test_one_bar_counts_the_seconds_that_figures_are_expected_to_take(capsys):
    with progress.bar_over([10, 30, 20]) as bar:
        with bar.figure():
            assert list(progress.track(iter("ab"), "letters", 2)) == ["a", "b"]
            assert 0 < bar._bar.n < 10
        bar.say("the first is drawn")
        assert bar._bar.n == 10
        with pytest.raises(KeyError), bar.figure():
            raise KeyError
        assert (bar._bar.n, bar._bar.total) == (10, 30)
    shown = capsys.readouterr()
    assert shown.out == "the first is drawn\n"
    assert " 17%" in shown.err and "letters, 2 of 2" in shown.err
    assert list(progress.track([1, 2], "without a bar")) == [1, 2]


def test_a_number_agrees_within_its_tolerance_or_word_for_word():
    assert report.Number("", 1.0, 1.05, 0.1).agrees
    assert not report.Number("", 1.0, 1.2, 0.1).agrees
    assert not report.Number("", 1.0, math.nan, 0.1).agrees
    assert report.Number("", "diverges", "diverges").agrees
    assert not report.Number("", "diverges", "converges").agrees


def test_the_table_shows_each_number_and_whether_it_agrees():
    lines = report.table(
        [
            report.Number("loss", 0.69, 0.7, 0.05),
            report.Number("error", 0.885, 0.9, 5e-4, check=True),
        ]
    ).splitlines()
    assert lines[0].split() == ["paper", "ours", "tolerance", "agrees"]
    assert lines[1].split() == ["loss", "0.69", "0.7", "±", "0.05", "yes"]
    assert lines[2].split() == ["error", "*", "0.885", "0.9", "±", "0.0005", "NO"]


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        report.write_atomically(path, fail)
    assert [(found.name, found.read_text()) for found in tmp_path.iterdir()] == [("file", "old")]


def test_the_command_draws_figure_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "new" / "folder"
    assert command.main(["--figure", "3", "--quick", "--out", str(out), "--device", "cpu"]) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "figure_3.json",
        "figure_3.pdf",
        "figure_3.png",
    ]
    assert (out / "figure_3.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "figure_3.pdf").read_bytes().startswith(b"%PDF")
    record = json.loads((out / "figure_3.json").read_text())
    assert record["data"] == {
        "name": "embedded digits",
        "training images": 10_000,
        "test images": 2_000,
    }
    assert record["seed"] == 0 and record["settings"]["eta"] == 0.1
    assert len(record["series"]["relative error"]) == 40
    # 1 - P[Binomial(19, 0.1) >= m] for m = 4 ... 0.
    survival = [
        1 - sum(math.comb(19, k) * 0.1**k * 0.9 ** (19 - k) for k in range(m, 20))
        for m in (4, 3, 2, 1, 0)
    ]
    for errors in record["series"]["relative error"]:
        assert errors == pytest.approx(survival, abs=1e-4)
    shown = capsys.readouterr().out
    assert "relative error, layer 1 *" in shown and "0.885" in shown


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--figure", "0"], "invalid choice: '0'"),
        (["--data", "nowhere"], "'nowhere' is not a folder"),
        (["--device", "abacus"], "'abacus' cannot be used"),
    ],
)
def test_bad_arguments_are_refused_with_the_reason(arguments, complaint, capsys):
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert complaint in capsys.readouterr().err


def test_a_malformed_data_file_ends_the_command(idx_folder: Path, capsys):
    (idx_folder / "t10k-labels-idx1-ubyte").write_bytes(b"")
    status = command.main(["--figure", "3", "--data", str(idx_folder), "--out", str(idx_folder)])
    assert status == 2
    assert "t10k-labels-idx1-ubyte starts with the bytes (none)" in capsys.readouterr().err


def test_a_missing_data_file_is_reported_and_is_an_error_when_asked_for(idx_folder: Path, capsys):
    (idx_folder / "t10k-labels-idx1-ubyte").unlink()
    status = command.main(["--figure", "3", "--data", str(idx_folder), "--out", str(idx_folder)])
    assert status == 1
    assert "Figure 3 is not drawn" in capsys.readouterr().out
