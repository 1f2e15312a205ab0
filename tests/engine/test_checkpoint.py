"""Killed at any moment and started again, a run ends with the same bits; what is not its own it does not go on from."""

from __future__ import annotations

import os
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from lorafusion.core import manifest
from lorafusion.core.manifest import MANIFEST
from lorafusion.core.plan import Plan
from lorafusion.core.workload import Workload
from lorafusion.engine.checkpoint import CheckpointError, drop_beyond, identity, newest, opened
from lorafusion.engine.saving import Checkpoints
from lorafusion.lab.checks.toy_runs import toy_jobs
from lorafusion.launch.spec import STOP_FILE, RunSpec, Saving
from lorafusion.planning import fast
from tests import forked

TENSORS = "rank-0.safetensors"
CHANGES = {"epochs": 3, "max_grad_norm": 0.5, "schedule": "cosine", "warmup_steps": 2, "evaluate_every": 2}


class Training:
    """A run of two jobs with everything that has a state, in a folder of its own."""

    def __init__(self, folder: Path, stages: int, replicas: int, every: int | None = 5) -> None:
        self.folder, self.processes = folder, stages * replicas
        jobs = tuple(job.model_copy(update=CHANGES | {"evaluation": job.samples[:2]}) for job in toy_jobs())
        workload = Workload(name="toy", jobs=jobs)
        plan = fast.plan(workload, "lorafusion", stages, 96, replicas)
        folder.mkdir(exist_ok=True)
        (folder / "workload.json").write_text(workload.to_json())
        (folder / "plan.json").write_text(plan.to_json())
        self.checkpoints = folder / "checkpoints"
        self.slots = len(plan.slots())
        self.spec = RunSpec(
            system="lorafusion", model="tiny", workload=str(folder / "workload.json"), plan=str(folder / "plan.json"),
            saving=Saving(folder=str(self.checkpoints), every=every) if every else None,
            save_adapters=str(folder / "adapters"), events=str(folder / "events"),
        )  # fmt: skip

    def run(self, look=lambda: None):
        return forked.launch(self.spec, self.processes, 120, reports=self.folder / "reports", look=look)

    def run_until(self, slot: int, what):
        """Run, and do something once to the processes when all are before a slot; `what` gets their ids."""

        def do() -> None:
            places = sorted((self.folder / "reports").glob("position-*"))
            what([int(path.read_bytes().split(b"\n")[1]) for path in places])

        outcome = self.run(forked.once_before(slot, self.checkpoints, self.processes, do))
        shutil.rmtree(self.folder / "reports")
        return outcome

    @property
    def result(self) -> tuple[dict, list[str]]:
        """All trained tensors, and all events in an order of their own."""
        tensors = {
            (path.parent.name, name): value
            for path in (self.folder / "adapters").glob("*/*.safetensors")
            for name, value in load_file(path).items()
        }
        files = (self.folder / "events").glob("*.jsonl")
        return tensors, sorted(line for file in files for line in file.read_text().splitlines())

    def found(self):
        return newest(self.checkpoints, identity(self.spec, Plan.read(self.spec.plan).content_hash))


@pytest.mark.parametrize(("stages", "replicas"), [(1, 1), (2, 1), (2, 2)])
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path, stages, replicas):
    """Two microbatches after a checkpoint the last process is killed, and one after the next checkpoint all of them."""
    whole = Training(tmp_path / "whole", stages, replicas, every=None)
    assert whole.run().status == "ok"
    killed = Training(tmp_path / "killed", stages, replicas)
    assert killed.run_until(7, lambda pids: os.kill(pids[-1], signal.SIGKILL)).status == "crash"
    everyone = killed.run_until(11, lambda pids: [os.kill(pid, signal.SIGKILL) for pid in pids])
    assert everyone.status == "crash"
    last = killed.run()
    assert last.status == "ok"
    (tensors, events), (expected, expected_events) = killed.result, whole.result
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[key], expected[key]) for key in expected)
    assert events == expected_events
    found, _ = killed.found()
    assert found.slot == killed.slots


@pytest.mark.parametrize(("stages", "replicas"), [(1, 1), (2, 2)])
def test_a_run_that_is_asked_to_stop_saves_and_goes_on(tmp_path, stages, replicas):
    whole = Training(tmp_path / "whole", stages, replicas, every=None)
    assert whole.run().status == "ok"
    stopped = Training(tmp_path / "stopped", stages, replicas, every=5)
    outcome = stopped.run_until(7, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    assert (outcome.status, outcome.note) == ("stopped", "by SIGTERM, after saving a checkpoint")
    found, _ = stopped.found()
    assert 5 < found.slot < stopped.slots
    assert stopped.run().status == "ok"
    assert all(torch.equal(stopped.result[0][key], value) for key, value in whole.result[0].items())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A finished run with its last checkpoints."""
    training = Training(tmp_path_factory.mktemp("saved") / "run", 1, 1)
    assert training.run().status == "ok"
    return training


@pytest.fixture
def copied(saved, tmp_path):
    """Its checkpoints, to be damaged: two of them."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved.checkpoints, folder)
    assert len(sorted(folder.glob("slot-*"))) == 2
    return folder


def of(saved) -> dict:
    return identity(saved.spec, Plan.read(saved.spec.plan).content_hash)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def described(folder: Path, **changes) -> None:
    """A checkpoint that was written with other facts."""
    facts = manifest.facts_of(folder)
    origin = facts["origin"] | {key: value for key, value in changes.items() if key in facts["origin"]}
    manifest.seal(folder, manifest.entries(folder, ["rank-0.safetensors"]), facts | changes | {"origin": origin})


def with_the_tensors_before(last: Path) -> None:
    shutil.copy(min(last.parent.glob("slot-*")) / TENSORS, last)


DAMAGES = {
    "a bit of the tensors": (lambda last: flip(last / TENSORS), f"{TENSORS}: damaged, its hash is not the one"),
    "cut tensors": (lambda last: cut(last / TENSORS), f"{TENSORS}: damaged, it has 100 bytes, not"),
    "no tensors": (lambda last: (last / TENSORS).unlink(), f"{TENSORS}: missing"),
    "other tensors": (with_the_tensors_before, f"{TENSORS}: damaged, "),
    "a bit of the manifest": (lambda last: flip(last / MANIFEST), f"{MANIFEST}: damaged, not JSON"),
    "a cut manifest": (lambda last: cut(last / MANIFEST), f"{MANIFEST}: damaged, not JSON"),
    "no manifest": (lambda last: (last / MANIFEST).unlink(), f"not finished, it has no {MANIFEST}"),
    "a file too many": (lambda last: (last / "rank-1.safetensors").touch(), "rank-1.safetensors: not a file of this"),
    "another folder": (
        lambda last: described(last, slot=999),
        "it is the checkpoint of slot-000000999; it was renamed",
    ),
    "another plan": (lambda last: described(last, plan="00"), "of another run, its plan is not this one's"),
    "another dtype": (
        lambda last: described(last, dtype="float16"),
        "its dtype is not this one's ('float16', not 'float32')",
    ),
    "another version": (lambda last: described(last, version=0), "its version is not this one's (0, not 2)"),
}


@pytest.mark.parametrize(("damage", "reason"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_bad_checkpoint_is_refused_and_the_last_good_one_taken(saved, copied, damage, reason):
    before, last = sorted(copied.glob("slot-*"))
    damage(last)
    found, reasons = newest(copied, of(saved))
    assert found.path == before
    assert reason in reasons[0]
    with pytest.raises(CheckpointError, match=re.escape(reason)):
        opened(last, of(saved))


@given(name=st.sampled_from([TENSORS, MANIFEST]), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
def test_any_bit_of_a_checkpoint_counts(saved, copied, name, place, bit):
    before, last = sorted(copied.glob("slot-*"))
    whole = (last / name).read_bytes()
    damaged = bytearray(whole)
    damaged[int(place * len(whole))] ^= 1 << bit
    (last / name).write_bytes(damaged)
    assert newest(copied, of(saved))[0].path == before
    (last / name).write_bytes(whole)


def test_a_checkpoint_whose_events_are_damaged_is_passed_over(saved, copied, tmp_path):
    """The rows are there again when the slots after the one before have been run again."""
    shutil.copytree(saved.spec.events, tmp_path / "events")
    path = tmp_path / "events" / "replica-0.jsonl"
    before, last = (opened(one) for one in sorted(copied.glob("slot-*")))
    assert newest(copied, of(saved), tmp_path / "events")[0] == last
    data = path.read_bytes()
    path.write_bytes(data[:-10] + b"*" * 9 + b"\n")
    found, [reason] = newest(copied, of(saved), tmp_path / "events")
    assert found == before
    assert f"{path}: line {len(data.splitlines())} is broken (" in reason
    path.write_bytes(b"*" + data[1:])
    with pytest.raises(CheckpointError, match="line 1 is broken .* no good checkpoint is left"):
        newest(copied, of(saved), tmp_path / "events")


@pytest.mark.parametrize("damage", [lambda last: flip(last / TENSORS), lambda last: cut(last / MANIFEST), shutil.rmtree,
                                    lambda last: (last / MANIFEST).unlink()])  # fmt: skip
def test_where_none_is_good_nothing_is_begun_anew_in_silence(saved, copied, damage):
    for path in copied.glob("slot-*"):
        damage(path)
    with pytest.raises(CheckpointError, match=r"no good checkpoint is left; to begin anew, move all of them away"):
        newest(copied, of(saved))


def test_an_unfinished_first_checkpoint_is_none(saved, tmp_path):
    (tmp_path / "slot-000000005").mkdir()
    found, reasons = newest(tmp_path, of(saved))
    assert found is None
    assert len(reasons) == 1


def test_only_the_last_ones_are_kept(saved):
    assert [path.name for path in sorted(saved.checkpoints.glob("slot-*"))] == [
        f"slot-{(saved.slots - 1) // 5 * 5:09}", f"slot-{saved.slots:09}",
    ]  # fmt: skip
    assert not (saved.checkpoints / STOP_FILE).exists()


def test_a_damaged_old_checkpoint_hinders_no_new_one(saved, copied):
    old, last = sorted(copied.glob("slot-*"))
    cut(old / MANIFEST)
    Checkpoints(
        Saving(folder=str(copied), keep=1), {}, SimpleNamespace(rank=0, world=1, position=None), None, lambda: False
    )._clear()
    assert sorted(copied.glob("slot-*")) == [last]


def test_what_lies_beyond_the_one_gone_on_from_is_removed(saved, copied):
    """Else a part that an interrupted process left would complete the next attempt's checkpoint of that slot."""
    before, last = sorted(copied.glob("slot-*"))
    (last / MANIFEST).unlink()
    found, _ = newest(copied, of(saved))
    drop_beyond(copied, found)
    assert sorted(path.name for path in copied.glob("*slot*")) == [before.name]
    drop_beyond(copied, None)
    assert sorted(copied.glob("*slot*")) == []
