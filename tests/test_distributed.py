"""PCInfer on several processes, held against one process with the whole batch.

The processes run in ``ranks.py``, each pair or triple of them once for all tests.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from tests import ranks
from tests.cases import ERR_TYPES
from torch2pc.distributed import PCInfer
from torch2pc.distributed.exchange import Exchange
from torch2pc.distributed.reductions import read_count, read_reduction

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="PyTorch without gloo")

Found = Callable[[str], list[Any]]


@pytest.fixture(scope="session")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What the ranks of a piece of work returned; it is done when first asked for."""

    @lru_cache
    def done(work: str) -> list[Any]:
        folder: Path = tmp_path_factory.mktemp(work)
        return ranks.run(work, {"two": 2, "three": 3}[work], folder)

    def of_each_rank(work: str) -> list[Any]:
        results = list(done(work))
        for result in results:
            assert isinstance(result, dict), result
        return results

    return of_each_rank


@pytest.mark.parametrize("count", ["two", "three"])
def test_result_is_that_of_one_process(found: Found, count: str) -> None:
    for of_rank in found(count):
        differences = of_rank["same_as_one_process"]
        assert len(differences) > 3 * 10
        assert {name: d for name, d in differences.items() if not d < 1e-12} == {}


@pytest.mark.parametrize("count", ["two", "three"])
def test_parameters_that_some_ranks_reach(found: Found, count: str) -> None:
    for of_rank in found(count):
        reached = of_rank["parameters_that_some_ranks_reach"]
        assert [name for name, is_right in reached.items() if not is_right] == []


def test_noise_is_each_ranks_own(found: Found) -> None:
    for of_rank in found("two"):
        assert [name for name, is_right in of_rank["noise"].items() if not is_right] == []


def test_ranks_stay_equal_in_training(found: Found) -> None:
    one, other = (of_rank["train"] for of_rank in found("two"))
    assert one == other
    assert one["losses"][-1] < one["losses"][0]


def test_a_group_of_some_ranks(found: Found) -> None:
    zero, *others = (of_rank["other_ranks"]["error"] for of_rank in found("three"))
    assert zero == "group must be one that this process is in"
    assert max(others) < 1e-14


FAILED = ("PeerFailed", "raised an error on rank 1 .* nothing was changed on rank [02]")
PURPOSE = ("ArithmeticError", "on purpose")
# Name: what the others and what rank 1 is told (its class, and what the message matches).
TOLD: dict[str, tuple[Any, Any]] = {
    **{f"raises in its forward, {ErrType}": (FAILED, PURPOSE) for ErrType in ERR_TYPES},
    "raises in its backward": (FAILED, PURPOSE),
    "bad argument": (FAILED, ("ValueError", "eta must be a finite number or .*, got 'big'")),
    "count": (("TypeError", "count must be a number, got str"),) * 2,
    "empty shard": (
        FAILED,
        ("ValueError", "at least one example .* on each rank"),
    ),
    "empty shard of a sum": (None, None),
    "all ignored": (FAILED, ("ValueError", "at least one example with a target")),
    "BatchNorm in eval mode": (None, None),
    "its module": (None, None),
    "at the end all is well": (None, None),
    **{
        f"different {name}": (
            ("ValueError", f"{name} must be the same .* on rank 0 and .* on rank 1"),
        )
        * 2
        for name in ranks.DIFFERENT
    },
    **{
        name: (told, told)
        for name, told in {
            "ErrType": (
                "ValueError",
                "ErrType must be .* got Exact on rank 0 and Strict on rank 1",
            ),
            "step found": ("ValueError", "eta must be a number here, got 'auto'"),
            "step halved": ("ValueError", "eta must have one size on all ranks, got Halving"),
            "above": ("ValueError", "connections must be the same .*above.x <- a; .* on rank 0"),
            "n": ("ValueError", "n must be the same on all ranks, got 4 on rank 0 and 5 on rank 1"),
            "width": (
                "ValueError",
                r"model\.0\.weight must .* got \(7, 5\), .* on rank 0 and \(8, 5\)",
            ),
            "connections": ("ValueError", "connections must be the same .*c <- b, a; .* on rank 0"),
            "frozen": ("ValueError", r"model\.0\.weight must .* on rank 0 and none on rank 1"),
            "values": ("ValueError", r"values must be the same .*broadcast\(p\.data, 0\)"),
            "reduction": ("ValueError", "reduction must be .* mean on rank 0 and sum on rank 1"),
            "unknown reduction": ("ValueError", "reduction must be given .* LossFun .penalised"),
            "contradiction": ("ValueError", 'what LossFun does .*mean.*, got "sum"'),
            "BatchNorm": (
                "ValueError",
                r"model\.1 \(BatchNorm1d in train mode\) .*convert_sync_batchnorm",
            ),
            "SyncBatchNorm": ("ValueError", "expected input tensor to be on GPU"),
            "loose": ("ValueError", r"must be parameters .* a tensor of shape \(3,\)"),
            "sparse": ("TypeError", "dense gradients .* leave out sparse=True"),
            "DistributedDataParallel": (
                "TypeError",
                r"got DistributedDataParallel: pass .*torch2pc\.distributed\.PCInfer",
            ),
            "an item in DistributedDataParallel": (
                "TypeError",
                r"not have items wrapped in DistributedDataParallel.*torch2pc\.distributed\.PCInfer",
            ),
        }.items()
    },
}


@pytest.mark.parametrize("name", TOLD)
@pytest.mark.parametrize("count", ["two", "three"])
def test_error_on_each_rank(found: Found, count: str, name: str) -> None:
    """In bounded time, with everything as it was, and without harm to the next call."""
    results = [of_rank["errors"][name] for of_rank in found(count)]
    for rank, result in enumerate(results):
        told = TOLD[name][rank == 1]
        if told is None:
            assert result == "no error"
        else:
            kind, message, is_unchanged = result
            assert kind == told[0]
            assert re.search(told[1], message), message
            assert is_unchanged, rank


def test_every_refusal_is_tested(found: Found) -> None:
    told = {name for name in found("two")[0]["errors"] if not name.startswith(("raises", "f", "F"))}
    assert told <= set(TOLD)


@pytest.mark.parametrize("kind", ["fully_shard", "FullyShardedDataParallel"])
def test_sharded_models_are_refused(found: Found, kind: str) -> None:
    for message in found("two")[0]["errors"][kind]:
        assert re.search(r"FSDP|FullySharded", message)
        assert "call torch2pc.distributed.PCInfer" in message


@pytest.mark.parametrize(("count", "how"), [("two", "dies"), ("three", "hangs")])
def test_a_lost_rank_is_an_error_on_the_others(found: Found, count: str, how: str) -> None:
    results = found(count)
    assert how not in results.pop(1)
    for of_rank in results:
        message, is_unchanged, seconds = of_rank[how]
        assert re.search("(?i)connection|timed out|timeout|peer", message), message
        assert is_unchanged
        assert seconds < 60


def test_needs_a_process_group() -> None:
    model, X = nn.Sequential(nn.Linear(4, 3)), torch.ones(2, 4)
    with pytest.raises(RuntimeError, match="init_process_group"):
        PCInfer(model, nn.MSELoss(), X, torch.ones(2, 3), "Exact")


class Recorded:
    """Stands in for the processes: one rank, which notes what is sent."""

    rank, count, is_lost = 0, 1, False
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.sent: list[int] = []

    def sum(self, tensor: torch.Tensor) -> None:
        self.sent.append(tensor.numel())

    def wait(self, works: list[Any]) -> None: ...

    def tell(self, numbers: list[int], failed: bool) -> list[int]:
        return list(numbers)


def test_buckets_leave_while_others_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one order, whatever order they fill in."""
    monkeypatch.setattr("torch2pc.distributed.exchange.BUCKET", 4 * 10)
    parameters = [nn.Parameter(torch.zeros(n)) for n in (6, 4, 10, 3)]
    peers = Recorded()
    exchange = Exchange(parameters, peers)  # type: ignore[arg-type]
    exchange.arrived(parameters[0], torch.ones(6))
    exchange.arrived(parameters[2], torch.ones(10))
    assert peers.sent == []
    exchange.arrived(parameters[1], torch.ones(4))
    assert peers.sent == [10, 10]
    updates = [(p, torch.ones_like(p)) for p in parameters[:3]]
    sums, Loss = exchange.finish(updates, torch.tensor(2.0))
    assert peers.sent == [10, 10, 3, 1]
    assert [p is q for (p, _), q in zip(sums, parameters[:3], strict=True)] == [True] * 3
    assert float(Loss) == 2


@pytest.mark.parametrize("ErrType", ["Exact", "FixedPred", "Strict"])
def test_first_bucket_leaves_before_the_last_gradient(
    ErrType: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The algorithms tell of updates as they come."""
    order: list[str] = []

    class Noting(Recorded):
        def sum(self, tensor: torch.Tensor) -> None:
            order.append("sent")

    monkeypatch.setattr("torch2pc.distributed.exchange.BUCKET", 4 * 72)
    monkeypatch.setattr("torch2pc.distributed.pcinfer.Peers", lambda group: Noting())
    monkeypatch.setattr("torch2pc.distributed.pcinfer.dist", FakeDistributed)
    model = nn.Sequential(*[nn.Sequential(nn.Tanh(), nn.Linear(8, 8)) for _ in range(4)])
    for item in model:
        item[1].weight.register_hook(lambda g: order.append("computed"))
    LossFun = nn.MSELoss(reduction="sum")
    PCInfer(model, LossFun, torch.ones(2, 8), torch.ones(2, 8), ErrType, n=6)
    last = len(order) - 1 - order[::-1].index("computed")
    assert order.index("sent") < last
    assert order.count("sent") == 5  # and the loss


class FakeDistributed:
    """One process that is initialised."""

    @staticmethod
    def is_available() -> bool:
        return True

    is_initialized = is_available

    @staticmethod
    def get_rank(group: object) -> int:
        return 0


WEIGHT = torch.tensor([0.5, 2.0, 1.0])
CLASSES = torch.tensor([0, 1, -100, 2, 1])


@pytest.mark.parametrize(
    ("LossFun", "Y"),
    [
        (nn.CrossEntropyLoss(), CLASSES),
        (nn.CrossEntropyLoss(weight=WEIGHT), CLASSES),
        (nn.CrossEntropyLoss(weight=WEIGHT, ignore_index=1, label_smoothing=0.2), CLASSES.clamp(0)),
        (nn.NLLLoss(weight=WEIGHT, ignore_index=255), torch.tensor([255, 1, 0, 2, 255])),
        (F.cross_entropy, CLASSES),
        (partial(F.nll_loss, weight=WEIGHT), CLASSES),
        (partial(F.cross_entropy, weight=WEIGHT, ignore_index=2), CLASSES.clamp(0)),
        (nn.CrossEntropyLoss(), torch.rand(5, 3)),
        (nn.MSELoss(), torch.rand(5, 3)),
        (F.smooth_l1_loss, torch.rand(5, 3)),
        (nn.KLDivLoss(reduction="batchmean"), torch.rand(5, 3)),
    ],
)
def test_a_mean_over_parts_is_known(LossFun: Any, Y: torch.Tensor) -> None:
    """The whole batch's loss is the parts' losses, weighted by their counts."""
    X = prediction = torch.randn(5, 3)
    parts = [slice(0, 2), slice(2, 5)]
    counts = [float(read_count(LossFun, X[rows], Y[rows], None)) for rows in parts]
    losses = [LossFun(prediction[rows], Y[rows]) for rows in parts]
    mean = sum(c * loss for c, loss in zip(counts, losses, strict=True)) / sum(counts)
    torch.testing.assert_close(mean, LossFun(prediction, Y))


def test_a_mean_over_elements_counts_them() -> None:
    """Ranks may have sequences of different lengths."""
    X, Y = torch.rand(2, 4), torch.rand(2, 3, 5)
    for LossFun in (nn.L1Loss(), F.l1_loss, partial(F.huber_loss, delta=2.0)):
        assert read_count(LossFun, X, Y, None) == 2 * 3 * 5
    assert read_count(nn.KLDivLoss(reduction="batchmean"), X, Y, None) == 2


def test_a_count_may_be_given() -> None:
    """A number, also in a tensor; it goes before what the loss is known to divide by."""
    X, Y = torch.rand(2, 4), torch.rand(2, 3)
    for count in (7, 7.0, torch.tensor(7.0, requires_grad=True)):
        found = read_count(nn.MSELoss(), X, Y, count)
        assert float(found) == 7
        assert not isinstance(found, torch.Tensor) or not found.requires_grad
    for count, given in (
        ("2", "str"),
        (True, "bool"),
        (torch.ones(2), r"a tensor of shape \(2,\)"),
    ):
        with pytest.raises(TypeError, match=f"count must be a number, got {given}"):
            read_count(nn.MSELoss(), X, Y, count)  # type: ignore[arg-type]
    for none in (0, -1.0, torch.zeros(()), math.nan):
        with pytest.raises(ValueError, match=r"X must have at least one example .* got (0|-1|nan)"):
            read_count(nn.MSELoss(), X, Y, none)


def test_what_is_not_known_is_the_number_of_examples() -> None:
    X, Y = torch.rand(4, 3), torch.rand(4, 5)
    for LossFun, targets in [
        (lambda y, Y: y.mean(), Y),
        (nn.MSELoss(), [1, 2]),
        (nn.MSELoss(), torch.ones(())),
        (nn.MSELoss(), torch.ones(3, 5)),
        (nn.TripletMarginLoss(), Y),
        (nn.CrossEntropyLoss(), torch.ones(3, 5)),
    ]:
        assert read_count(LossFun, X, targets, None) == 4
    assert read_count(nn.MSELoss(), torch.ones(()), torch.ones(()), None) == 1


def test_reduction_is_read_or_asked_for() -> None:
    assert read_reduction(nn.MSELoss(reduction="sum"), None) == "sum"
    assert read_reduction(F.mse_loss, None) == "mean"
    assert read_reduction(partial(F.mse_loss, reduction="sum"), None) == "sum"
    assert read_reduction(partial(nn.L1Loss()), "mean") == "mean"
    assert read_reduction(lambda y, Y: y.sum(), "sum") == "sum"
    with pytest.raises(ValueError, match=r"reduction must be given .*<lambda>"):
        read_reduction(lambda y, Y: y.sum(), None)
    with pytest.raises(ValueError, match='"mean", "sum" or None, got \'none\''):
        read_reduction(nn.MSELoss(), "none")
