"""Launchers on several nodes, each with an environment as Slurm gives it: who meets whom, where, and who is missed."""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed import run as torchrun

from lorafusion.engine import agent
from lorafusion.launch import network, rendezvous
from lorafusion.launch.launch import launch
from lorafusion.launch.network import PORTS, free_port
from lorafusion.launch.outcome import FaultyRunError, Outcome
from lorafusion.launch.rendezvous import (
    ATTEMPT,
    MEETING,
    Meeting,
    attempt_of,
    leave,
    meet,
    shared_folder,
)
from lorafusion.launch.spec import RunSpec
from lorafusion.planning import first_fit

OUT = "repeat~1.json"


def node(rank: int, **changes: str) -> dict[str, str]:
    """The environment of the launcher on a node."""
    same = {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_SRUN_COMM_PORT": "40001",
            "SLURM_STEP_NODELIST": "toy[1-2]", "GLOO_SOCKET_IFNAME": "lo"}  # fmt: skip
    return same | {"SLURM_NODEID": str(rank), "SLURMD_NODENAME": f"toy{rank + 1}"} | changes


@pytest.mark.parametrize("variable", [*ATTEMPT, "SLURM_JOB_ID", "SLURM_STEP_ID"])
def test_an_attempt_has_a_name_of_its_own_that_all_nodes_know(variable):
    assert attempt_of(node(0)) == attempt_of(node(1))
    assert attempt_of(node(0)) != attempt_of(node(0, **{variable: "5"}))


def test_an_attempt_reads_nothing_of_earlier_ones_and_removes_it(tmp_path):
    out = tmp_path / "[a]" / OUT
    killed = shared_folder(out, node(0))
    other_cell = shared_folder(out.with_name("repeat~2.json"), node(0))
    for folder in (killed, other_cell):
        folder.mkdir(parents=True)
        (folder / "position-0").write_text("host\n1\n1\nrank 0\nstart-up\n")
    requeued = {"LORAFUSION_ATTEMPT": "2"}
    assert shared_folder(out, node(1, **requeued)) != killed
    assert killed.exists(), "the first node alone tidies up"
    folder = shared_folder(out, node(0, **requeued))
    folder.mkdir()
    assert shared_folder(out, node(0, **requeued)) == folder
    assert {path.name for path in out.parent.iterdir()} == {folder.name, other_cell.name}


def met(folder: Path, *environments: dict[str, str]) -> list[Meeting]:
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda environment: meet(folder, len(environments), environment, 20), environments))


def test_all_nodes_meet_at_a_port_of_the_first(tmp_path):
    first, second = met(tmp_path, node(0), node(1))
    assert (first.rank, second.rank) == (0, 1)
    assert first.endpoint == second.endpoint
    assert re.fullmatch(r"127\.0\.0\.1:\d{5}", first.endpoint)
    leave(tmp_path)
    assert not tmp_path.exists()


def test_attempts_on_one_node_meet_at_ports_of_their_own():
    ports = {free_port() for _ in range(20)}
    assert len(ports) > 15
    assert ports < set(PORTS)


def test_a_port_that_somebody_has_is_not_taken(monkeypatch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken, free = other.getsockname()[1], free_port()
        monkeypatch.setattr(network.random.SystemRandom, "sample", lambda *_: [taken, free])
        assert free_port() == free


@pytest.mark.parametrize(("scontrol", "name"), [(True, "toy2"), (False, "node 1 of toy[1-2]")])
def test_a_node_that_does_not_come_is_named(tmp_path, monkeypatch, scontrol, name):
    monkeypatch.setenv("PATH", str(tmp_path))
    if scontrol:
        (tmp_path / "scontrol").write_text("#!/bin/sh\necho toy1\necho toy2\n")
        (tmp_path / "scontrol").chmod(0o755)
    folder = tmp_path / "reports"
    with pytest.raises(FaultyRunError) as fault:
        meet(folder, 2, node(0), seconds=0)
    assert str(fault.value).startswith(f"1 of 2 nodes did not come to the rendezvous in 0 s: {name}; ")
    leave(folder)
    late = time.monotonic()
    with pytest.raises(FaultyRunError, match="the first node, called no rendezvous"):
        meet(folder, 2, node(1), seconds=5)
    assert time.monotonic() - late < 5, "it goes at once"


def test_the_note_of_a_port_that_was_taken_names_it(tmp_path, monkeypatch):
    """By somebody who came after the launcher had looked. Nothing is said of the host's memory."""
    for name, value in node(0).items():
        monkeypatch.setenv(name, value)
    (tmp_path / "node-1").touch()
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        endpoint = f"127.0.0.1:{other.getsockname()[1]}"
        monkeypatch.setattr(rendezvous, "free_port", lambda: other.getsockname()[1])
        done = launch(RunSpec(system="lorafusion", model="tiny", workload="none"), 4, 120, 2, tmp_path)
    assert (done.status, done.killed) == ("crash", False)
    assert done.note.startswith(f"the rendezvous at {endpoint} failed: ")
    assert "EADDRINUSE" in done.note
    assert "GLOO_SOCKET_IFNAME" in done.note
    assert len(done.note) <= 300


def on_node(rank: int, spec: RunSpec, reports: Path) -> Outcome:
    """The outcome of a launcher of two processes on two nodes, in a process of its own."""
    os.environ.update(node(rank))
    return launch(spec, 2, 120, 2, reports)


@pytest.mark.slow
def test_a_run_on_two_nodes_has_one_report(tmp_path, make_job, make_workload):
    workload = make_workload(make_job("a"), make_job("b", (4, 4, 7, 9)))
    (tmp_path / "workload.json").write_text(workload.to_json())
    (tmp_path / "plan.json").write_text(first_fit.plan(workload, "lorafusion", 1, 16, data_parallel=2).to_json())
    spec = RunSpec(
        system="lorafusion",
        model="tiny",
        workload=str(tmp_path / "workload.json"),
        plan=str(tmp_path / "plan.json"),
    )
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        ends = [pool.submit(on_node, rank, spec, tmp_path / "run-0") for rank in (0, 1)]
        outcomes = [end.result() for end in ends]
    assert [done.status for done in outcomes] == ["ok", "ok"], outcomes
    assert [len(values) for values in outcomes[0].report["losses"].values()] == [3, 2]


def test_the_first_node_s_report_of_a_rendezvous_comes_first(tmp_path, monkeypatch):
    def fail() -> None:
        raise dist.DistStoreError("Timed out after 121 seconds waiting for clients. 1/2 clients joined.")

    monkeypatch.setattr(torchrun, "main", fail)
    for rank in (1, 0):
        options = [f"--node-rank={rank}", "--rdzv-endpoint=10.0.0.7:20123", "-m", "worker", "spec.json", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", ["agent", *options])
        with pytest.raises(dist.DistStoreError):
            agent.main()
    first = json.loads(min(tmp_path.glob("failure-*.json")).read_text())
    assert first["message"].startswith("the rendezvous at 10.0.0.7:20123 failed: Timed out after 121 seconds")
    assert not (tmp_path / MEETING).exists()
