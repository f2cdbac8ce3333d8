"""Time: Exact and FixedPred against backprop, Strict against its floor.

The bars are what the library promises; a row without one is there for information.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
import torch._inductor.config
from tqdm import tqdm

from benchmarks.nets import Case, case
from benchmarks.report import Options, Row, device_name, save_rows
from benchmarks.steps import Step, backprop, floor, infer, products
from benchmarks.timing import Times, alternate, launches, measure, threads

METHOD = (
    "One training step without the optimizer's, float32, cross-entropy, random data. BP is "
    "zero_grad, forward and loss.backward(); the floor is 20 times forward and input-vjp of layers "
    "2..L with frozen parameters, and nothing else, which is ErrorBased's floor too. Steps take "
    "turns in one process, after a warm-up, with garbage collection off; a number is the median of "
    "the ratios within the rounds. "
    "'From vinit' hands Strict its initial beliefs, so that it cannot skip the layers that no error "
    "has reached yet."
)

N = 20
ETA = 0.1
RELAXATIONS = "Strict", "ErrorBased"
# What compiled Strict is promised to take at most, in units of BP, and its first call in seconds.
BARS = {"mlp3x300": (3.5, 20.0), "mlp8x300": (5.2, None), "mlp20x64": (4.0, 40.0)}
PRODUCTS = "its products alone"
# The networks that compile=True is measured on: those whose time is not all in convolutions.
COMPILED = ("mnist_net", *BARS)


def run(options: Options) -> None:
    """Measure, print and save the table of times."""
    rows: list[Row] = []
    milliseconds: list[dict[str, object]] = []
    combinations = [
        (name, device, count)
        for device, count in options.devices()
        for name in options.networks
        if name != "vgg_blocks"  # whose time is vgg_style's: it is there for its memory
    ]
    with nothing_compiled_yet():
        for name, device, count in tqdm(combinations, "speed"):
            where = device_name(device, count)
            with threads(count):
                found, medians = measure_case(case(name, device), device, options.seconds)
            rows += [Row(name, where, **row) for row in found]
            milliseconds.append({"network": name, "device": where, **medians})
    save_rows(options, "speed", rows, method=METHOD, milliseconds=milliseconds)


def measure_case(
    case: Case, device: torch.device, seconds: float
) -> tuple[list[dict[str, object]], dict[str, float]]:
    """The rows of one network, and the median time of each step in milliseconds."""
    deep = case.name == "mlp20x64"  # so little to compute that PCInfer's own work shows
    cheap: dict[str, Step] = {
        "BP": backprop(case),
        "Exact": infer(case, "Exact"),
        **{f"FixedPred, n={n}": infer(case, "FixedPred", eta=ETA, n=n) for n in (5, N, 1000)},
    }
    costly: dict[str, Step] = {
        "BP": cheap["BP"],
        "floor": floor(case, N),
        f"Strict, n={N}": infer(case, "Strict", eta=ETA, n=N),
        f"ErrorBased, n={N}": infer(case, "ErrorBased", eta=ETA, n=N),
    }
    unskipped = f"Strict, n={N}, from vinit"
    if case.kind == "MLP":
        costly[unskipped] = infer(case, "Strict", from_vinit=True, eta=ETA, n=N)
    rows = []
    measures_compiled = case.name in COMPILED
    if measures_compiled:
        compiled, compiled_errors = [f"{kind}, n={N}, compile=True" for kind in RELAXATIONS]
        costly[compiled_errors] = infer(case, "ErrorBased", eta=ETA, n=N, compile=True)
        costly[compiled] = infer(case, "Strict", eta=ETA, n=N, compile=True)
        if case.kind == "MLP":
            costly[PRODUCTS] = products(case, N)
        rows.append(
            dict(
                what=f"{compiled}: first call",
                of="s",
                value=measure(costly[compiled], 1, device),
                bar=BARS.get(case.name, (None, None))[1],
            )
        )

    times = alternate(cheap, device, seconds / 2, case.name)
    rows += [
        ratio(times, "Exact", "BP", 1.10 if deep else 1.05),
        ratio(times, f"FixedPred, n={N}", "BP", 1.12 if deep else 1.08),
        ratio(times, "FixedPred, n=1000", "FixedPred, n=5", 1.03),
    ]
    strict_times = alternate(costly, device, seconds, case.name)
    rows += [
        ratio(strict_times, f"Strict, n={N}", "floor", 1.35 if case.kind == "conv" else 1.5),
        ratio(strict_times, f"Strict, n={N}", "BP"),
        ratio(strict_times, f"ErrorBased, n={N}", "floor", 1.1),
    ]
    if unskipped in costly:
        rows.append(ratio(strict_times, unskipped, "floor"))
    if measures_compiled:
        rows.append(ratio(strict_times, compiled, "floor"))
        bar = 1.0 if case.name == "mnist_net" else None
        rows.append(ratio(strict_times, compiled, f"Strict, n={N}", bar))
        rows.append(ratio(strict_times, compiled, "BP", BARS.get(case.name, (None, None))[0]))
        rows.append(ratio(strict_times, compiled_errors, "floor", 1.1))
        if PRODUCTS in costly:
            rows.append(ratio(strict_times, compiled, PRODUCTS, 1.2))
    if device.type == "cuda":
        rows += launch_rows(costly, strict_times)
    medians = {
        name: 1000 * taken.median(name)
        for taken, steps in ((strict_times, costly), (times, cheap))
        for name in steps
    }
    return rows, medians


def launch_rows(steps: dict[str, Step], times: Times) -> list[dict[str, object]]:
    """What each step starts on the GPU, how often it waits, and its time in units of its kernels' sum."""
    rows: list[dict[str, object]] = []
    for name, step in steps.items():
        started = launches(step)
        bar = 1.3 if name.endswith("compile=True") else None
        rows.append(dict(what=name, of="kernels", value=float(started.kernels)))
        rows.append(dict(what=name, of="CUDA graphs", value=float(started.graphs)))
        rows.append(dict(what=name, of="synchronisations", value=float(started.waits), bar=0.0))
        value = times.median(name) / started.seconds
        rows.append(dict(what=name, of="sum of its kernels", value=value, bar=bar))
    return rows


def ratio(times: Times, what: str, of: str, bar: float | None = None) -> dict[str, object]:
    low, middle, high = times.ratio(what, of)
    return dict(what=what, of=of, value=middle, quartiles=(low, high), bar=bar)


@contextmanager
def nothing_compiled_yet() -> Iterator[None]:
    """Hides what torch.compile kept on disk from earlier runs, and keeps it from sharing now."""
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict("os.environ", TORCHINDUCTOR_CACHE_DIR=folder),
        torch._inductor.config.patch(force_disable_caches=True),
    ):
        yield
