"""Processes for ``test_distributed.py``: ``python -m tests.ranks WORK COUNT FOLDER`` starts them.

They meet at a file in the folder, talk over loopback by gloo, and leave what they found there.
"""

from __future__ import annotations

import copy
import datetime
import faulthandler
import itertools
import os
import pickle
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import torch2pc
from tests.cases import Join
from torch2pc import distributed, steps
from torch2pc.checks import OF_BOTH_SIDES
from torch2pc.distributed import exchange

ROOT = Path(__file__).parent.parent


def run(work: str, count: int, folder: Path, timeout: float = 300) -> list[Any]:
    """For each rank what the parts of ``work`` returned that it came to the end of, or what it printed."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    command = [sys.executable, "-m", "tests.ranks", work, str(count), str(folder)]
    # They end by themselves before that.
    with Path(folder, "log").open("wb") as log, suppress(subprocess.TimeoutExpired):
        subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            timeout=timeout,
            check=False,
        )
    results = [folder / f"{rank}.pickle" for rank in range(count)]
    return [
        pickle.loads(result.read_bytes()) if result.exists() else Path(folder, "log").read_text()
        for result in results
    ]


class Sharded:
    """A batch, and the part of it that this rank has: examples in turns, or ever more of them."""

    def __init__(self, shards: str) -> None:
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        sizes = [4] * self.count if shards == "equal" else [1 + 3 * r for r in range(self.count)]
        starts = [sum(sizes[:r]) for r in range(self.count)]
        self.rows = slice(starts[self.rank], starts[self.rank] + sizes[self.rank])
        self.batch = sum(sizes)

    def own(self, whole: Any) -> Any:
        """This rank's rows of a tensor, or of each in a list."""
        if isinstance(whole, list):
            return [None if entry is None else self.own(entry) for entry in whole]
        return whole[self.rows].clone()


def network(width: int = 7) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(5, width),
        nn.Sequential(nn.Tanh(), nn.Linear(width, width)),
        nn.Sequential(nn.Softplus(), nn.Linear(width, width)),
        nn.Sequential(nn.Tanh(), nn.Linear(width, 3)),
    ).double()


def tied() -> nn.Sequential:
    """Two items share a layer."""
    model = network()
    model[2][1] = model[1][1]
    return model


def borrowing() -> nn.Sequential:
    """An item uses another's weights without holding its module."""
    model = network()
    model.insert(3, Borrower([model[1][1].weight]))
    return model


def graph(width: int = 7, skip: str = "stem") -> torch2pc.PCGraph:
    """Ways of several lengths, and a layer that is used twice."""
    join = Join(width)
    return torch2pc.PCGraph(
        stem=(nn.Linear(5, width), "x"),
        a=(nn.Sequential(nn.Tanh(), nn.Linear(width, width)), "stem"),
        b=(join, "a", skip),
        c=(join, "b", "a"),
        out=(nn.Linear(width, 3), "c"),
    ).double()


def two_sided(width: int = 7, of_input: str = "a") -> torch2pc.PCGraph:
    """Predictions from above, of the input and from the target too."""
    return torch2pc.PCGraph(
        a=(nn.Linear(5, width), "x"),
        b=(nn.Sequential(nn.Tanh(), nn.Linear(width, width)), "a"),
        out=(nn.Linear(width, 3), "b"),
        above={
            "x": (nn.Sequential(nn.Tanh(), nn.Linear(width, 5)), of_input),
            "b": (nn.Linear(3, width), "out"),
        },
    ).double()


class Borrower(nn.Module):
    def __init__(self, held: list[Tensor]) -> None:
        super().__init__()
        self.held = held

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x) @ self.held[0]


class Conditional(nn.Module):
    """Uses one of its layers for inputs that are large, the other for the rest, and a third never."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(3, 3) for _ in range(3)])
        self.choice = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.parts[self.choice](torch.tanh(x))


class Learned(nn.Module):
    """A loss with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
        self.reduction = "mean"

    def forward(self, prediction: Tensor, Y: Tensor) -> Tensor:
        return (self.scale.exp() * (prediction - Y).square()).mean() - self.scale


def penalised(prediction: Tensor, Y: Tensor) -> Tensor:
    return (prediction - Y).abs().mean() + prediction.square().mean()


def kept(Y: Tensor) -> Tensor:
    """Which examples a masked loss looks at."""
    return Y[:, 2] < 0.4


def masked(prediction: Tensor, Y: Tensor) -> Tensor:
    errors = (prediction - Y).square().sum(1) * kept(Y)
    return errors.sum() / kept(Y).sum()


WEIGHTS = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
# Loss, whether its targets are classes, more options.
LOSSES: dict[str, tuple[Any, bool, dict[str, Any]]] = {
    "MSELoss": (nn.MSELoss(), False, {}),
    "mse_loss": (F.mse_loss, False, {}),
    "MSELoss of sums": (nn.MSELoss(reduction="sum"), False, {}),
    "CrossEntropyLoss": (nn.CrossEntropyLoss(), True, {}),
    "CrossEntropyLoss, weighted": (
        nn.CrossEntropyLoss(weight=WEIGHTS, ignore_index=1, label_smoothing=0.1),
        True,
        {},
    ),
    "cross_entropy of sums": (partial(F.cross_entropy, reduction="sum"), True, {}),
    "cross_entropy, weighted": (partial(F.cross_entropy, weight=WEIGHTS), True, {}),
    "probabilities": (nn.CrossEntropyLoss(), False, {}),
    "parameters": (Learned(), False, {}),
    "function": (penalised, False, {"reduction": "mean"}),
    "masked": (masked, False, {"reduction": "mean", "count": lambda Y: kept(Y).sum()}),
}


def compare(
    model: Any, LossFun: Any, classes: bool, shards: str, ErrType: str, **options: Any
) -> float:
    """The largest difference from one process with the whole batch, relative to each tensor's size."""
    torch.manual_seed(3)
    part = Sharded(shards)
    X = torch.randn(part.batch, 5, dtype=torch.float64)
    Y: Tensor = torch.rand(part.batch, 3, dtype=torch.float64).softmax(1)
    if classes:
        Y = torch.arange(part.batch) % 3
        Y[0] = 2  # at least one is not ignored
    if "count" in options:
        options["count"] = options["count"](part.own(Y))
    if options.pop("input_grad", False):
        X.requires_grad_()
    if options.pop("vinit", False):
        options["vinit"] = [
            v + 0.3 * torch.randn_like(v)
            for v in torch2pc.PCInfer(model, LossFun, X.detach(), Y, "Exact").vhat
        ]
    twin, loss_twin = copy.deepcopy((model, LossFun))
    if options.get("accumulate"):
        for p in [*model.parameters(), *twin.parameters()]:
            p.grad = torch.ones_like(p)
    whole_options = {k: o for k, o in options.items() if k not in ("reduction", "count")}
    whole = torch2pc.PCInfer(twin, loss_twin, X, Y, ErrType, 0.1, 6, **whole_options)
    if "vinit" in options:
        options["vinit"] = part.own(options["vinit"])
    own_X = X.detach()[part.rows].clone().requires_grad_(X.requires_grad)
    found = distributed.PCInfer(model, LossFun, own_X, part.own(Y), ErrType, 0.1, 6, **options)

    pairs = [(found.Loss, whole.Loss), (found.dLdy, part.own(whole.dLdy))]
    for own, entire in zip(found[0:1] + found[3:], whole[0:1] + whole[3:], strict=True):
        pairs += [(a, b) for a, b in zip(own, part.own(entire), strict=True) if b is not None]
    if X.requires_grad:
        pairs.append((own_X.grad, part.own(X.grad)))
    modules = [(model, twin)]
    if isinstance(LossFun, nn.Module):
        modules.append((LossFun, loss_twin))
    for one, other in modules:
        for p, q in zip(one.parameters(), other.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None)
            if q.grad is not None:
                pairs.append((p.grad, q.grad))
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-3)) for a, b in pairs)


def same_as_one_process() -> dict[str, float]:
    """Differences by case."""
    found: dict[str, float] = {}
    # All of them on two ranks; on three one of each kind: of examples, of weighted targets, asked for.
    some = ("MSELoss", "CrossEntropyLoss, weighted", "masked")
    losses = LOSSES if dist.get_world_size() == 2 else {name: LOSSES[name] for name in some}
    for ErrType in torch2pc.pcinfer.ErrTypes:
        for loss, (LossFun, classes, options) in losses.items():
            for shards in ("equal", "unequal") if loss == "MSELoss" else ("unequal",):
                torch.manual_seed(0)
                name = f"{ErrType}, {shards} shards, {loss}"
                found[name] = compare(network(), LossFun, classes, shards, ErrType, **options)
        for build in (tied, borrowing, graph):
            torch.manual_seed(0)
            name = f"{ErrType}, {build.__name__}"
            found[name] = compare(build(), nn.MSELoss(), False, "unequal", ErrType)
        if ErrType in OF_BOTH_SIDES:
            torch.manual_seed(0)
            found[f"{ErrType}, two-sided"] = compare(
                two_sided(), nn.MSELoss(), False, "unequal", ErrType, input_grad=True
            )
        for option in ("accumulate", "input_grad"):
            torch.manual_seed(0)
            chosen = {option: True}
            found[f"{ErrType}, {option}"] = compare(
                network(), nn.MSELoss(), False, "unequal", ErrType, **chosen
            )
        torch.manual_seed(0)
        before, exchange.BUCKET = exchange.BUCKET, 500
        name = f"{ErrType}, many buckets"
        found[name] = compare(network(), nn.MSELoss(), False, "unequal", ErrType)
        exchange.BUCKET = before
    for more in (dict(vinit=True), dict(update_at="vhat")):
        torch.manual_seed(0)
        name = f"Strict, {', '.join(more)}"
        found[name] = compare(network(), nn.MSELoss(), False, "unequal", "Strict", **more)
    return found


def noise() -> dict[str, bool]:
    """Langevin's is another one on each rank, and the same again from the same state."""
    found = {}
    torch.manual_seed(0)
    model, X, Y = network(), torch.ones(1, 5).double(), torch.zeros(1, 3).double()
    for name, generator in [("default", None), ("own", torch.Generator())]:
        beliefs = []
        for _ in range(2):
            (generator or torch.random.default_generator).manual_seed(5)
            rule = steps.Langevin(0.1, 1.0, generator)
            LossFun = nn.MSELoss(reduction="sum")
            beliefs.append(distributed.PCInfer(model, LossFun, X, Y, "Strict", rule, 3).v[2])
        gathered = [torch.empty_like(beliefs[0]) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, beliefs[0])
        alike = [torch.allclose(a, b) for a, b in itertools.combinations(gathered, 2)]
        found[f"{name}: the same again"] = torch.equal(*beliefs)
        found[f"{name}: another on each rank"] = not any(alike)
    return found


def parameters_that_some_ranks_reach() -> dict[str, bool]:
    """A parameter's gradient is the sum over the ranks that reached it, and None if none did."""
    rank, count = dist.get_rank(), dist.get_world_size()
    found = {}
    for ErrType in torch2pc.pcinfer.ErrTypes:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 3), Conditional(), nn.Linear(3, 3)).double()
        twin = copy.deepcopy(model)
        X = torch.randn(count, 5, dtype=torch.float64)
        Y = torch.randn(count, 3, dtype=torch.float64)
        LossFun = nn.MSELoss(reduction="sum")
        for p in [*model.parameters(), *twin.parameters()]:
            p.grad = torch.ones_like(p)  # of the step before
        model[1].choice = int(rank == 0)
        distributed.PCInfer(
            model, LossFun, X[rank : rank + 1], Y[rank : rank + 1], ErrType, eta=0.1, n=6
        )
        wanted: dict[str, Tensor] = {}
        for r in range(count):
            twin[1].choice = int(r == 0)
            torch2pc.PCInfer(twin, LossFun, X[r : r + 1], Y[r : r + 1], ErrType, eta=0.1, n=6)
            for name, p in twin.named_parameters():
                if p.grad is not None:
                    wanted[name] = wanted[name] + p.grad if name in wanted else p.grad
        for name, p in model.named_parameters():
            right = (name in wanted) == (p.grad is not None)
            if p.grad is not None and right:
                right = torch.allclose(p.grad, wanted[name], rtol=1e-12, atol=1e-14)
            found[f"{ErrType}, {name}"] = right
    found["never reached"] = "1.parts.2.weight" not in wanted
    return found


# Options that must be the same on all ranks, and what two of them may be.
DIFFERENT: dict[str, tuple[Any, Any]] = {
    "eta": (0.1, torch.tensor(0.2)),
    "update_at": ("v", "vhat"),
    "accumulate": (False, True),
    "compile": (False, True),
    "precision": (None, 2.0),
    "nudge": (None, 0.1),
    "alpha": (0.5, 0.4),
    "energies": (None, {1: F.mse_loss}),
    "vinit": (None, [torch.zeros(2, k).double() for k in (5, 7, 7, 7, 3)]),
    "layers": (None, None),
}


class Raises(nn.Module):
    """A layer that raises on one rank, in the forward or in the backward pass."""

    def __init__(self, rank: int, when: str) -> None:
        super().__init__()
        self.rank, self.when = rank, when

    def forward(self, x: Tensor) -> Tensor:
        if dist.get_rank() != self.rank:
            return x * 1.0
        if self.when == "forward":
            raise ArithmeticError("on purpose")
        y = x * 1.0
        y.register_hook(self.raise_error)
        return y

    def raise_error(self, gradient: Tensor) -> None:
        raise ArithmeticError("on purpose")


def errors() -> dict[str, Any]:
    """What each rank is told; the group can be used after all of them."""
    rank = dist.get_rank()
    X, Y = torch.ones(2, 5).double(), torch.zeros(2, 3).double()
    found: dict[str, Any] = {}

    def told(name: str, **changed: Any) -> None:
        torch.manual_seed(0)
        arguments: dict[str, Any] = dict(model=network(), LossFun=nn.MSELoss(), X=X, Y=Y)
        arguments.update(ErrType="Exact", n=4)
        arguments.update({k: v() if k == "model" else v for k, v in changed.items()})
        model = arguments["model"]
        for p in model.parameters():
            p.grad = torch.full_like(p, 7.0)
        state = {k: v.clone() for k, v in model.state_dict().items()}
        random = torch.get_rng_state()
        try:
            distributed.PCInfer(**arguments)
            found[name] = "no error"
        except Exception as error:
            unchanged = (
                all(p.grad is not None and bool((p.grad == 7).all()) for p in model.parameters())
                and all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
                and torch.equal(random, torch.get_rng_state())
            )
            found[name] = type(error).__name__, str(error), unchanged
        dist.barrier()

    def other_seed() -> nn.Sequential:
        torch.manual_seed(rank == 1)
        return network()

    def failing(when: str) -> Callable[[], nn.Module]:
        return lambda: nn.Sequential(
            nn.Linear(5, 4), nn.Dropout(), Raises(1, when), nn.Linear(4, 3)
        ).double()

    for ErrType in torch2pc.pcinfer.ErrTypes:
        told(f"raises in its forward, {ErrType}", model=failing("forward"), ErrType=ErrType)
    told("raises in its backward", model=failing("backward"))
    told("bad argument", eta="big" if rank == 1 else 0.1, ErrType="Strict")
    told("step found", eta="auto", ErrType="Strict")
    told("step halved", eta=steps.Halving(0.1), ErrType="Strict")
    told("above", model=lambda: two_sided(of_input="b" if rank == 1 else "a"), ErrType="Strict")
    told("ErrType", ErrType="Strict" if rank == 1 else "Exact")
    told("n", ErrType="Strict", n=4 + (rank == 1))
    for name, values in DIFFERENT.items():
        ErrType = "Multipliers" if name == "alpha" else "Strict"
        model = (lambda: network()[: 4 - (rank == 1)]) if name == "layers" else network
        option = {} if name == "layers" else {name: values[rank == 1]}
        told(f"different {name}", ErrType=ErrType, model=model, **option)
    told("width", model=lambda: network(7 + (rank == 1)))
    told("connections", model=lambda: graph(skip="a" if rank == 1 else "stem"))
    told("frozen", model=lambda: network().requires_grad_(rank != 1))
    told("values", model=other_seed)
    told("reduction", LossFun=nn.MSELoss(reduction="sum" if rank == 1 else "mean"))
    told("unknown reduction", LossFun=penalised)
    told("contradiction", reduction="sum")
    told("empty shard", X=X[: 2 * (rank != 1)], Y=Y[: 2 * (rank != 1)])
    told(
        "empty shard of a sum",
        X=X[: 2 * rank],
        Y=Y[: 2 * rank],
        LossFun=nn.MSELoss(reduction="sum"),
    )
    told("count", count="2")
    told(
        "all ignored",
        LossFun=nn.CrossEntropyLoss(),
        Y=torch.full((2,), -100) if rank == 1 else torch.zeros(2).long(),
    )
    norm = lambda: nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)).double()  # noqa: E731
    told("BatchNorm", model=norm)
    told("BatchNorm in eval mode", model=lambda: norm().eval())
    sync = nn.SyncBatchNorm.convert_sync_batchnorm
    told("SyncBatchNorm", model=lambda: sync(norm()))
    loose = torch.ones(3, dtype=torch.float64, requires_grad=True)
    told("loose", LossFun=lambda y, Y: (loose * (y - Y)).square().mean(), reduction="mean")
    words = torch.zeros(2, 1, dtype=torch.long)
    told(
        "sparse",
        model=lambda: nn.Sequential(
            nn.Embedding(4, 3, sparse=True), nn.Sequential(nn.Flatten(), nn.Linear(3, 3))
        ).double(),
        X=words,
    )
    told("DistributedDataParallel", model=lambda: nn.parallel.DistributedDataParallel(network()))
    told("its module", model=lambda: nn.parallel.DistributedDataParallel(network()).module)
    wrapped = lambda: nn.Sequential(nn.parallel.DistributedDataParallel(network()))  # noqa: E731
    told("an item in DistributedDataParallel", model=wrapped)
    found["fully_shard"] = sharded_fully()
    found["FullyShardedDataParallel"] = sharded_flat()
    told("at the end all is well")
    return found


def refusal(call: Callable[[], Any]) -> str:
    try:
        call()
    except TypeError as error:
        return str(error)
    return "no error"


def sharded_fully() -> list[str]:
    """FSDP2: the root, and an item alone."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole, item = network(), network()
    fully_shard(whole, mesh=mesh)
    fully_shard(item[1], mesh=mesh)
    X, Y = torch.ones(2, 5).double(), torch.zeros(2, 3).double()
    return [
        refusal(lambda f=f, m=m: f(m, nn.MSELoss(), X, Y, "Exact"))  # type: ignore[misc]
        for m in (whole, item)
        for f in (torch2pc.PCInfer, distributed.PCInfer)
    ]


def sharded_flat() -> list[str]:
    """FSDP1."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = FullyShardedDataParallel(network(), device_id=torch.device("cpu"))
    X, Y = torch.ones(2, 5).double(), torch.zeros(2, 3).double()
    return [
        refusal(lambda f=f: f(model, nn.MSELoss(), X, Y, "Exact"))  # type: ignore[misc]
        for f in (torch2pc.PCInfer, distributed.PCInfer)
    ]


def other_ranks() -> dict[str, Any]:
    """A group of some ranks, and what the others are told."""
    rank, count = dist.get_rank(), dist.get_world_size()
    group = dist.new_group([1, count - 1])
    model, X, Y = network(), torch.ones(1, 5).double() * rank, torch.zeros(1, 3).double()
    torch.manual_seed(0)
    for p in model.parameters():
        dist.broadcast(p.data, 0)
    try:
        distributed.PCInfer(model, nn.MSELoss(), X, Y, "Strict", group=group)
    except ValueError as error:
        return {"error": str(error)}
    twin = copy.deepcopy(model)
    both = torch.cat([torch.ones(1, 5) * r for r in (1, count - 1)]).double()
    torch2pc.PCInfer(twin, nn.MSELoss(), both, torch.zeros(2, 3).double(), "Strict")
    pairs = zip(model.parameters(), twin.parameters(), strict=True)
    return {"error": max(float((p.grad - q.grad).abs().max()) for p, q in pairs)}


def train() -> dict[str, list[float]]:
    """Parameters stay the same on all ranks through steps of an optimizer."""
    torch.manual_seed(0)
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    torch.manual_seed(dist.get_rank())
    losses = []
    for step in range(12):
        X = torch.randn(3 + step % 2, 5).double()
        Y = X[:, :3].argmax(1)
        result = distributed.PCInfer(model, nn.CrossEntropyLoss(), X, Y, "Strict", n=8)
        optimizer.step()
        losses.append(float(result.Loss))
    return {"losses": losses, "parameters": [float(p.detach().sum()) for p in model.parameters()]}


def lost_rank(how: str) -> tuple[str, bool, float]:
    """Rank 1 goes away in the middle of a call: what the others are told, and after how long."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), Leaves(how, sys.argv[-1]), nn.Linear(4, 3)).double()
    X, Y = torch.ones(2, 5).double(), torch.zeros(2, 3).double()
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0)
    group = dist.new_group(timeout=datetime.timedelta(seconds=5 if how == "hangs" else 90))
    start = time.monotonic()
    try:
        distributed.PCInfer(model, nn.MSELoss(), X, Y, "Strict", group=group)
    except RuntimeError as error:
        unchanged = all(bool((p.grad == 7).all()) for p in model.parameters())
        return str(error), unchanged, time.monotonic() - start
    return "no error", False, 0.0


class Leaves(nn.Module):
    def __init__(self, how: str, folder: str) -> None:
        super().__init__()
        self.how, self.folder = how, folder

    def forward(self, x: Tensor) -> Tensor:
        if dist.get_rank() == 1 and self.how == "dies":
            os._exit(3)
        if dist.get_rank() == 1 and self.how == "hangs":
            while not Path(self.folder, "over").exists():
                time.sleep(0.1)
            os._exit(4)
        return x * 1.0


def dies() -> Any:
    return lost_rank("dies")


def hangs() -> Any:
    return lost_rank("hangs")


# The last leaves the group broken.
WORK: dict[str, list[Callable[[], Any]]] = {
    "two": [same_as_one_process, parameters_that_some_ranks_reach, noise, errors, train, dies],
    "three": [same_as_one_process, parameters_that_some_ranks_reach, errors, other_ranks, hangs],
}


def main(work: str, count: str, folder: str) -> None:
    """Forks a process for each rank, so that PyTorch is imported once."""
    torch.set_num_threads(1)
    ranks = []
    for rank in range(int(count)):
        ranks.append(os.fork())
        if ranks[-1] == 0:
            try:
                be(rank, work, int(count), folder)
            except BaseException:
                traceback.print_exc()
            sys.stderr.flush()
            sys.stdout.flush()
            os._exit(0)  # without waiting for ranks that are gone
    for process in ranks:
        os.waitpid(process, 0)


def be(rank: int, work: str, count: int, folder: str) -> None:
    """One of the processes."""
    faulthandler.dump_traceback_later(290, exit=True)
    warnings.filterwarnings("ignore", category=UserWarning, module="tests")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=count,
        timeout=datetime.timedelta(seconds=90),
    )
    found: dict[str, Any] = {}
    for part in WORK[work]:
        found[part.__name__] = part()
        temporary = Path(folder) / f"{rank}.tmp"
        temporary.write_bytes(pickle.dumps(found))
        temporary.rename(Path(folder) / f"{rank}.pickle")
    Path(folder, "over").touch()


if __name__ == "__main__":
    main(*sys.argv[1:])
