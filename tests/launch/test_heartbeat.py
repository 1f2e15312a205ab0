"""A launcher that was stopped for a while, with its processes, takes none of them for one that hangs."""

from __future__ import annotations

import time

from lorafusion.launch.heartbeat import Position, Watch


def test_a_pause_of_the_launcher_is_nobodys(tmp_path, monkeypatch):
    position, now = Position(tmp_path, 0), [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    watch = Watch(tmp_path, 1)
    position.set("the forward of microbatch 3")
    watch.look()
    now[0] += 3600
    watch.look()
    assert watch.stalled(60) == ""
    for _ in range(70):
        now[0] += 1
        watch.look()
    assert watch.stalled(60) == "rank 0: the forward of microbatch 3"
