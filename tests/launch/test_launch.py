"""How a run ends, whatever happens to it: one status, one line, and nothing left running."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import resource
import signal
import time
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
import yaml
from safetensors.torch import save_file

from lorafusion.core.config import CONFIGS, read_model
from lorafusion.core.plan import Plan
from lorafusion.core.workload import Workload
from lorafusion.engine import worker
from lorafusion.engine.agent import first_failure
from lorafusion.engine.build import executor_of
from lorafusion.engine.process import WorkerProcess
from lorafusion.lab.table.result import result_of
from lorafusion.launch.heartbeat import WAITING, Watch
from lorafusion.launch.launch import end_with_parent, launch, worker_command, worker_environment
from lorafusion.launch.outcome import Outcome
from lorafusion.launch.rendezvous import Meeting
from lorafusion.launch.spec import RunSpec
from lorafusion.model.stage import build_stage
from lorafusion.planning import first_fit
from tests import forked

CPU = torch.device("cpu")


@pytest.fixture
def spec(make_job, make_workload, tmp_path):
    """A run of two adapters, with any field changed; `model` and `first` may be dicts of changes to the tiny model and
    to the first job."""

    def make(stages=1, model=None, first=None, **changes) -> RunSpec:
        workload = make_workload(make_job("a", **(first or {})), make_job("b", (4, 4, 7, 9)))
        (tmp_path / "workload.json").write_text(workload.to_json())
        plan = first_fit.plan(workload, "lorafusion", stages, 16)
        (tmp_path / "plan.json").write_text(plan.to_json())
        if model:
            tiny = yaml.safe_load((CONFIGS / "models" / "tiny.yaml").read_text())
            (tmp_path / "model.yaml").write_text(yaml.safe_dump(tiny | model))
            changes["model"] = str(tmp_path / "model.yaml")
        paths = {"workload": str(tmp_path / "workload.json"), "plan": str(tmp_path / "plan.json")}
        return RunSpec(**({"system": "lorafusion", "model": "tiny"} | paths | changes))

    return make


def test_a_run_ends_with_a_report(spec):
    done = launch(spec(), 1, timeout=120)
    assert (done.status, done.note) == ("ok", "")
    assert [len(values) for values in done.report["losses"].values()] == [3, 2]
    assert done.report["peak_memory"] > 2**20
    assert set(done.report["canary"]) == {"canary-gemm", "canary-copy"}


def test_no_collection_of_garbage_looks_at_what_was_imported(spec, tmp_path):
    """In a process that is not forked, to which megatron-core would come late."""
    (tmp_path / "spec.json").write_text(
        spec(system="megatron-fsdp", task="tests.launch.test_launch:count_tracked_objects").model_dump_json()
    )
    arguments = (str(tmp_path / "spec.json"), str(tmp_path))
    process = get_context("spawn").Process(target=worker.main, args=arguments)
    process.start()
    process.join()
    assert json.loads((tmp_path / "report.json").read_text())["tracked"] < 10_000


def count_tracked_objects(process: WorkerProcess) -> dict:
    executor_of(process.spec.system)
    return {"tracked": len(gc.get_objects())}


def test_a_mistake_is_one_line_that_names_it(spec):
    done = forked.launch(spec(stages=2), 1, timeout=120)
    assert done.status == "crash"
    assert "plan.json: made for 2 stages and 1 replicas, but the run has 1 processes" in done.note
    assert "\n" not in done.note


def test_a_stage_that_fails_ends_the_others(spec, tmp_path):
    """Rank 1 finds no head in the checkpoint; rank 0 would wait for it."""
    config = read_model("tiny")
    tensors = dict(build_stage(config, index=0, count=1, device=CPU, dtype=torch.float32, seed=1).named_parameters())
    del tensors["lm_head.weight"]
    save_file({name: value.detach() for name, value in tensors.items()}, tmp_path / "model.safetensors")
    begin = time.monotonic()
    done = launch(spec(stages=2, model={"weights": str(tmp_path)}), 2, timeout=120)
    assert done.status == "crash"
    assert done.note == f"rank 1 (stage 1 of 2), start-up: {tmp_path}: the checkpoint has no tensor 'lm_head.weight'"
    assert time.monotonic() - begin < 90


def test_a_loss_that_is_no_number_is_told_apart(spec):
    done = forked.launch(spec(first={"learning_rate": 100.0, "weight_decay": 100.0, "alpha": 1e6}), 1, timeout=120)
    assert done.status == "ok"
    result = result_of(done, Workload.read(spec().workload), Plan.read(spec().plan), {}, {})
    assert result["status"] == "nan"
    assert result["note"] == "the loss of a is not finite"
    assert result["metrics"] == []
    json.dumps(result, allow_nan=False)


def test_out_of_memory_is_its_own_status(spec):
    """The first weight would take 16 GiB."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (12 * 2**30, limits[1]))
    try:
        done = launch(spec(model={"hidden_size": 65536}), 1, timeout=120)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert done.status == "oom", done.note


def test_a_run_that_takes_too_long_is_ended(spec):
    done = launch(spec(), 1, timeout=0.5)
    assert done == Outcome("timeout", "not done after 0.5 s")
    assert not _children()


def test_a_killed_worker_is_a_crash(spec):
    done = launch(spec(), 1, timeout=120, look=lambda: [child.kill() for child in _children()])
    assert (done.status, done.killed) == ("crash", True)
    assert "SIGKILL" in done.note


@pytest.mark.parametrize(("number", "killed"), [(signal.SIGKILL, True), (signal.SIGSEGV, False)])
def test_a_worker_that_is_killed_is_told_from_one_that_crashes(spec, tmp_path, number, killed):
    """Under torchrun, which by itself ends with status 1 in both cases."""
    watch = Watch(tmp_path / "reports", 2)

    def look() -> None:
        watch.look()
        if 1 in watch.seen:
            with contextlib.suppress(ProcessLookupError):
                os.kill(watch.seen[1].pid, number)

    done = launch(spec(stages=2), 2, timeout=120, reports=tmp_path / "reports", look=look)
    assert (done.status, done.killed) == ("crash", killed)
    assert not killed or done.note.startswith("rank 1")


@pytest.mark.parametrize(
    ("failures", "expected"),
    [
        ([(10, 1), (10, -9)], (1, True)),  # rank 0 missed it, at the next look of torchrun
        ([(11, -15), (10, 1)], (1, False)),
        ([(10, 1), (40, -9)], (0, False)),  # torchrun itself had to kill it
    ],
)
def test_the_first_to_fail_is_one_that_was_killed(failures, expected):
    error = SimpleNamespace(
        failures={rank: SimpleNamespace(timestamp=at, exitcode=code) for rank, (at, code) in enumerate(failures)}
    )
    error.get_first_failure = lambda: min(error.failures.items(), key=lambda item: item[1].timestamp)
    assert first_failure(error) == expected


def test_a_launcher_that_is_killed_leaves_nothing_running(spec, tmp_path):
    run = spec()
    launcher = os.fork()
    if launcher == 0:
        try:
            launch(run, 1, timeout=120, reports=tmp_path / "reports")
        finally:
            os._exit(0)
    watch = Watch(tmp_path / "reports", 1)
    while not watch.seen:
        time.sleep(0.05)
        watch.look()
    os.kill(launcher, signal.SIGKILL)
    os.waitpid(launcher, 0)
    gone, alive = psutil.wait_procs([psutil.Process(watch.seen[0].pid)], timeout=20)
    assert not alive


def test_what_is_started_by_a_launcher_that_is_gone_ends():
    """It was killed after it forked, and before the new process could ask to be told."""
    child = os.fork()
    if child == 0:
        try:
            end_with_parent(parent=1)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL


@pytest.fixture
def long_run(make_job, make_workload, tmp_path):
    """A run of two stages that goes on for minutes, with something done to rank 1 once it is under way: `what` gets its
    process and a function that says what it is doing, and returns whether it is done."""

    def run(what, **options) -> Outcome:
        workload = make_workload(make_job("a", epochs=3000), make_job("b", epochs=3000))
        (tmp_path / "workload.json").write_text(workload.to_json())
        (tmp_path / "plan.json").write_text(first_fit.plan(workload, "lorafusion", 2, 16).to_json())
        paths = {"workload": str(tmp_path / "workload.json"), "plan": str(tmp_path / "plan.json")}
        watch, done = Watch(tmp_path / "reports", 2), []

        def doing() -> str:
            watch.look()
            return watch.seen[1].doing if 1 in watch.seen else ""

        def look() -> None:
            if not any(done) and re.search(r"backward of microbatch \d\d", doing()):
                done.append(what(psutil.Process(watch.seen[1].pid), doing))

        spec = RunSpec(system="lorafusion", model="tiny", **paths)
        return forked.launch(spec, 2, 120, reports=tmp_path / "reports", look=look, **options)

    return run


def killed(process: psutil.Process, doing) -> bool:
    process.kill()
    return True


def stopped_at_work(process: psutil.Process, doing) -> bool:
    """Stop it, unless it waits for the other one by now: then both would wait."""
    process.suspend()
    while process.status() != psutil.STATUS_STOPPED:
        time.sleep(0.001)
    if doing().startswith(WAITING):
        process.resume()
        return False
    return True


def test_a_process_that_dies_is_named(long_run):
    begin = time.monotonic()
    done = long_run(killed)
    assert (done.status, done.killed) == ("crash", True)
    where, _, reason = done.note.rpartition(": ")
    assert reason == "ended by SIGKILL, often the host's out-of-memory killer"
    assert re.fullmatch(r"rank 1 \(stage 1 of 2\), .*microbatch \d+.*", where)
    assert time.monotonic() - begin < 60


def test_a_process_that_hangs_is_named(long_run):
    """Rank 0 waits for it, and that is not what is wrong."""
    begin = time.monotonic()
    done = long_run(stopped_at_work, stall=5)
    assert done.status == "timeout"
    assert re.fullmatch(r"nothing happened for 5 s; rank 1 \(stage 1 of 2\): .*microbatch \d+", done.note)
    assert time.monotonic() - begin < 60


def test_nodes_meet_at_the_first():
    command = worker_command(16, Meeting("77.0-1a", "10.0.0.7:20123", rank=1, nodes=2), Path("scratch"))
    expected = {"--nproc-per-node=8", "--node-rank=1", "--rdzv-id=77.0-1a", "--rdzv-endpoint=10.0.0.7:20123"}
    assert expected < set(command)
    assert "--rdzv-endpoint=scratch/torchrun" in worker_command(4, None, Path("scratch"))
    assert "torch.distributed.run" not in worker_command(1, None, Path("scratch"))


@pytest.mark.parametrize("launched", [launch, forked.launch], ids=["torchrun", "forked"])
def test_processes_of_one_machine_listen_on_its_loopback_alone(spec, launched):
    addresses = set()

    def look() -> None:
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                sockets = process.net_connections("inet")
                addresses.update(socket.laddr.ip for socket in sockets if socket.status == psutil.CONN_LISTEN)

    assert launched(spec(stages=2), 2, timeout=120, look=look).status == "ok"
    assert addresses == {"127.0.0.1"}


@pytest.mark.parametrize(("cores", "processes", "expected"), [(8, 2, "4"), (8, 3, "2"), (1, 2, "1")])
def test_workers_share_the_cores_that_this_process_may_use(monkeypatch, cores, processes, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    assert worker_environment(processes, {})["OMP_NUM_THREADS"] == expected
    assert worker_environment(processes, {"OMP_NUM_THREADS": "5"})["OMP_NUM_THREADS"] == "5"


def test_workers_have_no_place_but_the_one_that_we_give_them():
    """RANK and WORLD_SIZE left in the environment had a run of one process wait ten minutes for another; PET_NNODES,
    which Kubeflow sets, one of two processes."""
    left_over = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME",
                 "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RUN_ID",
                 "PET_NNODES", "PET_RDZV_ENDPOINT"]  # fmt: skip
    others = {"NAME", "SLURM_NODEID", "HOME", "OMP_NUM_THREADS", "PYTHONPATH", "PYTHONUNBUFFERED"}
    assert worker_environment(1, dict.fromkeys([*left_over, *others], "2")).keys() == others


def _children() -> list[psutil.Process]:
    """Workers of runs that are not forked; the server of those that are names the worker's module, too."""
    every = {child: " ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)}
    return [child for child, command in every.items() if "lorafusion.engine" in command and "forkserver" not in command]
