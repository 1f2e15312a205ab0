"""A meter whose readings a test knows: time passes, and memory is taken, only where tokens pass through a stage."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from lorafusion.core.clock import Meter, TimePoint
from lorafusion.model.stage import Stage


class KnownMeter(Meter):
    """seconds, memory: of a token's forward pass, and its bytes, of which the peak is those of the largest microbatch.
    host: seconds of the host's clock in one of the device's. begin: what the clock says at first; before: bytes of the
    peak until it is reset."""

    def __init__(
        self, seconds: float, memory: int = 1, host: float = 1.0, begin: float = 1000.0, before: int = 10**12
    ) -> None:
        super().__init__(torch.device("cpu"))
        self.of_a_token, self.memory_of_a_token, self.host = seconds, memory, host
        self.now, self.peak = begin, before

    def mark(self) -> float:
        return self.now

    def point(self) -> TimePoint:
        return TimePoint(self.now, self.host * self.now)

    def reset_peak_memory(self) -> None:
        self.peak = 0

    def peak_memory(self) -> int:
        return self.peak

    def passed(self, tokens: int) -> None:
        """So many tokens, padding included, are on their way through a stage."""
        self.now += tokens * self.of_a_token
        self.peak = max(self.peak, tokens * self.memory_of_a_token)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within it every stage's forward pass of this process takes what it takes by this meter."""

        def look(module: torch.nn.Module, inputs: tuple) -> None:
            if isinstance(module, Stage):
                self.passed(inputs[0].shape[1])

        hook = register_module_forward_pre_hook(look)
        try:
            yield
        finally:
            hook.remove()
