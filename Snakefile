# The whole workflow of a suite: plans, runs, checks, measurements, figures, report.
#   snakemake --cores all --profile slurm                        on Slurm
#   snakemake --profile workflow/profiles/local                  on this machine
# The suite is chosen by --config suite=NAME (a file of configs/suites, or a path); without it, the one that fits.
#
# lorafusion/lab/steps.py lists the steps of a suite: what is made from what, and what each depends on. Here is a rule
# for each kind of steps and for each target. A rule makes one step, by its main output.
import os
import re
import shlex
import sys
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.utils import min_version

from lorafusion.core.schema import UserError
from lorafusion.lab.begin import begin, dag_of_config
from lorafusion.lab.cluster.request import request_of
from lorafusion.lab.cluster.site import read_site
from lorafusion.lab.driver import is_driven
from lorafusion.lab.failures import accidents, statement, unmade
from lorafusion.lab.reproduce import again_command, failures_of, write_report
from lorafusion.lab.submission import share_jobs, submission_of

min_version("9.25")


report: "workflow/report/workflow.rst"


include: "workflow/common.smk"


# The workflow's own Python, also where the environment was not activated and inside Slurm jobs.
# A job that Slurm requeues is another attempt (lorafusion/launch/rendezvous.py).
PROGRAMS = shlex.quote(str(Path(sys.executable).parent))
BEFORE = SITE.shell if "SLURM_JOB_ID" in os.environ else ""
PATHS = f"export PATH={PROGRAMS}:$PATH LORAFUSION_ATTEMPT=$(date +%s%N)"
shell.prefix(braced(f"{BEFORE}set -euo pipefail; {PATHS}; "))

for target in SUITE.targets:

    rule:
        name:
            target
        # All that it is made from, too: Snakemake would not miss the result of a run whose table is there.
        input:
            [path for step in SUITE.of_target(target) for path in step.files],
        localrule: True

    if FAILED:
        # With nothing to be done Snakemake calls no handler, which would say that runs failed. So there is something.
        workflow.get_rule(target).norun = False
        workflow.get_rule(target).shellcmd = "true"


for kind, steps in SUITE.kinds.items():

    rule:
        name:
            kind.name
        input:
            inputs_of(kind),
        output:
            **outputs_of(kind),
        log:
            f"{SUITE.folder}/{kind.log}",
        wildcard_constraints:
            name=names_of(kind),
        priority: of_step(kind, lambda step: step.priority)
        group:
            group_of(kind)
        localrule: kind.quick
        threads: threads_of(kind)
        resources:
            **resources_of(kind),
        params:
            suite=lambda wildcards: SUITE.suite,  # else what stands in braces is filled in
            # Not in the command: a step is made again when its key changes, and only then.
            key=of_step(kind, lambda step: step.key),
        shell:
            "{resources.mpi} lorafusion lab run {params.suite:q} --step {output.main:q} > {log:q} 2>&1"


workflow.default_target = "all"
