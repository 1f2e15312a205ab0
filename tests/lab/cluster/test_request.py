"""What Slurm is asked for a step."""

from __future__ import annotations

import pytest

from lorafusion.lab.cluster.request import Resources, nodes_for, request_of
from lorafusion.lab.cluster.site import Site

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
        "srun --kill-on-bad-exit=1 --cpus-per-task=32",
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
    ],
)
def test_a_timed_job_has_its_node_or_its_share_alone(needs, site, extra):
    assert request_of(needs, Site(**site))["slurm_extra"] == extra


@pytest.mark.parametrize(("needs", "memory_mb"), [(NODES, 1_900_000), (GPUS, 64_000)])
def test_a_whole_node_comes_with_all_of_its_memory(needs, memory_mb):
    assert request_of(needs, Site(gpus_per_node=8, memory_gb=1900))["mem_mb"] == memory_mb


@pytest.mark.parametrize(
    ("processes", "per_node", "nodes"),
    [(1, 8, 1), (8, 8, 1), (16, 8, 2), (16, 4, 4), (6, 4, 2), (5, 4, 5), (12, 5, 3)],
)
def test_nodes_share_processes_evenly(processes, per_node, nodes):
    assert nodes_for(processes, per_node) == nodes
