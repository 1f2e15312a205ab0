"""Reads the offline runs of a publication by wandb's own reader from its log files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from lorafusion.core.files import read_json
from lorafusion.core.schema import UserError
from lorafusion.core.wandb_runs import environment
from lorafusion.lab.report.wandb_publisher import MANIFEST


def read_back(directory: Path) -> dict[str, dict[str, Any]]:
    """What the offline runs of a publication hold, by id.

    Each has `config`, `summary`, `history` (lines without wandb's own fields), `name`, `group`, `job_type`, `tags`
    and `exit_code`. Raises `UserError` for a folder without a whole publication.
    """
    folder = directory.resolve()
    if not (folder / MANIFEST).is_file():
        raise UserError(f"{folder}: no {MANIFEST}, so no whole publication")
    runs = read_json(folder / MANIFEST, "publication")["runs"]
    return {run_id: _read_run(folder / entry["folder"], folder) for run_id, entry in runs.items()}


def _read_run(run: Path, folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(run)]
    with environment(folder, "offline"):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{run}: wandb cannot read it: {done.stderr}")
    out: dict[str, Any] = {"config": {}, "summary": {}, "history": [], "exit_code": None}
    for line in done.stdout.splitlines():
        record = json.loads(line)
        content = record.get(record["type"], {})
        if record["type"] == "run":
            out["config"] |= _without_fields_of_wandb(content["config"]["update"])
            out |= {"name": content["display_name"], "group": content["run_group"]}
            out |= {"job_type": content["job_type"], "tags": content["tags"]}
        elif record["type"] == "summary":
            out["summary"] |= _without_fields_of_wandb(content["update"])
        elif record["type"] == "history":
            out["history"].append(_without_fields_of_wandb(content["item"]))
        elif record["type"] == "exit":
            out["exit_code"] = content.get("exit_code", 0)
    return out


def _without_fields_of_wandb(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if not name.startswith("_")}
