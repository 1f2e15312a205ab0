"""Small tables of made-up runs, with the values of real ones in miniature."""

from __future__ import annotations

import pytest

from lorafusion.lab.checks.catalog import CHECKS
from lorafusion.lab.checks.verdicts import Origin, Verdict, write_verdict
from lorafusion.lab.table import table
from tests.lab.report.speeds import SPEEDS as SPEEDS_OF_PARTS

SPEEDS = {"peft": 800.0, "megatron-fsdp": 850.0, "megatron-pp": 900.0, "mlora": 1100.0, "lorafusion": 1430.0}


def run(system="lorafusion", workload="xsum", gpus=1, repeat=1, status="ok", gpu=None, speed=None, **cell) -> dict:
    """The content of a result file: throughput in both windows and a canary; `cell` changes fields of the cell."""
    speed = (speed or SPEEDS.get(system, 1000.0)) * gpus + 7.0 * repeat + len(workload)
    metrics = [
        {"metric": "throughput", "value": value, "unit": "tok/s", "direction": "higher", "window": window}
        for window, value in (("whole", speed), ("steady", 1.1 * speed))
    ]
    canary = {"metric": "time", "value": 1e-3, "unit": "s", "direction": "lower", "window": "steady"}
    metrics.append(canary | {"implementation": "canary-gemm"})
    name = f"model~{cell.get('model', 'tiny')}/workload~{workload}/gpus~{gpus}/batch~{cell.get('global_batch', 8)}"
    fields = {
        "suite": "smoke",
        "kind": "measured",
        "cell": f"{name}/system~{system}",
        "system": system,
        "model": "tiny",
        "workload": workload,
        "gpus": gpus,
        "repeat": repeat,
        "implementation": "fused",
        "global_batch": 8,
        "merged_qkv": False,
    }
    return {
        "version": 1,
        "status": status,
        "note": "" if status == "ok" else "it went wrong",
        "cell": fields | cell,
        "expected": [{"metric": "throughput", "window": window} for window in ("whole", "steady")],
        "metrics": metrics if status == "ok" else [],
        "losses": {"adapter-0": [3.5, 3.0 + repeat / 10, 2.5], "adapter-1": [3.25, None]} if status == "ok" else {},
        "provenance": {
            "git_sha": "0123456789abcdef",
            "git_dirty": False,
            "config_hash": "0123456789abcdef",
            "gpu_name": gpu,
            "started_at": f"2025-01-01T00:00:0{repeat}",
            "python": "3.11.2",
            "log": f"logs/{system}-{repeat}.log",
        },
    }


def tabulate(results: list[dict]):
    """The summarised table of results."""
    rows = []
    for result in results:
        cell = result["cell"]
        rows += table.rows_of_result(result, f"results/{cell['system']}-{cell['workload']}-{cell['repeat']}.json")
    return table.summarise(table.frame(rows))


@pytest.fixture(name="make_run")
def _make_run():
    return run


@pytest.fixture(name="make_table")
def _make_table():
    return tabulate


@pytest.fixture
def passed_checks():
    """Writes to a folder what figures of a table ask for: passed verdicts about its suite, device and systems."""

    def write(folder, made) -> None:
        suite, gpus = made["suite"].iloc[0], made["gpu_name"].dropna().unique()
        origin = Origin(
            suite=suite, device="cuda" if len(gpus) else "cpu", dtype="float32", gpu_name=next(iter(gpus), None)
        )
        figures = {f"{system} as 1x1: of a tensor": 0.0 for system in made["system"].dropna().unique()}
        for name in CHECKS:
            write_verdict(
                Verdict(check=name, passed=True, statement="", figures=figures), origin, folder / f"{name}.json"
            )

    return write


@pytest.fixture
def smoke_runs():
    """Two repeats of four systems on one to four processes, peft on one only; three cells fail, one is missing."""
    runs = []
    for repeat in (1, 2):
        for workload in ("xsum", "heterogeneous"):
            runs.append(run("peft", workload, 1, repeat, "oom" if workload == "xsum" else "ok"))
            for gpus in (1, 2):
                runs.append(run("lorafusion", workload, gpus, repeat))
                runs.append(run("mlora", workload, gpus, repeat, "timeout" if (gpus, repeat) == (2, 2) else "ok"))
                if (workload, gpus) != ("xsum", 2):
                    runs.append(run("megatron-pp", workload, gpus, repeat))
        for system in ("lorafusion", "mlora"):
            runs.append(run(system, "heterogeneous", 4, repeat))
    return runs


@pytest.fixture
def measure(make_run):
    """Runs with exactly the given speeds, in tokens/s.

    drift: factors of the repeats. failed: status by (workload, system, repeat).
    """

    def runs(
        speeds=SPEEDS_OF_PARTS, workloads=("xsum",), drift=(1.0, 1.0, 1.0), failed=None, qkv="", **cell
    ) -> list[dict]:
        out = []
        for workload in workloads:
            for system, speed in speeds.items():
                for repeat, factor in enumerate(drift, start=1):
                    status = (failed or {}).get((workload, system, repeat), "ok")
                    name = f"model~tiny/workload~{workload}/gpus~{cell.get('gpus', 1)}/batch~8{qkv}/system~{system}"
                    result = make_run(
                        system, workload, repeat=repeat, status=status, **{"cell": name, "merged_qkv": bool(qkv)} | cell
                    )
                    for metric, value in zip(result["metrics"], (speed * factor, 10 * speed), strict=False):
                        metric["value"] = value
                    out.append(result)
        return out

    return runs
