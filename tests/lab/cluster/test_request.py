"""What Slurm is asked for a step."""

from __future__ import annotations

import pytest

from lorafusion.lab.cluster.request import Resources, nodes_for, request_of
from lorafusion.lab.cluster.site import Site
from lorafusion.lab.steps import dag_of

GPUS = Resources(65, 64_000, cpus=2, gpus=2)
NODES = Resources(185, 256_000, cpus=8, gpus=8, nodes=2)
CPU = Resources(15, 4000)
SITE = Site(
    gpus_per_node=8, cpus_per_gpu=12, partition="gpu", cpu_partition="cpu", account="lab", qos="high",
    constraint="a100", reservation="week",
)  # fmt: skip


def asked(needs: Resources, **site) -> dict:
    """All that is asked for, without what has no value."""
    return {key: value for key, value in request_of(needs, Site(**site)).items() if value is not None}


def test_without_a_site_the_cluster_s_defaults_hold():
    assert asked(GPUS) == {
        "runtime": 65, "mem_mb": 64_000, "cpus_per_task": 8, "tasks_per_gpu": 0, "gres": "gpu:2", "mpi": "",
    }  # fmt: skip
    assert asked(CPU) == {
        "runtime": 15, "mem_mb": 4000, "cpus_per_task": 1, "tasks_per_gpu": 0, "mpi": "",
    }  # fmt: skip


def test_each_node_has_a_launcher():
    request = asked(NODES)
    assert (request["nodes"], request["tasks"], request["mpi"]) == (
        2,
        2,
        "srun --kill-on-bad-exit=1 --wait=0 --cpus-per-task=32",
    )
    assert (request["gres"], request["mem_mb"]) == ("gpu:8", 256_000)  # of each node


@pytest.mark.parametrize(
    ("needs", "site", "key", "value"),
    [
        (GPUS, {"gpu_type": "h100"}, "gres", "gpu:h100:2"),
        (GPUS, {"cpus_per_gpu": 12}, "cpus_per_task", 24),
        (Resources(1, 1, cpus=8, gpus=1), {"cpus_per_gpu": 2}, "cpus_per_task", 8),
        (CPU, {"cpus_per_gpu": 12}, "cpus_per_task", 1),
        (GPUS, {"account": "lab"}, "slurm_account", "lab"),
        (GPUS, {"partition": "gpu", "cpu_partition": "cpu"}, "slurm_partition", "gpu"),
        (CPU, {"partition": "gpu", "cpu_partition": "cpu"}, "slurm_partition", "cpu"),
        (CPU, {"partition": "gpu"}, "slurm_partition", "gpu"),
        (GPUS, {"constraint": "a100"}, "constraint", "a100"),
        (GPUS, {"qos": "high"}, "qos", "high"),
        (CPU, {"reservation": "week"}, "slurm_extra", "--reservation=week"),
    ],
)
def test_a_site_s_key_becomes_a_resource(needs, site, key, value):
    assert request_of(needs, Site(**site))[key] == value


def test_what_is_for_nodes_with_gpus_is_not_asked_of_others():
    request = request_of(CPU, SITE)
    assert (request["slurm_account"], request["qos"]) == ("lab", "high")
    assert request["constraint"] is None
    assert request["slurm_extra"] is None


@pytest.mark.parametrize(
    ("needs", "site", "extra"),
    [
        (GPUS, {"gpus_per_node": 8}, None),  # its share: its GPUs and their cores
        (NODES, {"gpus_per_node": 8}, "--exclusive"),  # all GPUs, so that nothing runs on the other cores
        (GPUS, {"exclusive": True}, "--exclusive"),
        (CPU, {"exclusive": True}, "--exclusive"),
        (CPU._replace(exclusive=False), {"exclusive": True}, None),
        (NODES, {"gpus_per_node": 8, "reservation": "week"}, "--exclusive --reservation=week"),
        (NODES, {"gpus_per_node": 8, "extra": "--nice=5"}, "--exclusive --nice=5"),
        (NODES._replace(whole_nodes=True), {}, "--exclusive"),  # the suite says that these are all
        (NODES._replace(whole_nodes=True, exclusive=False), {}, None),
        (GPUS, {"physical_cores": True}, "--hint=nomultithread"),
        (NODES, {"gpus_per_node": 8, "physical_cores": True}, "--exclusive --hint=nomultithread"),
    ],
)
def test_a_timed_job_has_its_node_or_its_share_alone(needs, site, extra):
    assert request_of(needs, Site(**site))["slurm_extra"] == extra


def test_launchers_on_several_nodes_have_physical_cores_too():
    """srun does not get to know what sbatch was told."""
    assert request_of(NODES, Site(physical_cores=True))["mpi"].endswith(" --cpus-per-task=32 --hint=nomultithread")


@pytest.mark.parametrize("needs", [NODES, GPUS, CPU])
def test_where_memory_is_not_tracked_none_is_asked_for(needs):
    assert request_of(needs, Site(gpus_per_node=8, memory_gb=0))["mem_mb"] == 0


@pytest.mark.parametrize(
    ("gpus_per_node", "whole"),
    [("", {8}), ("4", {4}), ("16", {16}), ("32", set())],
    ids=["the suite's", "4", "16", "more than are used"],
)
def test_a_cell_that_takes_all_gpus_of_a_node_is_alone_there(monkeypatch, gpus_per_node, whole):
    """Also where the suite says how many those are, and the site does not."""
    monkeypatch.setenv("LORAFUSION_SLURM_GPUS_PER_NODE", gpus_per_node)
    needs = {step.resources for step in dag_of("paper-grid").of_target("all")}
    assert {some.gpus for some in needs if "--exclusive" in (request_of(some, Site())["slurm_extra"] or "")} == whole


@pytest.mark.parametrize(("needs", "memory_mb"), [(NODES, 1_900_000), (GPUS, 64_000)])
def test_a_whole_node_comes_with_all_of_its_memory(needs, memory_mb):
    assert request_of(needs, Site(gpus_per_node=8, memory_gb=1900))["mem_mb"] == memory_mb


@pytest.mark.parametrize(
    ("processes", "per_node", "nodes"),
    [(1, 8, 1), (8, 8, 1), (16, 8, 2), (16, 4, 4), (6, 4, 2), (5, 4, 5), (12, 5, 3)],
)
def test_nodes_share_processes_evenly(processes, per_node, nodes):
    assert nodes_for(processes, per_node) == nodes
