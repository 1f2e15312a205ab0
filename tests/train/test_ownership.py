"""A training replaces nothing but what a training has made: its folder was empty when it began, or it is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafusion.core.schema import UserError
from lorafusion.launch.lock import locked
from lorafusion.planning import fast
from lorafusion.train import run as training
from lorafusion.train.config import read_train_config
from lorafusion.train.folder import OutputFolder, claim
from lorafusion.train.ownership import require_own
from lorafusion.train.run import train

# What a training writes at the top, and a folder and a file of a user's.
NAMES = ["model.yaml", "metrics.jsonl", "data/rows.safetensors", "adapters/a/README.md", "state/a.safetensors",
         "log.txt", "workload.json", "status.json", "runs/000/plan.json", "progress.json", "notes/x", ".x"]  # fmt: skip


def jobs_file(folder: Path, output: object = "out", name: str = "jobs.yaml", **changes) -> Path:
    job = {"name": "a", "data": {"synthetic": {"samples": 4}}}
    path = folder / name
    path.write_text(yaml.safe_dump({"model": "tiny", "output": str(output), "jobs": [job]} | changes))
    return path


def tree(folder: Path) -> dict[str, object]:
    """Everything in a folder: contents of files, targets of links, times of folders."""
    return {
        str(path.relative_to(folder)): path.readlink()
        if path.is_symlink()
        else (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in (folder, *folder.rglob("*"))
    }


def refused(path: Path, message: str) -> None:
    """The command refuses a jobs file in one line, and the folder is as it was."""
    before = tree(path.parent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "Training", lambda config: pytest.fail("a training was begun"))
        with pytest.raises(UserError, match=message) as caught:
            train(path)
    assert str(caught.value).startswith(f"{path}: output: ")
    assert len(str(caught.value).splitlines()) == 1
    assert tree(path.parent) == before


@settings(max_examples=40)
@given(names=st.sets(st.sampled_from(NAMES), min_size=1))
def test_whatever_a_user_keeps_in_a_folder_stays_there(tmp_path_factory, names):
    folder = tmp_path_factory.mktemp("user")
    for name in names:
        path = folder / "out" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    refused(jobs_file(folder), "holds files, but not those of a training")


def test_a_way_over_a_folder_that_is_still_to_be_made_leads_to_a_users_folder_too(tmp_path):
    (tmp_path / "user").mkdir()
    (tmp_path / "user" / "model.yaml").write_text("mine")
    refused(jobs_file(tmp_path, "new/../user"), "holds files, but not those of a training")


@pytest.mark.parametrize("name", ["jobs.yaml", "model.yaml"])
def test_a_folder_with_the_jobs_file_is_no_output(tmp_path, name):
    refused(jobs_file(tmp_path, ".", name), "holds files, but not those of a training")


def test_a_file_is_no_output(tmp_path):
    (tmp_path / "file").touch()
    refused(jobs_file(tmp_path, "file"), r"is no folder to write to \(Not a directory\)")
    refused(jobs_file(tmp_path, "file/deep"), r"is no folder to write to \(Not a directory\)")


def marked(folder: Path) -> Path:
    claim(folder)
    return folder


@pytest.mark.parametrize("link", ["log.txt", "data", "adapters/a", "data/a.safetensors", "wandb", ".lock"])
def test_nothing_is_written_through_a_link(tmp_path, link):
    (tmp_path / "mine").mkdir()
    path = marked(tmp_path / "out") / link
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(tmp_path / "mine")
    refused(jobs_file(tmp_path), f"{link} is a link, expected a file or folder of the training's own")


def test_wandbs_own_links_are_left_alone(tmp_path):
    (marked(tmp_path / "out") / "wandb").mkdir()
    (tmp_path / "out" / "wandb" / "latest-run").symlink_to("run")
    require_own(read_train_config(jobs_file(tmp_path)))


def test_the_output_folder_itself_may_be_a_link(tmp_path):
    (tmp_path / "large-disk").mkdir()
    (tmp_path / "out").symlink_to("large-disk")
    require_own(read_train_config(jobs_file(tmp_path)))


def test_what_is_read_is_not_kept_where_it_would_be_replaced(tmp_path):
    out = marked(tmp_path / "out")
    (out / "rows.jsonl").write_text('{"x": "y"}')
    (out / "base").mkdir()
    rows = {"name": "a", "data": {"jsonl": "out/rows.jsonl", "completion": "{x}"}}
    refused(jobs_file(tmp_path, jobs=[rows]), "holds .*rows.jsonl, which is read")
    data = {"data": {"text": "jobs.yaml"}, "evaluation": {"text": "out/rows.jsonl"}}
    refused(jobs_file(tmp_path, jobs=[rows | data]), "holds .*rows.jsonl, which is read")
    refused(jobs_file(tmp_path, model="out/base"), "out holds .*base, which is read")
    refused(jobs_file(tmp_path, tokenizer="out/base"), "out holds .*base, which is read")
    refused(jobs_file(out, ".", "model.yaml"), "holds .*model.yaml, which is read")


def test_a_training_marks_its_folder_before_it_writes(tmp_path, monkeypatch):
    """Killed anywhere after that, the same command goes on."""
    seen = []

    def stop(config, *_):
        seen.append(sorted(path.name for path in config.output.iterdir()))
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "Training", stop)
    path = jobs_file(tmp_path)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train(path)
    assert seen == [[".lock", "progress.json", "status.json"]] * 2


def test_what_an_interrupted_marking_leaves_is_no_obstacle(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".lock").touch()
    (tmp_path / "out" / ".progress.json.123").touch()
    require_own(read_train_config(jobs_file(tmp_path)))


def test_a_marked_folder_of_no_step_binds_to_no_settings(tmp_path):
    claim(tmp_path)
    folder = OutputFolder(tmp_path, {"dtype": "float32"})
    folder = OutputFolder(tmp_path, {"dtype": "float64"})
    folder.update(probed={"x": []})
    with pytest.raises(UserError, match="begun with dtype 'float64', now it is 'float32'"):
        OutputFolder(tmp_path, {"dtype": "float32"})


def test_a_folder_that_has_lost_its_mark_is_not_begun_anew(tmp_path, make_workload):
    workload = make_workload()
    out = tmp_path / "out"
    with locked(out):
        OutputFolder(out, {}).new_run(workload, fast.plan(workload, "lorafusion", 1, 64))
    (out / "progress.json").unlink()
    refused(jobs_file(tmp_path), "holds files, but not those of a training")


def test_a_folder_of_an_earlier_version_is_told_apart(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "progress.json").write_text('{"settings": {"seed": 1}, "jobs": {}, "probed": {}}')
    with pytest.raises(UserError, match="it was written by another version, or changed"):
        train(jobs_file(tmp_path))
