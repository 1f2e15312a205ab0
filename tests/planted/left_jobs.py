"""Errors in what becomes of Slurm's jobs, and of runs that failed, when a workflow is started again."""

from __future__ import annotations

from tests.planted.plant import planted

LEFT_JOBS = "tests/lab/cluster/test_left_jobs.py"
PREFLIGHT = "tests/lab/cluster/test_preflight.py"


@planted(
    "lorafusion.lab.driver:end_left_jobs",
    caught_by=(
        f"{LEFT_JOBS}::test_the_next_driver_ends_them_first_and_says_which",
        f"{LEFT_JOBS}::test_a_driver_without_slurm_ends_them_too",
    ),
)
def the_jobs_of_a_killed_workflow_run_on(original):
    """A resume makes the same cells at the same time as they do."""
    return lambda folder, patient=False: False


@planted(
    "lorafusion.lab.cluster.left_jobs:jobs_named",
    caught_by=f"{LEFT_JOBS}::test_the_next_driver_ends_them_first_and_says_which",
)
def all_jobs_of_the_user_are_ended(original):
    """A resume ends the jobs of other folders too."""
    from lorafusion.lab.cluster import queue

    form = "--format=%A|%T|%N|%r|%k"
    return lambda names: queue.read_jobs(queue.slurm("squeue", "--me", "--noheader", form))


@planted(
    "lorafusion.lab.cluster.queue:slurm",
    caught_by=f"{LEFT_JOBS}::test_without_an_answer_nothing_begins",
)
def a_controller_that_is_down_has_an_empty_queue(original):
    """Where Slurm does not answer, no job is taken to run."""
    from lorafusion.core.schema import UserError

    def slurm(*words, **options):
        try:
            return original(*words, **options)
        except UserError:
            return ""

    return slurm


@planted(
    "lorafusion.lab.failures:accidents",
    caught_by="tests/lab/test_failures.py::test_what_a_run_showed_is_not_tried_again",
)
def findings_are_tried_again(original):
    """--again runs what had too little memory, too."""
    return list


@planted(
    "lorafusion.lab.cluster.preflight:problems_of",
    caught_by=(
        f"{PREFLIGHT}::test_a_node_without_the_environment_is_named",
        f"{PREFLIGHT}::test_a_job_that_ends_before_it_begins_shows_its_last_words",
    ),
)
def a_preflight_always_passes(original):
    """What the nodes say is not read."""
    return lambda seen, nodes: []
