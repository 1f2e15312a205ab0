"""What a cluster would not run is refused before anything runs, in a line that says what to do."""

import subprocess
import sys

import pytest

from lorafusion.core.schema import UserError
from lorafusion.lab.cluster.admission import require_admitted
from lorafusion.lab.cluster.request import Resources, request_of
from lorafusion.lab.cluster.site import Site
from tests.slurm.toy import Workflow, cluster, lives, queue

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300), pytest.mark.usefixtures("two_nodes")]


@pytest.fixture
def workflow(tmp_path):
    return Workflow(tmp_path, "two-nodes")


@pytest.fixture
def half_installed():
    """The second node does not see the environment."""
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("a node with files of its own needs mount namespaces")
    cluster("lose", "toy2")
    cluster("return", "toy2", HIDDEN=sys.prefix)
    yield
    cluster("lose", "toy2")
    cluster("return", "toy2")


def refused(workflow, **changes):
    """The only error of a workflow that ends without a job."""
    before = len(lives())
    status, said = workflow.start("results/two-nodes/measurements.csv", **changes).end(120)
    errors = [line for line in said.splitlines() if "error:" in line]
    assert status != 0, said
    assert len(errors) == 1, said
    assert len(lives()) == before
    assert not queue()
    return errors[0]


def test_a_job_that_is_longer_than_its_partition_allows_is_refused(workflow):
    error = refused(workflow, LORAFUSION_SLURM_PARTITION="short")
    assert "runs/model~tiny" in error
    assert "15 minutes" in error
    assert "partition short" in error
    assert "at most 10" in error


def test_a_missing_account_is_named():
    """By what sbatch says."""
    with pytest.raises(UserError, match="a: Slurm would not run it: .*LORAFUSION_SLURM_ACCOUNT names an account"):
        require_admitted({"a": request_of(Resources(5, 100), Site(partition="long"))})


def test_a_node_without_the_environment_ends_it_within_a_minute(workflow, half_installed):
    before = len(lives())
    status, said = workflow.start().end(300)
    assert status != 0
    assert f"toy2: no {sys.executable}; install where all nodes see it" in said
    assert len(lives()) == before + 1, "jobs came after the preflight"
    assert int(lives()[-1].seconds) < 60
    assert not queue()
