# From result files to the table, and from the table to everything that is looked at.
rule measurements:
    input:
        [f"{RESULTS}/runs/{run}.json" for run in RUNS],
    output:
        csv=report(
            f"{RESULTS}/measurements.csv",
            caption="../report/measurements.rst",
            category="Measurements",
            labels={"content": "systems: every number (CSV)"},
        ),
        parquet=f"{RESULTS}/measurements.parquet",
        store=f"{RESULTS}/measurements.results.jsonl.gz",
        seals=multiext(f"{RESULTS}/measurements", ".csv.sha256", ".parquet.sha256"),
        schema=f"{RESULTS}/measurements.schema.json",
        html=report(
            f"{RESULTS}/measurements.html",
            caption="../report/measurements.rst",
            category="Measurements",
            labels={"content": "systems: medians and runs (page)"},
        ),
    log:
        f"{LOGS}/measurements.log",
    localrule: True
    conda:
        "../../environment.yml"
    params:
        folder=subpath(output.csv, parent=True),
        suite=SUITE_PATH,
    shell:
        "lorafusion measurements {params.folder:q} {input:q} --suite {params.suite:q} > {log:q} 2>&1"


rule checks:
    input:
        f"{RESULTS}/checks/plans.json",
        RUN_VERDICTS,
        KERNEL_VERDICTS,
    output:
        report(
            f"{RESULTS}/checks.html",
            caption="../report/checks.rst",
            category="Checks",
            labels={"content": "what the figures rest on (page)"},
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
            f"{RESULTS}/figures/end_to_end~{{model}}.png",
            caption="../report/end_to_end.rst",
            category="Figures",
            labels={"content": "end-to-end throughput, {model} (PNG)"},
        ),
        pdf=report(
            f"{RESULTS}/figures/end_to_end~{{model}}.pdf",
            caption="../report/end_to_end.rst",
            category="Figures",
            labels={"content": "end-to-end throughput, {model} (PDF)"},
        ),
        csv=f"{RESULTS}/figures/end_to_end~{{model}}.csv",
    log:
        f"{LOGS}/end_to_end~{{model}}.log",
    localrule: True
    conda:
        "../../environment.yml"
    params:
        checks=lambda wildcards: CHECKS,
        stem=subpath(output.png, strip_suffix=".png"),
    shell:
        "lorafusion figure end_to_end {input.table:q} --model {wildcards.model} --checks {params.checks:q}"
        " --out {params.stem:q} > {log:q} 2>&1"


rule contributions:
    input:
        table=f"{RESULTS}/measurements.csv",
        checks=f"{RESULTS}/checks.html",
    output:
        png=report(
            f"{RESULTS}/figures/contributions~{{model}}.png",
            caption="../report/contributions.rst",
            category="Figures",
            labels={"content": "what the parts of LoRAFusion add, {model} (PNG)"},
        ),
        pdf=report(
            f"{RESULTS}/figures/contributions~{{model}}.pdf",
            caption="../report/contributions.rst",
            category="Figures",
            labels={"content": "what the parts of LoRAFusion add, {model} (PDF)"},
        ),
        csv=report(
            f"{RESULTS}/figures/contributions~{{model}}.csv",
            caption="../report/contributions.rst",
            category="Figures",
            labels={"content": "what the parts of LoRAFusion add, {model} (CSV)"},
        ),
    log:
        f"{LOGS}/contributions~{{model}}.log",
    localrule: True
    conda:
        "../../environment.yml"
    params:
        checks=lambda wildcards: CHECKS,
        stem=subpath(output.png, strip_suffix=".png"),
    shell:
        "lorafusion figure contributions {input.table:q} --model {wildcards.model} --checks {params.checks:q}"
        " --out {params.stem:q} > {log:q} 2>&1"


rule system_profile:
    input:
        [f"{RESULTS}/profiles/{name}.csv" for name in PROFILED],
    output:
        png=report(
            f"{RESULTS}/figures/system_profile.png",
            caption="../report/system_profile.rst",
            category="Figures",
            labels={"content": "what the GPU does with each system (PNG)"},
        ),
        pdf=f"{RESULTS}/figures/system_profile.pdf",
        csv=f"{RESULTS}/figures/system_profile.csv",
    log:
        f"{LOGS}/system_profile.log",
    localrule: True
    conda:
        "../../environment.yml"
    params:
        stem=subpath(output.png, strip_suffix=".png"),
    shell:
        "lorafusion figure system_profile {input:q} --out {params.stem:q} > {log:q} 2>&1"


rule tunings:
    input:
        lambda wildcards: [
            f"{RESULTS}/tuned/{name}.json" for name in TUNED[wildcards.model]
        ],
    output:
        png=report(
            f"{RESULTS}/figures/tunings~{{model}}.png",
            caption="../report/tunings.rst",
            category="Figures",
            labels={"content": "capacities that were tried, {model} (PNG)"},
        ),
        pdf=f"{RESULTS}/figures/tunings~{{model}}.pdf",
        csv=f"{RESULTS}/figures/tunings~{{model}}.csv",
    log:
        f"{LOGS}/tunings~{{model}}.log",
    localrule: True
    conda:
        "../../environment.yml"
    params:
        stem=subpath(output.png, strip_suffix=".png"),
    shell:
        "lorafusion figure tunings {input:q} --model {wildcards.model} --out {params.stem:q} > {log:q} 2>&1"


rule publish:
    input:
        table=f"{RESULTS}/measurements.csv",
        figures=[
            *[f"{RESULTS}/figures/end_to_end~{model}.png" for model in MODELS],
            *[f"{RESULTS}/figures/contributions~{model}.png" for model in CONTRIBUTED],
        ],
        results=[f"{RESULTS}/runs/{run}.json" for run in RUNS],
    output:
        directory(f"{RESULTS}/wandb"),
    log:
        f"{LOGS}/publish.log",
    localrule: True
    conda:
        "../../environment.yml"
    params:
        figures=lambda wildcards, input: [f"--figure={path}" for path in input.figures],
    shell:
        "lorafusion publish {input.table:q} {input.results:q} {params.figures:q}"
        " --directory {output:q} > {log:q} 2>&1"
