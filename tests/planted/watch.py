"""Errors in how a workflow's Slurm jobs are submitted, and seen to stand."""

from __future__ import annotations

from tests.planted.plant import planted

WATCH = "tests/lab/cluster/test_watch.py"


@planted(
    "lorafusion.lab.cluster.watch:is_made",
    caught_by=f"{WATCH}::test_a_job_that_slurm_has_forgotten_ended_as_its_files_say",
)
def a_result_of_an_earlier_run_counts(original):
    """A job that Slurm has forgotten is taken to have made what was there before."""
    return lambda job, begin: original(job, 0.0)


@planted(
    "lorafusion.lab.cluster.watch:jobs_named",
    caught_by=f"{WATCH}::test_no_answer_is_no_end_and_told_once",
)
def no_answer_is_an_end(original):
    """Where squeue does not answer, all jobs are taken to have ended."""
    from lorafusion.core.schema import UserError

    def jobs_named(names):
        try:
            return original(names)
        except UserError:
            return []

    return jobs_named


@planted(
    "lorafusion.lab.cluster.watch:wait_of",
    caught_by=(
        f"{WATCH}::test_a_job_that_waits_in_vain_is_cancelled_and_the_others_go_on",
        f"{WATCH}::test_a_controller_that_does_not_cancel_is_asked_again",
    ),
)
def every_wait_is_that_of_a_busy_cluster(original):
    """A job that is longer than its QOS allows is waited for, for ever."""
    from lorafusion.lab.cluster.words import BUSY

    return lambda reason: BUSY


@planted(
    "lorafusion.lab.cluster.limits:excess",
    caught_by="tests/lab/cluster/test_limits.py::test_a_job_is_compared_with_the_limit_that_it_waits_for",
)
def a_limit_on_jobs_together_always_passes(original):
    """A job of eight GPUs waits for ever where a user may have four."""
    return lambda job: ""


@planted(
    "lorafusion.lab.cluster.watch:_report_job_error",
    caught_by=(
        f"{WATCH}::test_the_end_of_a_job_that_steps_share_is_told_as_well",
        f"{WATCH}::test_a_shared_job_that_could_not_be_submitted_is_told_as_well",
    ),
)
def what_became_of_a_shared_job_is_left_out(original):
    """As Snakemake leaves it out."""
    return lambda report, info, msg=None, **more: report(info, msg=msg, **more)


@planted(
    "lorafusion.lab.cluster.submit:jobs_named",
    caught_by="tests/lab/cluster/test_submit.py::test_a_job_that_was_taken_without_a_word_is_not_submitted_again",
)
def what_a_busy_controller_took_is_submitted_again(original):
    """After an sbatch that timed out nobody looks whether the job is there."""
    return lambda names: []
