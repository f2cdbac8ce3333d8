"""Peak memory of one training step: what PyTorch's allocator hands out at most at one time.

On a CPU every allocation and release is read from a profile; on a GPU the allocator counts itself.
Scratch space that a kernel takes from the system is not seen.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from benchmarks.nets import Case, case
from benchmarks.report import Options, Row, device_name, save_rows
from benchmarks.steps import Step, backprop, infer
from benchmarks.timing import threads
from torch2pc import PCInfer

METHOD = (
    "Peak of the memory that PyTorch's allocator hands out during two training steps in a row, on "
    "top of what was there before (weights and batch); on a CPU summed up from the allocations in "
    "a torch.profiler trace, on a GPU torch.cuda.max_memory_allocated. It contains the gradients, "
    "and what PCInfer returns. Every step starts with zero_grad, except where it says that the "
    "gradients of the step before are still there. 'Results' is the size of all that PCInfer must "
    "return: vhat, v and epsilon. In vgg_blocks, a layer is a whole block "
    "of vgg_style: Strict keeps the graphs of the first block and of one other, BP of all."
)

N, ETA = 20, 0.1


def run(options: Options) -> None:
    """Measure, print and save the table of peaks."""
    rows: list[Row] = []
    megabytes: list[dict[str, object]] = []
    # The number of threads changes nothing: one CPU entry, and the GPU if there is one.
    devices = {device.type: device for device, _ in options.devices()}
    for device in devices.values():
        for name in tqdm(options.networks, f"memory, {device.type}"):
            with threads(1):
                peaks = measure_case(case(name, device), device)
            where = device_name(device, 1) if device.type == "cuda" else "cpu"
            rows += rows_of(name, where, peaks)
            in_megabytes = {what: size / 1e6 for what, size in peaks.items()}
            megabytes.append({"network": name, "device": where, **in_megabytes})
    save_rows(options, "memory", rows, method=METHOD, megabytes=megabytes)


def measure_case(case: Case, device: torch.device) -> dict[str, int]:
    """Peak bytes of each kind of step on this network, and the size of what PCInfer returns."""
    steps = {
        "BP": backprop(case),
        "Exact": with_zero_grad(case, infer(case, "Exact")),
        "Exact, old gradients there": infer(case, "Exact"),
        f"FixedPred, n={N}": with_zero_grad(case, infer(case, "FixedPred", eta=ETA, n=N)),
        f"Strict, n={N}": with_zero_grad(case, infer(case, "Strict", eta=ETA, n=N)),
    }
    peaks = {}
    for name, step in steps.items():
        # The first call for a model also looks at what others may do to its memory.
        step()
        case.model.zero_grad()
        peaks[name] = peak_memory(lambda step=step: (step(), step()), device)  # type: ignore[misc]
    result = PCInfer(case.model, case.LossFun, case.X, case.Y, "Exact")
    peaks["results"] = size([*result.vhat, *result.v, *result.epsilon[1:]])
    peaks["gradients"] = size([parameter.grad for parameter in case.model.parameters()])
    case.model.zero_grad()
    return peaks


def size(tensors: Iterable[Any]) -> int:
    """Bytes of all tensors together."""
    return sum(tensor.nbytes for tensor in tensors)


def with_zero_grad(case: Case, step: Step) -> Step:
    def both() -> None:
        case.model.zero_grad()
        step()

    return both


def rows_of(name: str, device: str, peaks: dict[str, int]) -> list[Row]:
    """The table's rows; the bars are over what backprop needs and what must be returned besides."""
    exact, fixed, strict = "Exact", f"FixedPred, n={N}", f"Strict, n={N}"
    of = {
        "BP": peaks["BP"],
        "BP + results": peaks["BP"] + peaks["results"],
    }
    in_megabytes = [
        Row(name, device, what, "MB", peaks[what] / 1e6) for what in ("BP", "gradients", "results")
    ]
    return in_megabytes + [
        Row(name, device, what, baseline, peaks[what] / of[baseline], bar=promised)
        for what, baseline, promised in (
            (exact, "BP", None),
            (exact, "BP + results", 1.0),
            ("Exact, old gradients there", "BP", None),
            (fixed, "BP", None),
            (fixed, "BP + results", 1.0),
            (strict, "BP", None),
            (strict, "BP + results", 1.05),
        )
    ]


def peak_memory(function: Callable[[], Any], device: torch.device) -> int:
    """The most bytes that were allocated at one time during the call, beyond those before it.

    >>> def function():
    ...     a = torch.empty(1000, dtype=torch.uint8)
    ...     del a
    ...     b, c = torch.empty(500, dtype=torch.uint8), torch.empty(700, dtype=torch.uint8)
    >>> peak_memory(function, torch.device("cpu"))
    1200
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        function()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text("utf-8"))["traceEvents"]
    changes = [
        (event["ts"], event["args"]["Ev Idx"], event["args"]["Bytes"])
        for event in events
        if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0
    ]
    allocated = peak = 0
    for _, _, change in sorted(changes):
        allocated += change
        peak = max(peak, allocated)
    return peak
