# Sample lengths to workloads to plans: pure Python, in seconds, the same bytes everywhere.
rule workload:
    input:
        config=lambda wildcards: CONFIGS
        / "workloads"
        / f"{WORKLOADS[wildcards.shared].workload}.yaml",
        lengths=f"{WORKLOAD_CONFIGS}/lengths.csv",
    output:
        f"{RESULTS}/workloads/{{shared}}.json",
    log:
        f"{LOGS}/workload/{{shared}}.log",
    localrule: True
    conda:
        "../../environment.yml"
    params:
        samples=lambda wildcards: WORKLOADS[wildcards.shared].grid.samples,
        global_batch=lambda wildcards: WORKLOADS[wildcards.shared].grid.global_batch,
        length_scale=lambda wildcards: WORKLOADS[wildcards.shared].grid.length_scale,
        seed=SUITE.seed,
        merged=lambda wildcards: (
            "--merged-qkv" if WORKLOADS[wildcards.shared].grid.merged_qkv else ""
        ),
    shell:
        "lorafusion workload {input.config:q} --samples {params.samples}"
        " --global-batch {params.global_batch} --length-scale {params.length_scale}"
        " --seed {params.seed} {params.merged} --out {output:q} > {log:q} 2>&1"


rule plan:
    input:
        lambda wildcards: f"{RESULTS}/workloads/{cell_of(wildcards).workload_name}.json",
    output:
        f"{RESULTS}/plans/{{cell}}.json",
    log:
        f"{LOGS}/plan/{{cell}}.log",
    localrule: True
    conda:
        "../../environment.yml"
    params:
        system=lambda wildcards: cell_of(wildcards).system,
        planner=lambda wildcards: SYSTEMS[cell_of(wildcards).system].planner,
        stages=lambda wildcards: cell_of(wildcards).stages,
        capacity=lambda wildcards: cell_of(wildcards).grid.capacity_of(
            cell_of(wildcards).workload
        ),
    shell:
        "lorafusion plan {input:q} --system {params.system} --stages {params.stages}"
        " --capacity {params.capacity} --out {output:q} > {log:q} 2>&1"
