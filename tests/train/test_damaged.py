"""Whatever is changed in a training's folder: the same command ends with the same adapters and rows, or says in one
line what is wrong. It never trains on from what it should not, and never begins anew in silence."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorafusion.core.schema import UserError
from lorafusion.train import export as exporting
from lorafusion.train.folder import read_progress, write_progress
from lorafusion.train.run import DONE, FAILED, train
from tests.train import playback
from tests.train.playback import JOBS, files, jobs_file

RUN = "out/runs/000"


@pytest.fixture(scope="module")
def begun(recorded, tmp_path_factory):
    """The training after its second checkpoint of several, killed."""
    folder = tmp_path_factory.mktemp("begun")

    def kill(slot: int) -> None:
        if len(list((folder / RUN / "checkpoints").glob("slot-*"))) == 2:
            raise KeyboardInterrupt

    with playback.played(recorded, kill), pytest.raises(KeyboardInterrupt):
        train(jobs_file(folder))
    return folder


@pytest.fixture(scope="module")
def finished(recorded, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    with playback.played(recorded):
        assert train(jobs_file(folder)) == DONE
    return folder


def memory(folder: Path) -> list[str]:
    """The files that going on depends on."""
    kept = [folder / "out/progress.json", *(folder / "out/state").glob("*"), *(folder / "out/runs").rglob("*")]
    return sorted(str(path.relative_to(folder)) for path in kept if path.is_file())


def ends_well_or_in_one_line(folder: Path, recorded: Path, capsys) -> bool:
    """Run the same command; was it refused?"""
    capsys.readouterr()
    path = jobs_file(folder)
    said = ""
    try:
        with playback.played(recorded):
            code = train(path)
    except UserError as error:
        code, said = FAILED, f"error: {error}"
    if code == DONE:
        assert files(folder) == files(recorded)
        return False
    assert code == FAILED
    last = said or capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert len(last.splitlines()) == 1
    return True


def copied(folder: Path, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder, target)
    return target


@given(file=st.floats(0, 1, exclude_max=True), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
def test_no_bit_is_changed_unseen(begun, recorded, tmp_path, capsys, file, place, bit):
    folder = copied(begun, tmp_path / "folder")
    names = memory(folder)
    path = folder / names[int(file * len(names))]
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1 << bit
    path.write_bytes(data)
    ends_well_or_in_one_line(folder, recorded, capsys)


@pytest.mark.parametrize("which", ["begun", "finished"])
def test_no_file_goes_unseen(begun, finished, recorded, tmp_path, capsys, which):
    """Each one of them gone, in turn."""
    source = {"begun": begun, "finished": finished}[which]
    for name in memory(source):
        folder = copied(source, tmp_path / "folder")
        (folder / name).unlink()
        ends_well_or_in_one_line(folder, recorded, capsys)


def without_progress(folder: Path) -> None:
    (folder / "out/progress.json").unlink()


def without_the_run(folder: Path) -> None:
    shutil.rmtree(folder / RUN)


def with_the_run_renamed(folder: Path) -> None:
    (folder / RUN).rename(folder / "out/runs/001")


def without_checkpoints(folder: Path) -> None:
    for path in (folder / RUN / "checkpoints").glob("slot-*"):
        shutil.rmtree(path)


def with_the_checkpoints_exchanged(folder: Path) -> None:
    first, second = sorted((folder / RUN / "checkpoints").glob("slot-*"))
    first.rename(folder / "spare")
    second.rename(first)
    (folder / "spare").rename(second)


def with_another_plan(folder: Path) -> None:
    path = folder / RUN / "plan.json"
    path.write_text(path.read_text().replace('"capacity": 64', '"capacity": 65'))


def with_a_broken_first_event(folder: Path) -> None:
    [path] = (folder / RUN / "events").iterdir()
    path.write_bytes(b"*" + path.read_bytes()[1:])


BEGUN = {
    "no progress": (without_progress, "holds files, but not those of a training"),
    "no run": (without_the_run, "runs/000/manifest.json: missing; put it back as it was, or take another"),
    "a renamed run": (with_the_run_renamed, "runs/000/manifest.json: missing"),
    "no checkpoints": (without_checkpoints, "its checkpoints are gone; no good checkpoint is left"),
    "exchanged checkpoints": (with_the_checkpoints_exchanged, "it was renamed; no good checkpoint is left"),
    "another plan": (with_another_plan, "plan.json: damaged, its hash is not the one that was noted; put it back"),
    "a broken event": (with_a_broken_first_event, r"replica-0.jsonl: line 1 is broken \(.*no good checkpoint is left"),
}


@pytest.mark.parametrize(("damage", "message"), BEGUN.values(), ids=BEGUN.keys())
def test_what_cannot_be_gone_on_from_is_told_and_left_as_it_is(begun, recorded, tmp_path, damage, message):
    folder = copied(begun, tmp_path / "folder")
    damage(folder)
    before = {path: path.read_bytes() for path in (folder / "out/runs").rglob("*") if path.is_file()}
    with playback.played(recorded) as launched, pytest.raises(UserError, match=message) as caught:
        train(jobs_file(folder))
    assert len(str(caught.value).splitlines()) == 1
    assert launched == []
    assert {path: path.read_bytes() for path in (folder / "out/runs").rglob("*") if path.is_file()} == before


def test_a_checkpoint_that_is_passed_over_is_told_in_one_line(begun, recorded, tmp_path, capsys):
    folder = copied(begun, tmp_path / "folder")
    last = max((folder / RUN / "checkpoints").glob("slot-*"))
    (last / "rank-0.safetensors").write_bytes(b"")
    assert not ends_well_or_in_one_line(folder, recorded, capsys)
    warnings = [line for line in capsys.readouterr().err.splitlines() if "passed over" in line]
    assert len(warnings) == 1
    assert re.match(rf"warning: passed over a checkpoint: {last}/rank-0.safetensors: damaged", warnings[0])


def test_a_training_that_was_moved_goes_on(begun, recorded, tmp_path, capsys):
    """All of it; the jobs file's relative paths mean the new place."""
    folder = copied(begun, tmp_path / "elsewhere" / "folder")
    assert not ends_well_or_in_one_line(folder, recorded, capsys)


def test_swapped_states_are_not_taken_for_each_other(recorded, tmp_path, monkeypatch, capsys):
    """Two finished jobs whose adapters could not be exported yet."""
    monkeypatch.setattr(exporting.Exporter, "look", lambda *_: [])
    with monkeypatch.context() as patch, playback.played(recorded):
        patch.setattr(exporting, "export", raising)
        assert train(jobs_file(tmp_path)) == FAILED
    one, other = sorted((tmp_path / "out/state").iterdir())
    one.rename(tmp_path / "spare")
    other.rename(one)
    (tmp_path / "spare").rename(other)
    assert ends_well_or_in_one_line(tmp_path, recorded, capsys)
    assert list((tmp_path / "out").glob("adapters/*")) == []


def raising(*_, **__):
    raise OSError(28, "No space left on device")


def test_a_job_does_not_take_anothers_progress(finished, recorded, tmp_path, capsys):
    folder = copied(finished, tmp_path / "folder")
    progress = read_progress(folder / "out")
    jobs = {"short": progress.jobs["long"], "long": progress.jobs["short"]}
    write_progress(folder / "out", progress.model_copy(update={"jobs": jobs}))
    assert ends_well_or_in_one_line(folder, recorded, capsys)


def test_the_rows_of_a_run_that_was_left_are_not_lost_unseen(finished, recorded, tmp_path, capsys):
    folder = copied(finished, tmp_path / "folder")
    [path] = (folder / RUN / "events").iterdir()
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], b"?" + lines[2][1:], *lines[3:]]))
    with pytest.raises(UserError, match=rf"{path}: line 3 is broken \(.*; put it back as it was, or take another"):
        train(jobs_file(folder, jobs=[*JOBS, {"name": "late"}]))
    path.write_bytes(b"".join(lines))
    assert not ends_well_or_in_one_line(folder, recorded, capsys)
