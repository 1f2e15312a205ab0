"""One clock for every system: CUDA events on a GPU, the monotonic clock on a CPU."""

from __future__ import annotations

import gc
import time

import torch

from lorafusion.measure.environment import largest_resident_set

Mark = float | torch.cuda.Event


class Clock:
    """Marks points in the work of a device without waiting for it; intervals are read once the work is done."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self) -> Mark:
        """A point in the device's stream of work, now."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, begin: Mark, end: Mark) -> float:
        """Seconds between two marks; call `synchronize` before."""
        if isinstance(begin, float):
            return end - begin
        return begin.elapsed_time(end) / 1000.0

    def synchronize(self) -> None:
        """Wait until the device has done its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def reset_peak_memory(device: torch.device) -> None:
    """Start a new measurement of `peak_memory` on a GPU; a process's peak on a CPU cannot be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's peak on a GPU, the process's largest resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
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
    clock = Clock(device)
    fastest = {}
    for name, work in (
        ("canary-gemm", lambda: torch.mm(a, a, out=target)),
        ("canary-copy", lambda: target.copy_(a)),
    ):
        work()
        times = []
        for _ in range(repeats):
            begin = clock.mark()
            work()
            end = clock.mark()
            clock.synchronize()
            times.append(clock.seconds(begin, end))
        fastest[name] = min(times)
    return fastest
