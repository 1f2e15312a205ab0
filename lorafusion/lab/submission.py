"""The border to Snakemake's objects: what a workflow that begins would submit to Slurm.

Snakemake adds up what the steps that share a job ask for: the minutes of those that run one after another, which
`device` has them do, and the most of all else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from lorafusion.lab.cluster.admission import Request, minutes_allowed
from lorafusion.lab.cluster.site import Site
from lorafusion.lab.dag import Dag, Step
from lorafusion.lab.shared_jobs import groups_of


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
    groups = groups_of(dag, site, minutes_allowed(site))
    settings = workflow.group_settings
    settings.group_components = {**settings.group_components, **Counter(groups.values())}
    return groups
