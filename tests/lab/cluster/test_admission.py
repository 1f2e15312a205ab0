"""What is said of jobs that a cluster would not run, before any is submitted."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from lorafusion.core.schema import UserError
from lorafusion.lab.cluster.admission import (
    Nodes,
    minutes_allowed,
    read_minutes,
    read_nodes,
    refusal,
    require_admitted,
)
from lorafusion.lab.cluster.request import Resources, request_of
from lorafusion.lab.cluster.site import Site
from lorafusion.lab.steps import dag_of

# Two kinds of nodes in one partition, whose sockets are told; a partition whose jobs have one node.
SINFO = """\
short*|10:00|1-infinite|2|96|1|1000000|gpu:h100:8(S:0-1)
short*|10:00|1-infinite|1|64+|1|500000+|gpu:a100:4,mps:400
long|1-00:00:00|1-infinite|2|96|2|1000000|gpu:8
one|infinite|1|4|128|1|250000|(null)
"""
ONE_GPU = Resources(8, 64_000, gpus=1)


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("10:00", 10), ("0:30", 0.5), ("1:00:00", 60), ("2-12:00:00", 3600), ("infinite", math.inf), ("n/a", math.inf)],
)
def test_times_are_read_as_slurm_writes_them(text, minutes):
    assert read_minutes(text) == minutes


def test_nodes_are_read_as_sinfo_tells_them():
    shapes = dict(partition="short", is_default=True, minutes=10, most=math.inf, threads=1)
    assert read_nodes(SINFO) == [
        Nodes(**shapes, count=2, cpus=96, memory_mb=1_000_000, gpus=8),
        Nodes(**shapes, count=1, cpus=64, memory_mb=500_000, gpus=4),
        Nodes("long", False, 1440, math.inf, count=2, cpus=96, threads=2, memory_mb=1_000_000, gpus=8),
        Nodes("one", False, math.inf, 1, count=4, cpus=128, threads=1, memory_mb=250_000, gpus=0),
    ]


@pytest.mark.parametrize(
    ("needs", "partition", "reason"),
    [
        (ONE_GPU, None, ""),
        (ONE_GPU._replace(minutes=125), None, "partition short: 125 minutes, at most 10 there"),
        (ONE_GPU._replace(minutes=125), "long", ""),
        (ONE_GPU._replace(minutes=125), "short,long", ""),  # Slurm takes the first that fits
        (ONE_GPU._replace(minutes=1500), "short,long", "partition short: 1500 minutes, at most 10 there"),
        (
            ONE_GPU, "long,gpu",
            "no partition 'gpu'; known: long, one, short; LORAFUSION_SLURM_PARTITION names one",
        ),
        (ONE_GPU._replace(nodes=3), "long", "partition long: 3 nodes, at most 2 there"),
        (ONE_GPU._replace(gpus=9), "long", "partition long: 9 GPUs a node, at most 8 there"),
        (ONE_GPU, "one", "partition one: 1 GPUs a node, at most 0 there"),
        (Resources(8, 1000, nodes=2), "one", "partition one: 2 nodes, at most 1 there"),
        (Resources(8, 2_000_000), None, "partition short: 2000000 MB of memory a node, at most 1000000 there"),
        (Resources(8, 1000, cpus=100), None, "partition short: 100 cores a node, at most 96 there"),
        (
            ONE_GPU, "gpu",
            "no partition 'gpu'; known: long, one, short; LORAFUSION_SLURM_PARTITION names one",
        ),
    ],
)  # fmt: skip
def test_a_job_that_no_node_can_run_is_refused(needs, partition, reason):
    advice = "; LORAFUSION_SLURM_PARTITION names another" if "there" in reason else ""
    assert refusal(request_of(needs, Site(partition=partition)), read_nodes(SINFO)) == reason + advice


def test_nodes_that_differ_a_little_share_a_job():
    """`slurmd -C` writes each node's memory to the megabyte."""
    nodes = read_nodes("gpu*|1:00:00|1-infinite|1|96|2|2063937|gpu:8\ngpu*|1:00:00|1-infinite|1|96|2|2063921|gpu:8\n")
    assert refusal(request_of(ONE_GPU._replace(nodes=2), Site()), nodes) == ""
    assert "3 nodes, at most 2 there" in refusal(request_of(ONE_GPU._replace(nodes=3), Site()), nodes)


@pytest.mark.parametrize(("physical_cores", "reason"), [(False, ""), (True, "64 cores a node, at most 48 there")])
def test_physical_cores_are_half_as_many_as_hardware_threads(physical_cores, reason):
    site = Site(partition="long", cpus_per_gpu=64, physical_cores=physical_cores)
    assert reason in refusal(request_of(ONE_GPU, site), read_nodes(SINFO))
    assert bool(reason) == bool(refusal(request_of(ONE_GPU, site), read_nodes(SINFO)))


@pytest.mark.parametrize(
    ("answer", "mistakes"),
    [
        ("", []),
        (
            "No partition specified or system default partition",
            ["a: Slurm would not run it: sbatch: No partition specified or system default partition; "
             "LORAFUSION_SLURM_PARTITION names one"],
        ),
    ],
)  # fmt: skip
def test_where_no_partition_is_the_default_sbatch_decides(slurm, capsys, answer, mistakes):
    """A cluster may route jobs by rules of its own."""
    assert admitted(slurm, {"a": ONE_GPU}, answer, sinfo=SINFO.replace("*", "")) == mistakes
    assert "not sure whether jobs are too long: they name no partition" in capsys.readouterr().out


def test_partitions_that_are_hidden_are_looked_at(slurm):
    admitted(slurm, {"a": ONE_GPU})
    assert "--all" in slurm.calls("sinfo")[0].split()


@pytest.mark.parametrize(
    ("site", "minutes"),
    [
        ({}, 10),
        ({"partition": "long"}, 1440),
        ({"partition": "long,short"}, 1440),
        ({"partition": "long", "cpu_partition": "short"}, 10),
        ({"partition": "one"}, math.inf),
        ({"partition": "gone"}, math.inf),
    ],
)
def test_the_longest_job_is_that_of_the_partitions(slurm, site, minutes):
    (slurm.folder / "nodes").write_text(SINFO)
    slurm.program("sinfo", "cat nodes")
    assert minutes_allowed(Site(**site)) == minutes


def test_without_slurm_nothing_limits_a_job(slurm):
    slurm.program("sinfo", "exit 1")
    assert minutes_allowed(Site()) == math.inf


def admitted(slurm, jobs, answer="", sinfo=SINFO, **site) -> list[str]:
    """What is said of jobs where sbatch answers so."""
    (slurm.folder / "nodes").write_text(sinfo)
    slurm.program("sinfo", "cat nodes")
    slurm.program("sbatch", f"echo '{answer}' >&2; exit 1" if answer else "")
    try:
        require_admitted({name: request_of(needs, Site(**site)) for name, needs in jobs.items()})
    except UserError as error:
        return error.mistakes
    return []


def test_jobs_that_slurm_takes_are_tried_once_for_each_kind(slurm):
    assert admitted(slurm, {"a": ONE_GPU, "b": ONE_GPU, "c": Resources(8, 1000)}) == []
    calls = slurm.calls("sbatch")
    assert len(calls) == 2
    assert all("--test-only" in call for call in calls)
    assert "-t 8 --mem 64000 --cpus-per-task=4 --gres=gpu:1" in calls[0]


def test_a_job_that_is_too_long_is_named_once_with_minutes_and_limit(slurm):
    jobs = {"runs/a.json": ONE_GPU._replace(minutes=125), "runs/b.json": ONE_GPU._replace(minutes=125), "c": ONE_GPU}
    assert admitted(slurm, jobs) == [
        "runs/a.json and 1 more: Slurm would not run it: partition short: 125 minutes, at most 10 there; "
        "LORAFUSION_SLURM_PARTITION names another"
    ]
    assert len(slurm.calls("sbatch")) == 1  # of the job that is short enough


@pytest.mark.parametrize(
    ("answer", "site", "hint"),
    [
        ("sbatch: error: AssocMaxSubmitJobLimit", {}, True),
        ("allocation failure: Invalid account or account/partition combination specified", {}, True),
        ("allocation failure: Invalid account or account/partition combination specified", {"account": "lab"}, False),
        ("allocation failure: Requested reservation is invalid", {"reservation": "week"}, False),
    ],
)
def test_an_account_that_is_missing_is_asked_for(slurm, answer, site, hint):
    name = "results/two-nodes/runs/model~tiny/workload~xsum/gpus~4/batch~4/system~lorafusion/repeat~1.json"
    (mistake,) = admitted(slurm, {name: ONE_GPU, f"{name}x": ONE_GPU}, answer, **site)
    assert mistake.startswith(f"{name} and 1 more: Slurm would not run it: ")
    assert answer.removeprefix("sbatch: error: ") in mistake
    assert ("LORAFUSION_SLURM_ACCOUNT names an account" in mistake) == hint


@pytest.mark.parametrize(
    "answer",
    [
        "allocation failure: Requested node configuration is not available",
        "allocation failure: Socket timed out on send/recv operation",
        "allocation failure: Unable to contact slurm controller (connect failure)",
    ],
)
def test_nodes_in_repair_and_a_busy_controller_keep_nobody_out(slurm, capsys, answer):
    assert admitted(slurm, {"runs/a.json": ONE_GPU}, answer) == []
    assert "not sure whether Slurm would run all jobs: sbatch: allocation failure: " in capsys.readouterr().out


def test_a_busy_controller_is_asked_once_and_keeps_nobody_out(slurm, capsys):
    """Jobs are submitted patiently. What is refused already is told."""
    jobs = {"a": ONE_GPU, "b": ONE_GPU._replace(memory_mb=1000), "c": ONE_GPU._replace(memory_mb=2000)}
    assert admitted(slurm, jobs, "Unable to contact slurm controller (connect failure)") == []
    assert len(slurm.calls("sbatch")) == 1
    slurm.program("sinfo", "echo 'slurm_load_partitions: Socket timed out on send/recv operation' >&2; exit 1")
    require_admitted({"a": request_of(ONE_GPU, Site())})
    assert len(capsys.readouterr().out.splitlines()) == 2
    (mistake,) = admitted(slurm, {"a": ONE_GPU._replace(minutes=125), "b": ONE_GPU}, "Socket timed out")
    assert "125 minutes, at most 10 there" in mistake


def test_job_arrays_are_refused(slurm):
    with pytest.raises(UserError, match="^--slurm-array-jobs: "):
        require_admitted({}, SimpleNamespace(array_jobs="all"))


@pytest.mark.parametrize(("gpus_per_node", "nodes"), [(4, 4), (8, 2)])
def test_the_papers_grid_fits_nodes_of_four_and_of_eight_gpus(monkeypatch, gpus_per_node, nodes):
    monkeypatch.setenv("LORAFUSION_SLURM_GPUS_PER_NODE", str(gpus_per_node))
    cluster = read_nodes(f"gpu*|1-00:00:00|1-infinite|{nodes}|64|1|{64_000 * gpus_per_node}|gpu:{gpus_per_node}\n")
    requests = [request_of(step.resources, Site()) for step in dag_of("paper-grid").steps if not step.kind.quick]
    assert {refusal(request, cluster) for request in requests} == {""}
    assert max(request["nodes"] or 1 for request in requests) == nodes
    assert max(request["mem_mb"] for request in requests) == 64_000 * gpus_per_node


def test_a_site_makes_no_result_out_of_date(monkeypatch):
    """What a cell trains is the suite's; on how many nodes it runs is not in its key."""
    before = {step.relative: step.key for step in dag_of("smoke").steps}
    monkeypatch.setenv("LORAFUSION_SLURM_GPUS_PER_NODE", "1")
    steps = dag_of("smoke").steps
    assert max(step.resources.nodes for step in steps) == 4
    assert {step.relative: step.key for step in steps} == before
