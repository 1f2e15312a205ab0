"""One command for everything on this machine: the workflow, its report, and a short table at the end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil

from lorafusion.core.config import CONFIGS
from lorafusion.core.plugins import import_extra
from lorafusion.core.schema import UserError
from lorafusion.core.source_tree import IS_CHECKOUT
from lorafusion.lab.suite import read_suite, suite_path

ROOT = CONFIGS.parent
SNAKEMAKE = [sys.executable, "-m", "snakemake"]


def reproduce(suite: str | None) -> int:
    """Run the workflow where anything is to be done, show the summary; returns the exit status."""
    require_workflow()
    path = suite_path(suite)
    name = read_suite(path).name
    results = ROOT / "results" / name
    snakemake = [*SNAKEMAKE, "--profile", str(ROOT / "workflow" / "profiles" / "local"), "--config", f"suite={path}"]
    report = results / "report.html"
    clear_interrupted_run(snakemake)
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
    show_summary(suite)
    return 0


def require_workflow() -> None:
    """Raise `UserError` where the workflow or what runs it is missing."""
    if not IS_CHECKOUT:
        raise UserError("the workflow: needs a checkout of the repository, which has its Snakefile")
    import_extra("snakemake", "lab", "the workflow")


def clear_interrupted_run(snakemake: list[str]) -> None:
    """End what a killed workflow left running here and take its lock away; a living workflow is an error."""
    here = [process for process in psutil.process_iter(["cmdline", "ppid"]) if _works_here(process)]
    if any("snakemake" in " ".join(process.info["cmdline"]) for process in here):
        raise UserError(f"{ROOT}: a workflow is running here already; wait for it, or stop it")
    orphans = [process for process in here if "lorafusion" in " ".join(process.info["cmdline"])]
    for process in orphans:
        print(f"Ending process {process.pid}, left by an interrupted run.")
        process.terminate()
    psutil.wait_procs(orphans, timeout=30)
    if any((ROOT / ".snakemake" / "locks").glob("*")):
        subprocess.run([*snakemake, "--unlock"], cwd=ROOT, capture_output=True, check=True)


def _works_here(process: psutil.Process) -> bool:
    """Does a process other than this one and its ancestors belong to a workflow of this checkout?

    `lab run --here` does not: a workflow starts `lab run --step`."""
    mine = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    command = " ".join(process.info["cmdline"] or [])
    is_step = "lorafusion lab run" in command and "--step" in command
    if process.pid in mine or not ("snakemake" in command or is_step):
        return False
    try:
        return Path(process.cwd()) == ROOT
    except psutil.Error:
        return False


def make_report(suite: str | None) -> None:
    """Write the report of a suite whose workflow has run."""
    require_workflow()
    name = read_suite(suite_path(suite)).name
    command = report_command(suite_path(suite), Path("results") / name, ROOT / "Snakefile")
    if subprocess.run(command, cwd=ROOT, check=False).returncode:
        raise UserError(
            f"results/{name}: the report could not be made; run `lorafusion reproduce --suite {name}` first"
        )
    print(f"results/{name}/report.html")


def report_command(suite: str | Path, folder: Path, snakefile: str | Path) -> list[str]:
    """The words that have Snakemake write report.html to the folder of a suite's results."""
    return [*SNAKEMAKE, "--snakefile", str(snakefile), "--cores", "1", "--nolock", "--quiet", "all",
            "--config", f"suite={suite}", "--report", f"{folder}/report.html",
            "--report-stylesheet", str(Path(snakefile).parent / "workflow" / "report" / "phone.css")]  # fmt: skip


def show_summary(suite: str | None) -> None:
    """Print a suite's results; raises `UserError` where there are none yet."""
    from lorafusion.lab.report.summary import print_summary
    from lorafusion.lab.table.table import read

    folder = Path("results") / read_suite(suite_path(suite)).name
    table = ROOT / folder / "measurements.csv"
    if not table.exists():
        raise UserError(f"{table}: no results yet; run `make reproduce`")
    print_summary(read(table), folder / "report.html")


def _up_to_date(snakemake: list[str]) -> bool:
    """Would the workflow have nothing to do?"""
    dry = subprocess.run([*snakemake, "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=False)
    return dry.returncode == 0 and "Nothing to be done" in dry.stdout + dry.stderr
