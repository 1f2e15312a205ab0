# Whole training steps in every implementation: the entry of configs/steps.yaml with the suite's name.
wildcard_constraints:
    trained="[A-Za-z0-9][A-Za-z0-9._-]*",


rule training:
    input:
        TRAINING_RUNS,
        TRAINING_RESULTS,
    localrule: True


# One bench in a fresh process. An implementation that fails is a row that says so, and the workflow goes on.
rule training_bench:
    input:
        KERNEL_VERDICTS,
    output:
        result=ensure(
            f"{TRAINING_FOLDER}/runs/{{trained}}/repeat~{{repeat}}.json",
            non_empty=True,
        ),
        profile=[
            f"{TRAINING_FOLDER}/runs/{{trained}}/repeat~{{repeat}}.profile.csv"
            for _ in TRAINING_PROFILES[:1]
        ],
        seals=[
            f"{TRAINING_FOLDER}/runs/{{trained}}/repeat~{{repeat}}.profile.csv.sha256"
            for _ in TRAINING_PROFILES[:1]
        ],
    log:
        f"{LOGS}/training_bench/{{trained}}/repeat~{{repeat}}.log",
    priority: training_order
    conda:
        "../../environment.yml"
    resources:
        runtime=TRAINING_SUITE.minutes + 5,
        mem_mb=16000,
        tasks_per_gpu=0,
        gres="gpu:1" if TRAINING_SUITE.device == "cuda" else "",
        device=1,
    params:
        suite=SUITE.name,
        # Not in the command: a bench runs again when its configuration changes, and only then.
        configuration=lambda wildcards: key_of("steps", wildcards.trained),
    shell:
        "lorafusion training measure --suite {params.suite:q} --bench {wildcards.trained:q}"
        " --repeat {wildcards.repeat} --out {output.result:q} --log {log:q} > {log:q} 2>&1"


rule training_measurements:
    input:
        TRAINING_RUNS,
    output:
        csv=report(
            f"{TRAINING_FOLDER}/measurements.csv",
            caption="../report/measurements.rst",
            category="Measurements",
            labels={"content": "training: every number (CSV)"},
        ),
        parquet=f"{TRAINING_FOLDER}/measurements.parquet",
        store=f"{TRAINING_FOLDER}/measurements.results.jsonl.gz",
        seals=multiext(
            f"{TRAINING_FOLDER}/measurements", ".csv.sha256", ".parquet.sha256"
        ),
        schema=f"{TRAINING_FOLDER}/measurements.schema.json",
        html=report(
            f"{TRAINING_FOLDER}/measurements.html",
            caption="../report/measurements.rst",
            category="Measurements",
            labels={"content": "training: medians and runs (page)"},
        ),
    log:
        f"{LOGS}/training_measurements.log",
    localrule: True
    conda:
        "../../environment.yml"
    params:
        folder=subpath(output.csv, parent=True),
    shell:
        "lorafusion measurements {params.folder:q} {input:q} > {log:q} 2>&1"


rule training_speed:
    input:
        TRAINING_VERDICTS,
        table=f"{TRAINING_FOLDER}/measurements.csv",
    output:
        png=report(
            f"{RESULTS}/figures/training_speed.png",
            caption="../report/training.rst",
            category="Figures",
            labels={"content": "training_speed (PNG)"},
        ),
        pdf=report(
            f"{RESULTS}/figures/training_speed.pdf",
            caption="../report/training.rst",
            category="Figures",
            labels={"content": "training_speed (PDF)"},
        ),
        csv=f"{RESULTS}/figures/training_speed.csv",
    log:
        f"{LOGS}/training_speed.log",
    localrule: True
    conda:
        "../../environment.yml"
    params:
        checks=lambda wildcards: CHECKS,
        stem=subpath(output.png, strip_suffix=".png"),
    shell:
        "lorafusion figure training_speed {input.table:q} --checks {params.checks:q} --out {params.stem:q} > {log:q} 2>&1"


if TRAINING_PROFILES:

    rule training_profile:
        input:
            TRAINING_PROFILES,
        output:
            png=report(
                f"{RESULTS}/figures/training_profile.png",
                caption="../report/training.rst",
                category="Figures",
                labels={"content": "training_profile (PNG)"},
            ),
            pdf=report(
                f"{RESULTS}/figures/training_profile.pdf",
                caption="../report/training.rst",
                category="Figures",
                labels={"content": "training_profile (PDF)"},
            ),
            csv=f"{RESULTS}/figures/training_profile.csv",
        log:
            f"{LOGS}/training_profile.log",
        localrule: True
        conda:
            "../../environment.yml"
        params:
            stem=subpath(output.png, strip_suffix=".png"),
        shell:
            "lorafusion figure training_profile {input:q} --out {params.stem:q} > {log:q} 2>&1"
