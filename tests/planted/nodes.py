"""Errors in how the nodes of one run find each other, and tell who judges."""

from __future__ import annotations

from tests.planted.plant import planted

RENDEZVOUS = "tests/launch/test_rendezvous.py"


@planted(
    "lorafusion.launch.rendezvous:attempt_of",
    caught_by=(
        f"{RENDEZVOUS}::test_an_attempt_has_a_name_of_its_own_that_all_nodes_know[SLURM_SRUN_COMM_PORT]",
        f"{RENDEZVOUS}::test_an_attempt_reads_nothing_of_earlier_ones_and_removes_it",
    ),
)
def a_requeued_job_is_the_same_attempt(original):
    """A job that Slurm starts again reads what its first life left."""
    return lambda environment: environment["SLURM_JOB_ID"]


@planted(
    "lorafusion.launch.network:free_port",
    caught_by=(
        f"{RENDEZVOUS}::test_attempts_on_one_node_meet_at_ports_of_their_own",
        f"{RENDEZVOUS}::test_a_port_that_somebody_has_is_not_taken",
    ),
)
def all_attempts_meet_at_the_same_port(original):
    """Runs whose first node is the same choose the same port, and also where another program has it."""
    from lorafusion.launch.network import PORTS

    return lambda: PORTS[0]


@planted(
    "lorafusion.engine.agent:report_no_rendezvous",
    caught_by=f"{RENDEZVOUS}::test_the_first_node_s_report_of_a_rendezvous_comes_first",
)
def a_rendezvous_fails_without_a_word(original):
    """Why the nodes did not meet is not told."""

    def report_no_rendezvous(error, arguments, reports):
        pass

    return report_no_rendezvous


@planted(
    "lorafusion.launch.rendezvous:leave",
    caught_by=f"{RENDEZVOUS}::test_a_node_that_does_not_come_is_named[True-toy2]",
)
def a_late_node_finds_nothing(original):
    """A node that comes when the first has given up waits for it again."""
    import shutil

    return lambda folder: shutil.rmtree(folder)


@planted(
    "lorafusion.launch.judgement:judged",
    caught_by="tests/launch/test_judgement.py::test_a_rule_decides[a silent death]",
)
def who_was_killed_is_not_told(original):
    """That a process died without a word explains nothing."""
    from dataclasses import replace

    return lambda evidence: original(replace(evidence, died=None))


@planted(
    "lorafusion.lab.dag:node_rank",
    caught_by="tests/lab/test_dag.py::test_only_the_first_node_of_a_run_says_that_it_is_made",
)
def every_node_says_that_a_run_is_made(original):
    """A node that is not the first removes the result's key, and writes it."""
    return lambda environment: 0


@planted(
    "lorafusion.core.machine:_family",
    caught_by="tests/core/test_machine.py::test_a_run_knows_others_processes_on_the_gpus",
)
def a_run_takes_itself_for_another(original):
    """A run's own processes on a GPU are recorded as others'."""
    return lambda: []
