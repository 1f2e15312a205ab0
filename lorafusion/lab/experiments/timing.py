"""Times of functions on a device, in turns: as CUDA graphs after the cache was emptied, and as a user calls them."""

import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import pairwise
from typing import TypeVar

import torch

from fused_lora.tools.timing import ColdClock
from lorafusion.core.clock import Meter, canary
from lorafusion.lab.table.result import row

Key = TypeVar("Key", bound=Hashable)
WARM_UPS = 3
ROUNDS = 3  # of calls in a row, of each function
SPAN = 0.01  # seconds of a row, and its fewest calls
FEWEST_CALLS = 3
FIRST_CALLS = 5  # of a row that tell the host's time: later ones may wait until the driver's queue has room
# Of all functions in turns before any is timed on a GPU: within a quarter of a second its power limit lowers the clock
# by 4 to 10 %. Times from both sides of that moment make medians that differ by 10 % between equal functions.
WARM_SECONDS = 0.4


def own_stream(device: torch.device) -> AbstractContextManager:
    """A stream that graphs can be captured on, which the default one is not."""
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()


def prepared(function: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """The function, run a few times, and on a GPU captured in a graph: the host's own time does not count.

    What is returned keeps the function, and with it all that the graph reads."""
    if device.type != "cuda":
        function()
        return function
    for _ in range(WARM_UPS):
        function()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    # On the stream of the warm-up: autograd remembers the stream that a leaf was first used on.
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(device)):
        function()
    return partial(_replay, graph, function)


def _replay(graph: torch.cuda.CUDAGraph, _kept: Callable[[], object]) -> None:
    """Replay a graph. The function that it is of is kept: without that, a batch's borders were freed, other tensors
    took their memory, and kernels skipped tokens or read beyond the batch."""
    graph.replay()


def shuffled_rounds(keys: Sequence[Key], rounds: int, seed: int) -> Iterator[list[Key]]:
    """All keys in each of the rounds, each time in another order."""
    order, shuffle = list(keys), random.Random(seed)
    for _ in range(rounds):
        shuffle.shuffle(order)
        yield list(order)


def seconds(
    functions: Mapping[Key, Callable[[], None]], device: torch.device, replays: int, seed: int = 0
) -> dict[Key, list[float]]:
    """The times of `replays` executions of each function, one round after another, each round in another order.

    Compare functions by the ratios of each round (`median_ratio`): a change of the clock is in both of its times."""
    meter, around = Meter(device), _around
    if device.type == "cuda":
        around, begin = ColdClock(device).around, time.perf_counter()
        while time.perf_counter() - begin < WARM_SECONDS:
            for function in functions.values():
                around(function)
            meter.synchronize()
    rounds = shuffled_rounds(list(functions), replays, seed)
    marks = [(key, *around(functions[key])) for order in rounds for key in order]
    meter.synchronize()
    times: dict[Key, list[float]] = {key: [] for key in functions}
    for key, begin, end in marks:
        times[key].append(meter.seconds(begin, end))
    return times


def call_seconds(
    calls: Mapping[Key, Callable[[], object]],
    replays: Mapping[Key, Callable[[], object]],
    device: torch.device,
    seed: int = 0,
) -> dict[Key, dict[str, float]]:
    """What a call takes of a user, who makes one after another: seconds by metric, medians of rounds in another order
    each. `host`: until it returns; `wall`: of a call of many; `device`: of a replay of many, where there are graphs.

    calls: functions that have run before. replays: of their graphs, none on a CPU.
    """
    meter = Meter(device)
    rows = {(key, "wall"): call for key, call in calls.items()}
    rows |= {(key, "device"): call for key, call in replays.items()}
    counts = {key: max(FEWEST_CALLS, int(SPAN / _in_a_row(call, 1, meter)[1])) for key, call in rows.items()}
    times: dict[Key, dict[str, list[float]]] = {key: defaultdict(list) for key in calls}
    for order in shuffled_rounds(list(rows), ROUNDS, seed):
        for key, metric in order:
            host, whole = _in_a_row(rows[key, metric], counts[key, metric], meter)
            times[key][metric].append(whole)
            if metric == "wall":
                times[key]["host"].append(host)
    return {key: {metric: statistics.median(values) for metric, values in of.items()} for key, of in times.items()}


def _in_a_row(call: Callable[[], object], count: int, meter: Meter) -> tuple[float, float]:
    """Seconds of a call, until it returns and of all in a row. The clock begins after a first one, by which the device
    has work from then on as in a training."""
    meter.synchronize()
    call()
    begin, returned = meter.mark(), [time.perf_counter()]
    for _ in range(count):
        call()
        if len(returned) <= FIRST_CALLS:
            returned.append(time.perf_counter())
    end = meter.mark()
    meter.synchronize()
    return statistics.median(after - before for before, after in pairwise(returned)), meter.seconds(begin, end) / count


def _around(function: Callable[[], None]) -> tuple[float, float]:
    """A CPU's clock before and after a function."""
    begin = time.perf_counter()
    function()
    return begin, time.perf_counter()


def canary_rows(device: torch.device, cell: str) -> list[dict]:
    """Times that show how fast the machine is now, as rows of cells below `cell`."""
    return [
        row("time", value, "steady", {"cell": f"{cell}/{name}"}, implementation=name)
        for name, value in canary(device).items()
    ]


def median_ratio(times: Sequence[float], baseline: Sequence[float]) -> float:
    """The median over the rounds of a function's time over another's."""
    return statistics.median(time / other for time, other in zip(times, baseline, strict=True))
