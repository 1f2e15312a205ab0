"""Where the time of a run went: of each stage its passes and steps, and the share in which it was idle, by cause.

`bubble`: the stage would have been idle too if each operation took as long as it did, and neither messages nor hosts
took any time. So says the simulator of the run's schedule, by the run's own times. `host`: the device waited for the
loop that launches its work; between passes, and on a GPU within them too, as far as the profile of the run tells.
`neighbour`: the rest, in which it waited for another process although the schedule had work for it.
"""

from collections.abc import Sequence

import numpy as np

from lorafusion.core.plan import Plan
from lorafusion.planning.simulator import Costs, simulate

PASSES = ("forward", "backward", "step")


def stages_of(report: dict, plan: Plan, schedule: str | None = None) -> list[dict]:
    """Of each process of a report (`timed.report_of`) its stage and replica; the seconds of passes, steps and waits;
    and of the run's time the shares in which it was idle. Empty for a report without times."""
    if not report.get("times"):
        return []
    whole = max(device for device, _ in report["clocks"])
    seconds = [_by_slot(times, len(plan.slots())) for times in report["times"]]
    waits = [sum(times["wait"]) / 1e6 for times in report["times"]]
    needed = min(whole, simulate(plan, measured_costs(plan, seconds), schedule).makespan)
    # Some executors wait within libraries: then nothing tells whether it was for a host.
    unknown = len(seconds) > 1 and not any(waits)
    within = _idle_within_passes(report.get("cost", {}), seconds)
    stages = []
    for rank, (passes, wait, (clock, _)) in enumerate(zip(seconds, waits, report["clocks"], strict=True)):
        busy = float(passes.sum())
        bubble = max(0.0, needed - busy)
        idle = max(0.0, whole - busy)
        loop = 0.0 if unknown else min(max(0.0, clock - busy - wait), max(0.0, idle - bubble))
        stages.append({
            "stage": rank % plan.stages, "replica": rank // plan.stages,
            **dict(zip(PASSES, passes.sum(axis=1).tolist(), strict=True)), "wait": wait,
            "bubble": bubble / whole, "host": (loop + within * busy) / whole,
            "neighbour": max(0.0, idle - bubble - loop) / whole,
        })  # fmt: skip
    return stages


def measured_costs(plan: Plan, seconds: Sequence[np.ndarray]) -> Costs:
    """The simulator's table of what a run's operations took. seconds: of each process [forward, backward, step] by
    slot."""
    shape = plan.stages, len(plan.microbatches)
    table = {name: np.zeros(shape) for name in PASSES}
    for rank, passes in enumerate(seconds):
        replica, stage = divmod(rank, plan.stages)
        for name, values in zip(PASSES, passes, strict=True):
            # Replicas step at the same time, but the simulator adds up what it finds in a slot.
            share = plan.data_parallel if name == "step" else 1
            table[name][stage, replica :: plan.data_parallel] = values / share
    return Costs(**table, transfer=np.zeros(shape[1]))


def _by_slot(times: dict[str, list[int]], slots: int) -> np.ndarray:
    """Seconds of a process's passes and steps, [forward, backward, step] by slot, without the waits within them."""
    out = np.zeros((len(PASSES), slots))
    for row, name in zip(out, PASSES, strict=True):
        slot, begin, end = np.array(times[name], np.int64).reshape(-1, 3).T
        np.add.at(row, slot, (end - begin) / 1e6)
        slot, waited = np.array(times.get(f"{name}_wait", []), np.int64).reshape(-1, 2).T
        np.add.at(row, slot, -waited / 1e6)
    return out


def _idle_within_passes(cost: dict, seconds: Sequence[np.ndarray]) -> float:
    """The share of the passes in which a GPU does nothing, by the profile of the first slots (`cost.cost_of`). Other
    slots may have another number of kernels for a token, and more padding. seconds: as `measured_costs` takes them."""
    busy = cost.get("counts", {}).get("busy_ms")
    passes = sum(float(part[:, : cost["slots"]].sum()) for part in seconds) if busy else 0.0
    return max(0.0, 1 - busy / 1000 / passes) if passes else 0.0
