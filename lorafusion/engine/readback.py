"""Small results of the device that the host wants to know, without anything waiting for them."""

from collections import deque
from collections.abc import Callable

import torch


class Readback:
    """Hands the values of tensors to functions, in order, some time after they were computed."""

    def __init__(self) -> None:
        self._underway: deque[tuple[torch.cuda.Event, torch.Tensor, Callable[[list[float]], None]]] = deque()

    def add(self, values: torch.Tensor, then: Callable[[list[float]], None]) -> None:
        """Call `then` with the values of a vector: at once on a CPU, else from a later `poll` or `wait`."""
        values = values.detach()
        if not values.is_cuda:
            then(values.tolist())
            return
        copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        copy.copy_(values, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._underway.append((arrived, copy, then))

    def poll(self) -> None:
        """Hand over what has arrived."""
        while self._underway and self._underway[0][0].query():
            self._deliver()

    def wait(self) -> None:
        """Wait for everything and hand it over."""
        while self._underway:
            self._underway[0][0].synchronize()
            self._deliver()

    def _deliver(self) -> None:
        _, copy, then = self._underway.popleft()
        then(copy.tolist())
