"""This process among the others: neighbouring stages of a pipeline, and the same stage of other replicas.

Every shape is known from the plan, so nothing is negotiated. The two directions have a process group each: on NCCL the
operations of one communicator run in the order of their posting, and 1F1B posts a send forward before a receive from
the same neighbour whose matching operations the neighbour posts the other way round.

On NCCL each side of a message is a kernel that waits on its device for the other side, and whatever makes a host wait
for its device (a kernel's first use, memory that is freed) waits for all of these. So nothing may be posted that the
other side answers only after hearing more, or the two hosts wait for each other: a run on two H200s stood still with
receives that were posted ahead, and went on without. The receives of what comes back in a turn are posted at its
beginning, before anything is sent forward, and all others when they are waited for. tests/engine/test_device_waits.py
tries it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

PATIENCE = timedelta(days=1)  # the launcher decides how long nothing may happen
Waiting = Callable[[str], AbstractContextManager[None]]  # by what is waited for, around the wait
AHEAD = 1  # receives that are posted beyond the one that is waited for, at most


class Expected(NamedTuple):
    """A message's shape and dtype, and what it is, for a person."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    name: str


class Pipeline:
    """Stage `index` of `size` in replica `replica` of `replicas`; index 0 holds the embedding. Ranks count the stages
    of the first replica, then those of the next."""

    def __init__(
        self, rank: int, size: int, replicas: int, device: torch.device, dtype: torch.dtype, hidden_size: int
    ) -> None:
        self.size, self.replicas = size, replicas
        self.replica, self.index = divmod(rank, size)
        self.device, self.dtype, self.hidden_size = device, dtype, hidden_size
        self._first_rank = self.replica * size
        # All processes make all groups, in the same order.
        self._forward = dist.new_group(timeout=PATIENCE) if size > 1 else None
        self._backward = dist.new_group(timeout=PATIENCE) if size > 1 else None
        self._stages = self._alike = None
        if size > 1:
            pipelines = [list(range(first, first + size)) for first in range(0, size * replicas, size)]
            self._stages = [dist.new_group(ranks, timeout=PATIENCE) for ranks in pipelines][self.replica]
        if replicas > 1:
            stages = [list(range(index, size * replicas, size)) for index in range(size)]
            self._alike = [dist.new_group(ranks, timeout=PATIENCE) for ranks in stages][self.index]
        self._sent: deque[tuple[dist.Work, torch.Tensor]] = deque()

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.size - 1

    @property
    def replica_group(self) -> dist.ProcessGroup | None:
        """The processes of this stage in all replicas; None where there is one."""
        return self._alike

    @property
    def name(self) -> str:
        """This process's place, for a person."""
        replica = f", replica {self.replica} of {self.replicas}" if self.replicas > 1 else ""
        return f"stage {self.index} of {self.size}{replica}"

    def hidden(self, tokens: int, name: str) -> Expected:
        """Hidden states [1, T, H], or their gradient."""
        return Expected((1, tokens, self.hidden_size), self.dtype, name)

    def from_before(self, expected: Iterator[Expected], waiting: Waiting) -> Inbox:
        """What the stage before sends."""
        return Inbox(self._first_rank + self.index - 1, self._forward, self.device, expected, waiting)

    def from_after(self, expected: Iterator[Expected], waiting: Waiting) -> Inbox:
        """What the stage after sends."""
        return Inbox(self._first_rank + self.index + 1, self._backward, self.device, expected, waiting)

    def send_after(self, tensor: torch.Tensor) -> None:
        self._send(tensor, self.index + 1, self._forward)

    def send_before(self, tensor: torch.Tensor) -> None:
        self._send(tensor, self.index - 1, self._backward)

    def connect(self) -> None:
        """One message to and from each neighbour, and one through each group, since communicators are made at the
        first; all processes call it."""
        # Even stages turn to the one after them first, and all to the forward group: both sides make a communicator
        # at the same time, or wait for ever.
        for after in (self.index % 2 == 0, self.index % 2 == 1):
            neighbour = self.index + (1 if after else -1)
            if 0 <= neighbour < self.size:
                rank, send, receive = self._first_rank + neighbour, dist.isend, dist.irecv
                work = [(send if after else receive)(self._nothing(), rank, group=self._forward),
                        (receive if after else send)(self._nothing(), rank, group=self._backward)]  # fmt: skip
                for message in work:
                    message.wait()
        self.sum_over_stages(self._nothing())
        self.sum_over_replicas([self._nothing()])

    def wait_for_everyone(self) -> None:
        """Until all processes are here, if there are several or an executor made a group of this one alone."""
        if dist.is_initialized():
            dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def _nothing(self) -> torch.Tensor:
        return torch.zeros(1, device=self.device)

    def finish_sends(self) -> None:
        """Wait for every send."""
        while self._sent:
            self._sent.popleft()[0].wait()

    def sum_over_stages(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over this pipeline's stages, in place; all of them call it."""
        if self._stages is not None:
            dist.all_reduce(tensor, group=self._stages)
        return tensor

    def sum_over_replicas(self, tensors: list[torch.Tensor]) -> None:
        """The sums over this stage's replicas, in place; all of them call it. One message for all tensors of a dtype:
        an adapter has hundreds of small ones."""
        if self._alike is None or not tensors:
            return
        flat = torch._utils._flatten_dense_tensors(tensors)
        dist.all_reduce(flat, group=self._alike)
        torch._foreach_copy_(tensors, torch._utils._unflatten_dense_tensors(flat, tensors))

    def _send(self, tensor: torch.Tensor, stage: int, group: dist.ProcessGroup | None) -> None:
        # A tensor must live until its send is done; those that are done go.
        while self._sent and self._sent[0][0].is_completed():
            self._sent.popleft()
        tensor = tensor.detach().contiguous()
        self._sent.append((dist.isend(tensor, dst=self._first_rank + stage, group=group), tensor))


class Inbox:
    """Messages from one neighbour, in the order in which it sends them."""

    def __init__(
        self,
        source: int,
        group: dist.ProcessGroup | None,
        device: torch.device,
        expected: Iterator[Expected],
        waiting: Waiting,
    ) -> None:
        self.source, self.group, self.device = source, group, device
        self.expected, self.waiting = expected, waiting
        self._posted: deque[tuple[dist.Work, torch.Tensor, str]] = deque()

    def next(self) -> torch.Tensor:
        """The next message; on a GPU it is the device that waits for it."""
        self.post(1)
        if not self._posted:
            raise RuntimeError(f"a message from rank {self.source} is waited for, but the plan has no more of them")
        work, tensor, name = self._posted.popleft()
        with self.waiting(f"{name} from rank {self.source}"):
            work.wait()
        return tensor

    def post(self, count: int) -> None:
        """Be ready for the next messages."""
        while len(self._posted) < count and (message := next(self.expected, None)) is not None:
            buffer = torch.empty(message.shape, dtype=message.dtype, device=self.device)
            self._posted.append((dist.irecv(buffer, src=self.source, group=self.group), buffer, message.name))
