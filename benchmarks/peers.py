"""The same training step in other predictive coding packages: ``python -m benchmarks.peers``.

Each package runs in a process of its own, so that their thread pools do not meet and each can have
the interpreter that its requirements need; the processes take turns. What a package's step looks
like is in `peer_steps`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import torch2pc
from benchmarks.peer_steps import ETA, PACKAGES, N
from benchmarks.report import Options, device_name, save, table
from benchmarks.timing import SAMPLE, Times

MLPS = {
    "mlp3x300": [784, 300, 300, 10],
    "mlp8x300": [784, *[300] * 7, 10],
    "mlp20x64": [784, *[64] * 19, 10],
    "mlp3x32": [784, 32, 32, 10],
}
ROOT = Path(__file__).resolve().parent.parent

METHOD = (
    f"One training step (n={N} steps of inference, eta={ETA}, one weight update by plain gradient "
    f"descent) of an MLP with ReLU, float32, squared error, on the CPU. Each package "
    "has a process of its own, bound to as many cores as it may use threads; the processes take "
    "turns, and a number is the median of the ratios to torch2pc's time (PCInfer with Strict, not "
    "compiled) within the rounds. The first step, in which the JAX packages and compile=True "
    "compile, is reported apart. pcx, jpc and fabricpc (JAX, jitted) start from the feed-forward pass, "
    "as Strict does; pcn-torch and torch-pc predict the input from latents that start at random, "
    "with layers of the same sizes, and compute the energy in every step of inference. All of them "
    "subtract predictions from beliefs; torch2pc iterates displacements, whose errors have no such "
    "round-off."
)
# What each package's step computes, beside its time.
COMPUTES = {
    "torch2pc": "displacements from the feed-forward pass; errors and updates right in every layer",
    "torch2pc, compile=True": "the same, as one compiled call",
    "pcx": "beliefs from the feed-forward pass, gradients of the energy; jitted and unrolled",
    "jpc": "beliefs from the feed-forward pass, gradients of the energy; jitted and unrolled",
    "fabricpc": "beliefs from the feed-forward pass, on a graph of nodes; jitted",
    "pcn-torch": "beliefs from random ones, which predict the input; no biases",
    "torch-pc": "beliefs from random ones, which predict the input",
}


class Peer:
    """A running process and what it said."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.versions: dict[str, str] = {}

    def ask(self, **command: Any) -> float:
        """Seconds that the command took; RuntimeError with the reason if it failed."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(command), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else {"error": "the process ended"}
        if "error" in answer:
            raise RuntimeError(answer["error"])
        self.versions = answer["versions"]
        return float(answer["seconds"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and save the ratios of all packages that are installed."""
    asked = parse(arguments)
    interpreters = [sys.executable, *asked.python]
    checkouts = {} if asked.jpc is None else {"jpc": asked.jpc}
    found, missing = find(interpreters, checkouts)
    options = Options(
        asked.out, asked.networks, asked.threads, 3.0 if asked.quick else 15.0, asked.quick
    )
    rows: list[dict[str, Any]] = []
    work = [
        (b, count, network)
        for b in asked.batch
        for count in asked.threads
        for network in asked.networks
    ]
    for batch, count, network in tqdm(work, "peers"):
        rows += measure(network, count, found, options.seconds, checkouts, batch)
    lines = [f"{name} is skipped: {reason}." for name, reason in missing.items()]
    text = "\n\n".join([rows_table(rows), *lines])
    print(text)
    save(options, "peers", method=METHOD, text=text, record={"rows": rows, "skipped": missing})
    print(f"\nThe files are in {options.out}.")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers",
        description="Times one training step in other predictive coding packages.",
    )
    parser.add_argument(
        "--python",
        nargs="+",
        default=[],
        metavar="PATH",
        help="interpreters to look for packages in, after this one (pcx and fabricpc need "
        "different versions of JAX, so that one environment cannot hold both)",
    )
    parser.add_argument(
        "--jpc",
        type=Path,
        metavar="PATH",
        help="a checkout of github.com/thebuckleylab/jpc, for an interpreter with jax 0.4.38, equinox, "
        "diffrax and optax (pcx runs there too)",
    )
    parser.add_argument("--networks", nargs="+", choices=MLPS, default=list(MLPS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1], metavar="N")
    parser.add_argument("--batch", nargs="+", type=int, default=[64], metavar="N")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), metavar="DIR")
    parser.add_argument("--quick", action="store_true", help="a shorter, less precise run")
    return parser.parse_args(arguments)


def find(
    interpreters: Sequence[str], checkouts: Mapping[str, Path] | None = None
) -> tuple[dict[str, tuple[str, str]], dict[str, str]]:
    """The interpreter and version of each package that is installed; why the others are not run.

    ``checkouts``: where packages are that need not be installed.
    """
    installed = "import importlib.metadata, sys; print(importlib.metadata.version(sys.argv[1]))"
    found, missing, checkouts = {}, {}, checkouts or {}
    for name, (distribution, _, _) in PACKAGES.items():
        if distribution == "torch2pc":
            found[name] = (sys.executable, torch2pc.__version__)
            continue
        code = installed
        if name in checkouts:
            code = f"import diffrax, equinox, jax, optax; print({version_in(checkouts[name])!r})"
        for interpreter in interpreters:
            tried = subprocess.run(
                [interpreter, "-c", code, distribution], capture_output=True, text=True
            )
            if tried.returncode == 0:
                found[name] = (interpreter, tried.stdout.strip())
                break
        else:
            missing[name] = "not installed"
    return found, missing


def version_in(checkout: Path) -> str:
    """What a checkout says of its version."""
    project = checkout / "pyproject.toml"
    found = re.search(r'^version = "(.*)"', project.read_text() if project.exists() else "", re.M)
    if found is None:
        raise SystemExit(f"--jpc: {checkout} is no checkout of jpc, which has a pyproject.toml")
    return found[1]


def measure(
    network: str,
    threads: int,
    found: dict[str, tuple[str, str]],
    seconds: float,
    checkouts: Mapping[str, Path],
    batch: int,
) -> list[dict[str, Any]]:
    """A row for each package: its median time, its ratio to ours, and the first step's seconds."""
    with ExitStack() as stack:
        peers, rows = {}, {}
        for name, (interpreter, version) in found.items():
            path = checkouts.get(name)
            peer = stack.enter_context(started(name, interpreter, threads, path))
            row = {
                "network": network,
                "batch": batch,
                "device": device_name(torch.device("cpu"), threads),
                "package": name,
                "version": version,
            }
            try:
                rows[name] = row | {"first step (s)": peer.ask(sizes=MLPS[network], batch=batch)}
                peers[name] = peer
                rows[name]["rests on"] = peer.versions
            except RuntimeError as error:
                rows[name] = row | {"error": str(error)}
        times = take_turns(peers, seconds, network)
    for name in peers:
        low, middle, high = times.ratio(name, "torch2pc")
        rows[name] |= {
            "milliseconds": 1000 * times.median(name),
            "ratio": middle,
            "quartiles": (low, high),
        }
    return list(rows.values())


def take_turns(peers: dict[str, Peer], seconds: float, description: str) -> Times:
    """Seconds a step of each package, in alternating order; at least five rounds."""
    for peer in peers.values():
        peer.ask(steps=3)
    once = {name: peer.ask(steps=3) / 3 for name, peer in peers.items()}
    steps = {name: max(1, math.ceil(3 * SAMPLE / spent)) for name, spent in once.items()}
    count = max(5, round(seconds / sum(once[name] * steps[name] for name in peers)))
    found = {name: np.empty(count) for name in peers}
    for index in tqdm(range(count), description, leave=False, unit="round"):
        for name in list(peers) if index % 2 == 0 else reversed(peers):
            found[name][index] = peers[name].ask(steps=steps[name]) / steps[name]
    return Times(found)


@contextmanager
def started(
    name: str, interpreter: str, threads: int, checkout: Path | None = None
) -> Iterator[Peer]:
    """The process that runs the package's steps; it is ended after the body."""
    with tempfile.TemporaryDirectory() as nothing_compiled_yet:
        environment = {
            "OMP_NUM_THREADS": str(threads),
            "TQDM_DISABLE": "1",
            "TORCHINDUCTOR_CACHE_DIR": nothing_compiled_yet,
        }
        if checkout is not None:
            environment["PYTHONPATH"] = str(checkout.resolve())
        process = subprocess.Popen(
            [interpreter, "-m", "benchmarks.peer_steps", name, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
            env=os.environ | environment,
        )
        with process:
            try:
                yield Peer(process)
            finally:
                process.kill()


def rows_table(rows: Sequence[dict[str, Any]]) -> str:
    header = [
        "network",
        "batch",
        "device",
        "package",
        "version",
        "ms",
        "x torch2pc",
        "first step (s)",
        "computes",
    ]
    lines = []
    for row in rows:
        start = [row["network"], str(row["batch"]), row["device"], row["package"]]
        if "error" in row:
            lines.append([*start, row["version"], "fails", row["error"], "", ""])
            continue
        basis = ", ".join(f"{name} {version}" for name, version in row["rests on"].items())
        lines.append(
            [
                *start,
                f"{row['version']} ({basis})",
                f"{row['milliseconds']:.2f}",
                f"{row['ratio']:.2f}",
                f"{row['first step (s)']:.2f}",
                COMPUTES.get(row["package"], ""),
            ]
        )
    return table(header, lines)


if __name__ == "__main__":
    sys.exit(main())
