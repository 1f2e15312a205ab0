"""One meter for every system. Its clock is CUDA events on a GPU, the monotonic clock on a CPU."""

import gc
import time
from typing import NamedTuple, cast

import torch

from lorafusion.core.machine import largest_resident_set

Mark = float | torch.cuda.Event


class TimePoint(NamedTuple):
    """A point in a run on the device's clock and on the host's, which is read in seconds."""

    mark: Mark
    host: float


class Duration(NamedTuple):
    """Seconds between two points, by the device's clock and by the host's."""

    device: float
    host: float


class Meter:
    """What a device's work is measured with: marks in it, the host's clock, and the peak of memory.

    Nobody waits for a mark: intervals are read once the work is done. A test gives a run a meter whose readings it
    knows.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self) -> Mark:
        """A point in the device's stream of work, now."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def point(self) -> TimePoint:
        """A mark, and what the host's clock says when the device has come to it. On a CPU the two are one reading."""
        mark = self.mark()
        self.synchronize()
        return TimePoint(mark, mark if isinstance(mark, float) else time.perf_counter())

    def seconds(self, begin: Mark, end: Mark) -> float:
        """Seconds between two marks; call `synchronize` before."""
        if isinstance(begin, float):
            return cast(float, end) - begin  # both are marks of this clock
        return begin.elapsed_time(cast(torch.cuda.Event, end)) / 1000.0

    def duration(self, begin: TimePoint, end: TimePoint) -> Duration:
        return Duration(self.seconds(begin.mark, end.mark), end.host - begin.host)

    def synchronize(self) -> None:
        """Wait until the device has done its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def reset_peak_memory(self) -> None:
        """Start a new measurement of `peak_memory` on a GPU; a process's peak on a CPU cannot be reset."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_memory(self) -> int:
        """Bytes: the allocator's peak on a GPU, the process's largest resident set on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return largest_resident_set()


def free_memory() -> None:
    """Give a GPU back what nobody holds any longer."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def canary(device: torch.device, repeats: int = 5) -> dict[str, float]:
    """Seconds of a fixed matrix product and a fixed copy, the fastest of `repeats`.

    Each run takes them in its own process: where they drift from run to run, so does the machine.
    """
    size = 8192 if device.type == "cuda" else 512
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device=device).manual_seed(0)
    a = torch.randn(size, size, device=device, dtype=dtype, generator=generator)
    target = torch.empty_like(a)
    meter = Meter(device)
    fastest = {}
    for name, work in (
        ("canary-gemm", lambda: torch.mm(a, a, out=target)),
        ("canary-copy", lambda: target.copy_(a)),
    ):
        work()
        times = []
        for _ in range(repeats):
            begin = meter.mark()
            work()
            end = meter.mark()
            meter.synchronize()
            times.append(meter.seconds(begin, end))
        fastest[name] = min(times)
    return fastest
