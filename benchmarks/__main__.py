"""The command line: ``python -m benchmarks`` measures everything, prints it and saves it."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

# The profiler announces each start and stop otherwise; read when torch is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch

from benchmarks import graphs, largest, memory, scaling, speed
from benchmarks.nets import NETWORKS
from benchmarks.report import Options

PARTS = {
    "speed": speed.run,
    "memory": memory.run,
    "scaling": scaling.run,
    "largest": largest.run,
    "graphs": graphs.run,
}
QUICK = ("mnist_net", "mlp3x300")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts that the arguments ask for."""
    # What is timed is not trained.
    for message in ("Strict takes its updates at v", "The error hardly reaches"):
        warnings.filterwarnings("ignore", message, UserWarning)
    asked = parse(arguments)
    networks = asked.networks or (list(QUICK) if asked.quick else list(NETWORKS))
    threads = asked.threads or ([1] if asked.quick else [1, 2])
    seconds = asked.seconds or (2.0 if asked.quick else 12.0)
    kinds = asked.device or ["cpu", "cuda"]
    if asked.device == ["cuda"] and not torch.cuda.is_available():
        print("--device cuda: PyTorch finds no GPU here", file=sys.stderr)
        return 2
    options = Options(asked.out, networks, threads, seconds, asked.quick, kinds)
    for name in asked.only or PARTS:
        print(f"\n{name}", flush=True)
        PARTS[name](options)
    print(f"\nThe files are in {options.out}.")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measures torch2pc's time and memory against backprop's, on the CPU and, "
        "if there is one, on the GPU.",
    )
    parser.add_argument("--only", nargs="+", choices=list(PARTS), help="these parts only")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), help="these only")
    parser.add_argument(
        "--device", nargs="+", choices=["cpu", "cuda"], help="default: the CPU and any GPU"
    )
    parser.add_argument(
        "--threads",
        nargs="+",
        type=positive,
        metavar="N",
        help="numbers of CPU threads (default: 1 2)",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        metavar="S",
        help="how long one network is timed, roughly; slow ones take longer (default: 12)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("benchmarks/results"),
        metavar="DIR",
        help="default: benchmarks/results",
    )
    parser.add_argument(
        "--quick", action="store_true", help="two networks, one thread, short and less precise"
    )
    return parser.parse_args(arguments)


def positive(given: str) -> int:
    if not given.isdecimal() or int(given) < 1:
        raise argparse.ArgumentTypeError(f"{given!r} is not an integer of at least 1")
    return int(given)


if __name__ == "__main__":
    sys.exit(main())
