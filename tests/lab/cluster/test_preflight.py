"""The preflight: what it asks Slurm for, what it finds on nodes, and what it says of a job that does not start."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch.distributed as dist

from lorafusion.core.schema import UserError
from lorafusion.lab.cluster import preflight as module
from lorafusion.lab.cluster import probe as on_node
from lorafusion.lab.cluster.preflight import (
    ON_EACH_NODE,
    Seen,
    check_nodes_first,
    needs_of,
    preflight,
    problems_of,
    read_log,
    script_of,
)
from lorafusion.lab.cluster.probe import probe
from lorafusion.lab.cluster.queue import Job, job_state, read_job_state
from lorafusion.lab.cluster.request import Resources
from lorafusion.lab.cluster.site import Site
from lorafusion.lab.steps import dag_of
from lorafusion.launch.network import free_port
from lorafusion.launch.rendezvous import Meeting

TWO = Resources(5, 4000, nodes=2, exclusive=False)
PENDING = "JobId=7 JobName=x JobState=PENDING Reason={} Dependency=(null) NodeList= NumNodes=2-2"
DONE = "JobId=7 JobName=x JobState=COMPLETED Reason=None Dependency=(null) ReqNodeList=(null) NodeList=toy[1-2]"
ENDED = Job("7", "COMPLETED", "toy[1-2]", "None")


@pytest.fixture
def nodes(slurm, monkeypatch):
    """A cluster whose nodes are processes: `srun` starts all of them at once."""
    slurm.program("sinfo", "echo 'toy*|1:00:00|1-infinite|2|8|1|16000|(null)'")
    slurm.program("sbatch", 'case "$*" in *--test-only*) exit;; esac\n'
                            'while [ $# -gt 0 ]; do case "$1" in --output) log=$2;; esac; shift; done\n'
                            'cat >script; sh script >"$log" 2>&1; echo 7')  # fmt: skip
    slurm.program("srun", 'while [ "$1" != sh ]; do case "$1" in --nodes=*) nodes=${1#*=};; esac; shift; done\n'
                          'for i in $(seq 0 $((nodes - 1))); do\n'
                          'SLURM_JOB_ID=7 SLURM_NODEID=$i SLURMD_NODENAME=toy$((i + 1)) "$@" &\n'
                          "done; wait")  # fmt: skip
    slurm.program("scontrol", f"case $2 in hostnames) echo toy1; echo toy2;; *) echo '{DONE}';; esac")
    slurm.program("scancel", "true")
    monkeypatch.setattr(module, "SHOW_SECONDS", 0.0)
    return slurm


def test_two_nodes_meet_in_a_folder_that_is_gone_afterwards(nodes, tmp_path):
    line = preflight(tmp_path / "results", TWO, Site(interface="lo"), "run-1")
    ready = r"preflight: toy\[1-2\]: ready, after \d+ s; importing torch took \d+ s on toy\d, \d+ s on toy\d"
    assert re.fullmatch(ready, line)
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["logs"]
    call = nodes.calls("sbatch")[-1]
    assert {"--job-name run-1", "--nodes=2", "--ntasks=2", "-t 5", "--mem 4000"} <= {
        *call.split(), *map(" ".join, zip(call.split(), call.split()[1:], strict=False))
    }  # fmt: skip


def test_a_node_without_the_environment_is_named(nodes, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(UserError) as error:
        preflight(tmp_path / "results", TWO, Site(), "run-1")
    assert sorted(str(error.value).splitlines()) == [
        f"preflight: see {tmp_path}/results/logs/preflight.log",
        "preflight: toy1: no /nowhere/python; install where all nodes see it",
        "preflight: toy2: no /nowhere/python; install where all nodes see it",
    ]


def said_on_node(python: Path) -> str:
    """What a node says that has this in the place of the workflow's Python."""
    environment = {"PATH": os.environ["PATH"], "SLURMD_NODENAME": "toy1"}
    command = ["sh", "-c", ON_EACH_NODE, "sh", str(python), "{}"]
    return subprocess.run(command, capture_output=True, text=True, env=environment).stdout


def test_a_python_that_is_another_there_is_named(tmp_path):
    (tmp_path / "link").symlink_to("/nowhere/python3.11")
    expected = "preflight: toy1 problem: no {0}/link, a link to /nowhere/python3.11; install where all nodes see it\n"
    assert said_on_node(tmp_path / "link") == expected.format(tmp_path)
    old = tmp_path / "python"
    old.write_text('#!/bin/sh\n[ "$1" = -V ] && exec echo Python 3.6.8\necho "No module: yaml" >&2; exit 1\n')
    old.chmod(0o755)
    assert said_on_node(old) == (
        f"preflight: toy1 problem: {old}, which is Python 3.6.8, cannot import lorafusion (No module: yaml); "
        "install where all nodes see it\n"
    )


def test_a_job_that_ends_before_it_begins_shows_its_last_words(nodes, tmp_path):
    with pytest.raises(
        UserError, match=r"job 7 on toy\[1-2\] ended as COMPLETED; 2 of 2 nodes .* ends: .*no-such-modul"
    ):
        preflight(tmp_path / "results", TWO, Site(before=["no-such-module load cuda"]), "run-1")


def test_what_a_site_has_each_job_do_first_comes_first(tmp_path):
    script = script_of(tmp_path / "a b", TWO._replace(gpus=8), Site(before=["module load cuda"]))
    lines = script.splitlines()
    assert lines[0] == "#!/bin/bash"
    assert lines.index("module load cuda") < next(i for i, line in enumerate(lines) if line.startswith("srun "))
    words = shlex.split(script[script.index("srun ") :])
    assert words[1:3] == ["--nodes=2", "--ntasks=2"]
    assert json.loads(words[-1]) == {"place": str(tmp_path / "a b"), "nodes": 2, "gpus": 8}


def seen(log: str | None, *files: str, state: Job = ENDED) -> Seen:
    """Of nodes that began between 40 and 60 by the login node's clock."""
    nodes = read_log(log or "")
    return Seen(state, 40.0, dict.fromkeys(nodes, (40.0, 60.0)), nodes, list(files), log)


BOTH = ("seen-toy1", "seen-toy2")
GOOD = "preflight: toy{0} clock: {1}\npreflight: toy{0} doing: imports torch\npreflight: toy{0} ended: \n"


@pytest.mark.parametrize(
    ("log", "files", "problem"),
    [
        (None, [], "job 7 on toy[1-2] ended as COMPLETED and its log has not come; do the nodes see the folder"),
        ("preflight: toy1 problem: bad\npreflight: toy1 ended: \n", ["seen-toy1"], "toy1: bad"),
        (GOOD.format(1, 50) + GOOD.format(2, 51), ["seen-toy1"], "toy2: what it writes into the"),
        (GOOD.format(1, 120) + GOOD.format(2, 51), BOTH, "toy1: its clock is at least 60 s ahead of the login node's"),
        (GOOD.format(1, 10) + GOOD.format(2, 51), BOTH, "toy1: its clock is at least 30 s behind the login node's"),
        (GOOD.format(1, 50) + "killed", BOTH,
         "job 7 on toy[1-2] ended as COMPLETED; 1 of 2 nodes have not answered; the log ends: killed"),
        (GOOD.format(1, 50) + GOOD.format(2, 50).removesuffix("preflight: toy2 ended: \n"), BOTH,
         "job 7 on toy[1-2] ended as COMPLETED; 1 of 2 nodes have not answered; toy2 imports torch"),
    ],
)  # fmt: skip
def test_each_problem_is_a_line_of_its_own(log, files, problem):
    (line,) = problems_of(seen(log, *files), 2)
    assert line.startswith(problem)


def test_clocks_within_seconds_are_well():
    log = "noise\n" + GOOD.format(1, 64) + GOOD.format(2, 36)
    assert problems_of(seen(log, "login", *BOTH), 2) == []


def test_the_time_in_the_queue_says_nothing_of_clocks(nodes, tmp_path, monkeypatch):
    """The job waits for an hour; then a clock that is minutes off shows."""
    clock = iter(range(0, 100_000, 600))
    monkeypatch.setattr(module.time, "time", lambda: float(next(clock)))
    monkeypatch.setattr(module.time, "sleep", lambda _: None)
    states = iter(["PENDING"] * 6 + ["COMPLETED"])
    (tmp_path / "seen-toy1").touch()
    log = tmp_path / "log"

    def state(job: str) -> Job:
        state = next(states)
        if state == "COMPLETED":
            log.write_text(GOOD.format(1, 600))
        return ENDED._replace(state=state, reason="")

    monkeypatch.setattr(module, "job_state", state)
    looked = Seen(ENDED, 0.0)
    module._watch(looked, tmp_path, log, 1, 3600.0)
    before, after = looked.spans["toy1"]
    assert after - before <= 1800
    (problem,) = problems_of(looked, 1)
    assert problem.startswith("toy1: its clock is at least ")
    assert "behind" in problem


def test_what_is_waited_for_is_said_once(nodes, tmp_path, monkeypatch, capsys):
    log, logs = tmp_path / "log", iter(["", "", "", GOOD.format(1, 1).partition("preflight: toy1 ended")[0]])
    lives = iter([("PENDING", "Priority"), ("PENDING", "Priority"), ("RUNNING", ""), ("RUNNING", "")])
    monkeypatch.setattr(module.time, "sleep", lambda _: None)

    def state(job: str) -> Job:
        log.write_text(next(logs, "preflight: toy1 problem: bad\n"))
        state, reason = next(lives, ("FAILED", ""))
        return ENDED._replace(state=state, reason=reason)

    monkeypatch.setattr(module, "job_state", state)
    module._watch(looked := Seen(ENDED, 0.0), tmp_path, log, 2, 600.0)
    assert looked.has_problems
    assert capsys.readouterr().out.splitlines() == [
        "preflight: job 7 waits in the queue, for at most 10 minutes, as Slurm says: Priority",
        "preflight: job 7 runs on toy[1-2]: waiting for toy1; waiting for toy2",
        "preflight: job 7 runs on toy[1-2]: toy1 imports torch; waiting for toy2",
    ]


def test_others_have_seconds_once_something_does_not_hold(nodes, tmp_path, monkeypatch):
    """A node that only waits for one that cannot come is not waited for, and a slow one is."""
    log = tmp_path / "log"
    monkeypatch.setattr(module.time, "sleep", lambda _: None)
    monkeypatch.setattr(module.time, "monotonic", iter(range(0, 10_000, 15)).__next__)
    states = iter([ENDED._replace(state="RUNNING")] * 9)

    def state(job: str) -> Job:
        left = states.__length_hint__()
        log.write_text(GOOD.format(1, 1) + ("preflight: toy2 problem: bad\n" if left <= 5 else ""))
        return next(states)

    monkeypatch.setattr(module, "job_state", state)
    module._watch(looked := Seen(ENDED, 0.0), tmp_path, log, 2, 600.0)
    assert looked.state.state == "RUNNING"
    assert states.__length_hint__() == 2, "two looks, of 15 s, after the problem"


def found(lines) -> list[str]:
    """The problems among what a probe says."""
    return [text for kind, text in lines if kind == "problem"]


def test_a_folder_that_is_not_the_login_nodes_is_named_once(tmp_path):
    (finding,) = found(probe(tmp_path / "results" / "place", nodes=2, gpus=0))
    assert finding.startswith(f"{tmp_path}/results is not the login node's; results need a folder that")


@pytest.mark.parametrize(
    ("cuda", "listed", "reason"),
    [
        ("12.8", "is not there", "nvidia-smi is not there; is this a node with GPUs (partition, constraint of the"),
        ("12.8", 0, "nvidia-smi lists none; is this a node with GPUs"),
        ("12.8", 4, "nvidia-smi lists 4; correct gpus_per_node of the site"),
        (None, 8, "it is built for CPUs; install with `make setup GPU=1`"),
        ("12.8", 8, "nvidia-smi lists 8; the driver is too old for CUDA 12.8, or CUDA_VISIBLE_DEVICES (0) wrong"),
    ],
)
def test_gpus_that_torch_does_not_see_have_a_reason(tmp_path, monkeypatch, cuda, listed, reason):
    (tmp_path / "login").touch()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.version.cuda", cuda)
    monkeypatch.setattr(on_node, "_listed_gpus", lambda: listed)
    (finding,) = found(probe(tmp_path, nodes=1, gpus=8))
    assert re.match(rf"torch \S+ sees 1 of the 8 GPUs: {re.escape(reason)}", finding)


def test_a_node_alone_adds_up_too(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    (tmp_path / "login").touch()
    lines = list(probe(tmp_path, nodes=1, gpus=0))
    assert [kind for kind, _ in lines] == ["clock", "doing", "doing", "torch", "doing", "doing"]
    assert lines[-1] == ("doing", "tries gloo's all_reduce over 1 nodes")
    dist.destroy_process_group()


def test_gpus_add_up_by_nccl(tmp_path, monkeypatch):
    """It fails here, where no GPU is, and says so in a line."""
    (tmp_path / "login").touch()
    asked = []

    def fail(backend: str, **options: object) -> None:
        asked.append((backend, options["world_size"]))
        raise RuntimeError("NCCL error: unhandled system error")

    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    monkeypatch.setattr("torch.distributed.init_process_group", fail)
    (finding,) = found(probe(tmp_path, nodes=1, gpus=8))
    assert asked == [("nccl", 1)]
    assert finding.startswith(
        "nccl's all_reduce over 1 nodes failed: NCCL error: unhandled system error; set the site's"
    )
    assert "(GLOO_SOCKET_IFNAME: ib0; here: " in finding


def test_a_clock_is_compared_with_the_first_node_s(monkeypatch):
    """By what must be: the question was asked before it was answered."""

    def lines(off: float) -> list[str]:
        monkeypatch.setattr(on_node, "_ask", lambda host, port: (off - 0.5, off + 0.5))
        return found(on_node._exchange_clocks(Meeting("7", "10.0.0.7:20123", 1, 2)))

    assert lines(5.4) == lines(-5.4) == []
    assert lines(60.0) == ["its clock is +60 s from the first node's; set them by NTP (chrony), files go by them"]
    assert lines(-60.0)[0].startswith("its clock is -60 s")


def test_nodes_ask_each_other_for_the_time():
    port = free_port()
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(on_node._ask, "127.0.0.1", port)
        assert on_node._answer(port, 1)
        early, late = asked.result()
    assert -1 < early <= 0 <= late < 1


def test_a_port_that_cannot_be_reached_names_the_interface(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    monkeypatch.setattr(on_node, "REACH_SECONDS", 0.2)
    endpoint = f"127.0.0.1:{free_port()}"
    (finding,) = found(on_node._exchange_clocks(Meeting("7", endpoint, 1, 2)))
    assert finding.startswith(f"the connection to {endpoint} failed: [Errno 111] Connection refused; set the site's")
    assert "(GLOO_SOCKET_IFNAME: eth7; here: " in finding
    assert not on_node._answer(free_port(), 1), "nobody asks"


def test_what_hangs_in_a_library_is_said(tmp_path):
    """As NCCL does where a firewall swallows what it sends."""
    code = 'from lorafusion.lab.cluster import probe; probe._give_up("nccl\'s all_reduce over 2 nodes")'
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    problem, end = done.stdout.splitlines()
    assert "problem: nccl's all_reduce over 2 nodes failed: no end after 60 s; set the site's `interface`" in problem
    assert end.endswith(" ended: ")
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("reason", "message"),
    [
        ("PartitionTimeLimit", "Slurm says: PartitionTimeLimit; it will never start; does the site file ask for what"),
        ("QOSMaxWallDurationPerJobLimit", "Slurm says: QOSMaxWallDurationPerJobLimit; it will never start"),
    ],
)
def test_a_job_that_does_not_start_says_why_and_is_cancelled(nodes, suite_of_two_nodes, reason, message, monkeypatch):
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(module, "read_site", lambda: Site(preflight=1))
    monkeypatch.setattr(module.time, "monotonic", iter(range(0, 10_000, 20)).__next__)
    nodes.program("sbatch", "echo 7")
    nodes.program("scontrol", f"echo '{PENDING.format(reason)}'")
    with pytest.raises(UserError, match=message):
        check_nodes_first(*suite_of_two_nodes, "run-1")
    assert nodes.calls("scancel") == ["--quiet 7"]


@pytest.mark.parametrize(
    "reason", ["Priority", "QOSMaxGRESPerUser", "Licenses", "ReqNodeNotAvail,_UnavailableNodes:toy2"]
)
def test_a_workflow_begins_on_a_cluster_that_is_only_busy(nodes, suite_of_two_nodes, monkeypatch, capsys, reason):
    monkeypatch.setattr(module, "read_site", lambda: Site(preflight=1))
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(module.time, "monotonic", iter(range(0, 10_000, 20)).__next__)
    nodes.program("sbatch", "echo 7")
    nodes.program("scontrol", f"echo '{PENDING.format(reason)}'")
    check_nodes_first(*suite_of_two_nodes, "run-1")
    assert capsys.readouterr().out.endswith("; the workflow begins without it\n")
    assert not (suite_of_two_nodes[0] / ".preflight").exists()


def test_a_preflight_that_has_passed_is_not_repeated(nodes, suite_of_two_nodes, monkeypatch):
    monkeypatch.setattr(module, "preflight", lambda *_: nodes.program("passed", "") or "well")
    for _ in range(2):
        check_nodes_first(*suite_of_two_nodes, "run-1")
        monkeypatch.setattr(module, "preflight", lambda *_: pytest.fail("again"))
    folder, steps = suite_of_two_nodes
    monkeypatch.setattr(module, "read_site", lambda: Site(preflight=0, account="other"))
    check_nodes_first(folder, steps, "run-1")


@pytest.fixture
def suite_of_two_nodes(tmp_path):
    """The folder, and what the steps need, of the suite of the Slurm tests, whose largest cell takes two nodes."""
    suite = Path(__file__).parents[2] / "slurm" / "suite.yaml"
    folder = tmp_path / "results"
    steps = [step.resources for step in dag_of(str(suite), folder).of_target("all")]
    assert (needs_of(steps).nodes, needs_of(steps).gpus) == (2, 0)
    return folder, steps


def test_a_job_that_slurm_has_forgotten_has_ended(slurm):
    slurm.program("scontrol", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert job_state("7").has_ended
    slurm.program("scontrol", "echo 'slurm_load_jobs error: Unable to contact' >&2; exit 1")
    with pytest.raises(UserError, match="Unable to contact"):
        job_state("7")


def test_states_are_read():
    assert read_job_state(DONE) == ENDED
    waiting = read_job_state(PENDING.format("Resources"))
    assert waiting == Job("7", "PENDING", "", "Resources")
    assert (waiting.waits, waiting.has_ended) == (True, False)
    states = ["RUNNING", "COMPLETING", "FAILED", "TIMEOUT", "NODE_FAIL"]
    assert [Job("7", state, "", "").has_ended for state in states] == [False, False, True, True, True]
