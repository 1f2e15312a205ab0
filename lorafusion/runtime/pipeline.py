"""Neighbouring pipeline stages: hidden states forward, their gradients backward.

Every shape is known from the plan, so nothing is negotiated. The two directions have a process group each: on NCCL
the operations of one communicator run in the order of their posting, and 1F1B posts a send forward before a receive
from the same neighbour whose matching operations the neighbour posts the other way round.
"""

from __future__ import annotations

import torch
import torch.distributed as dist


class Pipeline:
    """This process's place among `size` stages; `index` 0 holds the embedding."""

    def __init__(self, index: int, size: int, device: torch.device, dtype: torch.dtype, hidden_size: int) -> None:
        self.index, self.size = index, size
        self.device, self.dtype, self.hidden_size = device, dtype, hidden_size
        self._forward = dist.new_group() if size > 1 else None
        self._backward = dist.new_group() if size > 1 else None
        self._sent: list[tuple[dist.Work, torch.Tensor]] = []

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.size - 1

    def receive_hidden(self, tokens: int) -> torch.Tensor:
        """Hidden states [1, tokens, H] from the stage before."""
        return self._receive(tokens, self.index - 1, self._forward)

    def receive_gradient(self, tokens: int) -> torch.Tensor:
        """The gradient [1, tokens, H] of what this stage sent forward."""
        return self._receive(tokens, self.index + 1, self._backward)

    def send_hidden(self, hidden: torch.Tensor) -> None:
        self._send(hidden, self.index + 1, self._forward)

    def send_gradient(self, gradient: torch.Tensor) -> None:
        self._send(gradient, self.index - 1, self._backward)

    def finish(self) -> None:
        """Wait for every send."""
        for work, _ in self._sent:
            work.wait()
        self._sent.clear()

    def _receive(self, tokens: int, source: int, group: dist.ProcessGroup | None) -> torch.Tensor:
        buffer = torch.empty(1, tokens, self.hidden_size, device=self.device, dtype=self.dtype)
        dist.irecv(buffer, src=source, group=group).wait()
        return buffer

    def _send(self, tensor: torch.Tensor, target: int, group: dist.ProcessGroup | None) -> None:
        # A tensor must live until its send is done; those that are done go.
        self._sent = [(work, kept) for work, kept in self._sent if not work.is_completed()]
        tensor = tensor.detach().contiguous()
        self._sent.append((dist.isend(tensor, dst=target, group=group), tensor))
