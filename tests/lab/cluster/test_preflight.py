"""The preflight: what it asks Slurm for, what it finds on nodes, and what it says of a job that does not start."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest

from lorafusion.core.schema import UserError
from lorafusion.lab.cluster import preflight as module
from lorafusion.lab.cluster import probe as on_node
from lorafusion.lab.cluster.preflight import check_nodes_first, needs_of, preflight, problems_of, script_of
from lorafusion.lab.cluster.probe import probe
from lorafusion.lab.cluster.queue import JobState, job_state, read_job_state
from lorafusion.lab.cluster.request import Resources
from lorafusion.lab.cluster.site import Site
from lorafusion.lab.steps import dag_of

TWO = Resources(5, 4000, nodes=2, exclusive=False)
PENDING = "JobId=7 JobName=x JobState=PENDING Reason={} Dependency=(null) NodeList= NumNodes=2-2"
DONE = "JobId=7 JobName=x JobState=COMPLETED Reason=None Dependency=(null) ReqNodeList=(null) NodeList=toy[1-2]"
ENDED = JobState("7", "COMPLETED", "None", "toy[1-2]")


@pytest.fixture
def nodes(slurm, monkeypatch):
    """A cluster whose nodes are processes: `srun` starts all of them at once."""
    slurm.program("sinfo", "echo 'toy*|1:00:00|1-infinite|2|8|16000|(null)'")
    slurm.program("sbatch", 'case "$*" in *--test-only*) exit;; esac\n'
                            'while [ $# -gt 0 ]; do case "$1" in --output=*) log=${1#*=};; esac; shift; done\n'
                            'cat >script; sh script >"$log" 2>&1; echo 7')  # fmt: skip
    slurm.program("srun", 'while [ "$1" != sh ]; do case "$1" in --nodes=*) nodes=${1#*=};; esac; shift; done\n'
                          'for i in $(seq 0 $((nodes - 1))); do\n'
                          'SLURM_JOB_ID=7 SLURM_NODEID=$i SLURMD_NODENAME=toy$((i + 1)) "$@" &\n'
                          "done; wait")  # fmt: skip
    slurm.program("scontrol", f"echo '{DONE}'")
    slurm.program("scancel", "true")
    monkeypatch.setattr(module, "SHOW_SECONDS", 0.0)
    return slurm


def test_two_nodes_meet_in_a_folder_that_is_gone_afterwards(nodes, tmp_path):
    line = preflight(tmp_path / "results", TWO, Site(interface="lo"), "run-1")
    assert line.startswith("preflight: 2 nodes (toy[1-2]) are ready, after ")
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["logs"]
    call = nodes.calls("sbatch")[-1]
    assert {"--job-name=run-1", "--nodes=2", "--ntasks=2", "-t 5", "--mem 4000"} <= {
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


@pytest.mark.parametrize(
    ("log", "seen", "problem"),
    [
        (None, [], "job 7 on toy[1-2] ended as COMPLETED and its log has not come; do the nodes see the folder"),
        ("preflight: toy1: bad\npreflight: toy1: ended at 50", ["seen-toy1"], "toy1: bad"),
        ("preflight: toy1: ended at 50\npreflight: toy2: ended at 51", ["seen-toy1"], "toy2: what it writes into the"),
        ("preflight: toy1: ended at 120\npreflight: toy2: ended at 51", ["seen-toy1", "seen-toy2"],
         "toy1: its clock is 60 s ahead of the login node's"),
        ("preflight: toy1: ended at 10\npreflight: toy2: ended at 51", ["seen-toy1", "seen-toy2"],
         "toy1: its clock is 30 s behind the login node's"),
        ("preflight: toy1: ended at 50\nkilled", ["seen-toy1"],
         "job 7 on toy[1-2] ended as COMPLETED; 1 of 2 nodes have not answered; the log ends: killed"),
    ],
)  # fmt: skip
def test_each_problem_is_a_line_of_its_own(log, seen, problem):
    (line,) = problems_of(log, seen, 2, ENDED, (40.0, 60.0))
    assert line.startswith(problem)


def test_clocks_within_seconds_are_well():
    log = "noise\npreflight: toy1: ended at 63\npreflight: toy2: ended at 37\n"
    assert problems_of(log, ["login", "seen-toy1", "seen-toy2"], 2, ENDED, (40.0, 60.0)) == []


def test_a_folder_that_is_not_the_login_nodes_is_named_once(tmp_path):
    (finding,) = probe(tmp_path / "results" / "place", nodes=2, gpus=0)
    assert finding.startswith(f"{tmp_path}/results is not the login node's; results need a folder that")


def test_gpus_that_torch_does_not_see_are_counted(tmp_path, monkeypatch):
    (tmp_path / "login").touch()
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr(on_node, "_listed_gpus", lambda: "8")
    (finding,) = probe(tmp_path, nodes=1, gpus=8)
    assert "sees 1 of the 8 GPUs asked for, nvidia-smi 8;" in finding
    assert not list(probe(tmp_path, nodes=1, gpus=1))


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
    assert waiting == JobState("7", "PENDING", "Resources", "")
    assert (waiting.waits, waiting.has_ended) == (True, False)
    states = ["RUNNING", "COMPLETING", "FAILED", "TIMEOUT", "NODE_FAIL"]
    assert [JobState("7", state, "", "").has_ended for state in states] == [False, False, True, True, True]
