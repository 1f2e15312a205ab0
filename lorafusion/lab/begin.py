"""What comes before the first step of a workflow: which suite it is, and whether its steps can be made here."""

import atexit
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lorafusion.core.machine import has_gpu
from lorafusion.core.schema import UserError
from lorafusion.lab.cluster.admission import require_admitted
from lorafusion.lab.cluster.preflight import check_nodes_first
from lorafusion.lab.cluster.watch import watch
from lorafusion.lab.dag import Dag
from lorafusion.lab.driver import driving, is_driven, join_driver
from lorafusion.lab.steps import dag_of
from lorafusion.lab.submission import TARGETS, Submission, without_made


def dag_of_config(config: dict[str, Any]) -> Dag:
    """The steps of the suite that Snakemake's `--config` chooses. What it says and what the captions of the report need
    are in the configuration then."""
    unknown = sorted(set(config) - {"suite", "folder", "again", "suite_name"})
    if unknown:  # a misspelt key would otherwise be ignored
        raise UserError(f"--config: unknown key {unknown[0]!r}; known: suite, folder, again")
    again = str(config.get("again", False)).lower()  # Snakemake takes `true` for a word
    if again not in ("true", "false"):
        raise UserError(f"--config: again: expected true or false, found {config['again']!r}")
    if is_driven():
        join_driver()
    folder = config.get("folder")
    dag = dag_of(config.get("suite") or os.environ.get("LORAFUSION_SUITE"), Path(str(folder)) if folder else None)
    if is_driven() and "SLURM_RESTART_COUNT" in os.environ and TARGETS in sys.orig_argv:
        go_on(without_made(sys.orig_argv, dag))
    config |= {"again": again == "true", "suite_name": dag.name}
    return dag


def go_on(words: Sequence[str]) -> None:
    """Replace this process, a job's Snakemake, by one of fewer steps, or end it well where none is left."""
    words = words or ["true"]
    if words != sys.orig_argv:
        os.execvp(words[0], words)


def begin(dag: Dag, driver: ExitStack, submission: Submission | None, is_local: bool) -> None:
    """Take the folder of a suite's results, and see that this machine or the cluster can run the steps; raises
    `UserError` where not. driver: gives the folder back when it is closed. submission: to Slurm, if there is one;
    is_local: no executor places the steps elsewhere."""
    if is_local and any(step.resources.gpus for step in dag.of_target("all")) and not has_gpu():
        raise UserError(f"{dag.suite}: a suite for GPUs, but nvidia-smi finds none; try suite=smoke or Slurm")
    if submission:
        require_admitted(submission.jobs, submission.settings)
    run = submission.run if submission else ""
    atexit.register(driver.close)  # some errors call no handler of Snakemake's
    if driver.enter_context(driving(dag.folder, f"workflow of suite {dag.name}", slurm_run=run)):
        # The jobs that had to end took files with them: what is to be done is not what was planned.
        driver.close()
        print("starting anew", flush=True)
        os.execv(sys.executable, sys.orig_argv)
    if submission:
        watch(submission.executor, dag.folder)
        check_nodes_first(dag.folder, [step.resources for step in dag.of_target("all")], run)
        submission.settings.efficiency_report_path = dag.folder
