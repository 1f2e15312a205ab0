"""Which state of the project a number comes from: never another repository's, and the same without one."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

import pytest

from lorafusion.core.machine import provenance
from lorafusion.core.schema import UserError
from lorafusion.core.source_tree import ROOT, SOURCES, commit_tree_hash, state, tree_hash


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, text=True, capture_output=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def project(tmp_path):
    """A little project of this one's form, without a repository."""
    root = tmp_path / "outer" / "project"
    for name in ("lorafusion/a.py", "kernels/fused_lora/b.py", "configs/suites/s.yaml", "docs/d.md"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (root / "pyproject.toml").write_text("x")
    return root


@pytest.fixture
def repository(project):
    git(project, "init", "-q")
    git(project, "add", ".")
    git(project, "commit", "-qm", "first")
    return project


def test_a_repository_around_the_project_is_somebody_elses(project):
    git(project.parent, "init", "-q")
    git(project.parent, "add", ".")
    git(project.parent, "commit", "-qm", "theirs")
    assert state(project) == {"git_sha": None, "git_dirty": None, "tree_hash": tree_hash(project)}


@pytest.mark.parametrize("name", ["LORAFUSION_GIT_SHA", "GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"])
def test_no_variable_of_the_environment_is_believed(repository, tmp_path, monkeypatch, name):
    before = state(repository)
    other = tmp_path / "other"
    other.mkdir()
    git(other, "init", "-q")
    git(other, "commit", "-qm", "other", "--allow-empty")
    monkeypatch.setenv(name, str(other / ".git"))
    assert state(repository) == before
    assert (
        before["git_sha"]
        == subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=repository, env={}, text=True, capture_output=True
        ).stdout.strip()
    )


def test_the_hash_is_the_same_with_and_without_a_repository_and_as_its_commits(repository):
    with_one = state(repository)
    assert with_one["git_dirty"] is False
    assert commit_tree_hash(with_one["git_sha"], repository) == with_one["tree_hash"]
    copy = repository.parent / "copy"
    shutil.copytree(repository, copy, ignore=shutil.ignore_patterns(".git", "docs"))
    assert state(copy) == {"git_sha": None, "git_dirty": None, "tree_hash": with_one["tree_hash"]}


@pytest.mark.parametrize(
    ("name", "text"),
    [("lorafusion/a.py", "changed"), ("lorafusion/new.py", ""), ("pyproject.toml", "y"), ("configs/suites/s.yaml", "")],
)
def test_a_changed_or_a_new_source_file_is_another_tree_and_dirty(repository, name, text):
    before = state(repository)
    (repository / name).write_text(text)
    after = state(repository)
    assert after["tree_hash"] != before["tree_hash"]
    assert (before["git_dirty"], after["git_dirty"]) == (False, True)
    git(repository, "add", ".")
    git(repository, "commit", "-qm", "second")
    assert state(repository)["git_dirty"] is False
    assert commit_tree_hash("HEAD", repository) == after["tree_hash"]
    assert commit_tree_hash("HEAD~1", repository) == before["tree_hash"]


def test_a_renamed_or_deleted_source_file_is_another_tree(repository):
    before = tree_hash(repository)
    (repository / "lorafusion" / "a.py").rename(repository / "lorafusion" / "c.py")
    renamed = tree_hash(repository)
    (repository / "lorafusion" / "c.py").unlink()
    assert len({before, renamed, tree_hash(repository)}) == 3


def test_a_changed_document_makes_it_dirty_and_is_no_source(repository):
    before = tree_hash(repository)
    (repository / "docs" / "d.md").write_text("changed")
    assert state(repository)["git_dirty"] is True
    assert tree_hash(repository) == before


def test_what_runs_and_installs_leave_is_no_source(repository):
    before = state(repository)
    for name in ("lorafusion/__pycache__/a.pyc", "kernels/build/x.py", "kernels/f.egg-info/PKG", "lorafusion/.a.py.77"):
        (repository / name).parent.mkdir(exist_ok=True, parents=True)
        (repository / name).touch()
    assert state(repository) == before


def test_a_repository_without_a_commit_vouches_for_nothing(project):
    git(project, "init", "-q")
    assert state(project) == {"git_sha": None, "git_dirty": True, "tree_hash": tree_hash(project)}


def test_an_unknown_commit_is_an_error(repository):
    with pytest.raises(UserError, match="git finds no commit 'none'"):
        commit_tree_hash("none", repository)


def test_each_tracked_source_file_of_this_project_counts_and_it_takes_no_time():
    begin = time.perf_counter()
    tree_hash()
    assert time.perf_counter() - begin < 2  # 0.03 s on an idle core
    assert {"git_sha", "git_dirty", "tree_hash"} <= provenance("cpu").keys()
    missing = [name for name in SOURCES if not (ROOT / name).exists()]
    assert not missing
