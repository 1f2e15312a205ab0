"""A publication replaces an earlier one and nothing else: what its manifest does not list, or not as it is, stays."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafusion.core.schema import UserError
from lorafusion.lab.report import published
from lorafusion.lab.report.published import replaced, require_own, write_manifest
from tests.cli.test_cli import lorafusion
from tests.train.test_ownership import tree

MANIFEST = "runs.json"


def publish(folder: Path, text: str) -> None:
    """Write a publication such as wandb does: files in folders, and a link."""
    with replaced(folder, MANIFEST) as new:
        (new / "wandb" / "run-1" / "files").mkdir(parents=True)
        (new / "wandb" / "run-1" / "run-1.wandb").write_text(text)
        (new / "wandb" / "run-1" / "files" / "a.json").write_text(text)
        (new / "wandb" / "latest-run").symlink_to("run-1")
        write_manifest(new, MANIFEST, {"runs": {}})


def refused(folder: Path, message: str) -> None:
    before = tree(folder.parent)
    with pytest.raises(UserError, match=message) as caught:
        publish(folder, "new")
    assert "\n" not in str(caught.value)
    assert tree(folder.parent) == before


def test_a_folder_with_a_users_files_is_refused_before_any_is_read(tmp_path, monkeypatch):
    """It may be a home, or /: reading everything there takes hours."""
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "thesis.tex").write_text("mine")
    monkeypatch.setattr(published, "_described", lambda path: pytest.fail(f"{path} was read"))
    refused(tmp_path / "d", r"thesis\.tex was not published there")


def test_a_folder_that_cannot_be_read_or_be_is_one_line(tmp_path, monkeypatch):
    refused(tmp_path / ("x" * 300), r"cannot be published to \(File name too long\)")
    publish(tmp_path / "d", "old")

    def unreadable(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(published, "_described", unreadable)
    refused(tmp_path / "d", r"cannot be published to \(Permission denied\)")


def test_an_earlier_publication_is_replaced_as_often_as_wanted(tmp_path):
    for text in ("one", "two", "three"):
        publish(tmp_path / "d", text)
        assert (tmp_path / "d" / "wandb" / "run-1" / "run-1.wandb").read_text() == text
        assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_an_empty_folder_and_a_link_to_one_will_do(tmp_path):
    (tmp_path / "d").mkdir()
    publish(tmp_path / "d", "one")
    (tmp_path / "link").symlink_to("d")
    publish((tmp_path / "link").resolve(), "two")
    assert (tmp_path / "link").is_symlink()


NAMES = ["wandb", "wandb/x", "wandb/run-1/x", "thesis.tex", "runs.json", ".x", "wandb/run-1/files/a.json",
         "wandb/run-1/run-1.wandb", "data/x", ".snakemake_timestamp"]  # fmt: skip


@settings(max_examples=40)
@given(names=st.sets(st.sampled_from(NAMES), min_size=1), published=st.booleans())
def test_what_a_user_has_in_the_folder_is_never_touched(tmp_path_factory, names, published):
    """His own files beside those of a publication, or where one would have them."""
    folder = tmp_path_factory.mktemp("user") / "d"
    if published:
        publish(folder, "old")
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(exist_ok=True) if name == "wandb" else path.write_text("mine")
    if published and names <= {"wandb"}:
        require_own(folder, MANIFEST)
    else:
        refused(folder, "name a new or an empty folder")


@pytest.mark.parametrize("manifest", ["", "[]", "{}", '{"files": 1}', '{"runs": {}}', "\x00"])
def test_a_manifest_of_another_kind_lists_nothing(tmp_path, manifest):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / MANIFEST).write_text(manifest)
    (tmp_path / "d" / "thesis.tex").touch()
    refused(tmp_path / "d", r"runs\.json: does not list what was published beside it")


def test_what_is_linked_from_a_publication_is_not_followed(tmp_path):
    publish(tmp_path / "d", "old")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    (tmp_path / "d" / "data").symlink_to(tmp_path / "mine")
    refused(tmp_path / "d", "data was not published there")
    (tmp_path / "d" / "data").unlink()
    os.mkfifo(tmp_path / "d" / "pipe")
    with pytest.raises(UserError, match="pipe was not published there"):
        require_own(tmp_path / "d", MANIFEST)


def test_a_file_that_was_changed_since_is_kept(tmp_path):
    publish(tmp_path / "d", "old")
    (tmp_path / "d" / "wandb" / "run-1" / "files" / "a.json").write_text("mine")
    refused(tmp_path / "d", r"a\.json was not published there as it is")


def test_what_was_sent_and_what_a_workflow_has_stamped_is_still_a_publication(tmp_path):
    publish(tmp_path / "d", "old")
    (tmp_path / "d" / "wandb" / "run-1" / "run-1.wandb.synced").write_text("https://example.org")
    (tmp_path / "d" / ".snakemake_timestamp").touch()
    publish(tmp_path / "d", "new")


def fail(folder: Path, error: type[BaseException]) -> None:
    with replaced(folder, MANIFEST) as new:
        (new / "half").touch()
        raise error


@pytest.mark.parametrize("error", [UserError, KeyboardInterrupt])
@pytest.mark.parametrize("earlier", [True, False])
def test_a_publication_that_fails_leaves_what_was_there(tmp_path, error, earlier):
    if earlier:
        publish(tmp_path / "d", "old")
    before = tree(tmp_path / "d") if earlier else None
    with pytest.raises(error):
        fail(tmp_path / "d", error)
    assert [path.name for path in tmp_path.iterdir()] == (["d"] if earlier else [])
    assert earlier is False or tree(tmp_path / "d") == before


def test_the_command_reads_everything_before_it_touches_the_folder(tmp_path):
    (tmp_path / "d" / "wandb").mkdir(parents=True)
    (tmp_path / "d" / "thesis.tex").touch()
    for name in ("r.json", "f.png", "table.csv"):
        (tmp_path / name).touch()
    before = tree(tmp_path)
    done = lorafusion(
        "lab", "publish", "smoke", tmp_path / "table.csv", tmp_path / "r.json", "--figure", tmp_path / "f.png",
        "--out", tmp_path / "d",
    )  # fmt: skip
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "r.json: not a result file, as it is not JSON" in done.stderr
    assert tree(tmp_path) == before
