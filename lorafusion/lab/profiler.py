"""Where the time of training steps goes on a GPU: a profiler's trace, its kernels by class, and when there is none."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

OTHER, IDLE = "other", "idle"
# A kernel is of the first class that a part of its name tells. What PEFT computes with its adapters are GEMMs and
# elementwise kernels like any other; the LoRA class has the kernels of fused_lora beside its GEMMs.
CLASSES = {
    "loss": re.compile("cross_entropy"),
    "optimizer": re.compile("multi_tensor_apply|FusedAdam|lpnorm_cleanup"),
    "attention": re.compile("flash|fmha|sdpa"),
    "LoRA": re.compile(
        "project_kernel|(out|in)put_pass_kernel|finish_(out|in)put_kernel|expand_(out|in)put_kernel|draw_masks_kernel"
        r"|\bpad_kernel"
    ),
    "GEMM": re.compile("gemm|gemv|nvjet|cutlass|sm90_xmma|splitK", re.IGNORECASE),
    "elementwise": re.compile(
        "rms_norm|rope|swiglu|gate_kernel|gate_backward_kernel|elementwise|vectorized|CatArray|copy|reduce_kernel|dropout"
        "|index|gather|scatter|scan|softmax|fill",
        re.IGNORECASE,
    ),
    "copies": re.compile("^Mem(cpy|set)"),
}
ORDER = ("GEMM", "attention", "elementwise", "LoRA", "loss", "optimizer", "copies", OTHER, IDLE)
COMMUNICATION = re.compile("nccl", re.IGNORECASE)
WAITING = re.compile("^(Context|Stream|Event) (Sync|Wait)")  # what the profiler lists of a stream beside its work


class Span(NamedTuple):
    """A kernel or a copy on the device, from `begin` to `end` in ns, and which of the host's launches it came by."""

    name: str
    begin: int
    end: int
    launch: int = 0


class KernelTotals(NamedTuple):
    """A class's time, and how many kernels it had."""

    milliseconds: float
    kernels: int


def trace(function: Callable[[], object]) -> list[Span]:
    """What a function has a GPU do.

    The host's own operations are not recorded, which would slow it down and leave the GPU waiting for it. It is slowed
    down all the same, which does not matter where microbatches are large: see `at_full_speed`.
    """
    start()
    with Tracer() as tracer:
        function()
    return tracer.spans


def start() -> None:
    """Make the first trace of a process, so that the next one is whole."""
    with Tracer():
        torch.zeros(1, device="cuda")


class Tracer:
    """Within it a GPU's work is traced; `spans` has it afterwards."""

    def __enter__(self) -> Tracer:
        self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        self._profile.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        torch.cuda.synchronize()
        self._profile.__exit__(*error)
        self.spans = device_spans(self._profile.profiler.kineto_results.events())


def device_spans(events: Iterable[Any]) -> list[Span]:
    """The work on the device among a profiler's events, which are the host's calls and annotations too."""
    return [
        Span(event.name(), event.start_ns(), event.start_ns() + event.duration_ns(), event.correlation_id())
        for event in events
        if event.device_type() == torch.autograd.DeviceType.CUDA
        and not event.is_user_annotation()
        and not WAITING.search(event.name())
    ]


def without_communication(spans: Iterable[Span]) -> list[Span]:
    """Without the kernels by which devices wait for each other."""
    return [span for span in spans if not COMMUNICATION.search(span.name)]


def busy_nanoseconds(spans: Iterable[Span]) -> int:
    """In which at least one of them is there."""
    return sum(time for _, _, time in _in_turn(spans))


def _in_turn(spans: Iterable[Span]) -> Iterator[tuple[Span, int, int]]:
    """Spans as they began, the nanoseconds without any before each, and those for which it went on alone: after all
    that began before it had ended."""
    reached = None
    for span in sorted(spans, key=lambda span: span.begin):
        reached = span.begin if reached is None else reached
        yield span, max(0, span.begin - reached), max(0, span.end - max(span.begin, reached))
        reached = max(reached, span.end)


def class_of(name: str) -> str:
    """The class of a kernel by its name."""
    return next((kind for kind, pattern in CLASSES.items() if pattern.search(name)), OTHER)


def breakdown(spans: Sequence[Span], microbatches: int) -> dict[str, KernelTotals]:
    """Each class's part of a microbatch's time from the first kernel's begin to the last one's end; they add up to it.

    While kernels overlap, the time is that of the one that began first: the next begins early to wait for it.
    """
    times: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    for span, idle, time in _in_turn(spans):
        kind = class_of(span.name)
        times[IDLE] += idle
        times[kind] += time
        counts[kind] += 1
    return {
        name: KernelTotals(times[name] / 1e6 / microbatches, counts[name] // microbatches)
        for name in ORDER
        if name in times
    }


def at_full_speed(parts: dict[str, KernelTotals], milliseconds: float) -> dict[str, KernelTotals]:
    """The parts of work that took so long without the profiler. Kernels take as long with it; what is left is idle, of
    which there is more with it where kernels are many and small, as the host needs longer for each."""
    busy = {name: part for name, part in parts.items() if name != IDLE}
    idle = milliseconds - sum(part.milliseconds for part in busy.values())
    return busy | {IDLE: KernelTotals(max(0.0, idle), 0)}


def busy_share(parts: dict[str, KernelTotals]) -> float:
    """The share of the time in which the device computes or copies."""
    return 1 - parts[IDLE].milliseconds / sum(part.milliseconds for part in parts.values())


def unknown_kernels(spans: Sequence[Span]) -> list[str]:
    """Lines about the five largest kernels of no class."""
    times: dict[str, int] = defaultdict(int)
    for span in spans:
        if class_of(span.name) == OTHER:
            times[span.name] += span.end - span.begin
    largest = sorted(times, key=times.__getitem__, reverse=True)[:5]
    return [f"no class: {times[name] / 1e6:.3f} ms of {name[:150]}" for name in largest]


def csv_rows(parts: dict[str, KernelTotals], **identity: object) -> list[dict[str, object]]:
    """The rows of an implementation: milliseconds and kernels a microbatch, and the class's share of its time."""
    whole = sum(part.milliseconds for part in parts.values())
    return [
        identity | {"class": name, **part._asdict(), "share": part.milliseconds / whole} for name, part in parts.items()
    ]
