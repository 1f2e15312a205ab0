"""The examples run as examples/README.md says, and do what they show."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file

from lorafusion.core.config import CONFIGS
from lorafusion.core.plan import Plan, check
from lorafusion.core.workload import Workload
from tests.checkout import Checkout

EXAMPLES = CONFIGS.parent / "examples"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    return Checkout(tmp_path_factory.mktemp("examples"))


def test_every_example_is_in_the_table():
    table = (EXAMPLES / "README.md").read_text()
    named = re.findall(r"`([\w./]+)` \|$", table, re.MULTILINE)
    files = {path.name + "/" * path.is_dir() for path in EXAMPLES.iterdir() if path.name != "__pycache__"}
    assert sorted(named) == sorted(files - {"README.md"})


def test_a_peft_model_is_patched_and_trained_by_transformers(checkout):
    printed = checkout.run(sys.executable, "examples/patch_peft.py", "adapter")
    assert "14 LoRA linears patched" in printed
    losses = [float(loss) for loss in re.findall(r"'loss': '?([\d.]+)", printed)]
    assert losses[-1] < losses[0]
    tensors = load_file(checkout.root / "adapter" / "adapter_model.safetensors")
    assert any(name.endswith("lora_B.weight") and tensor.any() for name, tensor in tensors.items())


@pytest.mark.slow
def test_four_adapters_are_trained_from_a_jobs_file(checkout):
    checkout.run("lorafusion", "train", "examples/train/jobs.yaml")
    adapters = checkout.root / "results" / "example-train" / "adapters"
    assert sorted(path.name for path in adapters.iterdir()) == ["capitals", "counting", "opposites", "sums"]
    assert all((path / "adapter_config.json").exists() for path in adapters.iterdir())


@pytest.mark.slow
def test_two_groups_train_as_tasks_of_an_array_do(checkout):
    printed = checkout.run("bash", "examples/groups/run.sh")
    assert "best: 2 groups of 1 x 1 GPUs, 0 of 2 idle" in printed
    adapters = checkout.root.glob("results/example-groups/group-000[01]/adapters/*/adapter_model.safetensors")
    assert sorted(path.parent.name for path in adapters) == ["east", "north", "south", "west"]


@pytest.mark.parametrize(
    ("ends", "signals", "requeued"), [(0, 0, False), (1, 0, False), (75, 1, True), (75, 2, True), (143, 1, True)]
)
def test_the_batch_script_of_a_group_goes_on_after_a_time_limit(checkout, tmp_path, ends, signals, requeued):
    """The training is asked to stop, and the job is put in the queue again if it says that it has more to do."""
    programs = {
        "lorafusion": f'trap "echo stopping" TERM; touch {tmp_path}/begun; for i in $(seq {50 * signals}); '
        f'do sleep 0.05; done; echo "$@" > {tmp_path}/called; exit {ends}',
        "scontrol": f'echo "$@" > {tmp_path}/requeued',
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_ARRAY_TASK_ID": "7", "SLURM_JOB_ID": "41"}
    script = EXAMPLES / "groups" / "group.sbatch"
    process = subprocess.Popen(["bash", script, "groups"], env=environment, text=True, stdout=subprocess.PIPE)
    for _ in range(signals):
        while not (tmp_path / "begun").exists():
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == ends
    assert printed.count("stopping") == signals
    assert (tmp_path / "called").read_text() == "train groups/group-0007.yaml\n"
    assert (tmp_path / "requeued").exists() == requeued
    if requeued:
        assert (tmp_path / "requeued").read_text() == "requeue 41\n"


def test_the_data_of_the_jobs_file_is_what_its_script_makes(checkout):
    folder = checkout.root / "examples" / "train"
    checkout.run(sys.executable, "examples/train/make_data.py")
    for path in [*folder.glob("*.jsonl"), folder / "counting.txt"]:
        assert path.read_text() == (EXAMPLES / "train" / path.name).read_text()


def test_strategies_are_planned_and_compared(checkout):
    printed = checkout.run(sys.executable, "examples/plan.py", "plans")
    makespans = {name: float(seconds) for name, seconds in re.findall(r"^(\w+) .* ([\d.]+)s  ", printed, re.MULTILINE)}
    assert makespans["fast"] <= makespans["paper"] < makespans["sequential"]
    assert Plan.read(checkout.root / "plans" / "fast.json").stages == 4


def test_a_kernel_variant_is_checked(checkout):
    environment = checkout.environment | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "examples/kernel_variant.py"]
    done = subprocess.run(command, cwd=checkout.root, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert "error of the variant" in done.stdout


def test_a_system_is_one_file_and_one_entry(checkout):
    printed = checkout.run("bash", "examples/add_a_system/run.sh", "out")
    workload = Workload.read(checkout.root / "out" / "workload.json")
    plan = Plan.read(checkout.root / "out" / "longest-first.json")
    check(plan, workload)
    assert plan.system == "longest-first"
    assert f"{plan.statistics.microbatches} microbatches" in printed
