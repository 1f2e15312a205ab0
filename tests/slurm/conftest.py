"""One toy cluster for all tests here."""

import pytest

from tests.slurm.toy import cluster, end_all, require_possible


@pytest.fixture(scope="session")
def any_cluster():
    """One may be started; it is stopped in the end."""
    require_possible()
    yield
    cluster("stop")


@pytest.fixture(scope="module")
def two_nodes(any_cluster):
    cluster("start")
    yield
    end_all()
