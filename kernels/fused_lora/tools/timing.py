"""The clock for kernels on a GPU, of the tuner and of the benchmarks."""

from collections.abc import Callable

import torch

FLUSHED = 256 * 2**20  # bytes written between two executions, more than any L2 cache holds


class ColdClock:
    """Times functions after the L2 cache was emptied: in a model other tensors went through it."""

    def __init__(self, device: torch.device) -> None:
        self._flushed = torch.empty(FLUSHED, dtype=torch.int8, device=device)
        self._mark = torch.empty(1, device=device)

    def around(self, function: Callable[[], object]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        """Call a function; the events just before and after what it launches, to be read when the GPU is done."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flushed.zero_()
        # A kernel that may begin before the one before it has ended (a programmatic dependent launch) would do so
        # beside the emptying, before the clock starts.
        self._mark.zero_()
        begin.record()
        function()
        end.record()
        return begin, end
