"""The workflow: what it plans to do, what it refuses, and a whole run of a small suite."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

from lorafusion.core.config import CONFIGS

ROOT = CONFIGS.parent
LOCAL = ["--profile", str(ROOT / "workflow" / "profiles" / "local")]


def snakemake(*arguments, cwd=ROOT, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "snakemake", *map(str, arguments)]
    return subprocess.run(command, text=True, capture_output=True, cwd=cwd, **options)


def planned_jobs(output: str) -> dict[str, int]:
    """The table of rules and their numbers of jobs that a dry run prints."""
    return {name: int(count) for name, count in re.findall(r"^(\w+) +(\d+)$", output, re.MULTILINE)}


@pytest.fixture
def checkout(tmp_path):
    """The workflow's own files in a folder of their own, so that results and .snakemake are its own. Its name and those
    of suites have what a shell takes apart."""
    folder = tmp_path / "a b's"
    folder.mkdir()
    for name in ("Snakefile", "workflow", "configs", "environment.yml"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    return folder


def small_suite(checkout: Path) -> Path:
    """Two cells of the smoke suite, of one process each."""
    data = yaml.safe_load((CONFIGS / "suites" / "smoke.yaml").read_text())
    block = data["cells"][0] | {"workloads": ["xsum"], "systems": ["lorafusion", "mlora"], "gpus": [1], "samples": 8}
    checks = {"lossless": ["1x1"]}
    suite = data | {"name": "small", "repeats": 1, "cells": [block], "checks": checks}
    path = checkout / "small {x}; $(touch PWNED).yaml"
    path.write_text(yaml.safe_dump(suite))
    return path


@pytest.mark.parametrize("gpus_per_node", ["4", "8"])
def test_the_papers_grid_passes_a_dry_run_without_slurm_and_without_a_gpu(checkout, gpus_per_node):
    done = snakemake(
        "--dry-run", "--cores", "all", "--profile", "slurm", "--config", "suite=paper-grid",
        cwd=_with_slurm_profile(checkout), env=os.environ | {"LORAFUSION_SLURM_GPUS_PER_NODE": gpus_per_node},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    jobs = planned_jobs(done.stdout + done.stderr)
    assert jobs["run"] == 261
    assert jobs["tune_cell"] == 81
    assert jobs["workload"] == 17
    assert jobs["end_to_end"] == 3
    assert not [name for name in jobs if "kernel" in name]


def _with_slurm_profile(checkout: Path) -> Path:
    shutil.copytree(ROOT / "slurm", checkout / "slurm")
    return checkout


def test_a_suite_with_kernels_measures_each_bench_in_each_repeat(checkout):
    """Two benches, twice. Ahead-of-time builds and tuning are no part of it."""
    done = snakemake("--dry-run", *LOCAL, "--config", "suite=smoke", cwd=checkout)
    assert done.returncode == 0, done.stderr
    jobs = planned_jobs(done.stdout + done.stderr)
    kernels = {name: count for name, count in jobs.items() if "kernel" in name or name == "tune"}
    assert kernels == {"check_kernels": 1, "kernels_bench": 4, "kernels_measurements": 1, "kernel_speed": 1}
    # Snakemake hands a rule's threads to OpenMP, and sums in other orders are other losses.
    assert "threads:" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "suite=nope",
            "unknown|no file configs/suites/nope.yaml|known suites: cpu-tiny, h200, h200-prompts, h200x2, paper-grid",
        ),
        ("suit=smoke", "error: --config: unknown key 'suit'; known: suite"),
    ],
)
def test_a_bad_setting_is_named(checkout, setting, message):
    done = snakemake("--dry-run", *LOCAL, "--config", setting, cwd=checkout)
    assert done.returncode != 0
    assert re.search(message, done.stdout + done.stderr)
    assert "Traceback" not in done.stdout + done.stderr


def test_a_gpu_suite_passes_a_dry_run_without_a_gpu(checkout):
    done = snakemake("--dry-run", *LOCAL, "--config", "suite=h200", cwd=checkout)
    assert done.returncode == 0, done.stderr
    assert planned_jobs(done.stdout + done.stderr)["run"] == 282


def test_a_gpu_suite_on_a_machine_without_a_gpu_is_refused_before_anything_runs(checkout):
    if shutil.which("nvidia-smi"):
        pytest.skip("this machine has a GPU")
    done = snakemake(*LOCAL, "--config", "suite=h200", cwd=checkout)
    assert done.returncode != 0
    assert "a suite for GPUs, but nvidia-smi finds none" in done.stdout + done.stderr
    assert not (checkout / "results").exists()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_workflow_runs_to_its_report_and_then_has_nothing_to_do(checkout):
    """What a kill on the way changes, tests/torture tries."""
    suite = small_suite(checkout)
    done = snakemake(*LOCAL, "--config", f"suite={suite}", cwd=checkout)
    assert done.returncode == 0, done.stdout + done.stderr
    results = checkout / "results" / "small"
    table = pd.read_csv(results / "measurements.csv")
    assert set(table["status"]) == {"ok"}
    assert table["cell"].nunique() == 2
    for name in ("report.html", "figures/end_to_end~tiny.png", "checks.html", "wandb/runs.json"):
        assert (results / name).stat().st_size > 0, name
    _assert_traceable(table, checkout)

    assert not list(checkout.rglob("*PWNED"))

    nothing = snakemake(*LOCAL, "--config", f"suite={suite}", "--dry-run", cwd=checkout)
    assert "Nothing to be done" in nothing.stdout + nothing.stderr
    _assert_failures_are_told_and_tried_again(sorted((results / "runs").rglob("repeat~*.json")), suite, checkout)


def _assert_failures_are_told_and_tried_again(runs: list[Path], suite: Path, checkout: Path) -> None:
    """Also where nothing is to be done, and only the one that another try may mend."""
    for path, status in zip(runs, ["crash", "oom"], strict=True):
        time_ns = path.stat().st_mtime_ns
        path.write_text(path.read_text().replace('"status": "ok"', f'"status": "{status}"', 1))
        os.utime(path, ns=(time_ns, time_ns))
    settings = [*LOCAL, "--config", f"suite={suite}"]
    done = snakemake(*settings, cwd=checkout)
    assert done.returncode == 1
    assert re.search(r"error: failed: .*/repeat~\d.json \(.*to try again: lorafusion lab run .* --again", done.stderr)
    assert "Traceback" not in done.stdout + done.stderr
    again = snakemake(*settings, "again=true", "--dry-run", cwd=checkout)
    assert planned_jobs(again.stdout + again.stderr)["run"] == 1
    assert f"output: {runs[0].relative_to(checkout)}" in again.stdout + again.stderr


def _assert_traceable(table: pd.DataFrame, checkout: Path) -> None:
    """Each single number names its result file, its log and its command, and they exist."""
    single = table[table["statistic"] == "single"]
    assert single["command"].str.startswith("lorafusion lab run ").all()
    for column in ("result", "log"):
        for name in single[column].unique():
            assert (checkout / name).exists(), f"{column} {name}"
