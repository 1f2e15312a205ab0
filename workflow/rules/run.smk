# One run of one cell in fresh processes. A run that fails is a result too: its status is in its file, and the
# workflow goes on.
rule run:
    input:
        workload=lambda wildcards: f"{RESULTS}/workloads/{cell_of(wildcards).workload_name}.json",
        plan=lambda wildcards: (
            f"{RESULTS}/plans/{wildcards.cell}.json"
            if wildcards.cell in PLANNED
            else []
        ),
        tuned=tuned,
    output:
        ensure(f"{RESULTS}/runs/{{cell}}/repeat~{{repeat}}.json", non_empty=True),
    log:
        f"{LOGS}/run/{{cell}}/repeat~{{repeat}}.log",
    priority: order
    conda:
        "../../environment.yml"
    resources:
        **CELL_RESOURCES,
        nodes=nodes_of,
        tasks=nodes_of,
        mpi=launcher,
    params:
        suite=SUITE_PATH,
        plan=lambda wildcards, input: f"--plan={input.plan}" if input.plan else "",
        tuned=tuned_option,
        # Not in the command: a cell runs again when its configuration changes, and only then.
        configuration=configuration,
    shell:
        "{resources.mpi} lorafusion run --suite {params.suite:q} --cell {wildcards.cell:q}"
        " --repeat {wildcards.repeat} --nodes {resources.nodes} --workload {input.workload:q} {params.plan:q}"
        " {params.tuned:q} --out {output:q} --log {log:q} > {log:q} 2>&1"


# The first global batches of a cell under a profiler, which takes the time of nothing that is measured elsewhere.
rule profile:
    input:
        workload=lambda wildcards: f"{RESULTS}/workloads/{cell_of(wildcards).workload_name}.json",
        plan=f"{RESULTS}/plans/{{cell}}.json",
        tuned=tuned,
    output:
        csv=f"{RESULTS}/profiles/{{cell}}.csv",
        seal=f"{RESULTS}/profiles/{{cell}}.csv.sha256",
    log:
        f"{LOGS}/profile/{{cell}}.log",
    conda:
        "../../environment.yml"
    resources:
        **CELL_RESOURCES,
    params:
        suite=SUITE_PATH,
        tuned=tuned_option,
        configuration=configuration,
    shell:
        "lorafusion profile --suite {params.suite:q} --cell {wildcards.cell:q} --workload {input.workload:q}"
        " --plan {input.plan:q} {params.tuned:q} --out {output.csv:q} > {log:q} 2>&1"
