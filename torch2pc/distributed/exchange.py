"""Updates summed over the processes of a group, in few large messages, some while others are computed.

An ``Exchange`` lasts for one call. Every rank sends the same messages in the same order, whatever it
has computed, so that a rank that fails can tell the others instead of leaving them to wait. What is
summed, and why that is right, is in ``distributed.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Bytes: large enough for the bandwidth to count and not the latency, as in DistributedDataParallel.
BUCKET = 25 * 2**20


class Peers:
    """The processes of a group, and a way to talk to them that does not wait for a GPU."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.rank, self.count = dist.get_rank(group), dist.get_world_size(group)
        # Whether a message failed: then there is nobody to tell.
        self.is_lost = False
        self.device = torch.device("cpu")
        self._control = group
        if dist.get_backend(group) == "nccl":
            self.device = torch.device("cuda", torch.cuda.current_device())
            self._control = _on_cpu(group)

    def sum(self, tensor: Tensor) -> Any:
        """Start to sum ``tensor`` over all ranks, in place; returns what to ``wait`` for."""
        with self._noting_failure():
            return dist.all_reduce(tensor, group=self.group, async_op=True)

    def wait(self, works: Iterable[Any]) -> None:
        with self._noting_failure():
            for work in works:
                work.wait()

    def tell(self, numbers: Sequence[int], failed: bool) -> list[int]:
        """The sums of each rank's numbers; an error that names them if ranks failed."""
        failures = [0] * self.count
        failures[self.rank] = int(failed)
        told = torch.tensor([*failures, *numbers], dtype=torch.int64)
        with self._noting_failure():
            dist.all_reduce(told, group=self._control)
        failures, sums = told[: self.count].tolist(), told[self.count :].tolist()
        ranks = [str(rank) for rank, failure in enumerate(failures) if failure]
        if ranks and not failed:
            raise PeerFailed(
                f"PCInfer raised an error on rank {', '.join(ranks)} (see there): nothing was changed "
                f"on rank {self.rank}"
            )
        return sums

    def ask(self, value: object) -> list[Any]:
        """Each rank's value."""
        values: list[Any] = [None] * self.count
        with self._noting_failure():
            dist.all_gather_object(values, value, group=self._control)
        return values

    @contextmanager
    def _noting_failure(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.is_lost = True
            raise


class PeerFailed(RuntimeError):
    """The call failed on another rank."""


_control: dict[Any, Any] = {}


def _on_cpu(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """A group of the same ranks whose messages are in the CPU's memory; made once."""
    key = dist.group.WORLD if group is None else group
    if key not in _control:
        _control.clear()  # groups that may have been destroyed
        _control[key] = dist.new_group(
            dist.get_process_group_ranks(key), backend="gloo", use_local_synchronization=True
        )
    return _control[key]


class Bucket:
    """Some parameters' updates, one after the other in one tensor."""

    def __init__(self) -> None:
        self.parameters: list[Tensor] = []
        self.missing = self.size = 0
        self.flat: Tensor | None = None
        self.work: Any = None

    def add(self, parameter: Tensor) -> int:
        """Returns where its update begins."""
        start = self.size
        self.parameters.append(parameter)
        self.size += parameter.numel()
        self.missing += 1
        return start

    def takes(self, parameter: Tensor) -> bool:
        first = self.parameters[0]
        alike = first.dtype == parameter.dtype and first.device == parameter.device
        return alike and (self.size + parameter.numel()) * parameter.element_size() <= BUCKET

    def values(self) -> Tensor:
        if self.flat is None:
            self.flat = self.parameters[0].detach().new_zeros(self.size)
        return self.flat


class Exchange:
    """The updates of one call, from the first that arrives to the sums over all ranks."""

    def __init__(self, parameters: Iterable[Tensor], peers: Peers) -> None:
        self._peers = peers
        self._buckets: list[Bucket] = []
        # For each parameter, by its id: its number, bucket, and place there.
        self._places: dict[int, tuple[int, Bucket, int]] = {}
        self._parameters = list(parameters)
        for i, parameter in enumerate(self._parameters):
            if not self._buckets or not self._buckets[-1].takes(parameter):
                self._buckets.append(Bucket())
            bucket = self._buckets[-1]
            self._places[id(parameter)] = i, bucket, bucket.add(parameter)
        self._sent: set[int] = set()
        # Those whose update changed after it was sent.
        self._changed: set[int] = set()
        self._next = 0
        self._is_over = False

    def arrived(self, parameter: Tensor, update: Tensor) -> None:
        """Put an update into its bucket, and send the buckets that are full.

        In the order of the buckets, which is that of all ranks.
        """
        if id(parameter) not in self._places:
            return
        if update.is_sparse:
            raise TypeError(
                "parameters must have dense gradients to be summed over the ranks, got a sparse one "
                f"for a parameter of shape {tuple(parameter.shape)}: leave out sparse=True"
            )
        i, bucket, start = self._places[id(parameter)]
        if i in self._sent:
            self._changed.add(i)
            return
        self._sent.add(i)
        with torch.no_grad():
            bucket.values()[start : start + parameter.numel()].view_as(parameter).copy_(update)
        bucket.missing -= 1
        while self._next < len(self._buckets) and self._buckets[self._next].missing == 0:
            self._send_next()

    def finish(
        self, updates: Sequence[tuple[Tensor, Tensor]], Loss: Tensor
    ) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """The sums of the updates and of the loss, each in memory of its own.

        A parameter that some ranks did not reach gets the sum over those that did.
        """
        for parameter, update in updates:
            if id(parameter) not in self._places:
                raise ValueError(
                    "what is trained must be parameters of the model, or of a LossFun that is a "
                    f"module, got a tensor of shape {tuple(parameter.shape)} that is in neither: "
                    "ranks could not know that they mean the same"
                )
            if self._places[id(parameter)][0] not in self._sent:
                self.arrived(parameter, update)
        while self._next < len(self._buckets):
            self._send_next()
        total = Loss.detach().to(self._peers.device, torch.float64, copy=True)
        of_loss = self._peers.sum(total)
        count = len(self._parameters)
        flags = [int(i in chosen) for chosen in (self._sent, self._changed) for i in range(count)]
        self._is_over = True
        try:
            told = self._peers.tell(flags, failed=False)
        finally:
            self._peers.wait([*[bucket.work for bucket in self._buckets], of_loss])
        reached, changed = told[:count], told[count:]

        # Those that were sent before they were whole, which are few, go once more by themselves.
        late = {id(p) for p, times in zip(self._parameters, changed, strict=True) if times}
        own = {id(parameter): update for parameter, update in updates}
        sums = [
            (parameter, self._sum(parameter, own.get(id(parameter))))
            for parameter, times in zip(self._parameters, reached, strict=True)
            if times and id(parameter) not in late
        ]
        if late:
            again = Exchange([p for p in self._parameters if id(p) in late], self._peers)
            sums += again.finish([(p, u) for p, u in updates if id(p) in late], total)[0]
        return sums, total.to(Loss.device, Loss.dtype)

    def fail(self) -> None:
        """Send what the others wait for, and tell them that this rank failed."""
        if self._is_over or self._peers.is_lost:
            return
        self._is_over = True
        while self._next < len(self._buckets):
            self._send_next()
        total = torch.zeros((), dtype=torch.float64, device=self._peers.device)
        of_loss = self._peers.sum(total)
        self._peers.tell([0] * (2 * len(self._parameters)), failed=True)
        self._peers.wait([*[bucket.work for bucket in self._buckets], of_loss])

    def _send_next(self) -> None:
        bucket = self._buckets[self._next]
        self._next += 1
        bucket.work = self._peers.sum(bucket.values())

    def _sum(self, parameter: Tensor, update: Tensor | None) -> Tensor:
        """The sum, written into this rank's update where there is one."""
        _, bucket, start = self._places[id(parameter)]
        found = bucket.values()[start : start + parameter.numel()].view_as(parameter)
        return found.clone() if update is None else update.copy_(found)
