"""Check: every system trains what plain libraries train."""

from collections.abc import Sequence

from lorafusion.core.config import SystemConfig, read_systems
from lorafusion.core.schema import one_of
from lorafusion.core.workload import Workload
from lorafusion.lab.checks.comparison import PlainReference
from lorafusion.lab.checks.toy_runs import EXACT, Setup, setups_of, toy_jobs, train
from lorafusion.lab.checks.verdicts import Curve, Evidence, Verdict, left_out
from lorafusion.lab.experiments.end_to_end import unavailable
from lorafusion.lab.suite import Arrangement, Suite

ARRANGEMENT = "2x1"  # stages x replicas, or as many processes as a system can have


def check_suite(suite: Suite) -> tuple[Verdict, list[Curve]]:
    """The check of a suite's systems. On large models it is the gradients that are compared."""
    small = [setup for setup in setups_of(suite) if not setup.layers]
    return systems(systems_of(suite), Arrangement.read(ARRANGEMENT), small), []


def systems_of(suite: Suite, merged: bool | None = None) -> list[str]:
    """The systems of a suite's cells, or of those with q, k and v merged or apart."""
    grids = [grid for grid in suite.cells if merged is None or grid.merged_qkv is merged]
    return list(dict.fromkeys(system for grid in grids for system in grid.systems))


def systems(names: list[str], arrangement: Arrangement, setups: Sequence[Setup] = (EXACT,)) -> Verdict:
    """Each system, in an arrangement of so many processes that it can have, trains without dropout what plain
    transformers, PEFT and torch train. Those whose package is missing are left out, and the statement says so."""
    configs, evidence = read_systems(), Evidence()
    for name in names:
        one_of("system", name, set(configs), "check systems")
    missing = [name for name in names if unavailable(configs[name])]
    for setup in setups:
        jobs = toy_jobs(dropout=0.0, stretch=setup.stretch)
        plain = PlainReference.of(jobs, setup)
        wanted = arrangement if setup.has_room_for(arrangement) else Arrangement(1, 1, arrangement.recompute)
        for name in names:
            if name not in missing:
                chosen = possible(wanted, configs[name])
                result = train(Workload(name="check", jobs=jobs), name, chosen, setup=setup)
                plain.compare(evidence, f"{name} as {chosen}{setup.suffix}", result, jobs)
    statement = "every system trains what plain transformers, PEFT and torch train without dropout"
    return evidence.verdict("systems", statement + left_out("as their package is missing", missing))


def possible(arrangement: Arrangement, system: SystemConfig) -> Arrangement:
    """The arrangement, or of as many processes the one that a system can have, or one process."""
    processes = arrangement.stages * arrangement.replicas
    if system.max_gpus is not None and processes > system.max_gpus:
        return arrangement._replace(stages=1, replicas=1)
    if system.max_stages is not None and arrangement.stages > system.max_stages:
        return arrangement._replace(stages=1, replicas=processes)
    return arrangement
