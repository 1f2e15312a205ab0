"""Compare what a suite's results say besides times with a record of them: python tools/compare_results.py --help.

A change that should change nothing is tried so: run the suite before it and `record`, run it after it and `compare`.
Compared are workloads and losses, plans but for their key, which names the planner's path, and all of a table that
neither a clock nor the memory of a process decides. A cell whose capacity was tuned by time is compared only where both
found the same capacity.
"""

import csv
import gzip
import json
from pathlib import Path
from typing import Annotated

import typer

from lorafusion.core.workload import content_hash

TIMED = {
    "time",
    "throughput",
    "throughput_padded",
    "frozen_throughput",
    "overhead",
    "speedup",
    "tflops",
    "solve_time",
    "peak_memory",
    "busy",
    "bubble",
    "host_idle",
    "neighbour_idle",
    "step_time",
    "host_time",
    "host",
    "wall",
    "device",
    "transfer_time",
}
IDENTITY = ("cell", "system", "implementation", "adapters", "tokens", "pass", "metric", "window", "repeat")
app = typer.Typer(help=__doc__, no_args_is_help=True)


def facts_of(folder: Path) -> dict[str, object]:
    """All that is compared, by what it is about."""
    paths = (folder / "workloads").rglob("*.json")
    workloads = {_name(folder, path): content_hash(path.read_text()) for path in paths}
    return workloads | _plans(folder) | _runs(folder) | _tables(folder) | _verdicts(folder)


def _plans(folder: Path) -> dict[str, object]:
    facts = {}
    for path in (folder / "plans").rglob("*.json"):
        plan = json.loads(path.read_text())
        plan.pop("key", None)
        facts[_name(folder, path)] = {"capacity": plan["capacity"], "hash": content_hash(plan)}
    return facts


def _runs(folder: Path) -> dict[str, object]:
    facts = {}
    for path in (folder / "runs").rglob("*.json"):
        result = json.loads(path.read_text())
        facts[_name(folder, path)] = {
            "capacity": result["cell"]["capacity"],
            "status": result["status"],
            "losses": result.get("losses"),
            "steps": result.get("steps"),
            "cost": result.get("cost"),
        }
    return facts


def _tables(folder: Path) -> dict[str, object]:
    """The rows of all tables. What is simulated depends on no clock."""
    facts = {}
    for path in folder.rglob("measurements.csv"):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                if row["metric"] not in TIMED or row["kind"] == "simulated":
                    name = " ".join(f"{key}={row.get(key, '')}" for key in IDENTITY)
                    capacity = row["capacity"] if "/system~" in row["cell"] else None
                    facts[f"table: {name}"] = {"capacity": capacity, "value": row["value"], "status": row["status"]}
    return facts


def _verdicts(folder: Path) -> dict[str, object]:
    """But that of the plans, which counts them: they are compared one by one, those of tuned cells aside."""
    paths = [path for path in (folder / "checks").glob("*.json") if path.stem != "plans"]
    verdicts = [json.loads(path.read_text()) for path in paths]
    return {
        f"check: {verdict['check']}": {key: verdict[key] for key in ("passed", "figures", "limits")}
        for verdict in verdicts
    }


def _name(folder: Path, path: Path) -> str:
    return str(path.relative_to(folder))


@app.command()
def record(folder: Path, out: Path) -> None:
    """Write what a suite's results say, as gzipped JSON: record results/smoke before.json.gz"""
    facts = facts_of(folder)
    out.write_bytes(gzip.compress(json.dumps(facts, sort_keys=True).encode(), mtime=0))
    print(f"{out}: {len(facts)} facts")


@app.command()
def compare(
    before: Path, folder: Path, tolerance: Annotated[float, typer.Option(help="relative, of a number")] = 0.0
) -> None:
    """Compare results with a record; 1 where they differ: compare before.json.gz results/smoke"""
    expected = json.loads(gzip.decompress(before.read_bytes()))
    # As JSON has them, so that both are compared in the same form.
    actual = json.loads(json.dumps(facts_of(folder)))
    if not actual:
        raise typer.BadParameter(f"{folder}: no results of a suite")
    elsewhere = {name for name in expected.keys() & actual.keys() if _tuned_apart(expected[name], actual[name])}
    different = [
        name
        for name in sorted(expected.keys() | actual.keys())
        if name not in elsewhere and not _equal(expected.get(name), actual.get(name), tolerance)
    ]
    for name in different:
        print(f"{name}: {str(expected.get(name))[:200]} became {str(actual.get(name))[:200]}")
    same = len(expected.keys() | actual.keys()) - len(different) - len(elsewhere)
    print(f"{same} equal, {len(different)} different, {len(elsewhere)} not compared: tuned to another capacity")
    raise typer.Exit(1 if different else 0)


def _tuned_apart(before: object, after: object) -> bool:
    return isinstance(before, dict) and isinstance(after, dict) and before.get("capacity") != after.get("capacity")


def _equal(before: object, after: object, tolerance: float) -> bool:
    if isinstance(before, dict) and isinstance(after, dict):
        return before.keys() == after.keys() and all(_equal(before[key], after[key], tolerance) for key in before)
    if isinstance(before, list) and isinstance(after, list):
        return len(before) == len(after) and all(map(_equal, before, after, [tolerance] * len(before)))
    if tolerance and isinstance(before, int | float) and isinstance(after, int | float):
        return abs(before - after) <= tolerance * max(abs(before), abs(after))
    return before == after


if __name__ == "__main__":
    app()
