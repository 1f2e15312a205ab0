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
        # Not in the command: drawn again when anything that it is made of changes.
        content=workload_hash,
    shell:
        "lorafusion workload {input.config:q} --samples {params.samples}"
        " --global-batch {params.global_batch} --length-scale {params.length_scale}"
        " --seed {params.seed} {params.merged} --out {output:q} > {log:q} 2>&1"


rule plan:
    input:
        workload=lambda wildcards: f"{RESULTS}/workloads/{cell_of(wildcards).workload_name}.json",
        tuned=tuned,
    output:
        f"{RESULTS}/plans/{{cell}}.json",
    log:
        f"{LOGS}/plan/{{cell}}.log",
    localrule: True
    conda:
        "../../environment.yml"
    params:
        system=lambda wildcards: cell_of(wildcards).system,
        # Not in the command: planned again when the planner or its options change.
        planner=lambda wildcards: SYSTEMS[cell_of(wildcards).system].model_dump_json(
            include={"planner", "options"}
        ),
        stages=lambda wildcards: cell_of(wildcards).stages,
        replicas=lambda wildcards: cell_of(wildcards).grid.data_parallel,
        capacity=lambda wildcards, input: (
            f"--tuned={input.tuned}"
            if input.tuned
            else f"--capacity={cell_of(wildcards).grid.capacity_of(cell_of(wildcards).workload)}"
        ),
    shell:
        "lorafusion plan {input.workload:q} --system {params.system} --stages {params.stages}"
        " --data-parallel {params.replicas} {params.capacity:q} --out {output:q} > {log:q} 2>&1"


# Runs the first global batches of a cell with ever fewer tokens a microbatch, in fresh processes.
rule tune_cell:
    input:
        lambda wildcards: f"{RESULTS}/workloads/{cell_of(wildcards).workload_name}.json",
    output:
        f"{RESULTS}/tuned/{{cell}}.json",
    log:
        f"{LOGS}/tune/{{cell}}.log",
    conda:
        "../../environment.yml"
    resources:
        **CELL_RESOURCES,
    params:
        suite=SUITE_PATH,
        configuration=configuration,
    shell:
        "lorafusion tune --suite {params.suite:q} --cell {wildcards.cell:q} --workload {input:q} --out {output:q}"
        " > {log:q} 2>&1"
