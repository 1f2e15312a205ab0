"""Runs that fail: which are tried once more, how they are told, and how they are tried again."""

from __future__ import annotations

import json
import signal
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
import pytest

from lorafusion.lab.dag import launch_again
from lorafusion.lab.runner import Share
from lorafusion.lab.tuned import TRY_CAPACITIES, Tuned
from lorafusion.launch.heartbeat import Watch
from lorafusion.launch.outcome import Outcome
from tests.cli.test_cli import lorafusion
from tests.lab.toy_suite import files, instant, run

pytestmark = pytest.mark.usefixtures("checked")


class Killer:
    """A launcher of real processes, the first of which are killed from outside: those of some numbers, from 1."""

    def __init__(self, tmp_path: Path, numbers: set[int]) -> None:
        self.folder, self.numbers, self.tasks = tmp_path, numbers, []

    def __call__(self, spec, processes, timeout, nodes=1, reports=None, log=None) -> Outcome:
        from tests import forked

        self.tasks.append(spec.task)
        reports = self.folder / f"reports-{len(self.tasks)}"
        watch = Watch(reports, processes)

        def kill() -> None:
            watch.look()
            for process in watch.seen.values():
                with suppress(psutil.NoSuchProcess):
                    psutil.Process(process.pid).send_signal(signal.SIGKILL)

        look = kill if len(self.tasks) in self.numbers else lambda: None
        return forked.launch(spec, processes, timeout, nodes, reports, look=look, log=log)


def results(folder: Path) -> dict[str, dict]:
    return {path.parent.name: json.loads(path.read_text()) for path in folder.rglob("repeat~1.json")}


def test_a_run_that_is_killed_from_outside_is_tried_once_more(suite, tmp_path):
    """So is a tuning. Whatever the order: the first launch of all is killed, and the last one of all runs."""
    launch = Killer(tmp_path, {1, 3})
    assert run(suite, tmp_path / "results", Share(), launch, float("inf")) == 0
    assert len(launch.tasks) == 1 + 3 * 2 + 2
    assert launch.tasks[0] == launch.tasks[1]
    assert {result["status"] for result in results(tmp_path / "results").values()} == {"ok", "skipped"}
    notes = [json.loads(path.read_text())["note"] for path in (tmp_path / "results").rglob("repeat~*.json")]
    tries = [note for note in notes if note.startswith("the second try, as a process of the first was killed: rank 0")]
    tuned = TRY_CAPACITIES in launch.tasks[:4:2]
    assert len(tries) == 2 - tuned
    (path,) = (tmp_path / "results" / "tuned").rglob("*.json")
    assert {trial.status for trial in Tuned.read(path).trials} == {"ok"}


def test_a_run_that_is_killed_twice_is_a_crash(suite, tmp_path):
    launch = Killer(tmp_path, set(range(1, 100)))
    assert run(suite, tmp_path / "results", Share(), launch, float("inf")) == 0
    paths = (tmp_path / "results" / "runs").rglob("repeat~*.json")
    results = [result for result in map(json.loads, map(Path.read_text, paths)) if "SIGKILL" in result["note"]]
    # One that ended before it was killed is what it is: only its cost is then unknown.
    killed = [result for result in results if "the cost is unknown" not in result["note"]]
    assert {result["status"] for result in killed} == {"crash"}
    again = "out-of-memory killer; the second try, as a process of the first was killed: rank"
    assert all(again in result["note"] for result in killed)


@pytest.mark.parametrize("status", ["ok", "crash", "nan", "oom", "timeout", "stopped"])
def test_no_other_end_of_a_run_is_tried_again(status):
    """It would hide a measurement that is not stable."""
    ends = []
    done = launch_again(lambda *_: ends.append(Outcome(status, "why")) or ends[-1], None, 1)
    assert (done, len(ends)) == (Outcome(status, "why"), 1)


def test_a_run_on_several_nodes_is_not_tried_again():
    """The launchers of the others do not know of it."""
    killed = Outcome("crash", "killed", killed=True)
    assert launch_again(lambda *_: killed, None, 16, 60.0, 2) is killed


@pytest.fixture
def here(suite, origin, tmp_path, monkeypatch):
    """`lorafusion lab run SUITE --here` with instant runs, each of which crashes while `broken` is there."""
    (tmp_path / "broken").touch()

    def launch(*arguments, **options) -> Outcome:
        done = instant(*arguments, **options)
        return done if (tmp_path / "broken").exists() or done.status == "ok" else Outcome("crash", "mended")

    monkeypatch.setattr("lorafusion.lab.forked.launch", launch)
    monkeypatch.setattr("lorafusion.lab.commands.launch", launch)
    return partial(lorafusion, "lab", "run", suite, "--here", "--folder", tmp_path / "results")


def test_failed_runs_are_told_with_the_command_that_tries_them_again(here, suite, tmp_path):
    folder = tmp_path / "results"
    done = here()
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == f"{folder}: all done"
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: failed: runs/model~tiny/")
    assert line.endswith(f"4 more; to try again: lorafusion lab run {suite} --here --again")
    made = files(folder)

    again = here()
    assert (again.returncode, again.stderr) == (1, done.stderr)
    assert {name for name, time in files(folder).items() if time != made[name]} == {".lock"}

    (tmp_path / "broken").unlink()
    assert here("--again").returncode == 1
    changed = {name for name, time in files(folder).items() if time != made[name]}
    results = {name for name in changed if name.startswith("runs/") and name.endswith(".json")}
    assert len(results) == 6
    assert not [name for name in results if "unsloth" in name]
    assert {json.loads((folder / name).read_text())["note"] for name in results} == {"mended"}
    assert {name.split("/")[0] for name in changed} <= {"runs", "logs", ".lock"}
    listed = lorafusion("lab", "list", suite, "run", "--folder", folder).stdout.splitlines()
    assert [line.endswith(": up to date, failed (crash)") for line in listed].count(True) == 6


def test_what_a_run_showed_is_not_tried_again(here, suite, tmp_path, monkeypatch):
    """Memory that does not suffice and losses that are no numbers are findings."""
    ends = ["nan", "oom", "timeout", "crash", "oom", "nan"]

    def launch(*arguments, **options) -> Outcome:
        done = instant(*arguments, **options)
        return done if done.status == "ok" else Outcome(ends.pop(), "why")

    monkeypatch.setattr("lorafusion.lab.forked.launch", launch)
    here()
    statuses = {path: json.loads(path.read_text())["status"] for path in (tmp_path / "results/runs").rglob("*.json")}
    before = files(tmp_path / "results")
    ends[:] = ["oom", "nan"]
    done = here("--again")
    changed = {name for name, time in files(tmp_path / "results").items() if time != before[name]}
    again = {str(path.relative_to(tmp_path / "results")) for path in statuses if statuses[path] in ("crash", "timeout")}
    assert len(again) == 2
    assert {name for name in changed if name.startswith("runs/") and name.endswith(".json")} == again
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)  # they are told, but no command would mend them
    assert "to try again" not in done.stderr


def test_one_step_that_fails_ends_with_status_1(here, suite, tmp_path, monkeypatch):
    here()
    path = next(path for path in (tmp_path / "results").rglob("system~peft-bf16/repeat~1.json"))
    done = lorafusion("lab", "run", suite, "--step", path)
    assert done.returncode == 1
    assert done.stdout == f"launched\n{path}: crash (nothing is run here)\n"
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: failed: {path.relative_to(tmp_path / 'results')} (crash); to try again: lorafusion")
    assert line.endswith("/system~peft-bf16/repeat~1.json'")


def test_a_deleted_result_is_made_again(here, suite, tmp_path):
    here()
    path = next(path for path in (tmp_path / "results").rglob("system~peft-bf16/repeat~2.json"))
    before, text = files(tmp_path / "results"), path.read_text()
    path.unlink()
    here()
    assert json.loads(path.read_text())["cell"] == json.loads(text)["cell"]
    assert {name for name, time in files(tmp_path / "results").items() if time != before[name]} == {
        str(path.relative_to(tmp_path / "results")) + end for end in ("", ".key")
    } | {f"logs/run/{path.relative_to(tmp_path / 'results' / 'runs').with_suffix('.log')}", ".lock"}
