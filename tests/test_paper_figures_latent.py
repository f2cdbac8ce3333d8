"""The figures of latent causes and the classifier of "JPC from Scratch": parts, and drawn small."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_limits
from torch import nn

from paper_figures import data, decoders, report
from paper_figures.jpc import figure_jpc_mnist
from paper_figures.rao_ballard import figure_rao_ballard
from paper_figures.rao_ballard.figure_rao_ballard import Fields, Hierarchy
from paper_figures.unsupervised import figure_unsupervised
from paper_figures.unsupervised.figure_unsupervised import Probes, Reference, Sparse
from torch2pc import PCInferLatent

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The probes solve small systems, on which several threads mostly wait for each other."""
    with threadpool_limits(1):
        yield


def few_digits(train: int, test: int) -> data.DataSet:
    digits = data.load_digits(None)
    return data.DataSet(
        digits.name,
        digits.train_images[:train],
        digits.train_labels[:train],
        digits.test_images[:test],
        digits.test_labels[:test],
    )


def pixels_of(images: torch.Tensor) -> torch.Tensor:
    return images.flatten(1).float() / 255


def draw(module: object, name: str, out: Path) -> tuple[dict, list[report.Number]]:
    """Draw the figure; its JSON and its numbers."""
    numbers = module.run(report.Options(None, out, CPU, quick=True))
    assert sorted(path.name for path in out.iterdir()) == [
        f"figure_{name}.{ending}" for ending in ("json", "pdf", "png")
    ]
    record = json.loads((out / f"figure_{name}.json").read_text())
    assert [number["what"] for number in record["numbers"]] == [number.what for number in numbers]
    assert record["settings"] and record["data"]["name"]
    return record, numbers


def test_the_energy_is_the_sum_of_its_terms():
    decoder = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5)).double()
    Y, start = torch.randn(6, 5).double(), torch.zeros(6, 3).double()

    def prior(v: list[torch.Tensor]) -> torch.Tensor:
        return v[0].abs().sum()

    loss = decoders.half_squared_error
    result = PCInferLatent(decoder, loss, Y, start, 0.1, 5, precision=3.0, prior=prior)
    v, expected = result.v, 0.0
    for example in range(6):
        for l in 1, 2:
            for difference in (decoder[l - 1](v[l - 1]) - v[l])[example]:
                expected += 3 * difference.item() ** 2 / 2
        for difference in (decoder[2](v[2]) - Y)[example]:
            expected += difference.item() ** 2 / 2
        expected += sum(abs(value.item()) for value in v[0][example])
    F = decoders.energy(decoder, loss, Y, result, 3.0, prior)
    assert math.isclose(F, expected, rel_tol=1e-12)


def test_a_mosaic_has_its_pictures_in_rows():
    pictures = torch.rand(5, 3, 4, 6)
    whole = decoders.mosaic(pictures, 3, gap=2)
    assert whole.shape == (10, 22, 3)
    for index in range(5):
        top, left = index // 3 * 6, index % 3 * 8
        there = whole[top : top + 4, left : left + 6]
        torch.testing.assert_close(there, pictures[index].permute(1, 2, 0))
    assert (whole[6:, 16:] == 1).all() and (whole[4:6] == 1).all()


def test_signed_pictures_have_zero_in_the_middle():
    shown = decoders.signed(torch.tensor([[[-2.0, 0.0]], [[0.5, 0.25]]]))
    torch.testing.assert_close(shown, torch.tensor([[[0.0, 0.5]], [[1.0, 0.75]]]))


def test_jpc_net_gets_normalised_pixels():
    layer = figure_jpc_mnist.jpc_net()[0]
    X = torch.rand(2, 1, 28, 28)
    by_hand = torch.tanh(((X.flatten(1) - 0.1307) / 0.3081) @ layer[2].weight.T + layer[2].bias)
    torch.testing.assert_close(layer(X), by_hand)


def test_jpc_loss_is_half_the_squared_distance_to_one_hot_targets():
    loss = figure_jpc_mnist.half_squared_error(torch.tensor([[0.5, 1.0, 0.0]]), torch.tensor([2]))
    assert loss.item() == pytest.approx(0.5 * (0.25 + 1 + 1))


def test_jpc_mnist_is_drawn_and_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(figure_jpc_mnist, "load_digits", lambda folder: few_digits(3000, 300))
    record, numbers = draw(figure_jpc_mnist, "jpc_mnist", tmp_path)
    assert [number.what for number in numbers] == [
        "accuracy at step 50 (%)",
        "accuracy at step 100 (%)",
    ]
    accuracy = record["series"]["test accuracy (%) at step"]
    assert accuracy["PC"]["100"] > 75 and accuracy["BP"]["100"] > 75
    # Adam takes the size out of the updates, and their directions are nearly the same.
    assert abs(accuracy["PC"]["100"] - accuracy["BP"]["100"]) < 5


def test_the_sparse_set_up_evens_out_principal_components():
    images = pixels_of(few_digits(300, 1).train_images)
    setup = Sparse(images)
    Y = setup.data_of(images)
    assert Y.shape == (300, 64)
    assert Y.square().sum(1).mean().item() == pytest.approx(1, rel=0.02)
    covariance = torch.cov(Y.T)
    off = covariance - covariance.diag().diag()
    assert off.abs().max() < 1e-4 * covariance.max()
    # What is kept of the images comes back, and nothing of it is lost the second time.
    kept = setup.images_of(Y)
    torch.testing.assert_close(setup.data_of(kept), Y, rtol=1e-3, atol=1e-4)
    assert (kept - images).square().mean() < 0.2 * images.var(0).mean()


def test_the_sparse_prior_is_one_sided():
    setup = Sparse(pixels_of(few_digits(100, 1).train_images))
    v = torch.tensor([[0.5, -0.2], [0.0, 0.1]])
    by_hand = setup.positive_slope * 0.6 + setup.negative_curvature * 0.2**2 / 2
    assert setup.prior([v]).item() == pytest.approx(by_hand)


def test_sparse_inference_lowers_the_energy_and_stays_finite():
    images = pixels_of(few_digits(100, 1).train_images)
    setup = Sparse(images)
    Y = setup.data_of(images)
    norms = setup.decoder[0].weight.norm(dim=0)
    torch.testing.assert_close(norms, torch.ones_like(norms))
    energies = []
    for n in 1, 5, 50:
        setup.n = n
        result = figure_unsupervised.infer(setup, Y)
        args = setup.decoder, decoders.half_squared_error, Y, result
        energies.append(decoders.energy(*args, prior=setup.prior))
    assert energies[0] > energies[1] > energies[2] > 0


def test_sparse_latents_say_more_about_the_labels_than_pixels():
    digits = few_digits(1000, 500)
    images, test_images = pixels_of(digits.train_images), pixels_of(digits.test_images)
    probes = Probes(images, digits.train_labels, test_images, digits.test_labels)
    setup = Sparse(images)
    setup.n = 25
    from_pixels = probes.linear(images.numpy(), test_images.numpy())
    assert probes.linear(*probes.latents(setup)) > from_pixels + 2


def test_unsupervised_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(figure_unsupervised, "load_digits", lambda folder: few_digits(300, 60))
    monkeypatch.setattr(Reference, "n", 5)
    monkeypatch.setattr(Reference, "batch_size", 50)
    monkeypatch.setattr(Sparse, "n", 5)
    monkeypatch.setattr(Sparse, "latents", 100)
    record, numbers = draw(figure_unsupervised, "unsupervised", tmp_path)
    assert len(numbers) == 8
    for name in "reference", "sparse":
        series = record["series"][name]
        assert len(series["energy by step"]) == figure_unsupervised.QUICK_STEPS
        assert all(value is not None for value in series["energy by step"])
        accuracies = series["accuracy (%) on held-out training images by step"]
        assert list(accuracies) == ["0", "4", "8"]
        assert 0 <= series["test accuracy (%)"]["linear probe"] <= 100
    assert set(record["series"]["raw pixels"]["test accuracy (%)"]) == {
        "linear probe",
        "5 nearest neighbours",
    }


def test_patches_are_the_windows_of_the_image():
    images = torch.rand(2, 3, 32, 32)
    patches = figure_rao_ballard.patches_of(images)
    assert patches.shape == (2, 192, 7, 7)
    for row in range(7):
        for column in range(7):
            window = images[:, :, 4 * row : 4 * row + 8, 4 * column : 4 * column + 8]
            torch.testing.assert_close(patches[:, :, row, column], window.flatten(1))
    torch.testing.assert_close(figure_rao_ballard.images_of(patches, 32), images)


def test_overlapping_predictions_are_averaged():
    patches = torch.zeros(1, 192, 2, 2)
    patches[:, :, 0, 1] = 1
    image = figure_rao_ballard.images_of(patches, 12)
    assert image.shape == (1, 3, 12, 12)
    assert image[0, 0, 0, 0] == 0 and image[0, 0, 0, 11] == 1
    assert image[0, 0, 0, 5] == 0.5 and image[0, 0, 5, 5] == 0.25


def test_the_hierarchy_predicts_patch_by_patch_and_neighbourhood_by_neighbourhood():
    level_2, level_1 = figure_rao_ballard.hierarchy_decoder((0.3, 0.1)).double()
    r_h = torch.randn(2, 10, 3, 3).double()
    U_h, U = level_2[0].weight, level_1[0].weight[:, :, 0, 0]
    summed = torch.zeros(2, 8, 7, 7).double()
    for row in range(3):
        for column in range(3):
            causes = r_h[:, :, row, column]
            for y in range(3):
                for x in range(3):
                    summed[:, :, 2 * row + y, 2 * column + x] += causes @ U_h[:, :, y, x]
    r = level_2(r_h)
    torch.testing.assert_close(r, summed.tanh())
    for row in range(7):
        for column in range(7):
            by_hand = torch.tanh(r[:, :, row, column] @ U.T)
            torch.testing.assert_close(level_1(r)[:, :, row, column], by_hand)


def test_the_hierarchy_minimises_the_energy_of_the_docstring():
    hierarchy = Hierarchy(n=5)
    decoder = figure_rao_ballard.hierarchy_decoder((0.3, 0.1))
    Y = figure_rao_ballard.patches_of(figure_rao_ballard.photograph_crops(2))
    result = figure_rao_ballard.infer(decoder, hierarchy, Y)
    r_h, r = (v_l.clone().requires_grad_() for v_l in result.v[:2])
    U_h, U = decoder.parameters()
    L = ((Y - decoder[1](r)) ** 2).sum() / hierarchy.variance
    L = L + ((r - decoder[0](r_h)) ** 2).sum() / hierarchy.variance_top_down
    for wanted, given in zip(torch.autograd.grad(L, [U_h, U]), [U_h.grad, U.grad], strict=True):
        torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-6)
    L = L + 0.1 * (r**2).sum() + 0.1 * (r_h**2).sum()
    F = decoders.energy(decoder, hierarchy.LossFun, Y, result, hierarchy.precision, hierarchy.prior)
    assert math.isclose(F, L.item(), rel_tol=1e-5)


def test_the_hierarchy_halves_its_error():
    hierarchy = Hierarchy(batches=7, batch_size=60)
    images = figure_rao_ballard.photograph_crops(120)
    assert images.shape == (120, 3, 32, 32) and images.abs().max() <= 1
    learned = figure_rao_ballard.learn(hierarchy, images, report.Options(None, Path(), CPU))
    assert learned.error[-1] < learned.error[0] / 2
    assert learned.energy[-1] < learned.energy[0] / 2
    assert figure_rao_ballard.level_2_shown(learned.decoder).shape == (10, 3, 16, 16)


def test_the_whitened_photograph_has_an_even_spectrum():
    photograph = figure_rao_ballard._photographs()[0]
    white = figure_rao_ballard.whiten(photograph)
    assert white.std().item() == pytest.approx(1, abs=1e-4)

    def power(picture: torch.Tensor, low: float, high: float) -> float:
        size = picture.shape
        frequency = torch.hypot(
            torch.fft.fftfreq(size[0])[:, None], torch.fft.fftfreq(size[1])[None]
        )
        band = (frequency >= low) & (frequency < high)
        return torch.fft.fft2(picture)[band].abs().square().mean().item()

    grey = photograph.mean(0)
    before = power(grey, 0.02, 0.04) / power(grey, 0.16, 0.2)
    after = power(white, 0.02, 0.04) / power(white, 0.16, 0.2)
    assert before > 20 and 1 / 4 < after < 4


def gabor(across: float, along: float, angle: float, frequency: float) -> np.ndarray:
    y, x = np.mgrid[:12, :12] - 5.5
    u, w = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    return np.exp(-0.5 * ((u / across) ** 2 + (w / along) ** 2)) * np.cos(6.28 * frequency * u + 1)


@pytest.mark.parametrize(
    "shape", [(2, 2, 0.4, 0.2), (1.5, 3.5, 2.0, 0.15), (1, 3, 1.2, 0.05), (3, 1.5, -0.7, 0.3)]
)
def test_a_gabor_function_is_found_to_be_one(shape: tuple[float, ...]):
    assert figure_rao_ballard.gabor_fit(gabor(*shape)) > 0.98


def test_noise_and_what_fills_the_window_are_no_gabor_functions():
    noise = np.random.default_rng(0).normal(size=(12, 12))
    assert figure_rao_ballard.gabor_fit(noise) < 0.5
    grating = gabor(100, 100, 0.6, 0.25)
    localised = figure_rao_ballard.gabor_fit(grating)
    assert localised < 0.95


def test_excess_kurtosis_of_known_distributions():
    assert abs(figure_rao_ballard.excess_kurtosis(torch.randn(100_000))) < 0.1
    # Of a variable that is 1 or -1: the least there is.
    assert figure_rao_ballard.excess_kurtosis(torch.ones(10)) == pytest.approx(-2)


def test_the_kurtotic_prior_makes_the_causes_more_kurtotic():
    kinds = Fields("kurtotic", 0.12, 0.15), Fields("quadratic", 0.1, 1)
    kurtosis = {}
    for kind in kinds:
        kind = replace(kind, n=25, batches=30, batch_size=50, patches=1000)
        patches = figure_rao_ballard.whitened_patches(kind)
        assert patches.std().item() == pytest.approx(kind.deviation, rel=1e-3)
        fields, kurtosis[kind.prior] = figure_rao_ballard.learn_fields(kind, patches)
        assert fields.shape == (144, 12, 12) and fields.isfinite().all()
    assert kurtosis["kurtotic"] > 3 * kurtosis["quadratic"]


def test_rao_ballard_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(figure_rao_ballard, "Hierarchy", partial(Hierarchy, n=3, images=20))
    monkeypatch.setattr(figure_rao_ballard, "Fields", partial(Fields, n=2, patches=100))
    monkeypatch.setattr(figure_rao_ballard, "FIELDS", 6)
    record, numbers = draw(figure_rao_ballard, "rao_ballard", tmp_path)
    assert len(numbers) == 5
    series = record["series"]
    assert len(series["energy by batch"]) == len(series["mean absolute error by batch"]) == 8
    fits = series["share of variance that a Gabor function explains"]
    assert len(fits["kurtotic"]) == len(fits["quadratic"]) == 6
    assert all(-1e-6 <= fit <= 1 for values in fits.values() for fit in values)
