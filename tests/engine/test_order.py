"""In which order the stream's stages compute, with and without flush: as 1F1B is defined, whatever a system's name."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from lorafusion.core.config import read_systems
from lorafusion.engine.pipeline import Expected
from lorafusion.engine.stream import execute

SLOTS = 12
STEPS = (2, 3, 7, 11)  # slots that end a global batch


def expected(ahead: int, flushes: bool) -> list[str]:
    """`ahead` forwards, then one forward and one backward in turn, then the backwards that are left; all over again
    after each step where the pipeline is flushed."""
    ends = [slot + 1 for slot in STEPS] if flushes else [SLOTS]
    out, begin = [], 0
    for end in ends:
        waiting = list(range(begin, end))
        for slot in range(begin, end):
            out.append(f"F{slot}")
            if slot - begin >= ahead:
                out.append(f"B{waiting.pop(0)}")
        out += [f"B{slot}" for slot in waiting]
        begin = end
    return out


class Inbox:
    """Whatever is waited for is there."""

    def __init__(self, expected) -> None:
        self.expected = expected

    def post(self, count: int) -> None:
        pass

    def next(self) -> torch.Tensor:
        return torch.zeros(next(self.expected).shape)


def computed(index: int, stages: int, flushes: bool, system: str) -> list[str]:
    """What stage `index` computes, in order."""
    done: list[str] = []

    def forward(slot: int, x: torch.Tensor | None) -> torch.Tensor:
        done.append(f"F{slot}")
        out = (torch.zeros(1, 2, 1, requires_grad=True) if x is None else x) * 1
        out.register_hook(lambda _: done.append(f"B{slot}"))
        return out.sum() if index == stages - 1 else out

    steps = [(0,) if slot in STEPS else () for slot in range(SLOTS)]
    pipeline = SimpleNamespace(
        index=index, size=stages, is_first=index == 0, is_last=index == stages - 1,
        send_after=lambda _: None, send_before=lambda _: None, finish_sends=lambda: None,
        from_before=lambda one, _: Inbox(one), from_after=lambda one, _: Inbox(one),
        hidden=lambda tokens, name: Expected((1, tokens, 1), torch.float32, name),
    )  # fmt: skip
    run = SimpleNamespace(
        plan=SimpleNamespace(flush=flushes, stages=stages, system=system), pipeline=pipeline, begin=0, steps=steps,
        microbatches=[SimpleNamespace(noop=False, length=2)] * SLOTS, evaluations=[()] * SLOTS, forward=forward,
        reduce=lambda slot: torch.ones(1) if steps[slot] else None, update=lambda *_: None, norm_dtype=torch.float32,
        position=SimpleNamespace(set=lambda _: None), waiting=lambda _: nullcontext(),
        record=SimpleNamespace(readback=SimpleNamespace(wait=lambda: None)),
    )  # fmt: skip
    assert execute(run)
    return done


@pytest.mark.parametrize("system", ["arm-x", *read_systems()])
@pytest.mark.parametrize("flushes", [False, True])
@pytest.mark.parametrize("stages", [1, 2, 4])
def test_a_stage_computes_in_the_order_of_1f1b(stages, flushes, system):
    for index in range(stages):
        assert computed(index, stages, flushes, system) == expected(stages - 1 - index, flushes and stages > 1)
