"""What the benchmark suites write: rows in the table's words, and the result file of one process."""

from __future__ import annotations

import shlex
from pathlib import Path

from lorafusion.lab.table.result import VERSION, write_result
from lorafusion.lab.table.vocabulary import METRICS


def row(metric: str, value: float, window: str, cell: dict, **more: object) -> dict:
    """A number with the unit and the direction of its metric. cell: columns in which it differs from its file's."""
    unit, direction, _ = METRICS[metric]
    return {"metric": metric, "value": float(value), "unit": unit, "direction": direction, "window": window,
            "status": "ok", "cell": cell, **more}  # fmt: skip


def write_bench(
    out: Path,
    cell: dict,
    rows: list[dict],
    origin: dict,
    *,
    config_hash: str,
    seed: int,
    started: str,
    log: Path | None,
    command: list[object],
    bench: tuple[str, str, str] | None = None,
) -> None:
    """The result file of one process. origin: of `measure.environment.provenance`; started: when, in ISO 8601; command:
    the words after `lorafusion` that do this again; bench: the module with its kind's `current_hash`, its suite and its
    name."""
    told = {"config_hash": config_hash, "seed": seed, "started_at": started, "log": str(log) if log else None,
            "command": shlex.join(["lorafusion", *map(str, command)]), "bench": bench}  # fmt: skip
    write_result(
        out,
        {
            "version": VERSION,
            "status": "ok",
            "cell": cell,
            "expected": [],
            "metrics": rows,
            "provenance": origin | told,
        },
    )
