"""The figure on prospective configuration: networks side by side, the control's rules, the tuning."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from paper_figures import __main__ as command
from paper_figures.data import load_digits
from paper_figures.prospective import alignment, learning, side_by_side
from paper_figures.prospective import figure_prospective as prospective
from paper_figures.prospective.side_by_side import METHODS, Net, Stack
from paper_figures.report import Options
from paper_figures.runs import Runs
from torch2pc import PCInfer

CPU = torch.device("cpu")
SIZES = (5, 4, 3)


def nets(method: str, rates: list[float], threshold: float = math.inf) -> list[Net]:
    return [Net(method, rate, threshold, seed) for seed, rate in enumerate(rates)]


def stack(some: list[Net]) -> Stack:
    weights = {
        net.seed: [w.double() for w in side_by_side.drawn_weights(SIZES, None, net.seed)]
        for net in some
    }
    return Stack(some, weights, nn.Tanh, 0.3, 7)


def batch(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """For ``count`` networks, in float64."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.rand(count, 6, 5, generator=generator, dtype=torch.float64)
    return X, torch.rand(count, 6, 3, generator=generator, dtype=torch.float64)


def steps_of(made: Stack, X: Tensor, targets: Tensor) -> list[Tensor]:
    """What a step of the stack subtracts."""
    before = [weight.clone() for weight in made.weights]
    made.step(X, targets)
    return [old - new for old, new in zip(before, made.weights, strict=True)]


@pytest.mark.parametrize("method", METHODS)
def test_each_network_learns_as_it_would_alone(method: str) -> None:
    mine = [Net(method, rate, 0.4, seed) for seed, rate in enumerate((0.1, 0.02, 0.05))]
    together, apart = stack(mine), [stack([net]) for net in mine]
    for step in range(3):
        X, targets = batch(3, step)
        together.step(X, targets)
        for k, alone in enumerate(apart):
            alone.step(X[k : k + 1], targets[k : k + 1])
    for k, alone in enumerate(apart):
        for mixed, own in zip(together.weights, alone.weights, strict=True):
            torch.testing.assert_close(mixed[k], own[0])


def test_methods_in_one_stack_do_not_touch_each_other() -> None:
    methods = [method for method in METHODS if side_by_side.relaxes(method)]
    mixed = stack([net for method in methods for net in nets(method, [0.1, 0.03], 0.4)])
    X, targets = batch(2)
    mixed.step(X.repeat(len(methods), 1, 1), targets.repeat(len(methods), 1, 1))
    for place, method in enumerate(methods):
        alone = stack(nets(method, [0.1, 0.03], 0.4))
        alone.step(X, targets)
        for both, own in zip(mixed.weights, alone.weights, strict=True):
            torch.testing.assert_close(both[2 * place : 2 * place + 2], own)


def test_plain_steps_are_rate_times_the_papers_updates() -> None:
    X, targets = batch(2)
    for method, ErrType in ("PC", "Strict"), ("backprop", "Exact"):
        made = stack(nets(method, [0.1, 0.02]))
        layers = [[w[0].T.clone() for w in made.weights], [w[1].T.clone() for w in made.weights]]
        steps = steps_of(made, X, targets)
        for k, rate in enumerate((0.1, 0.02)):
            first, second = (nn.Linear(w.shape[1], w.shape[0], bias=False) for w in layers[k])
            model = nn.Sequential(first, nn.Sequential(nn.Tanh(), second)).double()
            for linear, weight in zip((first, second), layers[k], strict=True):
                linear.weight.data.copy_(weight)
            loss = side_by_side.summed_half_squares
            PCInfer(model, loss, X[k], targets[k], ErrType, 0.3, 7)
            for step, linear in zip(steps, (first, second), strict=True):
                torch.testing.assert_close(step[k].T, rate * linear.weight.grad)


def test_adam_is_pytorchs() -> None:
    rates = [0.1, 0.003]
    made = stack(nets("backprop, Adam", rates))
    copies = [
        [nn.Parameter(weight[k].clone()) for weight in made.weights] for k in range(len(rates))
    ]
    optimizers = [torch.optim.Adam(own, lr=rate) for own, rate in zip(copies, rates, strict=True)]
    for step in range(5):
        X, targets = batch(2, step)
        for k, (own, optimizer) in enumerate(zip(copies, optimizers, strict=True)):
            model = lambda X, own=own: torch.tanh(X @ own[0]) @ own[1]  # noqa: E731
            optimizer.zero_grad()
            (0.5 * (model(X[k]) - targets[k]).square().sum()).backward()
            optimizer.step()
        made.step(X, targets)
    for k, own in enumerate(copies):
        for weight, theirs in zip(made.weights, own, strict=True):
            torch.testing.assert_close(weight[k], theirs.detach())


def test_clipping_shortens_what_is_too_long_and_nothing_else() -> None:
    X, targets = batch(2)
    free = steps_of(stack(nets("backprop", [1, 1])), X, targets)
    lengths = [math.hypot(*(step[k].norm() for step in free)) for k in range(2)]
    short, long = min(lengths), max(lengths)
    threshold = (short + long) / 2
    clipped = steps_of(stack(nets("backprop, clipped", [1, 1], threshold)), X, targets)
    for k, length in enumerate(lengths):
        share = min(1, threshold / length)
        for step, whole in zip(clipped, free, strict=True):
            torch.testing.assert_close(step[k], share * whole[k])


def test_normalised_steps_are_as_long_as_their_rate_in_each_layer() -> None:
    X, targets = batch(2)
    made = stack(nets("backprop, normalised", [0.3, 0.01]))
    for step in steps_of(made, X, targets):
        assert step.norm(dim=(1, 2)).tolist() == pytest.approx([0.3, 0.01])
    nothing = [torch.zeros(2, 3, 4)]
    assert torch.equal(side_by_side.normalised(nothing)[0], nothing[0])


def test_backprop_as_long_as_PC_has_its_lengths_and_backprops_directions() -> None:
    X, targets = batch(2)
    methods = ("backprop, as long as PC", "PC", "backprop")
    both, PC, backprop = (steps_of(stack(nets(m, [0.1, 0.1])), X, targets) for m in methods)
    for ours, length, direction in zip(both, PC, backprop, strict=True):
        torch.testing.assert_close(ours.norm(dim=(1, 2)), length.norm(dim=(1, 2)))
        cosine = torch.cosine_similarity(ours.flatten(1), direction.flatten(1))
        torch.testing.assert_close(cosine, torch.ones_like(cosine))


def test_outputs_are_the_models() -> None:
    made = stack(nets("PC", [0.1, 0.1, 0.1]))
    X, _ = batch(1)
    found = torch.stack(list(made.outputs(X[0])))
    torch.testing.assert_close(found, made.model(X.expand(3, -1, -1)).detach())


def test_a_seed_has_its_own_batches_and_every_epoch_all_images() -> None:
    task = replace(prospective.DRIFT, batch_size=4, steps=9, images=12, drift=None)
    order = torch.cat([chosen for chosen, _ in learning.batches(task, 100, 3)])
    for epoch in order.split(12):
        assert sorted(epoch.tolist()) == list(range(12))
    assert not torch.equal(order[:12], order[12:24])
    other = torch.cat([chosen for chosen, _ in learning.batches(task, 100, 4)])
    assert not torch.equal(order, other)


def test_only_the_last_five_labels_drift_and_when_they_should() -> None:
    task = replace(prospective.DRIFT, batch_size=4, steps=12, images=12, drift=4)
    names = [names.tolist() for _, names in learning.batches(task, 100, 0)]
    assert all(now[:5] == list(range(5)) and sorted(now) == list(range(10)) for now in names)
    changes = [k for k in range(1, 12) if names[k] != names[k - 1]]
    assert changes == [4, 8]


def test_what_is_measured_is_the_share_of_errors_or_the_half_square_of_an_image() -> None:
    output = torch.eye(10)[:4]
    assert learning.measured("error", output, torch.tensor([0, 1, 3, 2])) == 0.5
    assert learning.measured("loss", output, torch.tensor([0, 1, 3, 2])) == 0.5
    assert learning.measured("loss", output, torch.arange(4)) == 0


def test_the_best_candidate_on_held_out_images_goes_on_to_the_test_images(tmp_path: Path) -> None:
    done: list[learning.Training] = []

    def train(training: learning.Training, *_: object) -> dict[str, object]:
        done.append(training)
        blown = {0.3: math.nan}
        return {"curves": [[1.0, blown.get(net.rate, net.rate)] for net in training.nets]}

    candidates = {
        method: [(rate, math.inf) for rate in (0.3, 0.1, 0.2)] for method in ("PC", "backprop")
    }
    options = Options(None, tmp_path, CPU)
    runs = Runs("figure_prospective", train, load_digits(None), options)
    found = learning.outcomes(prospective.ONLINE, candidates, [1000, 1001], [0, 1, 2], runs)
    for outcome in found.values():
        assert outcome.best == (0.1, math.inf)
        assert outcome.tried[0.3, math.inf] == [math.inf] * 2
        assert outcome.means == [0.55] * 3
    tuned = {net.seed for training in done if training.held_out for net in training.nets}
    final = {net.seed for training in done if not training.held_out for net in training.nets}
    assert tuned == {1000, 1001} and final == {0, 1, 2}
    # Nothing is trained twice.
    learning.outcomes(prospective.ONLINE, candidates, [1000, 1001], [0, 1, 2], runs)
    assert len(done) == 4


def test_every_method_has_as_many_candidates() -> None:
    for task, mine in prospective.CANDIDATES.items():
        for method, candidates in mine.items():
            assert method in METHODS
            if (task, method) != ("saddle", "backprop"):
                assert len(set(candidates)) == 9
    assert len(prospective.CANDIDATES["saddle"]["backprop"]) > 9


def test_alignment_of_one_layer_is_complete_and_of_two_is_what_the_equilibrium_gives() -> None:
    for values in alignment.alignments("linear", 1, 3, 0).values():
        assert values == pytest.approx([1] * 3)
    # Two linear layers: v minimises ||W2 v - t||^2 / 2 + ||v - W1 x||^2 / 2.
    found = alignment.alignments("linear", 2, 1, 5)["Equilibrium, n 100"]
    generator = torch.Generator().manual_seed(5)
    x, t = torch.randn(2, 1, 1, 64, generator=generator, dtype=torch.float64)
    drawn = torch.rand(2, 1, 64, 64, generator=generator, dtype=torch.float64)
    first, second = ((2 * drawn - 1) * (6 / 128) ** 0.5)[:, 0]
    v = torch.linalg.solve(
        second @ second.T + torch.eye(64, dtype=torch.float64), second @ t[0].T + (x[0] @ first).T
    ).T
    new_first = first - 1e-3 * x[0].T @ (x[0] @ first - v)
    new_second = second - 1e-3 * v.T @ (v @ second - t[0])
    change = x[0] @ new_first @ new_second - x[0] @ first @ second
    expected = torch.cosine_similarity(change, t[0] - x[0] @ first @ second)
    assert found == pytest.approx(expected.tolist(), abs=1e-6)


def fake_outcomes(task: learning.Task, value: float) -> dict[str, learning.Outcome]:
    curves = [[value, value / 2], [value, value / 2]]
    return {
        method: learning.Outcome({(0.1, math.inf): [value]}, (0.1, math.inf), curves)
        for method in prospective.CANDIDATES[task.name]
    }


def test_the_papers_errors_are_shown_beside_those_of_its_own_data_set(tmp_path: Path) -> None:
    plan = replace(prospective.Plan(), depths=(2, 15), aligned=3)
    of_rules = {rule: [0.5, 0.6, 0.7] for rule in alignment.STYLES}
    aligned = {kind: dict.fromkeys(plan.depths, of_rules) for kind in alignment.ACTIVATIONS}
    found = {task.name: fake_outcomes(task, 0.4) for task in plan.tasks}
    digits = load_digits(None)
    for name, shown in (digits.name, False), (prospective.FASHION, True):
        data = replace(digits, name=name)
        numbers = prospective.numbers_of(found, aligned, data)
        papers = [number.paper for number in numbers if "mean error" in number.what]
        assert papers == ([0.272, 0.288, 0.29, 0.405] if shown else [])
        figure = prospective.draw(plan, found, aligned, data)
        texts = [text.get_text() for axes in figure.axes for text in axes.texts]
        assert ("paper, PC" in texts) == shown
    # With such a loss both have left the saddle.
    checks = {number.what: number.ours for number in numbers if number.check}
    assert checks["PC leaves the saddle from every seed"] == "yes"
    assert checks["backprop with SGD does at one of its 1 rates"] == "yes"


def test_the_embedded_digits_are_learned_for_less_long() -> None:
    options = Options(None, Path(), CPU)
    digits = load_digits(None)
    short = prospective.plan_of(digits, options)
    long = prospective.plan_of(replace(digits, name=prospective.FASHION), options)
    assert long.candidates == short.candidates
    for few, many in zip(short.tasks, long.tasks, strict=True):
        assert replace(many, steps=few.steps) == few and many.steps > few.steps
    assert {task.name: task.steps for task in long.tasks}["online"] == 12_800


def test_the_command_draws_it_and_passes_its_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(alignment.RELAXATIONS, alignment.FURTHER, ("Strict", 130))
    arguments = ["--figure", "prospective", "--quick", "--check", "--out", str(tmp_path)]
    assert command.main([*arguments, "--device", "cpu"]) == 0
    record = json.loads((tmp_path / "figure_prospective.json").read_text())
    assert {*record["series"]["online"]} == {*record["series"]["drift"]} == {*METHODS}
    assert {*record["series"]["alignment"]["tanh"]["15"]} == {*alignment.STYLES}
    for outcome in record["series"]["drift"].values():
        assert [len(curve) for curve in outcome["test curves by seed"]] == [3, 3]
    assert (tmp_path / "figure_prospective.png").read_bytes().startswith(b"\x89PNG")
    assert "PC leaves the saddle from every seed *" in capsys.readouterr().out
