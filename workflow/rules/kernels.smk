# LoRA linears and decoder layers in every implementation: the entry of configs/kernels.yaml with the suite's name.
rule kernels:
    input:
        f"{KERNEL_FOLDER}/build.csv",
        KERNEL_VERDICTS,
        KERNEL_RESULTS,
    localrule: True


# Needs no GPU, but holds the machine: its compilers would disturb a measurement's clock. A build with a problem, such
# as a spill, fails the rule, and the log names it.
rule build_kernels:
    output:
        f"{KERNEL_FOLDER}/build.csv",
    log:
        f"{LOGS}/build_kernels.log",
    conda:
        "../../environment.yml"
    threads: 4
    resources:
        runtime=15,
        mem_mb=8000,
        device=1,
    shell:
        "python -m fused_lora.tools.build --jobs {threads} --out {output:q} > {log:q} 2>&1"


# No part of any other target: the kernels read kernels/fused_lora/tuned/<gpu>.json, which this does not replace.
rule tune:
    input:
        f"{KERNEL_FOLDER}/tuned.json",
    localrule: True


rule tune_kernels:
    output:
        f"{KERNEL_FOLDER}/tuned.json",
    log:
        f"{LOGS}/tune_kernels.log",
    conda:
        "../../environment.yml"
    threads: 8
    resources:
        runtime=120,
        mem_mb=32000,
        tasks_per_gpu=0,
        gres="gpu:1",
        device=1,
    shell:
        "python -m fused_lora.tools.tune --jobs {threads} --out {output:q} > {log:q} 2>&1"


rule check_kernels:
    output:
        f"{RESULTS}/checks/kernels.json",
    log:
        f"{LOGS}/check_kernels.log",
    conda:
        "../../environment.yml"
    resources:
        runtime=15,
        mem_mb=16000,
        tasks_per_gpu=0,
        gres=kernel_gres,
        device=1,
    params:
        suite=SUITE.name,
        # Not in the command: checked again when what is checked changes.
        configuration=KERNEL_SUITE.model_dump_json(
            include={"device", "dtype", "seed", "verify"}
        ),
    shell:
        "lorafusion check kernels --suite {params.suite:q} --out {output:q} > {log:q} 2>&1"


# One bench in a fresh process. A point that fails is a row that says so, and the workflow goes on.
rule kernel_bench:
    input:
        KERNEL_VERDICTS,
    output:
        ensure(f"{KERNEL_FOLDER}/runs/{{bench}}/repeat~{{repeat}}.json", non_empty=True),
    log:
        f"{LOGS}/kernel_bench/{{bench}}/repeat~{{repeat}}.log",
    priority: kernel_order
    conda:
        "../../environment.yml"
    resources:
        runtime=KERNEL_SUITE.minutes + 5,
        mem_mb=16000,
        tasks_per_gpu=0,
        gres=kernel_gres,
        device=1,
    params:
        suite=SUITE.name,
        # Not in the command: a bench runs again when its configuration changes, and only then.
        configuration=lambda wildcards: key_of("kernels", wildcards.bench),
    shell:
        "lorafusion kernels measure --suite {params.suite:q} --bench {wildcards.bench:q} --repeat {wildcards.repeat}"
        " --out {output:q} --log {log:q} > {log:q} 2>&1"


if KERNEL_SUITE.traffic:

    rule kernel_traffic:
        input:
            KERNEL_VERDICTS,
        output:
            ensure(f"{KERNEL_FOLDER}/runs/traffic.json", non_empty=True),
        log:
            f"{LOGS}/kernel_traffic.log",
        conda:
            "../../environment.yml"
        resources:
            # Five minutes for each program under ncu, at most.
            runtime=5 + 5 * len(KERNEL_SUITE.traffic.shapes),
            mem_mb=32000,
            tasks_per_gpu=0,
            gres=kernel_gres,
            device=1,
        params:
            suite=SUITE.name,
            configuration=key_of("kernels", "traffic"),
        shell:
            "lorafusion kernels traffic --suite {params.suite:q} --out {output:q} --log {log:q} > {log:q} 2>&1"


rule kernel_measurements:
    input:
        KERNEL_RUNS,
    output:
        csv=report(
            f"{KERNEL_FOLDER}/measurements.csv",
            caption="../report/measurements.rst",
            category="Measurements",
            labels={"content": "kernels: every number (CSV)"},
        ),
        parquet=f"{KERNEL_FOLDER}/measurements.parquet",
        store=f"{KERNEL_FOLDER}/measurements.results.jsonl.gz",
        seals=multiext(
            f"{KERNEL_FOLDER}/measurements", ".csv.sha256", ".parquet.sha256"
        ),
        schema=f"{KERNEL_FOLDER}/measurements.schema.json",
        html=report(
            f"{KERNEL_FOLDER}/measurements.html",
            caption="../report/measurements.rst",
            category="Measurements",
            labels={"content": "kernels: medians and runs (page)"},
        ),
    log:
        f"{LOGS}/kernel_measurements.log",
    localrule: True
    conda:
        "../../environment.yml"
    params:
        folder=subpath(output.csv, parent=True),
    shell:
        "lorafusion measurements {params.folder:q} {input:q} > {log:q} 2>&1"


rule kernel_figures:
    input:
        KERNEL_VERDICTS,
        table=f"{KERNEL_FOLDER}/measurements.csv",
    output:
        png=report(
            f"{RESULTS}/figures/{{figure}}.png",
            caption="../report/kernels.rst",
            category="Figures",
            labels={"content": "{figure} (PNG)"},
        ),
        pdf=report(
            f"{RESULTS}/figures/{{figure}}.pdf",
            caption="../report/kernels.rst",
            category="Figures",
            labels={"content": "{figure} (PDF)"},
        ),
        csv=f"{RESULTS}/figures/{{figure}}.csv",
    log:
        f"{LOGS}/{{figure}}.log",
    localrule: True
    conda:
        "../../environment.yml"
    params:
        checks=lambda wildcards: CHECKS,
        stem=subpath(output.png, strip_suffix=".png"),
    shell:
        "lorafusion figure {wildcards.figure} {input.table:q} --checks {params.checks:q} --out {params.stem:q}"
        " > {log:q} 2>&1"
