"""Liger's norms and activations in a stage: refused where they cannot run, and the same numbers where they can."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from lorafusion.core.config import read_model
from lorafusion.core.schema import UserError
from lorafusion.lab.experiments import EXPERIMENTS
from lorafusion.model.liger import use_liger
from lorafusion.model.stage import build_stage

SCRIPT = Path(__file__).with_name("liger_interpreted.py")
KERNELS = EXPERIMENTS["kernels"]
TINY = read_model("tiny")


def stage(device="cpu"):
    return build_stage(TINY, index=1, count=4, device=torch.device(device), dtype=torch.float32, seed=1)


def test_a_stage_on_a_cpu_is_refused():
    with pytest.raises(UserError, match="^liger: its kernels need a GPU, but the stage is on cpu$"):
        use_liger(stage())


def test_a_suite_for_cpus_is_refused(tmp_path, monkeypatch):
    data = yaml.safe_load(KERNELS.config.read_text())["smoke"]
    data["layers"][0]["liger"] = True
    path = tmp_path / "kernels.yaml"
    path.write_text(yaml.safe_dump({"smoke": data}))
    monkeypatch.setattr(KERNELS, "config", path)
    with pytest.raises(UserError, match=r"kernels.yaml: smoke: .*layers with `liger: true` need `device: cuda`"):
        KERNELS.entries()


def test_the_suite_for_gpus_has_it():
    assert all(block.liger for block in KERNELS.entry_of("h200").layers)


def test_nothing_imports_it_before_it_is_asked_for():
    code = (
        "import sys, lorafusion.cli.main, lorafusion.lab.experiments.kernel_times, lorafusion.model.liger, "
        "lorafusion.engine.worker;"
        "print([name for name in sys.modules if name.startswith('liger')])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_layer_computes_the_same_and_keeps_less():
    """In every implementation, twice in a row: what is written in place belongs to nobody else."""
    answer = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=True).stdout
    found = {row.pop("name"): row for row in map(json.loads, answer.splitlines())}
    assert list(found) == [
        "frozen, 0 adapters", "peft, 1 adapters", "peft-bf16, 1 adapters", "fused, 1 adapters",
        "fused-multi, 4 adapters",
    ]  # fmt: skip
    for name, row in found.items():
        assert row["error"] < 1e-5, name
        assert row["same"], name
        plain, lean = row["kept"]  # in float32 norms keep no copies, and ours keeps no product already
        assert lean == plain if name.startswith("fused") else lean < plain, name
