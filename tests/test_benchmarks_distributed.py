"""The benchmark of several processes: what it counts and predicts, and a run by one process."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import torch.distributed as dist

from benchmarks import distributed
from benchmarks.distributed import GPUS, Machine, Settings, Waiting, network, prediction, sizes
from torch2pc.distributed.exchange import Peers


def test_sizes_are_the_networks_own() -> None:
    build, shape, _ = distributed.PREDICTED["mnist_net"]
    flops, parameters, layers = sizes(build, shape)
    # Two operations for each product: 26x26 outputs of 10 filters 1x3x3, 11x11 of 5 filters 10x3x3.
    products = 26 * 26 * 10 * 9 + 11 * 11 * 5 * 90 + 605 * 50 + 50 * 30 + 30 * 10
    assert (flops, parameters, layers) == (2 * products, 32695, 5)
    assert sum(p.numel() for p in network().parameters()) == 328810


def test_prediction_follows_from_its_assumptions() -> None:
    machine = Machine(flops=1e12, launch=0, link=1e9, hop=0, control=0)
    assert machine.computing(forward=1e9, layers=5, iterations=20) == pytest.approx(43e-3)
    assert machine.messages(4e8, gpus=8, buckets=3) == pytest.approx(0.7)
    rows, text = prediction(Machine())
    assert {row["GPUs"] for row in rows} == set(GPUS)
    assert all(0 < row["efficiency"] < 1 for row in rows)
    assert "575 MB for VGG-19" in text
    assert "assumptions, not measurements" in text


@pytest.mark.skipif(not dist.is_gloo_available(), reason="PyTorch without gloo")
def test_a_run_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    variables = dict(RANK=0, WORLD_SIZE=1, LOCAL_RANK=0, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(distributed, "Settings", lambda *_: Settings(12, 60, 1, 1))
    distributed.main(["--quick", "--out", str(tmp_path)])
    record = json.loads((tmp_path / "distributed.json").read_text("utf-8"))
    assert record["trained"]["accuracy"] > 0.4
    assert 0 < record["trained"]["share of time in messages"] < 1
    assert [row["processes"] for row in record["scaling"]] == [1]
    assert "What this means" in (tmp_path / "distributed.md").read_text("utf-8")


def test_waiting_is_counted_and_no_longer() -> None:
    before, waiting = Peers.tell, Waiting()
    with waiting.counted():
        assert Peers.tell is not before
        with pytest.raises(AttributeError):
            Peers.wait(None, [])  # type: ignore[arg-type]
    assert waiting.seconds > 0
    assert Peers.tell is before
