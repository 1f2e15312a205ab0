# What the figures rest on. A check that does not hold fails its rule, and no figure is drawn.
rule check_plans:
    input:
        plans=[f"{RESULTS}/plans/{name}.json" for name in PLANNED],
        workloads=[f"{RESULTS}/workloads/{name}.json" for name in WORKLOADS],
    output:
        f"{RESULTS}/checks/plans.json",
    log:
        f"{LOGS}/check_plans.log",
    localrule: True
    conda:
        "../../environment.yml"
    params:
        workloads=lambda wildcards, input: [
            f"--workload={path}" for path in input.workloads
        ],
        suite=SUITE_PATH,
    shell:
        "lorafusion check plans {input.plans:q} {params.workloads:q} --suite {params.suite:q} --out {output:q}"
        " > {log:q} 2>&1"


rule check_lossless:
    output:
        verdict=f"{RESULTS}/checks/lossless.json",
        curves=f"{RESULTS}/checks/lossless.csv",
        seal=f"{RESULTS}/checks/lossless.csv.sha256",
    log:
        f"{LOGS}/check_lossless.log",
    conda:
        "../../environment.yml"
    resources:
        runtime=15,
        mem_mb=2000 * LOSSLESS_PROCESSES,
        cpus_per_task=LOSSLESS_PROCESSES,
        gres=check_gres,
        device=1,
    params:
        suite=SUITE_PATH,
        # Not in the command: checked again when what is checked changes.
        configuration=content_hash(SUITE.checks.model_dump(mode="json")),
    shell:
        "lorafusion check lossless --suite {params.suite:q} --curves {output.curves:q} --out {output.verdict:q}"
        " > {log:q} 2>&1"


rule lossless:
    input:
        f"{RESULTS}/checks/lossless.csv",
    output:
        png=report(
            f"{RESULTS}/figures/lossless.png",
            caption="../report/lossless.rst",
            category="Checks",
            labels={"content": "losses lying on each other (PNG)"},
        ),
        pdf=f"{RESULTS}/figures/lossless.pdf",
        csv=f"{RESULTS}/figures/lossless.csv",
    log:
        f"{LOGS}/lossless.log",
    localrule: True
    conda:
        "../../environment.yml"
    params:
        stem=subpath(output.png, strip_suffix=".png"),
    shell:
        "lorafusion figure lossless {input:q} --out {params.stem:q} > {log:q} 2>&1"


rule check_systems:
    output:
        f"{RESULTS}/checks/{{check}}.json",
    log:
        f"{LOGS}/check_{{check}}.log",
    wildcard_constraints:
        check="systems|gradients",
    conda:
        "../../environment.yml"
    resources:
        runtime=30,
        mem_mb=2000 * LOSSLESS_PROCESSES,
        cpus_per_task=LOSSLESS_PROCESSES,
        gres=check_gres,
        device=1,
    params:
        suite=SUITE_PATH,
        # Not in the command: checked again when what is checked changes.
        configuration=content_hash(
            [SUITE.checks.model_dump(mode="json")]
            + [SYSTEMS[name].model_dump(mode="json") for name in COMPARED]
        ),
    shell:
        "lorafusion check {wildcards.check} --suite {params.suite:q} --out {output:q} > {log:q} 2>&1"


rule check_learning:
    output:
        f"{RESULTS}/checks/learning.json",
    log:
        f"{LOGS}/check_learning.log",
    conda:
        "../../environment.yml"
    resources:
        runtime=10,
        mem_mb=2000,
        gres=check_gres,
        device=1,
    params:
        suite=SUITE_PATH,
    shell:
        "lorafusion check learning --suite {params.suite:q} --out {output:q} > {log:q} 2>&1"
