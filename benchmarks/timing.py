"""How steps are timed: alternately, in one process, and compared by paired ratios.

A machine's speed drifts with heat, clock rates and other programs. Steps that take turns meet the
same conditions, so the ratio within a round is steadier than either time.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from benchmarks.steps import Step

# One sample is as many calls as fill this time (seconds), well above the clock's resolution.
SAMPLE = 0.01
ROUNDS = (3, 201)


class Times(NamedTuple):
    """Seconds per call of each step, one entry a round."""

    seconds: dict[str, np.ndarray]

    def median(self, name: str) -> float:
        return float(np.median(self.seconds[name]))

    def ratio(self, name: str, baseline: str) -> tuple[float, float, float]:
        """Lower quartile, median and upper quartile of the ratios within the rounds."""
        ratios = self.seconds[name] / self.seconds[baseline]
        low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
        return float(low), float(middle), float(high)


def alternate(
    steps: Mapping[str, Step],
    device: torch.device,
    seconds: float,
    description: str,
    rounds: tuple[int, int] = ROUNDS,
) -> Times:
    """Time the steps in turns for about ``seconds``, but so many ``rounds`` at least and at most.

    Every other round goes through them backwards, so that none always profits from what the one
    before it left in the caches. Garbage is collected before, and not during the rounds.
    """
    for step in steps.values():
        measure(step, 1, device)
    once = {name: measure(step, 1, device) for name, step in steps.items()}
    calls = {name: max(1, math.ceil(SAMPLE / spent)) for name, spent in once.items()}
    a_round = sum(once[name] * calls[name] for name in steps)
    count = min(max(round(seconds / a_round), rounds[0]), rounds[1])
    found = {name: np.empty(count) for name in steps}
    with no_garbage_collection():
        for index in tqdm(range(count), description, leave=False, unit="round"):
            for name in list(steps) if index % 2 == 0 else reversed(steps):
                found[name][index] = measure(steps[name], calls[name], device)
    return Times(found)


def measure(step: Step, calls: int, device: torch.device) -> float:
    """Seconds per call of ``step``, over this many calls."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        step()
    synchronize(device)
    return (time.perf_counter() - start) / calls


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done all that it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Launches(NamedTuple):
    """What one call of a step does with a GPU."""

    kernels: int
    """Those that run there, copies and fills among them; in a CUDA graph they count one by one."""
    seconds: float
    """What they take together."""
    graphs: int
    """CUDA graphs that are started."""
    waits: int
    """How often the host waits: synchronisations, and copies to it."""


def launches(step: Step) -> Launches:
    """Of one call of ``step``, from a profile."""
    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        step()
        torch.cuda.synchronize()
    found = launched(profiled.events() or [])
    return found._replace(waits=found.waits - 1)  # the one above


# What the host calls where it waits for the GPU; a copy to pageable memory waits as well.
WAITS = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize")


def launched(events: Iterable[Any]) -> Launches:
    """What a profile's events tell."""
    events = list(events)
    found = [event for event in events if event.device_type == DeviceType.CUDA]
    called = [event.name for event in events if event.device_type != DeviceType.CUDA]
    return Launches(
        len(found),
        sum(event.device_time_total for event in found) / 1e6,
        called.count("cudaGraphLaunch"),
        sum(map(called.count, WAITS)),
    )


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let PyTorch use this many threads inside the body."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
