"""What the toy cluster takes: the paper's grid on nodes of four and of eight GPUs, and what it refuses at once."""

import subprocess

import pytest

from lorafusion.core.schema import UserError
from lorafusion.lab.cluster.admission import require_admitted
from lorafusion.lab.cluster.request import Resources, request_of
from lorafusion.lab.cluster.site import Site
from lorafusion.lab.steps import dag_of
from tests.slurm.toy import Workflow, cluster, lives

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]
LAB = Site(partition="long", account="lab")


@pytest.mark.parametrize(("gpus", "nodes"), [(4, 4), (8, 2)])
def test_the_papers_grid_passes_sbatch_test_only(any_cluster, monkeypatch, gpus, nodes):
    cluster("start", NODES=nodes, GPUS=gpus, CPUS=12 * gpus, MEM_MB=64_000 * gpus)
    monkeypatch.setenv("LORAFUSION_SLURM_GPUS_PER_NODE", str(gpus))
    site = LAB.model_copy(update={"gpus_per_node": gpus, "cpus_per_gpu": 12})
    steps = [step for step in dag_of("paper-grid").steps if not step.kind.quick]
    require_admitted({step.relative: request_of(step.resources, site) for step in steps})
    assert max(step.resources.nodes for step in steps) == nodes


@pytest.mark.parametrize(
    ("site", "reason"),
    [
        ({"partition": "short"}, "partition short: 65 minutes, at most 10 there; LORAFUSION_SLURM_PARTITION names a"),
        ({"partition": "gpu"}, "no partition 'gpu'; known: cpu, long, short; LORAFUSION_SLURM_PARTITION names one"),
        ({"account": None}, "sbatch: AssocMaxSubmitJobLimit; LORAFUSION_SLURM_ACCOUNT names an account; "),
        ({"account": "other"}, "sbatch: allocation failure: Invalid account or account/partition combination"),
        ({"constraint": "a100"}, "sbatch: allocation failure: Invalid feature specification"),
        ({"reservation": "week"}, "sbatch: allocation failure: Requested reservation is invalid"),
    ],
)  # fmt: skip
def test_what_slurm_would_refuse_is_said_in_a_line(two_nodes, site, reason):
    with pytest.raises(UserError) as error:
        require_admitted({"runs/a.json": request_of(Resources(65, 4000), LAB.model_copy(update=site))})
    assert str(error.value).startswith(f"runs/a.json: Slurm would not run it: {reason}")


def test_a_workflow_with_a_job_that_is_too_long_submits_none(two_nodes, tmp_path):
    workflow, before = Workflow(tmp_path, "suite"), len(lives())
    environment = workflow.environment | {"LORAFUSION_SLURM_PARTITION": "short", "LORAFUSION_SLURM_GPUS_PER_NODE": "4"}
    done = subprocess.run(
        ["snakemake", "--cores", "all", "--profile", "slurm", "--config", "suite=paper-grid"],
        cwd=workflow.checkout, env=environment, text=True, capture_output=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    assert "and 161 more: Slurm would not run it: partition short: 185 minutes, at most 10 there" in done.stderr
    assert len(lives()) == before
