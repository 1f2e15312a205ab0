"""Small workloads that many tests share."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

from lorafusion.core.log import start_logging
from lorafusion.core.workload import Job, Sample, Workload

# The same examples every time, and no verdict by the clock of a machine that others may be using.
settings.register_profile("suite", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")
start_logging()  # as the command line does
os.environ.setdefault("LORAFUSION_SLURM_SITE", "")  # tests know no slurm/site.yaml of this checkout


def pytest_collection_modifyitems(items):
    """Slow tests first, so that none is left to one process at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_make_parametrize_id(val, argname):
    """Bytes are numbered: two collections can differ in their content, as gzip writes the time into its own."""
    return argname if isinstance(val, bytes) else None


def job(name="a", lengths=(5, 3, 8, 2, 6), **changes) -> Job:
    """A job with the given sample lengths; any field can be changed."""
    fields = {
        "name": name,
        "dataset": "toy",
        "rank": 4,
        "alpha": 8.0,
        "global_batch_size": 2,
        "samples": tuple(Sample(i, tokens) for i, tokens in enumerate(lengths)),
    }
    return Job(**(fields | changes))


def workload(*jobs: Job, name="toy") -> Workload:
    return Workload(name=name, jobs=jobs or (job("a"), job("b", (4, 4, 7, 9), global_batch_size=3)))


@pytest.fixture(name="make_job")
def _make_job():
    return job


@pytest.fixture(name="make_workload")
def _make_workload():
    return workload


@pytest.fixture
def forked_runs(monkeypatch):
    """The runs of `lorafusion.lab.checks` are those of tests/forked.py, whose processes import nothing."""
    from tests import forked  # imports torch, which most tests do without

    monkeypatch.setattr("lorafusion.lab.checks.toy_runs.launch", forked.launch)
