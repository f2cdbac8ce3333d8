"""PCRNN against a plain reference, its properties, and its errors."""

from __future__ import annotations

import math
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tests import reference_memory as reference
from torch2pc import PCRNN
from torch2pc.memory import Retrieval

STEPS = 12
BATCH = 5
RATES = {"alpha_x": 0.3, "alpha_h": 0.2, "alpha_c": 0.01, "sigma_c": 0.3, "sigma_r": 0.7}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(dtype: torch.dtype = torch.float64, centres: int = 4) -> PCRNN:
    """Three causes, seven hidden states and two outputs, with weights large enough to matter."""
    model = PCRNN(3, 7, 2, tau=5, generator=generator(), dtype=dtype)
    with torch.no_grad():
        model.W_r.mul_(4)
        model.W_o.mul_(4)
    if centres:
        model.set_centres(torch.randn(centres, 3, generator=generator(1), dtype=dtype))
    return model


def causes_and_targets(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    c = torch.randn(BATCH, 3, generator=generator(2), dtype=dtype)
    return c, torch.randn(STEPS, BATCH, 2, generator=generator(3), dtype=dtype)


def expected(model: PCRNN, c: Tensor, targets: Tensor | None, **rates: float) -> list[Tensor]:
    """The reference's three results for a batch, with the noise that the model draws."""
    noise = torch.randn(STEPS, *c.shape, generator=generator(), dtype=c.dtype)
    runs = [
        reference.run(
            model,
            c[index],
            None if targets is None else targets[:, index],
            STEPS,
            SimpleNamespace(**RATES | rates),
            noise[:, index],
        )
        for index in range(len(c))
    ]
    return [torch.stack(parts, 1) for parts in zip(*runs, strict=True)]


@pytest.mark.parametrize(
    "rates",
    [
        {},
        {"alpha_c": 0.0},
        {"sigma_r": 0.0},
        {"alpha_x": 0.0},
        {"alpha_h": 0.0},
        {"alpha_c": 0.0, "sigma_r": 0.0},
    ],
    ids=str,
)
def test_inference_equals_the_reference(rates: dict[str, float]):
    model = network()
    c, targets = causes_and_targets()
    result = model(c, targets, **RATES | rates, generator=generator())
    for ours, theirs in zip(result, expected(model, c, targets, **rates), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_generation_equals_the_reference():
    model = network()
    c, _ = causes_and_targets()
    result = model(c, steps=STEPS)
    for ours, theirs in zip(result, expected(model, c, None), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_gradients_of_generation_and_inference_equal_the_reference():
    model = network()
    c, targets = causes_and_targets()
    c.requires_grad_()
    inputs = [c, *model.parameters()]
    for clamped, steps in (None, STEPS), (targets, None):
        results = (
            model(c, clamped, steps=steps, **RATES, generator=generator()),
            expected(model, c, clamped),
        )
        ours, theirs = (
            torch.autograd.grad((x_pred - targets).square().mean() + last_c[-1].sum(), inputs)
            for x_pred, _, last_c in results
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_without_correction_it_is_a_leaky_recurrent_network():
    model = network()
    c, targets = causes_and_targets()
    h, x_preds = model.h_0.repeat(BATCH, 1), []
    for _ in range(STEPS):
        h = h + (h.tanh() @ model.W_r.T + c @ model.W_c.T + model.b_r - h) / model.tau
        x_preds.append(h.tanh() @ model.W_o.T + model.b_o)
    clamped = model(c, targets, alpha_x=0.0, alpha_h=0.5, sigma_r=0.5)
    for result in clamped, model(c, steps=STEPS):
        torch.testing.assert_close(result.x_pred, torch.stack(x_preds), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(result.c, c.expand(STEPS, -1, -1))


@pytest.mark.parametrize("alpha_x", [1e-3, 1e-2, 0.05])
def test_correcting_the_state_lowers_the_sensory_error(alpha_x: float):
    model = network()
    c, targets = causes_and_targets()
    result = model(c, targets, alpha_x=alpha_x)
    corrected = result.h.tanh() @ model.W_o.T + model.b_o
    before = (result.x_pred - targets).square().sum(2)
    after = (corrected - targets).square().sum(2)
    assert (after < before).all()


def test_inferring_the_cause_lowers_the_generation_error():
    model = network()
    c, _ = causes_and_targets()
    targets = model(c, steps=STEPS).x_pred.detach()
    start = c + 0.3
    end = start
    for _ in range(40):
        end = model(end, targets, alpha_x=0.05, alpha_h=2.0).c[-1].detach()

    def error(causes: Tensor) -> Tensor:
        return (model(causes, steps=STEPS).x_pred - targets).square().mean()

    assert error(end) < 0.2 * error(start)


def test_the_score_is_half_the_gradient_of_the_log_mixture():
    model = network()
    c, targets = causes_and_targets()
    c.requires_grad_()
    sigma_c, alpha_c = 0.3, 0.01
    squares = (c.unsqueeze(1) - model.centres).square().sum(2)
    log_mixture = torch.logsumexp(-squares / (2 * sigma_c**2), 1)
    half_gradient = torch.autograd.grad(log_mixture.sum(), c)[0] / 2
    # Without errors to correct, the first step moves the cause along the score alone.
    moved = model(c, targets, alpha_x=0.0, alpha_c=alpha_c, sigma_c=sigma_c).c[0] - c
    torch.testing.assert_close(moved / alpha_c, half_gradient, rtol=1e-10, atol=1e-10)
    by_hand = torch.stack([reference.score(row, model.centres, sigma_c) for row in c])
    torch.testing.assert_close(by_hand, half_gradient, rtol=1e-10, atol=1e-10)


def test_retrieval_equals_forward_passes_with_the_same_noise():
    model = network()
    _, targets = causes_and_targets()
    tries, passes = 3, 4
    sigma_r = [0.7, 0.4, 0.2, 0.1]
    rates = RATES | {"sigma_r": sigma_r}
    found = model.retrieve(targets, tries, passes, **rates, generator=generator(), progress=False)

    source = generator()
    c = torch.randn(tries * BATCH, 3, generator=source, dtype=torch.float64)
    clamped = torch.cat([targets] * tries, 1)
    for index in range(passes):
        torch.testing.assert_close(found.paths[index], c.view(tries, BATCH, 3))
        c = model(c, clamped, **RATES | {"sigma_r": sigma_r[index]}, generator=source).c[-1]
        distance = (model(c, steps=STEPS).x_pred - clamped).norm(dim=2).mean(0)
        torch.testing.assert_close(found.errors[index].flatten(), distance)
        nearest = (c.unsqueeze(1) - model.centres).norm(dim=2).argmin(1)
        assert found.nearest[index].flatten().tolist() == nearest.tolist()
    torch.testing.assert_close(found.paths[passes].flatten(0, 1), c)


def test_generation_errors_do_not_depend_on_how_many_passes_are_measured_together(monkeypatch):
    model = network()
    _, targets = causes_and_targets()
    results = []
    for rows in 1, 3 * BATCH, 10_000:
        monkeypatch.setattr("torch2pc.memory._ROWS_GENERATED_TOGETHER", rows)
        results.append(model.retrieve(targets, 1, 7, generator=generator(), progress=False))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


def test_retrieval_finds_the_stored_sequences():
    """Three clearly different sequences, which the network generates without error."""
    model = network(centres=0)
    with torch.no_grad():
        model.W_c.mul_(3)
    model.set_centres(2 * torch.eye(3, dtype=torch.float64))
    targets = model(model.centres, steps=STEPS).x_pred.detach()
    rates = {"alpha_x": 0.05, "alpha_c": 0.002, "sigma_r": 10.0}
    found = model.retrieve(targets, 4, 200, **rates, generator=generator(), progress=False)
    for index in found.nearest, found.best_so_far():
        right = index == torch.arange(3)
        assert right[-1].all()
        assert right[0].double().mean() < 0.6


def test_the_best_so_far_is_the_pass_of_least_error():
    errors = torch.tensor([3.0, 2.0, math.nan, 2.5, 1.0]).view(5, 1, 1)
    nearest = torch.tensor([4, 7, 1, 2, 9]).view(5, 1, 1)
    result = Retrieval(torch.zeros(6, 1, 1, 2), errors, nearest)
    assert result.best_so_far().flatten().tolist() == [4, 7, 7, 7, 9]


def test_seeded_runs_repeat_and_other_seeds_differ():
    c, targets = causes_and_targets()
    for call in (
        lambda model, seed: model(c, targets, **RATES, generator=generator(seed)),
        lambda model, seed: model.retrieve(
            targets, 2, 3, generator=generator(seed), progress=False
        ),
    ):
        first, second, other = (call(network(), seed) for seed in (0, 0, 1))
        assert all(map(torch.equal, first, second))
        assert not torch.equal(first[0], other[0])
    weights, again, others = (PCRNN(2, 5, 2, 3, generator=generator(s)).W_r for s in (0, 0, 1))
    assert torch.equal(weights, again) and not torch.equal(weights, others)


def test_generators_leave_the_global_random_state_alone():
    state = torch.get_rng_state()
    c, targets = causes_and_targets()
    network()(c, targets, **RATES, generator=generator())
    network().retrieve(targets, 2, 3, generator=generator(), progress=False)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_thousand_passes_stay_finite():
    model = network(torch.float32)
    c, targets = causes_and_targets(torch.float32)
    found = model.retrieve(targets, 4, 1000, generator=generator(), progress=False)
    assert found.paths.isfinite().all() and found.errors.isfinite().all()
    # From where the passes have led: states, and gradients through a whole pass.
    c = found.paths[-1, 0].clone().requires_grad_()
    result = model(c, targets, alpha_c=0.0085, sigma_r=2.6, generator=generator())
    assert all(part.isfinite().all() for part in result)
    gradients = torch.autograd.grad(
        sum(part.square().sum() for part in result), [c, *model.parameters()]
    )
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_results_have_the_models_dtype(dtype: torch.dtype):
    model = network(dtype)
    c, targets = causes_and_targets(dtype)
    found = model.retrieve(targets, 2, 3, generator=generator(), progress=False)
    parts = [*model(c, targets, **RATES), *model(c, steps=2), found.paths, found.errors]
    assert {part.dtype for part in parts} == {dtype}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_what_the_cpu_gives():
    c, targets = causes_and_targets()
    on_cpu = network()(c, targets, **RATES, generator=generator())
    model = PCRNN(3, 7, 2, tau=5, generator=generator(), device="cuda", dtype=torch.float64)
    model.load_state_dict(network().state_dict())
    on_gpu = model(c.cuda(), targets.cuda(), **RATES, generator=generator())
    for ours, theirs in zip(on_gpu, on_cpu, strict=True):
        assert ours.is_cuda
        torch.testing.assert_close(ours.cpu(), theirs)
    found = model.retrieve(targets.cuda(), 2, 3, generator=generator(), progress=False)
    wanted = network().retrieve(targets, 2, 3, generator=generator(), progress=False)
    torch.testing.assert_close([part.cpu() for part in found], list(wanted))


@pytest.mark.parametrize("centres", [0, 4])
def test_the_state_dict_carries_the_centres(centres: int, tmp_path):
    saved = network(centres=centres)
    torch.save(saved.state_dict(), tmp_path / "model.pt")
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    # Into models that have other centres, or none.
    for before in 0, 2:
        model = network(centres=before)
        model.load_state_dict(state)
        assert (model.centres is None) == (centres == 0)
        if centres:
            assert torch.equal(model.centres, saved.centres)


def test_centres_are_a_copy_and_follow_the_model():
    model = network(centres=0)
    causes = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)
    model.set_centres(causes)
    with torch.no_grad():
        causes.add_(1)
    assert not model.centres.any() and not model.centres.requires_grad
    assert model.float().centres.dtype == torch.float32


def test_retrieval_runs_without_tqdm(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    _, targets = causes_and_targets()
    assert network().retrieve(targets, 1, 2, generator=generator()).errors.shape == (2, 1, BATCH)


def test_retrieval_shows_its_progress(capsys):
    pytest.importorskip("tqdm")
    _, targets = causes_and_targets()
    network().retrieve(targets, 1, 2)
    assert "2/2" in capsys.readouterr().err


def test_without_centres_there_is_nothing_to_retrieve():
    model = network(centres=0)
    c, targets = causes_and_targets()
    with pytest.raises(RuntimeError, match=r"no mixture centres to retrieve: call set_centres"):
        model.retrieve(targets)
    with pytest.raises(RuntimeError, match=r"alpha_c = 0.01 needs the mixture's centres"):
        model(c, targets, **RATES)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        *[
            ({name: value}, error, rf"{name} must be an int >= 1, got {value}$")
            for name in ("causes", "hidden", "outputs")
            for value, error in ((0, ValueError), (2.5, TypeError), (True, TypeError))
        ],
        ({"tau": 0.5}, ValueError, r"tau must be a finite number of at least 1, got 0\.5"),
        ({"tau": math.nan}, ValueError, "tau must be a finite number of at least 1, got nan"),
        ({"tau": "5"}, TypeError, "tau must be a number, got '5'"),
    ],
    ids=str,
)
def test_bad_sizes_are_named(change: dict[str, object], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        PCRNN(**{"causes": 3, "hidden": 7, "outputs": 2, "tau": 5} | change)


def test_the_smallest_sizes_work():
    model = PCRNN(1, 1, 1, 1)
    model.set_centres(torch.ones(1, 1))
    targets = model(torch.ones(1, 1), steps=1).x_pred.detach()
    assert targets.shape == (1, 1, 1)
    found = model.retrieve(targets, tries=1, passes=1, progress=False)
    assert (found.paths.shape, found.nearest.tolist()) == ((2, 1, 1, 1), [[[0]]])


def test_the_defaults_are_those_of_the_models_source():
    model, (c, targets) = network(), causes_and_targets()
    rates = {"alpha_x": 0.1, "alpha_h": 0.019, "sigma_c": 0.096}
    for by_default, explicit in zip(
        model(c, targets), model(c, targets, alpha_c=0.0, sigma_r=0.0, **rates), strict=True
    ):
        assert torch.equal(by_default, explicit)
    by_default = model.retrieve(targets, passes=3, generator=generator(), progress=False)
    rates |= {"alpha_c": 0.0085, "sigma_r": 2.6, "tries": 4, "passes": 3, "progress": False}
    explicit = model.retrieve(targets, generator=generator(), **rates)
    assert all(map(torch.equal, by_default, explicit))


def test_weights_are_drawn_by_the_generator_and_live_on_the_default_device():
    with torch.device("meta"):
        model = PCRNN(3, 7, 2, tau=5, generator=generator())
    assert {value.device.type for value in model.state_dict().values() if value is not None} == {
        "meta"
    }


def test_it_says_its_sizes():
    assert repr(network()) == "PCRNN(causes=3, hidden=7, outputs=2, tau=5)"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"c": [0.0]}, TypeError, r"c must be a tensor of shape \(batch, 3\), got list"),
        ({"c": torch.zeros(5, 2)}, ValueError, r"c must have shape \(batch, 3\), got \(5, 2\)"),
        ({"c": torch.zeros(3)}, ValueError, r"c must have shape \(batch, 3\), got \(3,\)"),
        (
            {"c": torch.zeros(5, 3)},
            ValueError,
            r"c must be torch.float64 on cpu like the model's weights, got torch.float32 on cpu",
        ),
        (
            {"targets": torch.zeros(12, 4, 2)},
            ValueError,
            r"targets must have shape \(time, 5, 2\), got \(12, 4, 2\)",
        ),
        ({"targets": torch.zeros(0, 5, 2)}, ValueError, r"targets must have shape .* \(0, 5, 2\)"),
        ({"targets": None}, ValueError, "either targets or steps: got neither"),
        ({"steps": 3}, ValueError, "either targets or steps: got both"),
        ({"targets": None, "steps": 0}, ValueError, "steps must be an int >= 1, got 0"),
        ({"alpha_x": -1.0}, ValueError, "alpha_x must be a finite number of at least 0, got -1"),
        ({"alpha_h": "big"}, TypeError, "alpha_h must be a number, .* got 'big'"),
        ({"sigma_c": 0}, ValueError, "sigma_c must be above 0, got 0"),
        ({"sigma_r": math.inf}, ValueError, "sigma_r must be a finite number .* got inf"),
    ],
    ids=str,
)
def test_bad_input_to_forward_is_named(
    change: dict[str, object], error: type[Exception], message: str
):
    c, targets = causes_and_targets()
    with pytest.raises(error, match=message):
        network()(**{"c": c, "targets": targets} | change)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"targets": torch.zeros(12, 5)},
            ValueError,
            r"targets must have shape \(time, batch, 2\)",
        ),
        ({"tries": 0}, ValueError, "tries must be an int >= 1, got 0"),
        ({"passes": 1.0}, TypeError, r"passes must be an int >= 1, got 1\.0"),
        (
            {"sigma_r": [1.0]},
            ValueError,
            "sigma_r must have one number for each of 3 passes, got 1",
        ),
        ({"alpha_h": [0.1, None, 0.1]}, TypeError, "alpha_h must be a number, or one number"),
    ],
    ids=str,
)
def test_bad_input_to_retrieval_is_named(
    change: dict[str, object], error: type[Exception], message: str
):
    _, targets = causes_and_targets()
    with pytest.raises(error, match=message):
        network().retrieve(**{"targets": targets, "tries": 2, "passes": 3} | change)


def test_bad_centres_are_named_and_change_nothing():
    model = network()
    before = model.centres
    for shape in (4, 2), (0, 3), (3,), (4, 3, 1):
        message = re.escape(f"centres must have shape (sequences, 3), got {shape}")
        with pytest.raises(ValueError, match=message):
            model.set_centres(torch.zeros(shape, dtype=torch.float64))
    assert model.centres is before
