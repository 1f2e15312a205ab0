"""Whether a cluster takes the jobs of a workflow, before the first is submitted.

Slurm lets a job wait for ever that is longer than its partition allows. What else it refuses, it says once a job."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from lorafusion.core.schema import UserError
from lorafusion.lab.cluster.queue import read_minutes, slurm
from lorafusion.lab.cluster.request import PHYSICAL, Resources, request_of
from lorafusion.lab.cluster.site import PREFIX, Site
from lorafusion.lab.cluster.submit import BUSY, Request, sbatch_words

FORM = "%P|%l|%s|%D|%c|%Z|%m|%G"  # of sinfo: a line for all nodes of one shape
KEYS = tuple(request_of(Resources(1, 1), Site()))
# What may mend what sbatch says, where a job does not ask for the key; short: the line names a job too.
HINTS = (
    ("slurm_account", "account|: Assoc", "ACCOUNT names an account, unless your queue is full"),
    ("slurm_partition", "No partition specified", "PARTITION names one"),
    ("", "MaxWall", "GROUP_MINUTES is the longest job that steps share"),
)
# Of nodes that are down or drained now: the job itself may be all right.
REPAIR = "node configuration is not available"


class Nodes(NamedTuple):
    """The nodes of a partition that are alike. minutes: the longest that a job may take; most: of a job's nodes; cpus:
    of a node, with all hardware threads of its cores; threads: of a core."""

    partition: str
    is_default: bool
    minutes: float
    most: float
    count: int
    cpus: int
    threads: int
    memory_mb: int
    gpus: int

    def lacks(self, request: Request) -> str:
        """Why a job cannot run on these nodes; empty if it can."""
        gpus = int((request["gres"] or ":0").rpartition(":")[2])
        physical = PHYSICAL in (request["slurm_extra"] or "").split()
        limits = [
            ("minutes", request["runtime"], self.minutes),
            ("nodes", request["nodes"] or 1, min(self.count, self.most)),
            ("GPUs a node", gpus, self.gpus),
            ("cores a node", request["cpus_per_task"], self.cpus // self.threads if physical else self.cpus),
            ("MB of memory a node", request["mem_mb"], self.memory_mb),
        ]
        return next((f"{value} {what}, at most {most:.10g} there" for what, value, most in limits if value > most), "")


def read_nodes(text: str) -> list[Nodes]:
    """What sinfo says in `FORM`."""
    return [_nodes(*line.strip().split("|")) for line in text.splitlines()]


def _nodes(name: str, limit: str, sizes: str, count: str, cpus: str, threads: str, memory: str, gres: str) -> Nodes:
    """A line of sinfo. `+` says that some nodes have more."""
    most = sizes.rpartition("-")[2]
    return Nodes(
        partition=name.removesuffix("*"),
        is_default=name.endswith("*"),
        minutes=read_minutes(limit),
        most=int(most) if most.isdigit() else math.inf,
        count=int(count),
        cpus=int(cpus.rstrip("+")),
        threads=int(threads.rstrip("+")),
        memory_mb=int(memory.rstrip("+")),
        gpus=sum(map(int, re.findall(r"gpu(?::[^:,()]+)?:(\d+)", gres))),
    )


def all_nodes() -> list[Nodes]:
    """The nodes of this cluster, also of partitions that are not shown to everybody."""
    return read_nodes(slurm("sinfo", "--all", "--exact", "--noheader", f"--format={FORM}"))


def minutes_allowed(site: Site) -> float:
    """The longest that a job of any partition of the site may take, as far as Slurm tells."""
    try:
        nodes = all_nodes()
    except UserError:  # no Slurm here, as where somebody looks at a dry run
        return math.inf
    return min(
        max((some.minutes for some in _in_partitions(nodes, names)), default=math.inf)
        for names in {site.partition, site.cpu_partition or site.partition}
    )


def _in_partitions(nodes: Iterable[Nodes], names: str | None) -> list[Nodes]:
    """The nodes of some partitions, as sbatch takes their names, `a,b`; without names, of the default one."""
    return [some for some in nodes if (some.partition in names.split(",") if names else some.is_default)]


def refusal(request: Request, nodes: Iterable[Nodes]) -> str:
    """Why no partition that a request names takes it; empty if some does. What has no name and no default is routed by
    the cluster's own rules, or refused by sbatch."""
    every, names = list(nodes), request["slurm_partition"]
    here = _in_partitions(every, names)
    unknown = sorted(set((names or "").split(",")) - {"", *(some.partition for some in every)})
    if unknown:
        known_names = ", ".join(sorted({some.partition for some in every})) or "none"
        return f"no partition {unknown[0]!r}; known: {known_names}; {PREFIX}PARTITION names one"
    partitions = dict.fromkeys(some.partition for some in here)
    reasons = [_reason(request, [some for some in here if some.partition == name]) for name in partitions]
    return "" if "" in reasons else next(iter(reasons), "")


def _reason(request: Request, here: list[Nodes]) -> str:
    """Why no nodes of a partition take a request."""
    able = [some for some in here if not some.lacks({**request, "nodes": 1})]
    count = sum(some.count for some in able)  # nodes of several shapes can share a job
    reasons = [some._replace(count=count).lacks(request) for some in able]
    if "" in reasons:
        return ""
    reason = (reasons or [max(here, key=lambda some: some.gpus).lacks(request)])[0]
    return f"partition {here[0].partition}: {reason}; {PREFIX}PARTITION names another"


def require_admitted(jobs: Mapping[str, Request], settings: object = None) -> None:
    """Raise `UserError`, a line a reason, where this cluster would not run some jobs. jobs: what each asks for, by its
    name; settings: those of Snakemake's plugin."""
    if getattr(settings, "array_jobs", None):
        raise UserError("--slurm-array-jobs: an array would run its first job again and again; leave this option out")
    refused: dict[str, list[str]] = {}
    try:
        for reason, names in _reasons(jobs, settings):
            refused.setdefault(reason, []).extend(names)
    except UserError as error:
        if not BUSY.search(str(error)):
            raise
        print(f"not sure whether Slurm would run all jobs: {error}", flush=True)
    if refused:
        more = {reason: f" and {len(names) - 1} more" if names[1:] else "" for reason, names in refused.items()}
        raise UserError(*(f"{names[0]}{more[reason]}: Slurm would not run it: {reason}"
                          for reason, names in refused.items()))  # fmt: skip


def _reasons(jobs: Mapping[str, Request], settings: object) -> Iterator[tuple[str, list[str]]]:
    """Why Slurm would not run jobs, and which; those that ask for the same are tried once. A controller that is busy
    is not asked about each."""
    alike: dict[tuple[tuple[str, Any], ...], list[str]] = {}
    for name, request in sorted(jobs.items()):
        alike.setdefault(tuple((key, request.get(key)) for key in KEYS), []).append(name)
    nodes = all_nodes() if alike else []
    if any(not dict(pairs)["slurm_partition"] for pairs in alike) and not any(some.is_default for some in nodes):
        print("not sure whether jobs are too long: they name no partition, and none is the default", flush=True)
    for pairs, names in alike.items():
        reason = refusal(dict(pairs), nodes) or _refused(dict(pairs), settings)
        if reason:
            yield reason, names


def _refused(request: Request, settings: object) -> str:
    """Why Slurm refuses a request: an account, a QOS, a constraint, a reservation; empty if it does not."""
    try:
        slurm(*sbatch_words(request, settings), "--test-only", text="#!/bin/sh\n")
    except UserError as error:
        if BUSY.search(str(error)):
            raise
        if REPAIR in str(error):
            print(f"not sure whether Slurm would run all jobs: {error}", flush=True)
            return ""
        hints = [f"; {PREFIX}{hint}" for key, pattern, hint in HINTS
                 if not request.get(key) and re.search(pattern, str(error), re.IGNORECASE)]  # fmt: skip
        return f"{error}{''.join(hints[:1])}"
    return ""
