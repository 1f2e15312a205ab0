"""What comes before the first step of a workflow."""

from __future__ import annotations

import atexit
import os
import sys
from contextlib import ExitStack

from lorafusion.core.machine import has_gpu
from lorafusion.core.schema import UserError
from lorafusion.lab.cluster.admission import require_admitted
from lorafusion.lab.cluster.preflight import check_nodes_first
from lorafusion.lab.cluster.watch import watch
from lorafusion.lab.dag import Dag
from lorafusion.lab.driver import driving
from lorafusion.lab.submission import Submission


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
