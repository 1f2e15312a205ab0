"""Slurm takes every request of the paper's grid, on nodes of eight and of four GPUs."""

from collections import defaultdict

import pytest

from lorafusion.core.schema import UserError
from lorafusion.lab.cluster.admission import minutes_allowed, require_admitted
from lorafusion.lab.cluster.limits import minutes_by_accounts
from lorafusion.lab.cluster.request import request_of
from lorafusion.lab.cluster.site import SITE, read_site
from lorafusion.lab.dag import Step
from lorafusion.lab.shared_jobs import groups_of
from lorafusion.lab.steps import dag_of
from tests.slurm.toy import cluster

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("any_cluster")]

CORES = 12  # that come with a GPU


@pytest.mark.parametrize(("nodes", "gpus"), [(2, 8), (4, 4)])
def test_slurm_takes_every_request_of_the_papers_grid(tmp_path, monkeypatch, nodes, gpus):
    cluster("start", NODES=nodes, GPUS=gpus, CPUS=CORES * gpus, MEM_MB=1_000_000)
    site = {"account": "lab", "partition": "long", "cpu_partition": "cpu"}
    site |= {"gpus_per_node": gpus, "cpus_per_gpu": CORES, "memory_gb": 1000, "physical_cores": True}
    (tmp_path / "site.yaml").write_text("".join(f"{key}: {value}\n" for key, value in site.items()))
    monkeypatch.setenv(SITE, str(tmp_path / "site.yaml"))

    dag = dag_of("paper-grid")
    jobs: dict[str, list[Step]] = defaultdict(list)
    of_partitions, of_accounts = minutes_allowed(read_site()), minutes_by_accounts(read_site())
    shared = groups_of(dag, read_site(), lambda needs: min(of_partitions, of_accounts(needs)))
    for step in dag.of_target("all"):
        if not step.kind.quick:
            jobs[shared.get(step, step.relative)].append(step)
    requests = {
        name: request_of(steps[0].resources, read_site()) | {"runtime": sum(step.resources.minutes for step in steps)}
        for name, steps in jobs.items()
    }
    assert {request["slurm_partition"] for request in requests.values()} == {"long", "cpu"}
    assert max(request["nodes"] or 1 for request in requests.values()) == nodes
    require_admitted(requests)  # by sbatch --test-only
    with pytest.raises(UserError, match="Invalid feature specification"):
        require_admitted({name: request | {"constraint": "none"} for name, request in requests.items()})
