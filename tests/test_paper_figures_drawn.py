"""Each figure, drawn in its shortened form: its files, its numbers, and what they rest on."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch

from paper_figures import __main__ as command
from paper_figures import data, maps, nets, report, training
from paper_figures.rosenbaum import figure_2, figure_3_cifar, figure_4, figure_6, figure_7
from torch2pc import PCInfer

CPU = torch.device("cpu")


def options(out: Path, folder: Path | None = None) -> report.Options:
    return report.Options(folder, out, CPU, quick=True)


def small_mnist_net_and_batch() -> tuple[torch.nn.Sequential, data.Batch]:
    torch.manual_seed(0)
    model = nets.mnist_net()
    return model, next(data.load_digits(None).train_batches(1, 20, seed=0, device=CPU))


@pytest.mark.parametrize("name", ["1", "2", "4", "5", "6", "7", "precision", "run_times", "steps"])
def test_a_figure_is_drawn_and_passes_its_check(name: str, tmp_path: Path):
    arguments = ["--figure", name, "--quick", "--check", "--device", "cpu", "--out", str(tmp_path)]
    assert command.main(arguments) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"figure_{name}.{ending}" for ending in ("json", "pdf", "png")
    ]
    record = json.loads((tmp_path / f"figure_{name}.json").read_text())
    assert record["data"]["name"] == data.EMBEDDED_NAME
    assert record["series"] and record["settings"] and record["versions"]["torch2pc"]


def test_every_figure_of_the_paper_has_its_file():
    modules = command.figure_modules()
    assert {"1", "2", "3", "3_cifar", "4", "5", "5_cifar", "6", "7", "run_times"} <= set(modules)
    for name, module in modules.items():
        assert module.__doc__.splitlines()[0].endswith("."), name
        assert callable(module.run), name


def test_check_fails_when_a_number_is_off(tmp_path, monkeypatch, capsys):
    numbers = [report.Number("good", 1, 1, 0.1, check=True), report.Number("free", 1, 2, 0.1)]
    module = command.figure_modules()["3"]
    monkeypatch.setattr(module, "run", lambda options: numbers)
    arguments = ["--figure", "3", "--check", "--out", str(tmp_path)]
    assert command.main(arguments) == 0
    numbers.append(report.Number("bad", 1, 2, 0.1, check=True))
    assert command.main(arguments) == 1
    shown = capsys.readouterr()
    assert "figure 3: bad is 2, not 1" in shown.err
    # A number that depends on the data is that of a full run.
    assert "free" not in shown.out and "free" not in shown.err
    assert command.main([*arguments, "--full"]) == 1
    shown = capsys.readouterr()
    assert "free" in shown.out and "free" not in shown.err
    del numbers[0], numbers[1:]
    assert command.main(arguments) == 0
    assert "free" in capsys.readouterr().out


def test_figure_2_follows_what_PCInfer_computes():
    model, batch = small_mnist_net_and_batch()
    gradients = training.weight_gradients(model, training.squared_error, batch)
    found = figure_2.follow_strict(model, batch, eta=0.2, iterations=12)
    for n in 1, 5, 12:
        PCInfer(model, training.squared_error, batch.X, batch.labels, "Strict", 0.2, n)
        updates = [weight.grad for weight in training.weights_of(model)]
        errors = list(map(training.relative_error, updates, gradients))
        assert found.relative_error[n - 1] == pytest.approx(errors, abs=1e-5)
    plain = figure_2.follow_plain(model, batch, eta=0.2, iterations=12)
    # Where round-off is small, the two are one; layer 1 has lost digits.
    for n in 5, 12:
        above = found.relative_error[n - 1][2:]
        assert plain.relative_error[n - 1][2:] == pytest.approx(above, abs=1e-3)
    assert abs(plain.angle[-1][0] - found.angle[-1][0]) > 0.1
    precise = data.Batch(batch.X.double(), batch.labels)
    in_float64 = figure_2.follow_plain(copy.deepcopy(model).double(), precise, 0.2, 12)
    for ours, right in zip(found.angle[4:], in_float64.angle[4:], strict=True):
        assert ours == pytest.approx(right, abs=1e-2)


def test_figure_4_follows_what_PCInfer_computes():
    model, batch = small_mnist_net_and_batch()
    followed = list(figure_4.closed_form(model, batch, 0.3, 9))
    for n in 1, 4, 9:
        PCInfer(model, training.cross_entropy, batch.X, batch.labels, "FixedPred", 0.3, n)
        for weight, update in zip(training.weights_of(model), followed[n - 1], strict=True):
            torch.testing.assert_close(update, weight.grad)


def test_the_plain_iteration_in_float64_is_the_closed_form():
    model, batch = small_mnist_net_and_batch()
    model.double()
    batch = data.Batch(batch.X.double(), batch.labels)
    both = zip(
        figure_4.plain_iteration(model, batch, 0.3, 12),
        figure_4.closed_form(model, batch, 0.3, 12),
        strict=True,
    )
    for plain, closed in both:
        for a, b in zip(plain, closed, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_the_share_to_come_is_the_binomial_distribution():
    assert training.share_to_come(0, 19, 0.1) == 0
    assert training.share_to_come(1, 19, 0.1) == pytest.approx(0.9**19)
    assert training.share_to_come(4, 19, 0.1) == pytest.approx(0.8850, abs=5e-5)
    assert training.share_to_come(3, 2, 0.7) == pytest.approx(1)
    assert training.share_to_come(2, 2, 1.0) == 0


def test_convergence_tells_its_fate():
    near, far = [0.5, 0.1], [1.0, 1.0]
    assert training.Convergence([far, near]).fate() == "converges"
    assert training.Convergence([far, [0.5, 7.0]]).fate() == "diverges"
    assert training.Convergence([far, [0.5, math.nan]]).fate() == "diverges"


@pytest.fixture
def cifar10(tmp_path: Path) -> Path:
    """CIFAR-10's six files with 16 random records each."""
    generator = torch.Generator().manual_seed(0)
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for name in data.CIFAR10_FILES:
        records = torch.randint(256, (16, 3073), generator=generator, dtype=torch.uint8)
        records[:, 0] %= 10
        (folder / name).write_bytes(records.numpy().tobytes())
    return tmp_path


def test_cifar10_is_read_plane_by_plane(cifar10: Path):
    images = data.load_cifar10(cifar10)
    assert images.train_images.shape == (80, 3, 32, 32)
    assert images.test_images.shape == (16, 3, 32, 32)
    record = (cifar10 / "cifar-10-batches-bin" / "data_batch_2.bin").read_bytes()[:3073]
    assert images.train_labels[16] == record[0]
    # The second row of the blue plane of the second file's first image.
    start = 1 + 2 * 1024 + 32
    assert images.train_images[16, 2, 1].tolist() == list(record[start : start + 32])


@pytest.mark.parametrize("name", ["3_cifar", "5_cifar"])
def test_the_cifar10_figures_are_drawn(name: str, cifar10: Path, tmp_path: Path):
    out = tmp_path / "out"
    arguments = ["--figure", name, "--data", str(cifar10), "--out", str(out)]
    assert command.main([*arguments, "--quick", "--check", "--device", "cpu"]) == 0
    record = json.loads((out / f"figure_{name}.json").read_text())
    assert record["data"] == {"name": "CIFAR-10", "training images": 80, "test images": 16}
    assert len(record["series"]["relative error"][0]) == 6


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "holds 0 bytes"),
        (bytes(3000), "holds 3000 bytes, which is no multiple of CIFAR-10's record of 3073"),
        (b"\x0a" + bytes(3072), "holds the label 10"),
    ],
)
def test_a_malformed_cifar10_file_is_named_with_the_mend(cifar10: Path, content, complaint):
    (cifar10 / "cifar-10-batches-bin" / "data_batch_3.bin").write_bytes(content)
    with pytest.raises(data.DataError, match=f"data_batch_3.bin {complaint}.*fetch the file again"):
        data.load_cifar10(cifar10)


def test_missing_cifar10_files_are_named(cifar10: Path, tmp_path_factory):
    (cifar10 / "cifar-10-batches-bin" / "test_batch.bin").unlink()
    with pytest.raises(data.MissingData, match=r"lacks test_batch.bin: .*--download"):
        figure_3_cifar.run(options(cifar10, cifar10))
    for folder in None, tmp_path_factory.mktemp("empty"):
        with pytest.raises(data.MissingData, match=r"CIFAR-10's binary version.*--download"):
            data.load_cifar10(folder)


def vgg19_state(fill) -> dict[str, torch.Tensor]:
    """A state dict with torchvision's keys and shapes, each tensor made by ``fill(shape)``."""
    with torch.device("meta"):
        shapes = [parameter.shape for parameter in nets.vgg19().parameters()]
    return dict(zip(nets.vgg19_keys(), map(fill, shapes), strict=True))


def one_value(shape: torch.Size) -> torch.Tensor:
    """A tensor of any shape that takes no room, in memory or in a file."""
    return torch.zeros(1).expand(shape)


def test_vgg19_has_the_published_networks_layers():
    with torch.device("meta"):
        model = nets.vgg19()
    assert len(model) == 19
    assert sum(parameter.numel() for parameter in model.parameters()) == 143_667_240
    keys = nets.vgg19_keys()
    assert keys[:4] == [
        "features.0.weight",
        "features.0.bias",
        "features.2.weight",
        "features.2.bias",
    ]
    assert keys[18] == "features.21.weight"
    assert keys[30:34] == [
        "features.34.weight",
        "features.34.bias",
        "classifier.0.weight",
        "classifier.0.bias",
    ]
    assert keys[-1] == "classifier.6.bias"


def test_vgg19_is_drawn_from_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The whole path with weights of our own: convolutions at random, dense layers of one value."""
    generator = torch.Generator().manual_seed(0)

    def weights(shape: torch.Size) -> torch.Tensor:
        if len(shape) == 4:
            return torch.randn(shape, generator=generator) * (2 / shape[1:].numel()) ** 0.5
        if shape == (1000, 4096):
            return torch.randn(1000, 1, generator=generator).div(4096).expand(shape)
        return torch.full((1,), 1 / shape[-1]).expand(shape)

    monkeypatch.setattr(nets, "VGG19_FILE", "vgg19.pth")
    torch.save(vgg19_state(weights), tmp_path / "vgg19.pth")
    monkeypatch.setattr(maps, "SIDE", 64)
    shown = maps.subject(options(tmp_path, tmp_path))
    assert shown.name == "VGG-19" and not shown.stand_in
    assert shown.X.shape == (2, 3, 64, 64)
    found = maps.infer(shown.model, shown.X[:1], maps.guess(shown.model, shown.X[:1]), 2, "test")
    assert len(found.vhat) == 20
    assert [maps.norms(found.vhat[l], c).shape for l, c in figure_6.layers_of(shown)] == [
        (64, 64),
        (8, 8),
    ]
    monkeypatch.setattr(figure_7, "subject", lambda options: shown)
    monkeypatch.setattr(figure_7, "N", 2)
    numbers = figure_7.run(report.Options(tmp_path, tmp_path, CPU, full=True))
    assert len(numbers) == 5
    record = json.loads((tmp_path / "figure_7.json").read_text())
    assert record["settings"] == {"model": "VGG-19", "eta": 0.05, "n": 2, "stand-in": ""}


def test_malformed_weights_are_named_with_the_mend(tmp_path: Path):
    path = tmp_path / "vgg19.pth"
    torch.save(vgg19_state(one_value), path)
    nets.read_vgg19(path)

    whole = path.read_bytes()
    for content in b"", whole[: len(whole) // 2], b"<html>" * 100:
        path.write_bytes(content)
        with pytest.raises(data.DataError, match=r"vgg19.pth is not a file of weights.*fetch it"):
            nets.read_vgg19(path)

    torch.save([1, 2], path)
    with pytest.raises(data.DataError, match=r"vgg19.pth holds a list, no state dict"):
        nets.read_vgg19(path)

    state = vgg19_state(one_value)
    state["features.0.weight"] = torch.zeros(64, 1, 3, 3)
    del state["classifier.6.bias"]
    torch.save(state, path)
    with pytest.raises(
        data.DataError, match=r"features.0.weight \(64, 3, 3, 3\), classifier.6.bias"
    ):
        nets.read_vgg19(path)


def test_weights_that_do_not_match_the_sum_in_their_name_are_refused(tmp_path: Path):
    path = tmp_path / "vgg19-dcbb9e9d.pth"
    torch.save(vgg19_state(one_value), path)
    with pytest.raises(data.DataError, match=r"SHA256 sum .* but dcbb9e9d is expected"):
        nets.load_vgg19(tmp_path)


def test_the_stability_limit_is_that_of_a_known_hessian():
    """With layers v_1 = w_1 x, y = w_2 v_1, F is quadratic in v_1, of Hessian 1 + 2 w_2^2 / N."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    batch = data.Batch(torch.ones(2, 3), torch.tensor([0, 1]))
    largest = torch.linalg.svdvals(model[1].weight)[0].item()
    # Four outputs share the mean squared error, whose second derivative is 2/4.
    expected = 2 / (1 + largest**2 / 2)
    assert figure_2.stability_limit(model, batch) == pytest.approx(expected, rel=1e-4)
