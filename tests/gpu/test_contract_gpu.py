"""What each system costs on this GPU is what is recorded for it: kernels by class, launches, waits of the host."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lorafusion.core.config import read_systems
from lorafusion.lab.checks import contract
from lorafusion.lab.experiments.end_to_end import unavailable
from lorafusion.lab.table.result import cost_metrics
from lorafusion.launch.launch import launch
from lorafusion.model.liger import is_installed
from tests.lab.test_cost import spec_of

FOLDER = Path(__file__).parent.parent / "contracts"
RECORDS = {"NVIDIA H200": FOLDER / "nvidia-h200.json"}
SYSTEMS = [name for name, system in read_systems().items() if not unavailable(system)]


@pytest.fixture(scope="module")
def record() -> dict[str, dict]:
    """What was recorded on a GPU of this kind with this torch."""
    path = RECORDS.get(torch.cuda.get_device_name())
    if path is None or not path.exists():
        pytest.skip(f"nothing is recorded for {torch.cuda.get_device_name()}: lorafusion lab contract FILE --write")
    recorded = json.loads(path.read_text())
    made_with = {one["torch"] for one in recorded.values()}
    if made_with != {torch.__version__}:
        pytest.skip(f"recorded with torch {', '.join(sorted(made_with))}, but this is {torch.__version__}")
    return recorded


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_system_costs_what_is_recorded(record, name):
    assert name in record, f"{name} is not recorded: lorafusion lab contract {RECORDS['NVIDIA H200'].name} --write"
    changed = contract.difference({name: record[name]}, contract.contracts([name], "cuda"))
    assert not changed, f"what {name} costs has changed; see `lorafusion lab contract --device cuda`\n{changed}"


def test_no_host_waits_for_its_device_and_ligers_kernels_are_whose_they_should_be(record):
    systems = read_systems()
    for name, one in record.items():
        if systems[name].executor == "lorafusion.engine.stream:execute":
            assert one["host waits"] == 0, name
        assert one["stage"]["recomputed_layers"] == 0
        assert one["stage"]["liger"] == (systems[name].liger and is_installed())


@pytest.mark.parametrize("system", ["lorafusion", "peft-bf16", "megatron-pp"])
def test_a_run_says_what_it_costs(tmp_path, system):
    if unavailable(read_systems()[system]):
        pytest.skip(unavailable(read_systems()[system]))
    outcome = launch(spec_of(tmp_path, system, device="cuda", dtype="bfloat16", adapter_dtype="bfloat16"), 1, 240)
    assert outcome.status == "ok", outcome.note
    cost = outcome.report["cost"]
    assert cost["counts"].keys() == {"kernels", "launches", "busy_ms"}
    found = {row["metric"]: row["value"] for row in cost_metrics(cost, None)}
    assert 0 < found["launches"] <= found["kernels"]
    assert found["device_busy"] > 0
    again = launch(spec_of(tmp_path, system, device="cuda", dtype="bfloat16", adapter_dtype="bfloat16"), 1, 240)
    assert again.report["cost"]["counts"]["kernels"] == cost["counts"]["kernels"]
