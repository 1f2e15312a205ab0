"""One command for everything on this machine: the workflow, its report, and a short table at the end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from lorafusion.config import CONFIGS, read_suite, suite_path
from lorafusion.errors import UserError

ROOT = CONFIGS.parent


def reproduce(suite: str | None) -> int:
    """Run the workflow, make the report where anything changed, show the summary; returns the exit status."""
    path = suite_path(suite)
    name = read_suite(path).name
    results = ROOT / "results" / name
    snakemake = [
        sys.executable, "-m", "snakemake",
        "--profile", str(ROOT / "workflow" / "profiles" / "local"),
        "--config", f"suite={path}",
    ]  # fmt: skip
    report = results / "report.html"
    if report.exists() and _up_to_date(snakemake):
        print(f"Nothing to do: the results of suite {name} are up to date.")
    else:
        status = subprocess.run(snakemake, cwd=ROOT, check=False).returncode
        if status:
            print(
                f"error: the workflow of suite {name} did not finish; run the same command again to resume",
                file=sys.stderr,
            )
            return status
        status = subprocess.run([*snakemake, "--report", str(report)], cwd=ROOT, check=False).returncode
        if status:
            return status
    show_summary(suite)
    return 0


def show_summary(suite: str | None) -> None:
    """Print a suite's results; raises `UserError` where there are none yet."""
    from lorafusion.measure.table import read
    from lorafusion.report.summary import print_summary

    folder = Path("results") / read_suite(suite_path(suite)).name
    table = ROOT / folder / "measurements.csv"
    if not table.exists():
        raise UserError(f"{table}: no results yet; run `make reproduce`")
    print_summary(read(table), folder / "report.html")


def _up_to_date(snakemake: list[str]) -> bool:
    """Would the workflow have nothing to do?"""
    dry = subprocess.run([*snakemake, "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=False)
    return dry.returncode == 0 and "Nothing to be done" in dry.stdout + dry.stderr
