# Plans of every strategy, judged by the simulator: the entry of configs/planner.yaml with the suite's name. CPU only.
rule scheduler:
    input:
        SCHEDULER_RUNS,
        SCHEDULER_RESULTS,
    localrule: True


# One workload and number of stages in a fresh process. It holds the machine, as it measures how long planning takes.
rule scheduler_bench:
    output:
        ensure(
            f"{SCHEDULER_FOLDER}/runs/{{planned}}/repeat~{{repeat}}.json",
            non_empty=True,
        ),
    log:
        f"{LOGS}/scheduler_bench/{{planned}}/repeat~{{repeat}}.log",
    conda:
        "../../environment.yml"
    resources:
        runtime=SCHEDULER_SUITE.minutes + 5,
        mem_mb=4000,
        device=1,
    params:
        suite=SUITE.name,
        # Not in the command: a bench runs again when its configuration changes, and only then.
        configuration=lambda wildcards: key_of("planner", wildcards.planned),
    shell:
        "lorafusion scheduler measure --suite {params.suite:q} --bench {wildcards.planned:q}"
        " --repeat {wildcards.repeat} --out {output:q} --log {log:q} > {log:q} 2>&1"


rule scheduler_measurements:
    input:
        SCHEDULER_RUNS,
    output:
        csv=report(
            f"{SCHEDULER_FOLDER}/measurements.csv",
            caption="../report/measurements.rst",
            category="Measurements",
            labels={"content": "scheduler: every number (CSV)"},
        ),
        parquet=f"{SCHEDULER_FOLDER}/measurements.parquet",
        store=f"{SCHEDULER_FOLDER}/measurements.results.jsonl.gz",
        seals=multiext(
            f"{SCHEDULER_FOLDER}/measurements", ".csv.sha256", ".parquet.sha256"
        ),
        schema=f"{SCHEDULER_FOLDER}/measurements.schema.json",
        html=report(
            f"{SCHEDULER_FOLDER}/measurements.html",
            caption="../report/measurements.rst",
            category="Measurements",
            labels={"content": "scheduler: medians and runs (page)"},
        ),
    log:
        f"{LOGS}/scheduler_measurements.log",
    localrule: True
    conda:
        "../../environment.yml"
    params:
        folder=subpath(output.csv, parent=True),
    shell:
        "lorafusion measurements {params.folder:q} {input:q} > {log:q} 2>&1"


rule scheduler_figures:
    input:
        f"{SCHEDULER_FOLDER}/measurements.csv",
    output:
        png=report(
            f"{RESULTS}/figures/{{scheduler_figure}}.png",
            caption="../report/scheduler.rst",
            category="Figures",
            labels={"content": "{scheduler_figure} (PNG)"},
        ),
        pdf=report(
            f"{RESULTS}/figures/{{scheduler_figure}}.pdf",
            caption="../report/scheduler.rst",
            category="Figures",
            labels={"content": "{scheduler_figure} (PDF)"},
        ),
        csv=f"{RESULTS}/figures/{{scheduler_figure}}.csv",
    log:
        f"{LOGS}/{{scheduler_figure}}.log",
    localrule: True
    conda:
        "../../environment.yml"
    params:
        stem=subpath(output.png, strip_suffix=".png"),
    shell:
        "lorafusion figure {wildcards.scheduler_figure} {input:q} --out {params.stem:q} > {log:q} 2>&1"
