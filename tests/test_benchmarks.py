"""The benchmarks measure what they say: steps, ratios, memory, fits, tables and files.

No test depends on how fast anything is: where times matter, the clock is a fake.
"""

from __future__ import annotations

import gc
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import memory, nets, peers, scaling, speed, steps, timing
from benchmarks.__main__ import main
from benchmarks.report import Options, Row, rows_table
from tests.cases import calls_of
from torch2pc import PCInfer
from torch2pc.displacement.lines import Displacement

CPU = torch.device("cpu")


class Counting(nn.Linear):
    """Notes its width each time it runs, whichever copy of the model it is in."""

    runs: list[int] = []  # noqa: RUF012

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.runs.append(self.out_features)
        return super().forward(x)


@pytest.fixture
def case() -> nets.Case:
    Counting.runs.clear()
    return nets.make_case(
        "tiny", "MLP", lambda: nn.Sequential(*map(Counting, (4, 5, 6), (5, 6, 10))), (3, 4), CPU
    )


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Options:
    """The settings of a run on one tiny network, which is over at once."""
    networks = {"mlp_tiny": ("MLP", lambda: nets.mlp(3, 6, 8), (8,), 4)}
    monkeypatch.setattr(nets, "NETWORKS", networks)
    monkeypatch.setattr(speed, "COMPILED", ())  # compiling takes too long here
    return Options(tmp_path, list(networks), [1], seconds=0.0, quick=True)


def gradients(case: nets.Case) -> list[torch.Tensor | None]:
    return [parameter.grad for parameter in case.model.parameters()]


def test_backprop_leaves_the_gradients_of_one_pass(case: nets.Case) -> None:
    step = steps.backprop(case)
    step()
    step()  # the second starts with zero_grad
    Loss = case.LossFun(case.model(case.X), case.Y)
    expected = torch.autograd.grad(Loss, list(case.model.parameters()))
    torch.testing.assert_close(gradients(case), list(expected))


def test_the_floor_runs_layers_2_to_L_n_times_and_nothing_else(
    case: nets.Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = steps.floor(case, 3)
    Counting.runs.clear()
    asked: list[tuple[int, ...]] = []
    grad = torch.autograd.grad

    def counted(output: torch.Tensor, x: torch.Tensor, e: torch.Tensor) -> object:
        found = grad(output, x, e)
        asked.append(tuple(found[0].shape))
        return found

    monkeypatch.setattr(torch.autograd, "grad", counted)
    step()
    assert Counting.runs == [6, 10] * 3
    assert asked == [(3, 5), (3, 6)] * 3
    assert gradients(case) == [None] * 6
    assert all(parameter.requires_grad for parameter in case.model.parameters())


class Products(TorchDispatchMode):
    """Counts the products of matrices by their operands' sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: Counter[tuple[int, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            a, b = args[-2:]
            self.sizes[(*a.shape, b.shape[1])] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("n", [1, 2, 6])
def test_the_products_are_those_of_strict_but_for_those_of_zeros(n: int) -> None:
    """In the layer that an error has just reached from above, whose input has not moved yet."""
    model = nn.Sequential(*map(nn.Linear, (4, 5, 6), (5, 6, 10)))
    case = nets.make_case("tiny", "MLP", lambda: model, (3, 4), CPU)
    step = steps.products(case, n)
    with Products() as alone:
        step()
    strict = steps.infer(case, "Strict", eta=0.1, n=n)
    strict()  # the first call on a model holds its layers against their rules
    with Products() as of_strict:
        strict()
    of_zeros = Counter([(3, 6, 10), (3, 5, 6)][:n])
    assert of_strict.sizes == alone.sizes + of_zeros


@pytest.mark.parametrize("ErrType", ["Exact", "FixedPred", "Strict"])
def test_infer_is_one_call_of_PCInfer(case: nets.Case, ErrType: str) -> None:
    steps.infer(case, ErrType, eta=0.2, n=3)()
    found = gradients(case)
    PCInfer(case.model, case.LossFun, case.X, case.Y, ErrType, eta=0.2, n=3)
    torch.testing.assert_close(found, gradients(case))


def test_strict_from_vinit_infers_the_same_and_skips_nothing(
    case: nets.Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated = calls_of(Displacement, "forward", monkeypatch)
    runs, found = [], []
    for from_vinit in False, True:
        step = steps.infer(case, "Strict", from_vinit=from_vinit, eta=0.1, n=1)
        step()
        evaluated.clear()
        step()
        runs.append([delta.shape[1] for _, delta in evaluated])
        found.append(gradients(case))
    torch.testing.assert_close(*found)
    # The inputs of layers 2 and 3 are 5 and 6 wide.
    assert runs == [[6], [6, 5]]


class Clock:
    """A clock that steps move by hand, on a machine that gets slower and slower."""

    def __init__(self) -> None:
        self.now, self.slowness = 0.0, 1.0
        self.calls: list[str] = []

    def step(self, name: str, seconds: float) -> Callable[[], None]:
        def step() -> None:
            self.calls.append(name)
            self.now += seconds * self.slowness
            self.slowness *= 1.001

        return step


def test_alternated_runs_give_the_ratio_in_spite_of_drift(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock.now)
    collecting: list[bool] = []
    slow, quick = clock.step("slow", 0.06), clock.step("quick", 0.02)

    def watched() -> None:
        collecting.append(gc.isenabled())
        slow()

    times = timing.alternate({"slow": watched, "quick": quick}, CPU, 8.0, "test")
    rounds = len(times.seconds["slow"])
    assert 90 <= rounds <= 100
    assert times.ratio("slow", "quick")[1] == pytest.approx(3, rel=0.01)
    assert times.median("slow") > 0.06 * 1.05  # the drift that the ratio is free of
    assert clock.calls[-4:] in (
        ["slow", "quick", "quick", "slow"],
        ["quick", "slow", "slow", "quick"],
    )
    assert collecting[-rounds:] == [False] * rounds
    assert gc.isenabled()


def test_short_steps_are_repeated_within_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock.now)
    step = clock.step("short", timing.SAMPLE / 8)
    times = timing.alternate({"short": step}, CPU, 0.0, "test", rounds=(2, 3))
    assert len(times.seconds["short"]) == 2
    assert len(clock.calls) in range(2 + 2 * 7, 2 + 2 * 9 + 1)
    assert times.median("short") == pytest.approx(timing.SAMPLE / 8, rel=0.05)


def test_ratios_are_paired_and_their_quartiles_given() -> None:
    times = timing.Times({"a": np.array([2.0, 6.0, 12.0]), "b": np.array([1.0, 2.0, 3.0])})
    assert times.ratio("a", "b") == (2.5, 3.0, 3.5)
    assert times.median("a") == 6.0


def test_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), timing.threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise ZeroDivisionError
    assert torch.get_num_threads() == before


def test_peak_memory_of_known_allocations() -> None:
    def function() -> None:
        a = torch.empty(1_000_000, dtype=torch.uint8)
        b = torch.empty(300_000, dtype=torch.uint8)
        del a
        c = torch.empty(600_000, dtype=torch.uint8)
        del b, c

    assert memory.peak_memory(function, CPU) == 1_300_000


def test_peak_memory_leaves_out_what_was_there_before() -> None:
    held = [torch.empty(1_000_000, dtype=torch.uint8)]

    def function() -> None:
        held.clear()
        held.append(torch.empty(200_000, dtype=torch.uint8))

    assert memory.peak_memory(function, CPU) == 200_000


def test_peak_memory_of_a_chain_that_autograd_stores() -> None:
    # Of one megabyte each: five outputs kept for the backward pass (and the last one by y), the
    # gradient that goes in, the one that the fifth sigmoid hands on and the one that the fourth makes.
    x = torch.zeros(250_000, requires_grad=True)

    def function() -> None:
        y = x
        for _ in range(5):
            y = y.sigmoid()
        y.backward(torch.ones_like(y))

    assert memory.peak_memory(function, CPU) == 8_000_000


def test_memory_of_a_net_that_is_all_weights() -> None:
    case = nets.make_case("wide", "MLP", lambda: nets.mlp(3, 200, 200), (1, 200), CPU)
    peaks = memory.measure_case(case, CPU)
    weights = sum(parameter.nbytes for parameter in case.model.parameters())
    for what in "BP", "Exact", "FixedPred, n=20", "Strict, n=20":
        # The gradients; those of the step before are freed by zero_grad. Scaling makes no copy.
        assert weights <= peaks[what] < 1.6 * weights, what
    assert 2 * weights <= peaks["Exact, old gradients there"] < 2.6 * weights
    assert peaks["results"] == 4 * (2 * 200 + 3 * (200 + 200 + 10))
    assert gradients(case) == [None] * 6


def test_line_and_its_R2() -> None:
    assert scaling.line([1, 2, 3], [5, 7, 9]) == pytest.approx((2, 3, 1))
    assert scaling.line([0, 1, 2, 3], [0, 1, 4, 9]) == pytest.approx((3, -1, 1 - 4 / 49))


def test_networks_are_those_that_the_table_names() -> None:
    for name, (kind, _, _, batch) in nets.NETWORKS.items():
        case = nets.case(name, CPU)
        assert (case.name, case.kind, len(case.X)) == (name, kind, batch)
        with torch.no_grad():
            assert case.model(case.X[:2]).shape == (2, nets.CLASSES)
        if name.startswith("mlp"):
            layers, width = map(int, name.removeprefix("mlp").split("x"))
            assert len(case.model) == layers
            assert case.model[-1].in_features == width
    vgg = nets.vgg_style()
    assert len(vgg) == 20
    assert sum(isinstance(module, nn.Conv2d) for module in vgg.modules()) == 19
    assert len(nets.vgg_blocks()) == 6
    assert torch.nn.utils.parameters_to_vector(nets.vgg_blocks().parameters()).numel() == (
        torch.nn.utils.parameters_to_vector(vgg.parameters()).numel()
    )


def test_rows_say_whether_the_bar_is_reached() -> None:
    rows = [
        Row("net", "cpu", "Exact", "BP", 1.04, (1.0, 1.1), 1.05),
        Row("net", "cpu", "Exact", "BP", 1.06, (1.0, 1.1), 1.05),
        Row("net", "cpu", "Strict", "BP", 7.0),
    ]
    assert [row.reached for row in rows] == [True, False, None]
    lines = rows_table(rows).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert [line.split("|")[-2].strip() for line in lines[2:]] == ["yes", "NO", ""]


def test_the_speed_table_is_what_was_measured(tiny: Options) -> None:
    speed.run(tiny)
    record = json.loads((tiny.out / "speed.json").read_text("utf-8"))
    markdown = (tiny.out / "speed.md").read_text("utf-8")
    found = {(row["what"], row["of"]): row for row in record["rows"]}
    assert set(found) == {
        ("Exact", "BP"),
        ("FixedPred, n=20", "BP"),
        ("FixedPred, n=1000", "FixedPred, n=5"),
        ("Strict, n=20", "floor"),
        ("Strict, n=20, from vinit", "floor"),
        ("Strict, n=20", "BP"),
        ("ErrorBased, n=20", "floor"),
    }
    for row in found.values():
        low, high = row["quartiles"]
        assert 0 < low <= row["value"] <= high
        assert row["reached"] is (None if row["bar"] is None else row["value"] <= row["bar"])
        assert f"{row['value']:.3f}" in markdown
    assert found["Exact", "BP"]["bar"] == 1.05
    assert found["Strict, n=20", "floor"]["bar"] == 1.5
    assert found["ErrorBased, n=20", "floor"]["bar"] == 1.1
    assert record["milliseconds"][0]["floor"] > 0
    assert record["conditions"]["torch"] == torch.__version__
    assert sorted(path.name for path in tiny.out.iterdir()) == ["speed.json", "speed.md"]


def test_the_memory_table_is_what_was_measured(tiny: Options) -> None:
    memory.run(tiny)
    record = json.loads((tiny.out / "memory.json").read_text("utf-8"))
    (peaks,) = record["megabytes"]
    values = {(row["what"], row["of"]): row["value"] for row in record["rows"]}
    assert values["Exact", "BP"] == pytest.approx(peaks["Exact"] / peaks["BP"])
    assert values["Strict, n=20", "BP + results"] == pytest.approx(
        peaks["Strict, n=20"] / (peaks["BP"] + peaks["results"])
    )


def test_scaling_draws_its_fits(tiny: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WIDTH": 3, "BATCH": 2, "FIXED_N": 2, "FIXED_DEPTH": 3}.items():
        monkeypatch.setattr(scaling, name, value)
    monkeypatch.setattr(scaling, "QUICK_DEPTHS", (2, 3, 4))
    monkeypatch.setattr(scaling, "QUICK_ITERATIONS", (1, 2, 3))
    scaling.run(tiny)
    against = json.loads((tiny.out / "scaling.json").read_text("utf-8"))["against"]
    assert against["L"]["x"] == [2, 3, 4]
    for panel in against.values():
        for fit in panel["curves"].values():
            line = scaling.line(panel["x"], fit["milliseconds"])
            assert line == pytest.approx((fit["slope"], fit["offset"], fit["R2"]))
    assert matplotlib.image.imread(tiny.out / "scaling.png").ndim == 3


def test_the_command_line_refuses_what_it_cannot_measure(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for arguments in ["--networks", "resnet"], ["--threads", "0"], ["--only", "taste"]:
        with pytest.raises(SystemExit):
            main(arguments)
        assert arguments[1] in capsys.readouterr().err


def test_packages_that_are_not_installed_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    packages = peers.PACKAGES | {"elsewhere": ("torch2pc-no-such-package", "torch", None)}
    monkeypatch.setattr(peers, "PACKAGES", packages)
    found, missing = peers.find([sys.executable])
    assert missing["elsewhere"] == "not installed"
    assert "torch2pc" in found


def test_a_checkout_says_its_version(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="is no checkout of jpc"):
        peers.version_in(tmp_path)
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "jpc"\nversion = "1.2.3"\n')
    assert peers.version_in(tmp_path) == "1.2.3"


def test_peers_are_timed_in_their_own_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "MLPS", {"tiny": [8, 6, 6, 10]})
    found = dict.fromkeys(("torch2pc", "no such package"), (sys.executable, "1.0"))
    ours, other = peers.measure("tiny", 1, found, seconds=0.0, checkouts={}, batch=8)
    assert ours["ratio"] == 1.0
    assert ours["milliseconds"] > 0
    assert ours["rests on"] == {"torch": torch.__version__}
    assert other["error"] == "the process ended"
    assert "the process ended" in peers.rows_table([ours, other])


def test_what_a_profile_tells_of_the_gpu() -> None:
    def event(device: str, name: str, microseconds: float = 50.0) -> SimpleNamespace:
        kind = torch.autograd.DeviceType
        return SimpleNamespace(
            name=name,
            device_type=kind.CUDA if device == "cuda" else kind.CPU,
            device_time_total=microseconds,
        )

    on_host = ["aten::mm", "cudaGraphLaunch", "cudaGraphLaunch", "cudaStreamSynchronize"]
    events = [event("cpu", name) for name in [*on_host, "cudaDeviceSynchronize"]]
    found = timing.launched([*events, event("cuda", "gemm", 3.0), event("cuda", "relu", 4.0)])
    assert found == timing.Launches(2, pytest.approx(7e-6), graphs=2, waits=2)


def test_launches_become_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "launches", lambda step: timing.Launches(10, 0.5, 3, 1))
    names = ["Strict, n=20", "Strict, n=20, compile=True"]
    times = timing.Times({name: np.array([0.6, 0.6, 0.7]) for name in names})
    rows = [Row("net", "cuda", **row) for row in speed.launch_rows(dict.fromkeys(names), times)]
    values = {(row.what, row.of): (row.value, row.bar) for row in rows}
    for name, bar in zip(names, (None, 1.3), strict=True):
        assert values[name, "kernels"] == (10.0, None)
        assert values[name, "CUDA graphs"] == (3.0, None)
        assert values[name, "synchronisations"] == (1.0, 0.0)
        assert values[name, "sum of its kernels"] == (pytest.approx(1.2), bar)


@pytest.mark.parametrize(("kinds", "cpu", "gpu"), [(["cpu"], 2, 0), (["cuda"], 0, 1)])
def test_the_devices_that_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kinds: list[str], cpu: int, gpu: int
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    devices = Options(tmp_path, [], [1, 2], 0.0, kinds=kinds).devices()
    types = [device.type for device, _ in devices]
    assert (types.count("cpu"), types.count("cuda")) == (cpu, gpu)


def test_no_gpu_no_measurement(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert main(["--device", "cuda"]) == 2
    assert "no GPU" in capsys.readouterr().err
