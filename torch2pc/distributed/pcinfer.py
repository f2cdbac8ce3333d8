"""PCInfer on several processes: each has a part of the batch, and all get the whole batch's updates.

The sums over the processes are formed in ``exchange.py``; what a process computes is what ``PCInfer``
computes, with a loss that is weighted where it is a mean.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torch2pc import pcinfer
from torch2pc.checks import check_modules, check_no_transform
from torch2pc.distributed.exchange import Exchange, Peers
from torch2pc.distributed.reductions import read_count, read_reduction
from torch2pc.graph.network import Inference, Network
from torch2pc.graph.nodes import PCGraph
from torch2pc.graph.state import chained_to, modules_in
from torch2pc.inference.relax import Callback
from torch2pc.inference.steps import Halving, Langevin, Rule
from torch2pc.pcinfer import PCResult, check_arguments

__all__ = ["PCInfer"]


def PCInfer(
    model: nn.Sequential | PCGraph,
    LossFun: Callable[[Tensor, Any], Tensor],
    X: Tensor,
    Y: Any,
    ErrType: str,
    eta: float | Tensor | str | Rule = 0.1,
    n: int | None = 20,
    vinit: Sequence[Any] | None = None,
    *,
    accumulate: bool = False,
    compile: bool = False,
    update_at: str = "v",
    callback: Callback | None = None,
    precision: float | Sequence[float] | Mapping[str, float] | None = None,
    nudge: float | None = None,
    alpha: float | None = None,
    energies: Mapping[int | str, Callable[[Tensor, Tensor], Tensor]] | None = None,
    group: dist.ProcessGroup | None = None,
    reduction: str | None = None,
    count: float | Tensor | None = None,
) -> PCResult:
    r"""``torch2pc.PCInfer`` for a batch of which each process (rank) has a part, its shard.

    Every rank holds the whole model, with the same parameters, and passes its own shard ``X, Y``. After
    the call ``.grad`` is, on every rank, that of one process with the whole batch, and so is
    ``Loss``; ``vhat``, ``dLdy``, ``v`` and ``epsilon`` are the shard's rows of what that process would
    return. Shards may differ in size. Then each rank steps its own optimizer, and the parameters stay
    the same on all. No average is taken, and no DistributedDataParallel is needed.

    **Why sums, and a weighted loss.** Beliefs and errors are separate for each example, so that with a
    loss that sums over the batch, ``Loss = sum_r Loss_r``, the energy is the sum of the shards'::

        F(v) = sum_r F_r(v_r),    F_r(v_r) = Loss_r + 1/2 sum_l ||epsilon_l||^2

    (the second sum over the examples of rank r). Each shard's beliefs descend their own ``F_r``, as they
    would in the whole batch, and the updates, being derivatives of F, are the sums of the shards' ones.
    With a mean over the N examples of the batch, of which rank r has ``B_r``::

        Loss = sum_r (B_r / N) Loss_r,    F_r(v_r) = (B_r / N) Loss_r + 1/2 sum_l ||epsilon_l||^2

    so each rank relaxes with its loss weighted by its share ``B_r / N``, and sums all the same. To relax
    with ``Loss_r`` and average the updates, as is done with backprop, would be right for Exact and
    FixedPred (with equal shards), which are linear in the loss, but not for Strict and the others: the
    weight of the loss against the errors, and so where the beliefs go, depends on it.

    What a mean divides by is the number of examples, unless it is known better: for
    ``nn.CrossEntropyLoss``, ``nn.NLLLoss`` and their functions it is the weight of the targets that are not
    ignored, for ``nn.MSELoss`` and its like the number of elements of ``Y``. For any other loss that
    does not divide by the number of its examples (tokens without padding), pass this rank's
    ``count``. What a loss adds that is no sum or mean over examples (a penalty of the weights) is
    kept by a mean, and added once for each rank by a sum.

    **Messages.** Gradients travel in buckets of up to 25 MiB for each type, each sent as soon as all of
    its gradients are there: with Exact and FixedPred while lower layers are still backpropagated (not
    where FixedPred's parameters are shared by layers), with Strict while the updates of the next
    layers are computed after the last iteration. A parameter that no rank reaches stops those behind it
    until the end. Relaxing needs no messages at all. Besides, a call sends a few numbers
    at its start and at its end: what fails on one rank fails on all.

    **Errors.** If the call raises on one rank, that rank raises its error and the others one that names
    it, and on all of them everything is as it was. If a rank dies, or hangs, the others raise an error
    as soon as the connection is lost, or after the timeout of the process group:
    ``init_process_group(timeout=datetime.timedelta(minutes=2))``, by default 10 (nccl) or 30 minutes.
    Then start anew from a checkpoint; the group cannot be used any longer. (A hook that raises when
    ``.grad`` is written fails on its own rank only.)

    **Layers that look at other examples.** BatchNorm in train mode normalises by its own shard, which
    gives another result than the whole batch: an error says so. ``nn.SyncBatchNorm`` normalises by all
    of them, but PyTorch has it on GPUs only; elsewhere use GroupNorm or LayerNorm, or BatchNorm in eval
    mode. Dropout draws from each rank's own generator: seed them differently. Buffers are each rank's own.

    Tested with gloo on the CPU. With nccl, gradients stay on the GPU and the few numbers go through a gloo
    group of the same ranks, made at the first call, so that no call waits for a GPU; that, and SyncBatchNorm,
    are written to PyTorch's documentation and untested, for want of GPUs.

    Args:
        model, LossFun, ErrType, eta, n, accumulate, compile, update_at: as for ``torch2pc.PCInfer``,
            the same on all ranks; ``eta`` a number or a rule, but not ``"auto"`` or ``Halving``, whose sizes
            depend on all of the batch. ``Langevin`` has other noise on each rank, also where their
            generators were seeded alike.
        callback: as there, called with this rank's beliefs and errors.
        precision, nudge, alpha, energies: as there, the same on all ranks.
        X, Y, vinit: as there, of this rank's shard, of at least one example.
        group: the processes; None for all.
        reduction: ``"mean"`` or ``"sum"``, what LossFun does over the batch; None to read it from
            ``LossFun.reduction``, or from a function of ``torch.nn.functional``.
        count: what a mean divides by on this rank, as far as it is not the number of examples.

    Returns:
        ``PCResult(vhat, Loss, dLdy, v, epsilon)``: ``Loss`` is the whole batch's, the rest the shard's.

    Raises:
        TypeError, ValueError: as ``torch2pc.PCInfer``; the ranks' arguments or parameters differ;
            ``reduction`` is not known; a shard is empty; BatchNorm in train mode; a gradient is sparse
            or of a tensor that is in no module.
        RuntimeError: ``torch.distributed`` is not initialised; the call failed on another rank; the
            connection to one was lost.

    Example (``torchrun --nproc-per-node=2 train.py``, where this is one of the processes):
        >>> import torch
        >>> from torch import distributed, nn
        >>> from torch2pc.distributed import PCInfer
        >>> store = distributed.HashStore()  # torchrun: init_process_group("gloo")
        >>> distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.Tanh(), nn.Linear(8, 3)))
        >>> for p in model.parameters():  # the same start on all ranks
        ...     _ = distributed.broadcast(p.data, 0)
        >>> X, Y = torch.randn(16, 4), torch.randint(3, (16,))  # this rank's examples
        >>> result = PCInfer(model, nn.CrossEntropyLoss(), X, Y, "Strict")
        >>> distributed.destroy_process_group()
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "torch.distributed must be initialised: call torch.distributed.init_process_group first, "
            "in a program that torchrun starts"
        )
    if dist.get_rank(group) < 0:
        raise ValueError("group must be one that this process is in")
    peers = Peers(group)
    try:
        asked = check_arguments(
            model,
            LossFun,
            X,
            ErrType,
            eta,
            n,
            vinit,
            update_at,
            compile,
            callback,
            precision,
            nudge,
            alpha,
            energies,
        )
        asked.warn(model)
        if isinstance(eta, str) and ErrType in ("Strict", "Multipliers", "ErrorBased"):
            raise ValueError(
                f"eta must be a number here, got {eta!r}, which would find another one on each rank"
            )
        if isinstance(eta, Halving):
            raise ValueError(
                f"eta must have one size on all ranks, got {eta}, of which each has its own"
            )
        if isinstance(eta, Langevin):
            asked = asked._replace(eta=eta.of_stream(peers.rank))
        check_no_transform()
        modules = modules_in(model, LossFun)
        check_modules(modules)
        if peers.count > 1:
            _check_batch_norm(model)
        reduction = read_reduction(LossFun, reduction)
        own_count = read_count(LossFun, X, Y, count) if reduction == "mean" else 1.0
        parameters = _parameters(modules)
        chosen = dict(ErrType=ErrType, n=n, eta=_number(eta), update_at=update_at)
        chosen.update(accumulate=accumulate, compile=compile, reduction=reduction)
        chosen.update(precision=asked.terms.precision, nudge=asked.nudge, alpha=asked.terms.alpha)
        chosen.update(energies=sorted(asked.terms.between))
        chosen.update(vinit="None" if vinit is None else "given", layers=len(model))
        if isinstance(model, PCGraph):
            chosen.update(connections=model.extra_repr().replace("\n", "; "))
        description = {name: str(value) for name, value in chosen.items()}
        description |= _described(model, LossFun, parameters)
    except Exception as error:
        with chained_to(error):
            peers.tell([0, 0], failed=True)
        raise
    _check_agreement(peers, description)
    _compared.setdefault(model, set()).add(description["parameters"])

    if reduction == "mean":
        LossFun = _weighted(LossFun, _share(peers, own_count, X.device))
    # Gradients come from the top in one backward pass, and layer by layer from the bottom elsewhere.
    upwards = ErrType not in ("Exact", "FixedPred")
    exchange = Exchange(parameters if upwards else reversed(parameters), peers)

    def summed(network: Network) -> Inference:
        network.arrived = exchange.arrived
        found = asked.algorithm(network)
        updates, Loss = exchange.finish(found.updates, found.Loss)
        return found._replace(updates=updates, Loss=Loss)

    try:
        return pcinfer.infer(summed, model, LossFun, X, Y, accumulate)
    except Exception as error:
        with chained_to(error):
            exchange.fail()
        raise


def _parameters(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """All that can be trained, once each, in the order of the modules."""
    tables = [module._parameters.values() for module in modules if module._parameters]
    parameters = [p for table in tables for p in table if p is not None and p.requires_grad]
    return list({id(p): p for p in parameters}.values())


def _check_batch_norm(model: nn.Module) -> None:
    """No layer takes its statistics from this rank's shard."""
    for name, module in model.named_modules():
        if (
            isinstance(module, nn.modules.batchnorm._BatchNorm)
            and not isinstance(module, nn.SyncBatchNorm)
            and (module.training or module.running_mean is None)
        ):
            raise ValueError(
                f"model must treat each example by itself, but model.{name} "
                f"({type(module).__name__} in {'train' if module.training else 'eval'} mode) "
                "normalises by the examples of its rank, not by those of the whole batch: convert it "
                "by nn.SyncBatchNorm.convert_sync_batchnorm(model), which works on GPUs only, use "
                "GroupNorm or LayerNorm, or put it into eval mode"
            )


def _share(peers: Peers, count: float | Tensor, device: torch.device) -> Tensor:
    """This rank's share of the whole batch, on ``device``."""
    own = torch.as_tensor(count, dtype=torch.float64, device=peers.device)
    total = own.clone()
    peers.wait([peers.sum(total)])
    return (own / total).to(device)


class _Weighted(nn.Module):
    """A loss that is a module, times this rank's share."""

    weight: Tensor

    def __init__(self, LossFun: nn.Module, weight: Tensor) -> None:
        super().__init__()
        self.LossFun = LossFun
        self.register_buffer("weight", weight)

    def forward(self, prediction: Tensor, Y: Any) -> Tensor:
        return self.weight * self.LossFun(prediction, Y)


def _weighted(LossFun: Any, weight: Tensor) -> Callable[[Tensor, Any], Tensor]:
    """``LossFun`` times this rank's share; what it holds can be found in it as before."""
    if isinstance(LossFun, nn.Module):
        return _Weighted(LossFun, weight)

    def weighted(prediction: Tensor, Y: Any) -> Tensor:
        return weight * LossFun(prediction, Y)

    return weighted


def _number(eta: object) -> object:
    return eta.item() if isinstance(eta, Tensor) else eta


# For each model, the parameters whose values were compared.
_compared: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


def _described(
    model: nn.Module, LossFun: object, parameters: Sequence[nn.Parameter]
) -> dict[str, str]:
    """What must be the same on all ranks about the parameters; their values the first time."""
    names = {id(p): f"model.{name}" for name, p in model.named_parameters()}
    if isinstance(LossFun, nn.Module):
        names |= {id(p): f"LossFun.{name}" for name, p in LossFun.named_parameters()}
    shapes = {names.get(id(p), f"parameter {i}"): p for i, p in enumerate(parameters)}
    described = {name: f"{tuple(p.shape)}, {p.dtype}" for name, p in shapes.items()}
    described["parameters"] = str(list(described))
    if described["parameters"] not in _compared.get(model, ()):
        described["the parameters' values"] = str([_checksum(p) for p in parameters])
    return described


def _checksum(parameter: Tensor) -> int:
    """The sum of its bytes as integers, weighted by their places: the same in whatever order."""
    values = parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).long()
    return int((values * (torch.arange(len(values)) % 8191 + 1)).sum())


def _check_agreement(peers: Peers, description: dict[str, str]) -> None:
    """All ranks were called with the same; an error that names what differs."""
    digest = zlib.crc32(str(description).encode()) >> 8
    # All numbers are equal if and only if their mean square is the square of their mean.
    total, squares = peers.tell([digest, digest**2], failed=False)
    if peers.count * squares == total**2:
        return
    all_of_them = peers.ask(description)
    for name in dict.fromkeys(name for one in all_of_them for name in one):
        values = [one.get(name, "none") for one in all_of_them]
        other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
        if other is None:
            continue
        if name == "the parameters' values":
            raise ValueError(
                f"the parameters' values must be the same on all ranks, but those of ranks 0 and {other} "
                "are not: after building the model, call torch.distributed.broadcast(p.data, 0) for "
                "each parameter p"
            )
        raise ValueError(
            f"{name} must be the same on all ranks, got {values[0]} on rank 0 and {values[other]} "
            f"on rank {other}"
        )
