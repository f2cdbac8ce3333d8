"""Training on several processes: accuracy, throughput, time spent in messages, scaling, a prediction.

    python -m torch.distributed.run --nproc-per-node=2 -m benchmarks.distributed

A program of its own, as it runs in several processes. On one machine with gloo on the CPU (one thread a
process), or, where there are GPUs, one for each process, with nccl. The paragraph at the end says what the
sizes of the messages mean for many GPUs; nothing in it was measured on any.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.report import Options, save, table
from paper_figures.data import DataSet, load_digits
from paper_figures.nets import cifar_net, mnist_net, vgg19
from paper_figures.training import test_accuracy
from torch2pc.distributed import PCInfer
from torch2pc.distributed.exchange import Peers

ERR_TYPE, ETA, N = "Strict", 0.1, 20
METHOD = (
    "An MLP 784-300-300-10 (328 810 parameters), cut before its ReLUs, on the embedded digits with "
    f"{ERR_TYPE} (n={N}, eta={ETA}), mean cross-entropy and Adam at 1e-3. Weak scaling: each process has "
    "as many examples as one has alone; strong scaling: they share one process's batch. The seconds of a "
    "step are medians over rounds in which all numbers of processes take turns, each round some steps "
    "between two barriers. 'In messages' is the time in which rank 0 waits for others, as a share of the "
    "training: what they are late counts too."
)


@dataclass(frozen=True)
class Settings:
    """batch: examples of one process alone. rounds: of the scaling, each of ``calls`` steps."""

    steps: int
    batch: int
    rounds: int
    calls: int


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Sequential(nn.Flatten(), nn.Linear(784, 300)),
        nn.Sequential(nn.ReLU(), nn.Linear(300, 300)),
        nn.Sequential(nn.ReLU(), nn.Linear(300, 10)),
    )


class Waiting:
    """Counts the seconds spent in messages: sending, waiting for others, being told."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def counted(self) -> Iterator[None]:
        before = {name: getattr(Peers, name) for name in ("sum", "wait", "tell")}

        def timed(function: Callable[..., Any]) -> Callable[..., Any]:
            def run(*arguments: Any, **options: Any) -> Any:
                start = time.perf_counter()
                try:
                    return function(*arguments, **options)
                finally:
                    self.seconds += time.perf_counter() - start

            return run

        for name, function in before.items():
            setattr(Peers, name, timed(function))
        try:
            yield
        finally:
            for name, function in before.items():
                setattr(Peers, name, function)


class Process:
    """This process: its place among the others, and its device."""

    def __init__(self) -> None:
        has_gpu = torch.cuda.is_available()
        self.device = torch.device("cpu")
        if has_gpu:
            self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(self.device)
        dist.init_process_group("nccl" if has_gpu else "gloo")
        self.rank, self.count = dist.get_rank(), dist.get_world_size()

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        dist.barrier()


def train(process: Process, data: DataSet, settings: Settings) -> dict[str, float]:
    """Train with the whole batch over all processes, as one with that batch would."""
    torch.manual_seed(0)
    model = network().to(process.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    LossFun, waiting = nn.CrossEntropyLoss(), Waiting()
    process.wait()
    start = time.perf_counter()
    with waiting.counted():
        # The same batches everywhere, of which each process takes its rows.
        for batch in data.train_batches(settings.steps, settings.batch, 0, process.device):
            rows = slice(process.rank, None, process.count)
            PCInfer(model, LossFun, batch.X[rows], batch.labels[rows], ERR_TYPE, ETA, N)
            optimizer.step()
        process.wait()
    seconds = time.perf_counter() - start
    return {
        "processes": process.count,
        "steps": settings.steps,
        "batch": settings.batch,
        "accuracy": test_accuracy(model, data, process.device),
        "examples per second": settings.steps * settings.batch / seconds,
        "share of time in messages": waiting.seconds / seconds,
    }


def scaling(process: Process, data: DataSet, settings: Settings) -> list[dict[str, float]]:
    """Weak and strong scaling over 1, 2, 4, ... processes and all."""
    counts = sorted({2**k for k in range(process.count.bit_length())} | {process.count})
    counts = [count for count in counts if count <= process.count]
    groups = {count: dist.new_group(list(range(count))) for count in counts}
    batch = next(data.train_batches(1, settings.batch, 0, process.device))
    torch.manual_seed(0)
    model, LossFun = network().to(process.device), nn.CrossEntropyLoss()

    def step(count: int, X: Tensor, Y: Tensor) -> None:
        PCInfer(model, LossFun, X, Y, ERR_TYPE, ETA, N, group=groups[count])

    seconds: dict[tuple[str, int], list[float]] = {}
    for index in range(settings.rounds + 1):
        for count in counts if index % 2 else reversed(counts):
            for kind in ("weak", "strong"):
                rows = slice(None) if kind == "weak" else slice(process.rank, None, count)
                X, Y = batch.X[rows], batch.labels[rows]
                process.wait()
                start = time.perf_counter()
                if process.rank < count:
                    for _ in range(settings.calls):
                        step(count, X, Y)
                process.wait()
                spent = (time.perf_counter() - start) / settings.calls
                if index:  # the first round is to warm up
                    seconds.setdefault((kind, count), []).append(spent)
    found = []
    for count in counts:
        weak, strong = (float(np.median(seconds[kind, count])) for kind in ("weak", "strong"))
        alone = [float(np.median(seconds[kind, 1])) for kind in ("weak", "strong")]
        found.append(
            {
                "processes": count,
                "weak: seconds a step": weak,
                "weak: efficiency": alone[0] / weak,
                "strong: seconds a step": strong,
                "strong: speed-up": alone[1] / strong,
            }
        )
    return found


@dataclass(frozen=True)
class Machine:
    """What the prediction assumes; nothing of it is measured.

    flops: what a GPU keeps up in float32 (TF32 products). launch: what Python and the GPU's launches
    take for a layer in an iteration, in which nothing shorter can be done. link: bytes per second that
    each GPU sends to the next one in the ring, over the slowest link. hop: seconds for a small message
    on it; control: the same for the few numbers that go over the CPUs.
    """

    flops: float = 30e12
    launch: float = 100e-6
    link: float = 25e9
    hop: float = 10e-6
    control: float = 50e-6

    def computing(self, forward: float, layers: int, iterations: int) -> float:
        """Seconds a step: a forward pass and an input-vjp in each iteration, and three passes more."""
        operations = (2 * iterations + 3) * forward
        return max(operations / self.flops, (iterations + 2) * layers * self.launch)

    def messages(self, size: float, gpus: int, buckets: int) -> float:
        """Seconds of a step's messages: sums of ``size`` bytes over a ring, a few small ones."""
        levels = 2 * math.ceil(math.log2(gpus))
        bandwidth = 2 * (gpus - 1) / gpus * size / self.link
        # Besides, the shares and the loss are summed, and two messages are of control.
        return bandwidth + levels * ((buckets + 2) * self.hop + 2 * self.control)


# Name: builder, one input's shape, examples on each GPU.
PREDICTED: dict[str, tuple[Callable[[], nn.Sequential], tuple[int, ...], int]] = {
    "mnist_net": (mnist_net, (1, 28, 28), 300),
    "cifar_net": (cifar_net, (3, 32, 32), 256),
    "vgg19": (vgg19, (3, 224, 224), 32),
}
GPUS = (8, 64, 512, 1000)


def sizes(build: Callable[[], nn.Sequential], shape: tuple[int, ...]) -> tuple[float, int, int]:
    """Floating-point operations of a forward pass of one example, parameters and layers."""
    with torch.device("meta"):
        model = build()
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            model(torch.empty(1, *shape))
    parameters = sum(p.numel() for p in model.parameters())
    return float(counter.get_total_flops()), parameters, len(model)


def prediction(machine: Machine) -> tuple[list[dict[str, Any]], str]:
    """Rows for each network and number of GPUs, and what they say."""
    rows = []
    for name, (build, shape, batch) in PREDICTED.items():
        flops, parameters, layers = sizes(build, shape)
        size = 4 * parameters
        for gpus in GPUS:
            buckets = max(1, math.ceil(size / (25 * 2**20)))
            messages = machine.messages(size, gpus, buckets)
            strict, bp = (machine.computing(batch * flops, layers, n) for n in (N, 0))
            rows.append(
                {
                    "network": name,
                    "examples a GPU": batch,
                    "GPUs": gpus,
                    "MB a step": size / 1e6,
                    "messages, ms": 1e3 * messages,
                    f"Strict, n={N}: computing, ms": 1e3 * strict,
                    "efficiency": strict / (strict + messages),
                    "BP: computing, ms": 1e3 * bp,
                    "BP: efficiency": bp / (bp + messages),
                }
            )
    last = rows[-1]
    strict, bp = (last[f"{name}: computing, ms"] for name in (f"Strict, n={N}", "BP"))
    text = (
        "What this means for 8 to 1000 GPUs. A step sends every gradient once: 4 bytes a parameter, "
        f"{last['MB a step']:.0f} MB for VGG-19, whatever n is, as relaxing needs no messages. Over a "
        "ring each GPU sends and receives 2 (W-1)/W of that, so that the time hardly depends on their "
        f"number W: at {machine.link / 1e9:g} GB/s for each GPU between machines (a 200 Gb/s link) and "
        f"{1e6 * machine.hop:g} us a hop, {last['messages, ms']:.0f} ms at {last['GPUs']}. Strict with "
        f"n={N} computes {strict / bp:.0f} times as long as backprop, {strict:.0f} ms for "
        f"{last['examples a GPU']} images a GPU at a sustained {machine.flops / 1e12:g} TFLOP/s, and so "
        f"keeps {100 * last['efficiency']:.0f}% of its speed where backprop keeps "
        f"{100 * last['BP: efficiency']:.0f}%, with nothing hidden behind computing. Small networks are "
        f"bound by Python's launches ({1e6 * machine.launch:g} us for a layer in an iteration) and by "
        f"latency: two messages of control over the CPUs ({1e6 * machine.control:g} us a hop) cost more "
        "than mnist_net's whole gradient. Strong scaling ends where a GPU's share of the batch no "
        "longer fills it. Assumed: equal GPUs and shards, (2n+3) forward passes' operations a step for "
        "Strict and 3 for backprop, a ring without congestion, data that are there in time. The rates "
        "and latencies are assumptions, not measurements: divide the bytes by your own link's speed."
    )
    return rows, text


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    cells = [
        [f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()]
        for row in rows
    ]
    return table(list(rows[0]), cells)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distributed", description=__doc__)
    parser.add_argument("--data", type=Path, help="a folder with MNIST's files")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), metavar="DIR")
    parser.add_argument("--quick", action="store_true", help="short, and less precise")
    asked = parser.parse_args(arguments)
    settings = Settings(30, 120, 3, 2) if asked.quick else Settings(300, 240, 11, 4)
    torch.set_num_threads(1)
    process = Process()
    try:
        data = load_digits(asked.data)
        trained = train(process, data, settings)
        process.say(as_table([trained]))
        scaled = scaling(process, data, settings)
        process.say(as_table(scaled))
        if process.rank == 0:
            rows, text = prediction(Machine())
            print(f"{as_table(rows)}\n\n{text}")
            load = os.getloadavg()[0]
            where = (
                f"{process.count} processes, {process.device.type}; load of the machine: {load:.1f}"
            )
            whole = [as_table([trained]), as_table(scaled), as_table(rows), text, where]
            save(
                Options(asked.out, ["mlp"], [1], 0.0, asked.quick),
                "distributed",
                method=METHOD,
                text="\n\n".join(whole),
                record=dict(trained=trained, scaling=scaled, predicted=rows, where=where),
            )
        dist.barrier()
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
