"""Errors in what Slurm is asked for, and in what is refused before it is asked."""

from __future__ import annotations

import os

from tests.planted.plant import planted

ADMISSION = "tests/lab/cluster/test_admission.py"
REQUEST = "tests/lab/cluster/test_request.py"
SITE = "tests/lab/cluster/test_site.py"
SHARED = "tests/lab/test_shared_jobs.py"


@planted(
    "lorafusion.lab.cluster.request:request_of",
    caught_by=f"{REQUEST}::test_a_timed_job_has_its_node_or_its_share_alone[needs1-site1---exclusive]",
)
def a_run_that_takes_all_gpus_shares_its_nodes(original):
    """Other jobs run on the cores beside a timed run."""
    return lambda needs, site: original(needs, site) | {"slurm_extra": None}


@planted(
    "lorafusion.lab.cluster.request:nodes_for",
    caught_by=f"{REQUEST}::test_nodes_share_processes_evenly[5-4-5]",
)
def the_last_node_has_fewer_processes(original):
    """Five processes go to two nodes, two to each."""
    return lambda processes, per_node: -(-processes // per_node)


@planted(
    "lorafusion.lab.experiments.end_to_end:EndToEnd.resources",
    caught_by=f"{ADMISSION}::test_the_papers_grid_fits_nodes_of_four_and_of_eight_gpus[4-4]",
)
def each_node_is_asked_for_the_memory_of_all(original):
    """A run on several nodes asks each of them for all of its memory."""

    def resources(self, point):
        return original(self, point)._replace(memory_mb=1000 * point.subject.cell.grid.memory_gb)

    return resources


@planted(
    "lorafusion.lab.cluster.admission:refusal",
    caught_by=f"{ADMISSION}::test_a_job_that_is_too_long_is_named_once_with_minutes_and_limit",
)
def a_job_that_is_too_long_is_submitted(original):
    """It waits for ever."""
    return lambda request, nodes: ""


@planted(
    "lorafusion.lab.cluster.site:read_site",
    caught_by=f"{SITE}::test_the_environment_replaces_single_keys",
)
def the_environment_is_not_read(original):
    """LORAFUSION_SLURM_ACCOUNT changes nothing."""
    from lorafusion.lab.cluster.site import SITE

    return lambda environment: original({SITE: environment[SITE]})


@planted(
    "lorafusion.lab.shared_jobs:groups_of",
    caught_by=f"{SHARED}::test_a_job_is_no_longer_than_the_site_and_the_partition_allow[site1-300-300]",
)
def steps_share_jobs_that_their_partition_does_not_take(original):
    """A job of ten hours in a partition of five."""
    return lambda dag, site, most: original(dag, site)


@planted(
    "lorafusion.lab.cluster.admission:minutes_allowed",
    caught_by=f"{ADMISSION}::test_the_longest_job_is_that_of_the_partitions[site3-10]",
)
def the_partition_of_jobs_without_gpus_is_not_looked_at(original):
    """It may be the one with the shorter limit."""
    return lambda site: original(site.model_copy(update={"cpu_partition": None}))


@planted(
    "lorafusion.lab.failures:unmade",
    caught_by="tests/lab/test_begin.py::test_steps_that_were_begun_and_not_made_are_named",
)
def a_step_that_failed_in_a_shared_job_is_not_named(original):
    """Snakemake names all steps of the job."""
    return lambda steps: original(step for step in steps if not step.path.parent.exists())


@planted(
    "lorafusion.lab.cluster.limits:minutes_by_accounts",
    caught_by="tests/lab/cluster/test_limits.py::test_the_longest_job_is_that_of_the_smallest_limit[one-of-a-user]",
)
def the_limits_of_accounts_are_not_looked_at(original):
    """A job that steps share is longer than they allow, and waits for ever."""
    return lambda site: lambda needs: float("inf")


@planted(
    "lorafusion.lab.submission:without_made",
    caught_by="tests/lab/test_submission.py::test_what_was_there_before_the_workflow_is_made",
)
def what_was_there_before_the_workflow_is_not_made(original):
    """A job that begins anew takes a run that is to be tried again for its own."""

    def without_made(words, dag):
        os.utime(dag.folder / ".slurm-jobs", (0, 0))
        return original(words, dag)

    return without_made
