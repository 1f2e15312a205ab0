"""Groups of adapters as an array of Slurm tasks, as docs/guide/many-gpus.md says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.toy import REPOSITORY, answer, queue, wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600), pytest.mark.usefixtures("two_nodes")]
EXAMPLE = REPOSITORY / "examples" / "groups"
SECONDS = 240


def test_an_array_of_groups_goes_on_after_a_signal_and_ends_once(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    jobs = (EXAMPLE / "jobs.yaml").read_text().replace("../../results/example-groups", "adapters")
    Path("jobs.yaml").write_text(jobs.replace("samples: 16", "samples: 100").replace("    epochs: 2\n", ""))
    script = (EXAMPLE / "group.sbatch").read_text()
    Path("group.sbatch").write_text(script.replace("#SBATCH --gpus-per-node=4\n", ""))  # the toy nodes have none
    propose = ["lorafusion", "plan", "propose", "jobs.yaml", "--gpus", "2", "--write", "groups"]
    done = subprocess.run(propose, text=True, capture_output=True, timeout=SECONDS)
    assert "best: 2 groups of 1 x 1 GPUs" in done.stdout, done

    array = submit()
    wait_until(lambda: "0%, " in log(array, 0), SECONDS, "the first group trains")
    answer("scancel", "--batch", "--signal=TERM", f"{array}_0")
    expected = [f"{array}_0|COMPLETED", f"{array}_0|REQUEUED", f"{array}_1|COMPLETED"]
    wait_until(lambda: ends(array) == expected, SECONDS, f"the ends are {expected}")  # told after the queue is empty
    trained = [path.parent.name for path in Path("adapters").glob("group-*/adapters/*/adapter_model.safetensors")]
    assert sorted(trained) == ["east", "north", "south", "west"]

    again = submit()
    wait_until(lambda: not queue(), SECONDS, "both groups have ended again")
    assert all("all jobs are trained" in log(again, group) for group in (0, 1))


def ends(array: str) -> list[str]:
    """How the tasks of an array ended, each time that they did."""
    return sorted(answer("sacct", "-X", "-D", "-n", "-P", "-j", array, "--format=JobID,State").splitlines())


def submit() -> str:
    """The id of an array of both groups."""
    said = answer("sbatch", "--parsable", "--account=lab", "--partition=long", "--array=0-1", "group.sbatch", "groups")
    return said.strip()


def log(array: str, group: int) -> str:
    """What a task has printed."""
    path = Path(f"slurm-{array}_{group}.out")
    return path.read_text() if path.exists() else ""
