"""No command replaces a device, a folder or what it reads: one line, status 2, and everything is as it was."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import get_type_hints

import pytest

from lorafusion.cli.common import Written
from lorafusion.cli.main import app
from lorafusion.core.config import CONFIGS
from lorafusion.core.files import require_outputs, write
from lorafusion.core.schema import UserError
from tests.cli.test_cli import lorafusion


def commands(group, prefix=()):
    """Every command of the program, as its words and its function."""
    for command in group.registered_commands:
        yield (*prefix, command.name or command.callback.__name__), command
    for part in group.registered_groups:
        yield from commands(part.typer_instance, (*prefix, *([part.name] if part.name else [])))


ALL = {" ".join(words): command for words, command in commands(app)}


@pytest.mark.parametrize("words", list(ALL))
def test_whatever_a_command_writes_is_marked(words):
    hints = get_type_hints(ALL[words].callback, include_extras=True)
    hints.pop("return")
    marked = {name for name, hint in hints.items() if any(isinstance(mark, Written) for mark in hint.__metadata__)}
    assert marked == ({"out", "trace", "curves", "step"} & hints.keys())


@pytest.mark.parametrize("words", list(ALL))
def test_the_help_of_a_command_has_an_example(words):
    example = ALL[words].epilog or ""
    assert re.match(rf"Example: lorafusion {words.removesuffix(' make')} ", example)


@pytest.fixture
def place(tmp_path):
    """A folder with an input, a link to it, a pipe, a folder and a file; and what stands in it, to compare."""
    (tmp_path / "in.csv").write_text("adapter,run,step,loss\n")
    (tmp_path / "link.csv").symlink_to("in.csv")
    (tmp_path / "hard.csv").hardlink_to(tmp_path / "in.csv")
    (tmp_path / "other").symlink_to(tmp_path)
    (tmp_path / "stdout").symlink_to("pages.html")  # as /dev/stdout, where a command's output goes to a file
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "pages.html").write_text("mine")
    return tmp_path


@pytest.fixture
def device():
    """A terminal: a device in a place where no file can be made, so that the machine keeps it whatever happens."""
    ends = os.openpty()
    yield os.ttyname(ends[1])
    for end in ends:
        os.close(end)


def state(folder: Path) -> dict:
    """What is in a folder: kinds, times and contents."""
    return {
        path.name: (path.lstat().st_mode, path.lstat().st_mtime_ns, path.lstat().st_ino) for path in folder.iterdir()
    }


REFUSED = {
    "a device": ("{device}", "found a device or a pipe"),
    "standard output": ("{place}/stdout", "found a link"),
    "a pipe": ("{place}/pipe", "found a device or a pipe"),
    "a folder": ("{place}/folder", "found a folder"),
    "nothing": ("", "found an empty word"),
    "under a file": ("{place}/pages.html/x.json", "cannot be written (Not a directory)"),
    "too long": ("{place}/" + 300 * "x", "cannot be written (File name too long)"),
    "its input": ("{place}/in.csv", "it is read too"),
    "its input by another way": ("{place}/other/in.csv", "it is read too"),
    "its input, over a folder that is not there": ("{place}/new/../in.csv", "it is read too"),
    "a link, over a folder that is not there": ("{place}/new/../stdout", "found a link"),
    "its folder, over one that is not there": ("{place}/new/..", "found a folder"),
    "a link to its input": ("{place}/link.csv", "found a link"),
    "another name of its input": ("{place}/hard.csv", "it is read too"),
    "the configuration": (str(CONFIGS / "systems.yaml"), "it is read too"),
}
COMMANDS = {
    "workload": ["workload", "{place}/in.csv", "-o"],
    "plan": ["plan", "{place}/in.csv", "-o"],
    "a chart": ["plan", "show", "{place}/in.csv", "-o"],
    "a trace": ["plan", "show", "{place}/in.csv", "--trace"],
    "a verdict": ["lab", "check", "{place}/in.csv", "systems", "--out"],
    "curves": ["lab", "check", "{place}/in.csv", "lossless", "--curves"],
    "a step": ["lab", "run", "{place}/in.csv", "--step"],
}


@pytest.mark.parametrize("output", list(REFUSED))
@pytest.mark.parametrize("command", list(COMMANDS))
def test_an_output_that_would_cost_something_is_refused(place, device, command, output):
    before = state(place)
    path, message = REFUSED[output]
    done = lorafusion(*(word.format(place=place, device=device) for word in [*COMMANDS[command], path]))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert state(place) == before


def test_a_figure_does_not_replace_the_curves_it_is_drawn_from(place):
    done = lorafusion("lab", "figure", "smoke", "lossless", place / "in.csv", "--out", place / "in")
    assert (done.returncode, "in.csv: is to be written, but it is read too" in done.stderr) == (2, True)
    assert (place / "in.csv").read_text() == "adapter,run,step,loss\n"


@pytest.mark.parametrize("stem", [".", "..", "/"])
def test_a_figure_needs_a_name(place, stem):
    done = lorafusion("lab", "figure", "smoke", "lossless", place / "in.csv", "--out", stem)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "expected a path without suffix" in done.stderr


def test_a_table_is_not_written_over_a_result(place):
    (place / "measurements.csv").hardlink_to(place / "in.csv")
    done = lorafusion("lab", "measure", "smoke", "kernels", place / "in.csv", "--out", place)
    assert (done.returncode, "measurements.csv: is to be written, but it is read too" in done.stderr) == (2, True)
    assert (place / "in.csv").read_text() == "adapter,run,step,loss\n"


def test_the_second_output_is_looked_at_too(place):
    done = lorafusion("lab", "check", "smoke", "lossless", "-o", place / "x.json", "--curves", place / "pipe")
    assert done.stderr == f"error: {place}/pipe: expected a file to write, found a device or a pipe\n"
    done = lorafusion(
        "lab", "check", "smoke", "lossless", "-o", place / "x.json", "--curves", place / "other" / "x.json"
    )
    assert "is to be written twice" in done.stderr
    assert not (place / "x.json").exists()


def test_an_output_in_a_folder_without_permission_is_one_line(place, monkeypatch):
    monkeypatch.setattr("lorafusion.core.files.os.access", lambda path, mode: False)
    with pytest.raises(UserError, match=r"x\.json: cannot be written \(no permission in .*/folder\)"):
        require_outputs([place / "folder" / "new" / "x.json"], [])


@pytest.mark.parametrize("name", ["n" * 255, "\u65e5" * 85])
def test_a_name_may_be_as_long_as_the_file_system_has_them(tmp_path, name):
    write(tmp_path / name, "text")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "text")]


def test_another_name_of_an_output_keeps_what_it_had(place):
    """A page is put in the place of the one that was there, and not written into it."""
    (place / "kept.html").hardlink_to(place / "pages.html")
    write(place / "pages.html", "new")
    assert (place / "kept.html").read_text() == "mine"


def test_what_can_be_written_is_let_through(place):
    require_outputs([place / "new.json", place / "deep" / "new.json", place / "pages.html"], [place / "in.csv"])


@pytest.mark.parametrize("name", ["pipe", "folder"])
def test_a_file_is_not_written_over_something_else_by_any_code(place, name):
    before = state(place)
    with pytest.raises(UserError, match="expected a file to write, found a"):
        write(place / name, "text")
    assert state(place) == before
