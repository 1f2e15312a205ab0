# From result files to the table, and from the table to everything that is looked at.
rule measurements:
    input:
        [f"{RESULTS}/runs/{run}.json" for run in RUNS],
    output:
        csv=report(
            f"{RESULTS}/measurements.csv",
            caption="../report/measurements.rst",
            category="Measurements",
            labels={"content": "every number", "form": "CSV"},
        ),
        parquet=f"{RESULTS}/measurements.parquet",
        schema=f"{RESULTS}/measurements.schema.json",
        html=report(
            f"{RESULTS}/measurements.html",
            caption="../report/measurements.rst",
            category="Measurements",
            labels={
                "content": "medians and runs, with log, command and commit",
                "form": "page",
            },
        ),
    log:
        f"{LOGS}/measurements.log",
    localrule: True
    conda:
        "../../environment.yml"
    params:
        folder=RESULTS,
    shell:
        "lorafusion measurements {params.folder:q} {input:q} > {log:q} 2>&1"


rule checks:
    input:
        f"{RESULTS}/checks/plans.json",
        [
            f"{RESULTS}/checks/lossless-{stages}.json"
            for stages in SUITE.checks.lossless_stages
        ],
        [f"{RESULTS}/checks/learning.json"] if SUITE.checks.learning else [],
    output:
        report(
            f"{RESULTS}/checks.html",
            caption="../report/checks.rst",
            category="Checks",
            labels={"content": "what the figures rest on", "form": "page"},
        ),
    log:
        f"{LOGS}/checks.log",
    localrule: True
    conda:
        "../../environment.yml"
    shell:
        "lorafusion page checks {input:q} --out {output:q} > {log:q} 2>&1"


rule end_to_end:
    input:
        table=f"{RESULTS}/measurements.csv",
        checks=f"{RESULTS}/checks.html",
    output:
        png=report(
            f"{RESULTS}/figures/end_to_end.png",
            caption="../report/end_to_end.rst",
            category="Figures",
            labels={"content": "end-to-end throughput", "form": "PNG"},
        ),
        pdf=report(
            f"{RESULTS}/figures/end_to_end.pdf",
            caption="../report/end_to_end.rst",
            category="Figures",
            labels={"content": "end-to-end throughput", "form": "PDF"},
        ),
        csv=f"{RESULTS}/figures/end_to_end.csv",
    log:
        f"{LOGS}/end_to_end.log",
    localrule: True
    conda:
        "../../environment.yml"
    params:
        stem=f"{RESULTS}/figures/end_to_end",
    shell:
        "lorafusion figure end_to_end {input.table:q} --out {params.stem:q} > {log:q} 2>&1"


rule publish:
    input:
        table=f"{RESULTS}/measurements.csv",
        figure=f"{RESULTS}/figures/end_to_end.png",
        results=[f"{RESULTS}/runs/{run}.json" for run in RUNS],
    output:
        f"{RESULTS}/wandb/runs.json",
    log:
        f"{LOGS}/publish.log",
    localrule: True
    conda:
        "../../environment.yml"
    params:
        folder=f"{RESULTS}/wandb",
    shell:
        "lorafusion publish {input.table:q} {input.results:q} --figure {input.figure:q}"
        " --directory {params.folder:q} > {log:q} 2>&1"
