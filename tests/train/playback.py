"""A small training whose processes' work is played back, so that what the command itself does can be tried often."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import yaml

from lorafusion.core.manifest import facts_of, write_sealed
from lorafusion.launch.outcome import Outcome
from lorafusion.train import export as exporting
from lorafusion.train import run as training

JOBS = [{"name": "short", "steps": 2, "seed": 1}, {"name": "long", "seed": 2}]
SETTINGS = {
    "model": "tiny", "output": "out", "capacity": 64, "save_every": 4, "keep": 100, "dtype": "float64",
    "defaults": {"data": {"synthetic": {"samples": 12, "dataset": "xsum", "scale": 32}}, "global_batch_size": 2,
                 "rank": 2, "target_modules": ["q_proj"]},
    "jobs": JOBS,
}  # fmt: skip
EXACT = ("adapter_model.safetensors", "adapter_config.json", "training.json")


def jobs_file(folder: Path, **changes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "jobs.yaml").write_text(yaml.safe_dump(SETTINGS | changes))
    return folder / "jobs.yaml"


def status(folder: Path) -> dict:
    return json.loads((folder / "out" / "status.json").read_text())


def files(folder: Path) -> dict[str, bytes]:
    """What a user has of a training: its rows and its adapters."""
    found = {f"{path.parent.name}/{path.name}": path for path in (folder / "out" / "adapters").glob("[!.]*/*")}
    kept = {name: path.read_bytes() for name, path in found.items() if path.name in EXACT}
    return kept | {"metrics": (folder / "out" / "metrics.jsonl").read_bytes()}


@contextmanager
def played(recorded: Path, look: Callable[[int], None] = lambda slot: None) -> Iterator[list]:
    """Within it runs are those of a recorded training: a checkpoint appears with the events before it, the launcher
    looks, then `look` is called, and so on. The list has the specs of those that were launched."""
    launched = []

    def launch(spec, processes, look_of_launcher, **_) -> Outcome:
        launched.append(spec)
        there = Path(spec.saving.folder)
        for slot in sorted((recorded / "out/runs/000/checkpoints").glob("slot-*")):
            facts = facts_of(slot)
            if not (there / slot.name).exists():
                for name, entry in facts["events"].items():
                    Path(spec.events).mkdir(exist_ok=True)
                    data = (recorded / "out/runs/000/events" / name).read_bytes()
                    (Path(spec.events) / name).write_bytes(data[: entry["size"]])
                shutil.copytree(slot, there / slot.name)
                write_sealed(there / "newest.json", {"slot": facts["slot"]})
            look_of_launcher()
            look(facts["slot"])
        return Outcome("ok", report={"finished": True})

    def launch_by_name(spec, processes, *, look, **options) -> Outcome:
        return launch(spec, processes, look, **options)

    def drawn(job, steps, path: Path) -> None:
        path.touch()

    with patch.object(training, "launch", launch_by_name), patch.object(exporting, "_draw", drawn):
        yield launched
