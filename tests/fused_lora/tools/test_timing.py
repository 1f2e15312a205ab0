"""The clock's order of events, on a GPU that is only played."""

from __future__ import annotations

import torch

from fused_lora.tools import timing


def test_the_clock_begins_after_the_cache_was_emptied_and_a_small_kernel_followed(monkeypatch):
    """Without it, a kernel that overlaps its predecessor would run beside the emptying, before the clock."""
    happened = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            happened.append(self)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(timing, "FLUSHED", 4096)
    clock = timing.ColdClock(torch.device("cpu"))
    original = torch.Tensor.zero_
    monkeypatch.setattr(torch.Tensor, "zero_", lambda self: happened.append(self.numel()) or original(self))
    begin, end = clock.around(lambda: happened.append("function"))
    assert happened == [4096, 1, begin, "function", end]
