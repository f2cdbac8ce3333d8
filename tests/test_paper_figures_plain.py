"""The iterations that figures 1, 2 and the figure of precision are held against."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from paper_figures.data import Batch, load_digits
from paper_figures.nets import mnist_net
from paper_figures.plain import Plain, infer_as_published, published_updates
from paper_figures.report import Options
from paper_figures.rosenbaum import figure_precision
from paper_figures.training import Setup, compare_with_backprop, squared_error, weights_of
from tests import reference, reference_precise

ETA, N = 0.1, 9


@pytest.fixture
def model() -> nn.Sequential:
    return mnist_net().double()


@pytest.fixture
def batch() -> Batch:
    digits = next(load_digits(None).train_batches(1, 20, seed=0, device=torch.device("cpu")))
    return Batch(digits.X.double(), digits.labels)


def assert_same(found: dict[Tensor, Tensor], right: dict[nn.Parameter, Tensor]) -> None:
    assert set(found) == set(right)
    for parameter, update in right.items():
        torch.testing.assert_close(found[parameter], update, rtol=1e-9, atol=1e-16)


def test_the_plain_iteration_is_the_reference(model: nn.Sequential, batch: Batch) -> None:
    plain = Plain(model, squared_error, batch, ETA)
    for _ in range(N):
        plain.step()
    right = reference.strict(model, squared_error, batch.X, batch.labels, ETA, N)
    assert_same(plain.updates(plain.v), right.updates)


def published(model: nn.Sequential, batch: Batch) -> dict[nn.Parameter, Tensor]:
    """The algorithm as it was published, each line of it written out."""
    L = len(model)
    vhat = reference.feed_forward(model, batch.X)
    v, epsilon = list(vhat), list(vhat)
    for _ in range(N):
        y = model[L - 1](v[L - 1])
        _, epsilon[L] = reference.loss_gradient(squared_error, y, batch.labels)
        for l in range(1, L):
            epsilon[l] = (v[l] - model[l - 1](v[l - 1])).detach()
        v = [
            v[l] + ETA * (-epsilon[l] + reference.input_vjp(model[l], v[l], epsilon[l + 1]))
            if 0 < l < L
            else v[l]
            for l in range(L + 1)
        ]
    return reference.parameter_updates(model, vhat, epsilon)


def test_as_published(model: nn.Sequential, batch: Batch) -> None:
    plain = Plain(model, squared_error, batch, ETA, published=True)
    for _ in range(N):
        plain.step()
    assert_same(plain.updates(plain.vhat), published(model, batch))
    # Neither the iteration of today nor the one at the beliefs.
    other = reference.strict(model, squared_error, batch.X, batch.labels, ETA, N).updates
    at_v = plain.updates(plain.v)
    weight = model[3][0].weight
    found = plain.updates(plain.vhat)[weight]
    assert (found - other[weight]).norm() > 1e-3 * found.norm()
    assert (found - at_v[weight]).norm() > 1e-3 * found.norm()


def test_the_published_updates_are_written_into_grad(model: nn.Sequential, batch: Batch) -> None:
    setup = Setup("Strict", ETA, N, squared_error, 1, 20, 0.002)
    result = infer_as_published(model, batch, setup)
    right = published(model, batch)
    assert_same({parameter: parameter.grad for parameter in model.parameters()}, right)
    torch.testing.assert_close(result.Loss, squared_error(model(batch.X), batch.labels).detach())
    in_float64 = published_updates(model.float(), Batch(batch.X.float(), batch.labels), setup)
    for weight, update in zip(weights_of(model), in_float64, strict=True):
        # The same but for the rounding of weights and images to float32.
        torch.testing.assert_close(update, right[weight].double(), rtol=1e-4, atol=1e-6)


def test_training_as_published_is_measured_in_both_types(tmp_path: Path) -> None:
    def net() -> nn.Sequential:
        return nn.Sequential(
            nn.Sequential(nn.Flatten(), nn.Linear(784, 8), nn.Tanh()),
            nn.Sequential(nn.Linear(8, 8), nn.Tanh()),
            nn.Sequential(nn.Linear(8, 10)),
        )

    setup = Setup("Strict", ETA, N, squared_error, 11, 20, 0.01)
    found = compare_with_backprop(
        net,
        load_digits(None),
        setup,
        Options(None, tmp_path, torch.device("cpu")),
        "test",
        infer_as_published,
        published_updates,
    )
    assert len(found.relative_error) == 11
    # At steps 0 and 10, at the weights of these steps.
    assert len(found.other.relative_error) == 2
    for step, other in zip((0, 10), found.other.relative_error, strict=True):
        assert other == pytest.approx(found.relative_error[step], abs=1e-3)
    assert found.relative_error[0] != pytest.approx(found.relative_error[10], abs=1e-3)
    assert found.PC.train_loss[-1] < found.PC.train_loss[0]


def tanh_net() -> tuple[nn.Sequential, Batch]:
    sizes = [4, *[5] * 11, 3]
    model = nn.Sequential()
    for l in range(12):
        activation = nn.Identity() if l == 11 else nn.Tanh()
        model.append(nn.Sequential(nn.Linear(sizes[l], sizes[l + 1]), activation))
        nn.init.xavier_normal_(model[-1][0].weight)
    return model.double(), Batch(torch.randn(3, 4).double(), torch.arange(3))


def test_the_exact_iteration_is_exact() -> None:
    """torch2pc in float64, against 60 digits, which the plain iteration in float64 is far from."""
    model, batch = tanh_net()
    ns = [12, 20]
    exact = figure_precision.torch2pc_updates(model, batch, ns)
    plain = figure_precision.plain_updates(model, batch, ns)
    one_hot = torch.eye(3).double()[batch.labels]
    for n, of_exact, of_plain in zip(ns, exact, plain, strict=True):
        right = reference_precise.strict(model, True, batch.X, one_hot, ETA, n).updates
        for l in range(12):
            assert reference_precise.relative_error(of_exact[l], right[l + 1][0]) < 1e-13
        assert reference_precise.relative_error(of_plain[0], right[1][0]) > 1e-9


def test_each_way_is_measured_against_the_exact_iteration() -> None:
    model, batch = tanh_net()
    model.float()
    batch = Batch(batch.X.float(), batch.labels)
    found = figure_precision.relative_errors(model, batch, [N])
    (plain_32,), (plain_64,), (torch2pc_32,) = found.values()
    # No error has come below layer 12 - 9 + 1.
    for errors in plain_32, plain_64, torch2pc_32:
        assert [error != error for error in errors] == [True] * 3 + [False] * 9
    assert max(torch2pc_32[3:]) < 1e-5 and max(plain_64[3:]) < 1e-5 < min(plain_32[3:8])
    assert len(weights_of(model)) == len(plain_32)
