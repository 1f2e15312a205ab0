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
    shell:
        "lorafusion check plans {input.plans:q} {params.workloads:q} --out {output:q} > {log:q} 2>&1"


rule check_lossless:
    output:
        f"{RESULTS}/checks/lossless-{{stages}}.json",
    log:
        f"{LOGS}/check_lossless/{{stages}}.log",
    conda:
        "../../environment.yml"
    resources:
        runtime=10,
        mem_mb=lambda wildcards: 2000 * int(wildcards.stages),
        cpus_per_task=lambda wildcards: int(wildcards.stages),
        device=1,
    shell:
        "lorafusion check lossless --stages {wildcards.stages} --out {output:q} > {log:q} 2>&1"


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
        device=1,
    shell:
        "lorafusion check learning --out {output:q} > {log:q} 2>&1"
