"""What each system costs is what is recorded, whatever its name."""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lorafusion.cli.main import app
from lorafusion.core.config import read_systems
from lorafusion.core.schema import UserError
from lorafusion.engine.fork_server import FORKSERVER
from lorafusion.lab.checks import contract
from lorafusion.lab.checks.observed_run import CLOCK
from lorafusion.lab.experiments.end_to_end import unavailable
from tests.renamed import exchanged

RECORD = Path(__file__).parents[2] / "contracts" / "cpu.json"
AGAIN = f"if that is meant: lorafusion lab contract tests/contracts/{RECORD.name} --write"
SYSTEMS = [name for name, system in read_systems().items() if not unavailable(system)]
OTHERS = dict(zip(SYSTEMS, [*SYSTEMS[1:], SYSTEMS[0]], strict=True))


def in_a_process(function, *arguments):
    with ProcessPoolExecutor(1, FORKSERVER) as processes:
        return processes.submit(function, *arguments).result()


def cost_under_the_name_of(name: str, other: str) -> dict:
    with exchanged(name, other):
        return contract.contract_of(other, "cpu")


def assert_as_recorded(name: str, found: dict) -> None:
    changed = contract.difference({name: json.loads(RECORD.read_text())[name]}, {name: found})
    assert not changed, f"what {name} costs has changed; {AGAIN}\n{changed}"


@pytest.mark.parametrize("name", ["lorafusion", "mlora", "megatron-pp"])
def test_a_system_costs_what_is_recorded(name):
    assert_as_recorded(name, in_a_process(contract.contract_of, name, "cpu"))


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_system_costs_the_same_under_another_ones_name(name):
    """Which has its name meanwhile: the operators that run, the plan, the warm-up, the tuning."""
    assert_as_recorded(name, in_a_process(cost_under_the_name_of, name, OTHERS[name]))


def test_every_system_is_recorded():
    recorded = json.loads(RECORD.read_text())
    assert set(SYSTEMS) <= set(recorded) <= set(read_systems())


def test_arms_differ_in_what_they_are_compared_for_alone():
    """One computation under three schedules; and what is said of an arm is what it does."""
    recorded = json.loads(RECORD.read_text())
    for name in ("megatron-fsdp", "mlora-paper-setting", "unfused-sequential"):
        for kind in ("attention", "loss"):
            assert recorded[name][CLOCK]["forward"][kind] == recorded["peft-bf16"][CLOCK]["forward"][kind]
    assert {one["stage"]["recomputed_layers"] for one in recorded.values()} == {0}
    assert {one["tuning"]["chosen"] == int(one["tuning"]["tried"].split()[1]) for one in recorded.values()} == {True}
    wide = {name for name, one in recorded.items() if one["stage"]["dtypes"]["adapters"] == "float32"}
    assert wide == {name for name in recorded if read_systems()[name].wide_adapters}
    assert {one["waits of the host in a microbatch"] for one in recorded.values()} == {0}
    rows = {name for name, one in recorded.items()
            if one["plans"]["1 stage"]["tokens with padding"] > one["plans"]["1 stage"]["tokens"]}  # fmt: skip
    assert rows == {"mlora"}


ONE = {"stage": {"layers": 2}, "copies": "8, 400 bytes read, 400 written"}
OTHER = ONE | {"copies": "9, 500 bytes read, 500 written"}


def test_a_difference_names_the_system_and_the_lines():
    assert contract.difference({"a": ONE, "b": ONE}, {"a": ONE, "b": ONE}) == ""
    said = contract.difference({"a": ONE, "b": ONE}, {"a": ONE, "b": OTHER})
    assert said.startswith("b:\n")
    assert '  - "copies": "8, 400 bytes read, 400 written"' in said
    assert '  + "copies": "9, 500 bytes read, 500 written"' in said
    assert len(said.splitlines()) < 9
    assert contract.difference({"a": ONE}, {}).startswith("a:\n")
    assert contract.difference({}, {"a": ONE}).startswith("a:\n")


def test_the_command_compares_and_records(tmp_path, monkeypatch):
    monkeypatch.setattr(contract, "contracts", lambda names, device: {name: OTHER for name in names})
    record, run = tmp_path / "cpu.json", CliRunner().invoke
    arguments = ["lab", "contract", str(record)]
    missing = run(app, arguments)
    assert isinstance(missing.exception, UserError)
    assert "no such record of what systems cost file" in str(missing.exception)
    assert run(app, [*arguments, "--write"]).exit_code == 0
    assert run(app, arguments).exit_code == 0
    unavailable_one = {"unsloth": ONE} if "unsloth" not in SYSTEMS else {}
    record.write_text(json.dumps(json.loads(record.read_text()) | {"lorafusion": ONE} | unavailable_one))
    changed = run(app, arguments)
    assert changed.exit_code == 1
    assert "lorafusion:" in changed.output
    assert "unsloth" not in changed.output
    assert f"lorafusion lab contract {record} --write" in changed.output.replace("\n", " ")
    assert run(app, [*arguments, "--write"]).exit_code == 0
    assert json.loads(record.read_text()) == {name: OTHER for name in SYSTEMS} | unavailable_one
