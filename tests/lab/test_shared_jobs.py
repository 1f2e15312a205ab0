"""Which steps share a Slurm job, and what that asks for, by Snakemake itself."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from lorafusion.lab.cluster.site import Site
from lorafusion.lab.shared_jobs import groups_of
from lorafusion.lab.steps import dag_of
from tests.lab.cluster.fake_slurm import FakeSlurm


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> FakeSlurm:
    return FakeSlurm(tmp_path / "slurm", monkeypatch)


def parts_of(suite: str, most: float = float("inf"), **site) -> list[list]:
    """The steps of each job that some share."""
    parts: dict[str, list] = {}
    for step, name in groups_of(dag_of(suite), Site(**site), lambda needs: most).items():
        parts.setdefault(name, []).append(step)
    return list(parts.values())


@pytest.mark.parametrize("suite", ["paper-grid", "h200", "smoke"])
def test_a_job_has_steps_that_need_the_same_on_a_node_within_its_time(suite):
    for part in parts_of(suite):
        assert len(part) > 1
        assert len({(step.kind.name, step.resources) for step in part}) == 1
        assert part[0].resources.nodes == 1
        assert not part[0].kind.quick
        assert sum(step.resources.minutes for step in part) <= 600


@pytest.mark.parametrize(("site", "most", "minutes"), [({"group_minutes": 240}, 600, 240), ({}, 300, 300)])
def test_a_job_is_no_longer_than_the_site_and_the_partition_allow(site, most, minutes):
    parts = parts_of("paper-grid", most, **site)
    assert max(sum(step.resources.minutes for step in part) for part in parts) <= minutes


def test_what_needs_more_may_be_shorter():
    """As where an account has so many minutes of a GPU."""
    suite, site = dag_of("paper-grid"), Site(jobs=1, group_minutes=600)
    parts: dict[str, list] = {}
    for step, name in groups_of(suite, site, lambda needs: 240 / max(1, needs.gpus)).items():
        parts.setdefault(name, []).append(step.resources)
    spent = [sum(needs.minutes for needs in part) * max(1, part[0].gpus) for part in parts.values()]
    assert 120 < max(spent) <= 240
    assert len({part[0].gpus for part in parts.values()}) > 1


def test_a_site_can_have_a_job_for_each_step():
    assert not parts_of("smoke", group_minutes=0)


def test_repeats_of_a_measurement_stay_apart():
    """They come one after another in the order of their priorities."""
    for part in parts_of("paper-grid"):
        priorities = [step.priority for step in part]
        assert priorities == sorted(priorities, reverse=True)
    runs = [part for part in parts_of("h200", jobs=64) if part[0].kind.name == "run"]
    assert all(len({step.name.rpartition("/")[0] for step in part}) == len(part) for part in runs)


def test_more_places_in_the_queue_are_used():
    assert len(parts_of("h200", jobs=64)) > 2 * len(parts_of("h200", jobs=16))


@pytest.mark.parametrize(("gpus_per_node", "most"), [("4", 125), ("8", 109)])
def test_the_papers_grid_is_a_hundred_jobs(slurm, tmp_path, gpus_per_node, most):
    """Snakemake's own count of what it would submit; sinfo knows no partition `gpu`, so the workflow ends there."""
    slurm.program("sinfo", "echo 'short*|1-00:00:00|1-infinite|2|96|1|1000000|gpu:8'")
    slurm.program("squeue", "")
    slurm.program("sbatch", "")
    words = ["--cores", "all", "--profile", "slurm", "--config", "suite=paper-grid", f"folder={tmp_path / 'results'}"]
    site = {"LORAFUSION_SLURM_GPUS_PER_NODE": gpus_per_node, "LORAFUSION_SLURM_PARTITION": "gpu"}
    done = subprocess.run([sys.executable, "-m", "snakemake", *words], text=True, capture_output=True,
                          env=os.environ | site | {"LORAFUSION_SLURM_CPU_PARTITION": "short"})  # fmt: skip
    output = done.stdout + done.stderr
    assert done.returncode != 0
    assert "no partition 'gpu'" in output, output
    steps, jobs = map(int, re.search(r"^(\d+) steps in (\d+) Slurm jobs$", output, re.MULTILINE).groups())
    assert (steps, jobs) == (386, most)
    assert not slurm.calls("sbatch") or all("--test-only" in call for call in slurm.calls("sbatch"))
    # What the longest job that steps share asks for: the sum of their minutes, and otherwise what a step needs.
    calls = " ".join(slurm.calls("sbatch"))
    assert "-t 600 --mem 4000 --requeue --ntasks=1 --cpus-per-task=1" in calls
