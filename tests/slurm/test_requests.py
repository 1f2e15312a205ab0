"""Slurm takes every request of the paper's grid, on nodes of eight and of four GPUs."""

import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
from snakemake_executor_plugin_slurm.submit_string import get_submit_command
from snakemake_executor_plugin_slurm.utils import set_gres_string

from lorafusion.lab.cluster.request import request_of
from lorafusion.lab.cluster.site import SITE, read_site
from lorafusion.lab.steps import dag_of
from tests.slurm.toy import answer, cluster

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("any_cluster")]

CORES = 12  # that come with a GPU


class Asked(dict):
    """Resources as the plugin reads them: by key and by attribute."""

    __getattr__ = dict.__getitem__


def words_of(request):
    """The plugin's sbatch for a request."""
    asked = Asked({key: value for key, value in request.items() if value is not None})
    job = SimpleNamespace(resources=asked, threads=1)
    parameters = {
        "run_uuid": "grid",
        "slurm_logfile": Path("log"),
        "comment_str": "",
        "account": f"-A {asked.slurm_account}",
        "partition": f"-p {asked.slurm_partition}",
        "workdir": None,
    }
    return shlex.split(get_submit_command(job, parameters) + set_gres_string(job))


@pytest.mark.parametrize(("nodes", "gpus"), [(2, 8), (4, 4)])
def test_slurm_takes_every_request_of_the_papers_grid(tmp_path, monkeypatch, nodes, gpus):
    cluster("start", NODES=nodes, GPUS=gpus, CPUS=CORES * gpus, MEM_MB=1_000_000)
    site = {"account": "lab", "partition": "long", "cpu_partition": "cpu"}
    site |= {"gpus_per_node": gpus, "cpus_per_gpu": CORES, "memory_gb": 1000}
    (tmp_path / "site.yaml").write_text("".join(f"{key}: {value}\n" for key, value in site.items()))
    monkeypatch.setenv(SITE, str(tmp_path / "site.yaml"))

    steps = [step for step in dag_of("paper-grid").of_target("all") if not step.kind.quick]
    requests = {tuple(request_of(step.resources, read_site()).items()) for step in steps}
    assert {dict(request)["slurm_partition"] for request in requests} == {"long", "cpu"}
    assert max(dict(request)["nodes"] for request in requests) == nodes
    for request in requests:
        answer(*words_of(dict(request)), "--test-only", input="#!/bin/sh\n")  # fails where it could never start
