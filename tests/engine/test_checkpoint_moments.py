"""A process that is killed, or whose disk is full, at any moment of saving leaves the checkpoint before or the new."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import wait
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorafusion.core.manifest import seal
from lorafusion.core.schema import UserError
from lorafusion.engine.checkpoint import adapter_state, load, load_initial, newest, seal_initial
from lorafusion.engine.events import EventLog
from lorafusion.engine.readback import Readback
from lorafusion.engine.saving import Checkpoints, HostCopy
from lorafusion.launch.spec import Saving
from tests.faults import Killed, fault_at, full_disk

ORIGIN = {"plan": "0"}


class Adapter:
    """What a checkpoint asks of an adapter."""

    def __init__(self, name: str, start: int = 0) -> None:
        self.job = SimpleNamespace(name=name, start=start)
        self.steps, self.stopped = 0, torch.zeros(())
        self.values = {"q/weight": torch.zeros(2, 3), "q/gradient": torch.zeros(2, 3), "stopped": torch.zeros(())}

    def state(self) -> dict[str, torch.Tensor]:
        return self.values

    def load(self, state: dict[str, torch.Tensor], steps: int) -> None:
        self.values, self.steps = state, steps


def run_of(folder, *names: str, rank: int = 0):
    """A run that has written a row for each slot."""
    log = EventLog(folder / "events" / f"replica-{rank}.jsonl")
    return SimpleNamespace(adapters=[Adapter(name) for name in names], ends=[6], begin=0,
                           record=SimpleNamespace(events=log, readback=Readback()), events_kept={},
                           pipeline=SimpleNamespace(device=torch.device("cpu")))  # fmt: skip


def advance(run, slot: int) -> None:
    for adapter in run.adapters:
        adapter.steps = slot
        adapter.values["q/weight"].fill_(slot)
    run.record.events.write({"slot": slot, "norm": 1.0})


def checkpoints(folder, rank: int = 0, processes: int = 1, store=None, keep: int = 1) -> Checkpoints:
    process = SimpleNamespace(rank=rank, world=processes, position=SimpleNamespace(set=str, waiting=str))
    return Checkpoints(Saving(folder=str(folder / "slots"), every=4, keep=keep), ORIGIN, process, store, lambda: False)


@pytest.mark.parametrize("error", [None, full_disk()], ids=["killed", "full"])
def test_saving_is_all_or_nothing(tmp_path, error):
    moment, died = 1, True
    while died:
        folder, died = tmp_path / str(moment), False
        run, saving = run_of(folder, "a", "b"), checkpoints(folder)
        advance(run, 4)
        saving.save(run, 4, last=True)
        advance(run, 8)
        with fault_at(moment, error):
            try:
                saving.save(run, 8, last=True)
            except (Killed, OSError):
                died = True
        found, _ = newest(folder / "slots", ORIGIN, folder / "events")
        assert found.slot in (4, 8)
        assert died or found.slot == 8
        again = run_of(folder, "a", "b")
        load(again, found, 0)
        assert all(bool((adapter.values["q/weight"] == found.slot).all()) for adapter in again.adapters)
        assert [adapter.steps for adapter in again.adapters] == [found.slot] * 2
        moment += 1
    assert moment > 4


class Store:
    """The processes' store, as far as checkpoints use it."""

    def __init__(self) -> None:
        self.values, self.changed = {}, threading.Condition()

    def set(self, key: str, value: str) -> None:
        with self.changed:
            self.values[key] = value
            self.changed.notify_all()

    def wait(self, keys: list[str]) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: all(key in self.values for key in keys), 20)

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)

    def get(self, key: str) -> bytes:
        return self.values[key].encode()

    def delete_key(self, key: str) -> None:
        del self.values[key]


def test_the_manifest_comes_after_all_parts(tmp_path):
    """The first process waits for the others; the events of every replica are noted."""
    store = Store()
    runs = [run_of(tmp_path, "a", rank=rank) for rank in range(3)]
    for run in runs:
        advance(run, 4)
    ranks = [checkpoints(tmp_path, rank, 3, store) for rank in range(3)]
    ranks[0].save(runs[0], 4)
    ranks[1].save(runs[1], 4)
    wait(ranks[0]._writing, 0.2)
    assert not (tmp_path / "slots/slot-000000004/manifest.json").exists()
    ranks[2].save(runs[2], 4)
    ranks[0]._finish()
    found, _ = newest(tmp_path / "slots", ORIGIN, tmp_path / "events")
    assert sorted(found.events) == ["replica-0.jsonl", "replica-1.jsonl", "replica-2.jsonl"]
    assert store.values == {}


def test_half_a_checkpoint_is_no_adapter(tmp_path):
    """A launcher reads one that is just being removed for a newer one."""
    store = Store()
    runs = [run_of(tmp_path, "a", rank=rank) for rank in range(2)]
    checkpoints(tmp_path, 1, 2, store).save(runs[1], 4)
    checkpoints(tmp_path, 0, 2, store).save(runs[0], 4, last=True)
    found, _ = newest(tmp_path / "slots", ORIGIN)
    assert sorted(adapter_state(found, "a")) == ["q/weight", "stopped"]
    for rank in range(2):
        found.part(rank).rename(tmp_path / "removed")
        with pytest.raises(FileNotFoundError):
            adapter_state(found, "a")
        (tmp_path / "removed").rename(found.part(rank))


def test_processes_that_disagree_make_no_checkpoint(tmp_path):
    store = Store()
    runs = [run_of(tmp_path, "a", rank=rank) for rank in range(2)]
    advance(runs[0], 4)
    checkpoints(tmp_path, 1, 2, store).save(runs[1], 4)
    with pytest.raises(RuntimeError, match="processes disagree on the steps made after 4 microbatches"):
        checkpoints(tmp_path, 0, 2, store).save(runs[0], 4, last=True)
    assert newest(tmp_path / "slots", ORIGIN)[0] is None


def test_a_checkpoint_is_due_at_intervals_and_where_a_job_ends(tmp_path):
    due = checkpoints(tmp_path).due
    run = SimpleNamespace(ends=[5, 8, 11])
    slots = [0]
    while slots[-1] < 14:
        slots.append(due(run, slots[-1]))
    assert slots == [0, 4, 6, 8, 9, 12, 16]


@contextmanager
def slow_disk() -> Iterator[threading.Event]:
    """Within it nothing is written before the event is set."""
    ready = threading.Event()
    write = HostCopy.write

    def write_late(self, path):
        assert ready.wait(20)
        return write(self, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HostCopy, "write", write_late)
        yield ready
        ready.set()


def test_a_run_trains_on_while_its_checkpoint_is_written(tmp_path):
    """What is written is the state at the checkpoint, to the last bit of weights, steps and events."""
    run, saving = run_of(tmp_path, "a", "b"), checkpoints(tmp_path)
    advance(run, 4)
    with slow_disk() as ready:
        saving.save(run, 4)
        advance(run, 7)
        assert not (tmp_path / "slots/slot-000000004/manifest.json").exists()
        ready.set()
        saving._finish()
    found, _ = newest(tmp_path / "slots", ORIGIN, tmp_path / "events")
    data = (tmp_path / "events/replica-0.jsonl").read_bytes()
    assert data[: found.events_kept["replica-0.jsonl"]].count(b"\n") == 1 == data.count(b"\n") - 1
    again = run_of(tmp_path, "a", "b")
    load(again, found, 0)
    assert [(adapter.steps, float(adapter.values["q/weight"].mean())) for adapter in again.adapters] == [(4, 4.0)] * 2


def test_one_that_is_still_being_written_delays_the_next_of_every_process(tmp_path, caplog):
    """It is tried again when as much more time has passed, and told once; the last one is never left out."""
    store = Store()
    runs = [run_of(tmp_path, "a", rank=rank) for rank in range(2)]
    ranks = [checkpoints(tmp_path, rank, 2, store, keep=9) for rank in range(2)]
    for run in runs:
        run.ends = []
    with slow_disk() as ready, caplog.at_level("INFO", "lorafusion"):
        for slot in (4, 5, 6, 8):
            for run, saving in zip(runs, ranks, strict=True):
                saving.save(run, slot)
        assert [saving.due(run, 8) for run, saving in zip(runs, ranks, strict=True)] == [12, 12]
        assert [saving.due(run, 5) for run, saving in zip(runs, ranks, strict=True)] == [6, 6]
        ready.set()
        ranks[0]._finish()
        for run, saving in zip(runs, ranks, strict=True):
            saving.save(run, 9)
        last = threading.Thread(target=ranks[0].save, args=(runs[0], 12, True))
        last.start()
        ranks[1].save(runs[1], 12, last=True)
        last.join(20)
    assert [path.name for path in sorted((tmp_path / "slots").glob("slot-*/manifest.json"))] == ["manifest.json"] * 3
    slots = [int(path.name.removeprefix("slot-")) for path in (tmp_path / "slots").glob("slot-*")]
    assert sorted(slots) == [4, 9, 12]
    messages = [record.message for record in caplog.records]
    assert sum("is still being written" in message for message in messages) == 1
    assert "3 checkpoints, " in messages[-1]
    assert "3 came later" in messages[-1]


def test_an_error_of_writing_ends_the_run_at_its_next_microbatch(tmp_path):
    run, saving = run_of(tmp_path, "a"), checkpoints(tmp_path)
    saving.save(run, 4)
    saving._finish()
    saving.stop_after(4, hold=5)
    with fault_at(1, full_disk()):
        saving.save(run, 8)
        wait(saving._writing)
        with pytest.raises(OSError, match="No space left on device"):
            saving.stop_after(8, hold=9)
    assert newest(tmp_path / "slots", ORIGIN)[0].slot == 4


def test_a_copy_is_written_as_safetensors_has_it(tmp_path):
    """Tensors of any size and dtype, also such as lie anyhow in memory."""
    tensors = {"a": torch.randn(3, 5).t(), "b": torch.randn(7, 3).bfloat16(), "c": torch.tensor(2.0),
               "é": torch.zeros(0), "d": torch.randn(5, dtype=torch.float64), "e": torch.randn(3).half()}  # fmt: skip
    copy = HostCopy(tensors, torch.device("cpu"))
    copy.take()
    entry = copy.write(tmp_path / "copy.safetensors")
    entry.require(tmp_path / "copy.safetensors")
    read = load_file(tmp_path / "copy.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], value) and read[name].dtype == value.dtype for name, value in tensors.items())


WRONG = {
    "another shape": ({"q/weight": torch.zeros(3, 2)}, "the shape of q/weight is \\(3, 2\\), not \\(2, 3\\)"),
    "a shape that would fit": ({"q/weight": torch.zeros(1, 3)}, "the shape of q/weight is \\(1, 3\\), not \\(2, 3\\)"),
    "a tensor too few": ({"q/weight": None}, "it has no q/weight"),
}


@pytest.mark.parametrize(("changes", "reason"), WRONG.values(), ids=WRONG.keys())
def test_tensors_must_fit_the_adapter(tmp_path, changes, reason):
    """Though they are the ones that the manifest knows."""
    run = run_of(tmp_path, "a")
    values = run.adapters[0].values | changes
    run.adapters[0].values = {name: value for name, value in values.items() if value is not None}
    checkpoints(tmp_path).save(run, 4, last=True)
    found, _ = newest(tmp_path / "slots", ORIGIN)
    with pytest.raises(UserError, match=f"not of the adapter 'a', {reason}"):
        load(run_of(tmp_path, "a"), found, 0)


@pytest.fixture
def initial(tmp_path):
    """States of two jobs after 3 and 5 steps."""
    (tmp_path / "initial").mkdir()
    for name, steps in (("a", 3), ("b", 5)):
        values = {"q/weight": torch.full((2, 3), float(steps)), "stopped": torch.zeros(())}
        save_file(values, tmp_path / "initial" / f"{name}.safetensors")
    seal_initial(tmp_path / "initial", {"a": 3, "b": 5})
    return tmp_path / "initial"


def test_jobs_begin_where_they_were(initial, tmp_path):
    run = run_of(tmp_path, "a", "b")
    run.adapters = [Adapter("a", start=3), Adapter("b", start=5), Adapter("new")]
    load_initial(run, initial)
    assert [adapter.steps for adapter in run.adapters] == [3, 5, 0]
    assert [float(adapter.values["q/weight"][0, 0]) for adapter in run.adapters] == [3.0, 5.0, 0.0]


def swapped(folder) -> None:
    (folder / "a.safetensors").rename(folder / "x")
    (folder / "b.safetensors").rename(folder / "a.safetensors")
    (folder / "x").rename(folder / "b.safetensors")


def of_other_steps(folder) -> None:
    seal_initial(folder, {"a": 4, "b": 5})


def flipped(folder) -> None:
    data = bytearray((folder / "b.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "b.safetensors").write_bytes(data)


@pytest.mark.parametrize("damage", [swapped, of_other_steps, flipped, lambda folder: seal(folder, {}, {"steps": {}})])
def test_jobs_do_not_begin_elsewhere(initial, tmp_path, damage):
    damage(initial)
    run = run_of(tmp_path)
    run.adapters = [Adapter("a", start=3), Adapter("b", start=5)]
    with pytest.raises(UserError):
        load_initial(run, initial)
    assert run.adapters[0].steps == 0
