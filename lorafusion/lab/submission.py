"""The border to Snakemake's objects: what a workflow that begins would submit to Slurm.

Snakemake adds up what the steps that share a job ask for: the minutes of those that run one after another, which
`device` has them do, and the most of all else."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

from lorafusion.lab.cluster.admission import Request, minutes_allowed
from lorafusion.lab.cluster.left_jobs import RECORD
from lorafusion.lab.cluster.limits import minutes_by_accounts
from lorafusion.lab.cluster.site import Site
from lorafusion.lab.dag import Dag, Step
from lorafusion.lab.shared_jobs import groups_of

TARGETS = "--target-jobs"  # the option by which a job's Snakemake is told its steps


class Submission(NamedTuple):
    """What a workflow submits. executor: Snakemake's, which does so; jobs: what each asks for, by what it makes."""

    executor: Any
    jobs: dict[str, Request]

    @property
    def run(self) -> str:
        """The name of all jobs."""
        return self.executor.run_uuid

    @property
    def settings(self) -> Any:
        """Those of Snakemake's plugin."""
        return self.executor.workflow.executor_settings


def submission_of(workflow: Any) -> Submission | None:
    """What a workflow of Snakemake is about to submit; None where Slurm does not place its steps."""
    executor = workflow.scheduler._executor
    if not hasattr(executor, "run_uuid"):  # only the plugin for Slurm has one
        return None
    jobs: dict[str, Request] = {}
    steps = [job for job in workflow.dag.needrun_jobs() if not job.is_local]
    for job, count in Counter(workflow.dag.get_job_group(job) or job for job in steps).items():
        others = f" (with {count - 1} more in its job)" if count > 1 else ""
        first = min(job.jobs, key=lambda member: member.output.main) if job.is_group() else job
        jobs[f"{first.output.main}{others}"] = job.resources
    print(f"{len(steps)} steps in {len(jobs)} Slurm jobs", flush=True)
    return Submission(executor, jobs)


def share_jobs(workflow: Any, dag: Dag, site: Site) -> Mapping[Step, str]:
    """Have steps of a workflow that Slurm places share jobs; returns the names of these, by steps. To be called while
    Snakemake makes its DAG: it has its settings by then, and no scheduler yet."""
    if workflow.remote_exec:
        # Within a job its steps are made one by one. One that fails must not keep the others from being made.
        workflow.execution_settings.keep_going = True
        return {}
    if workflow.executor_plugin.name != "slurm":
        return {}
    of_partitions, of_accounts = minutes_allowed(site), minutes_by_accounts(site)
    groups = groups_of(dag, site, lambda needs: min(of_partitions, of_accounts(needs)))
    settings = workflow.group_settings
    settings.group_components = {**settings.group_components, **Counter(groups.values())}
    return groups


def without_made(words: Sequence[str], dag: Dag) -> list[str]:
    """The call of a job's Snakemake without those of its steps that the job has made already, as before it lost its
    node; empty where it has made all. What was there before the workflow began does not count."""
    from snakemake.target_jobs import parse_target_jobs_cli_args

    first = words.index(TARGETS) + 1
    targets = list(takewhile(lambda word: not word.startswith("--"), words[first:]))
    steps = {kind.name: steps for kind, steps in dag.kinds.items()}
    begin = (dag.folder / RECORD).stat().st_mtime
    left = []
    for target, spec in zip(targets, parse_target_jobs_cli_args(targets), strict=True):
        step = steps[spec.rulename][spec.wildcards_dict.get("name", "")]
        if step.reason() or step.key_path.stat().st_mtime < begin:
            left.append(target)
        else:
            print(f"{step.relative}: made already, before the job began anew", flush=True)
    return [*words[:first], *left, *words[first + len(targets) :]] if left else []
