# The whole workflow of a suite: plans, runs, checks, measurements, figures, report.
#   snakemake --cores all --profile slurm                        on Slurm
#   snakemake --profile workflow/profiles/local                  on this machine
# The suite is chosen by --config suite=NAME (a file of configs/suites, or a path); without it, the one that fits.
from snakemake.utils import min_version

min_version("9.25")


report: "workflow/report/workflow.rst"


include: "workflow/rules/common.smk"
include: "workflow/rules/plan.smk"
include: "workflow/rules/check.smk"
include: "workflow/rules/run.smk"
include: "workflow/rules/report.smk"


if KERNEL_SUITE:

    include: "workflow/rules/kernels.smk"


if SCHEDULER_SUITE:

    include: "workflow/rules/scheduler.smk"


if TRAINING_SUITE:

    include: "workflow/rules/training.smk"


rule all:
    default_target: True
    input:
        f"{RESULTS}/measurements.csv",
        f"{RESULTS}/measurements.html",
        f"{RESULTS}/checks.html",
        [f"{RESULTS}/figures/end_to_end~{model}.png" for model in MODELS],
        [f"{RESULTS}/figures/contributions~{model}.png" for model in CONTRIBUTED],
        f"{RESULTS}/wandb",
        KERNEL_RESULTS,
        SCHEDULER_RESULTS,
        TRAINING_RESULTS,
        f"{RESULTS}/figures/lossless.png",
        [f"{RESULTS}/figures/system_profile.png"] if PROFILED else [],
        [f"{RESULTS}/figures/tunings~{model}.png" for model in TUNED],
    localrule: True


# The report needs the finished run, so it is no rule. Where nothing was to be done, it is there already. A target such
# as `kernels` can succeed before the rest of the suite was run: then there is no report yet.
onsuccess:
    if all(Path(path).exists() for path in rules.all.input):
        shell(
            f"{sys.executable} -m snakemake --snakefile '{workflow.main_snakefile}' --cores 1 --nolock --quiet all"
            f" --config 'suite={SUITE_PATH}' --report '{RESULTS}/report.html'"
            f" --report-stylesheet '{Path(workflow.main_snakefile).parent}/workflow/report/phone.css'"
        )
        print(f"report: {RESULTS}/report.html")
