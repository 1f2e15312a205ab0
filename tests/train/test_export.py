"""Each adapter is written when its job ends, once, and one that cannot be written hinders no other."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import yaml

from lorafusion.core.config import read_model
from lorafusion.core.schema import UserError
from lorafusion.train import export as exporting
from lorafusion.train.run import DONE, FAILED, train
from tests.train import playback
from tests.train.playback import files, jobs_file, status

TENSORS = "adapter_model.safetensors"


def adapter(folder: Path, name: str) -> Path:
    return folder / "out" / "adapters" / name


def identities(folder: Path, name: str) -> dict[str, tuple[int, int]]:
    """Of an adapter's files what changes when they are written again."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in adapter(folder, name).iterdir()}


@pytest.fixture
def failing(monkeypatch):
    """Has the export of the jobs in the set fail, as on a full disk."""
    names = set()
    export = exporting.export

    def export_or_fail(job, *arguments, **options):
        if job.name in names:
            raise OSError(28, "No space left on device", str(options["folder"]))
        export(job, *arguments, **options)

    monkeypatch.setattr(exporting, "export", export_or_fail)
    return names


def test_a_job_is_exported_while_the_others_train(recorded, tmp_path):
    seen = {}

    def look(slot: int) -> None:
        states = {name: job["state"] for name, job in status(tmp_path)["jobs"].items()}
        there = {name for name in states if (adapter(tmp_path, name) / TENSORS).exists()}
        assert there == {name for name, state in states.items() if state == "exported"}
        seen[slot] = states

    with playback.played(recorded, look):
        assert train(jobs_file(tmp_path)) == DONE
    assert list(seen.values())[:1] == [{"short": "exported", "long": "training"}]
    assert list(seen.values())[-1] == {"short": "exported", "long": "exported"}
    assert files(tmp_path) == files(recorded)


def test_an_adapter_is_not_exported_twice(recorded, tmp_path):
    """Neither at the end of the run nor when the same command goes on after it was killed."""
    written = []

    def look(slot: int) -> None:
        written.append(identities(tmp_path, "short"))
        if len(written) == 2:
            raise KeyboardInterrupt

    path = jobs_file(tmp_path)
    with playback.played(recorded, look), pytest.raises(KeyboardInterrupt):
        train(path)
    with playback.played(recorded):
        assert train(path) == DONE
        assert train(path) == DONE
    assert written[0] == written[1] == identities(tmp_path, "short")


def test_one_that_cannot_be_exported_hinders_no_other(recorded, played, tmp_path, failing, capsys):
    failing.add("short")
    path = jobs_file(tmp_path)
    assert train(path) == FAILED
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("error: failed: short could not be exported: ")
    assert "No space left on device" in said[-1]
    assert (adapter(tmp_path, "long") / TENSORS).exists()
    assert not adapter(tmp_path, "short").exists()
    assert {name: job["state"] for name, job in status(tmp_path)["jobs"].items()} == {
        "short": "failed", "long": "exported"
    }  # fmt: skip
    before = identities(tmp_path, "long")
    failing.clear()
    played.clear()
    assert train(path) == DONE
    assert played == [], "only what is missing is done"
    assert identities(tmp_path, "long") == before
    assert files(tmp_path) == files(recorded)


def test_one_that_could_not_be_exported_at_its_end_is_at_the_end_of_the_run(recorded, tmp_path, failing, capsys):
    failing.add("short")
    with playback.played(recorded, lambda slot: failing.clear()):
        assert train(jobs_file(tmp_path)) == DONE
    assert capsys.readouterr().err.count("warning: short could not be exported") == 1
    assert files(tmp_path) == files(recorded)


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", [TENSORS, "adapter_config.json", "training.json", "README.md"])
@pytest.mark.parametrize("damage", [Path.unlink, flipped])
def test_an_adapter_that_is_not_whole_is_written_again(recorded, played, tmp_path, name, damage):
    path = jobs_file(tmp_path)
    assert train(path) == DONE
    before = identities(tmp_path, "long")
    (adapter(tmp_path, "short") / "of_mine.txt").write_text("mine")
    damage(adapter(tmp_path, "short") / name)
    changed = (adapter(tmp_path, "short") / name).read_bytes() if damage is flipped else b""
    assert train(path) == DONE
    if (name, damage) == ("README.md", flipped):
        assert (adapter(tmp_path, "short") / name).read_bytes() == changed, "its owner may have edited it"
        changed = b""
        (adapter(tmp_path, "short") / name).unlink()
    (adapter(tmp_path, "short") / "of_mine.txt").unlink()
    assert files(tmp_path) == files(recorded)
    assert identities(tmp_path, "long") == before


def test_what_others_put_beside_an_adapter_stays(played, tmp_path):
    path = jobs_file(tmp_path)
    adapter(tmp_path, "short").mkdir(parents=True)
    with pytest.raises(UserError, match="holds files, but not those of a training"):
        train(path)
    os.removedirs(adapter(tmp_path, "short"))
    assert train(path) == DONE
    (adapter(tmp_path, "short") / "merged.bin").write_text("mine")
    (adapter(tmp_path, "short") / TENSORS).unlink()
    assert train(path) == DONE
    assert (adapter(tmp_path, "short") / "merged.bin").read_text() == "mine"


def test_a_link_in_place_of_an_adapter_is_not_followed(recorded, tmp_path, capsys):
    """One that appears while the jobs train; at the start the whole folder would be refused."""
    mine = tmp_path / "mine"
    mine.mkdir()

    def link(slot: int) -> None:
        (tmp_path / "out/adapters").mkdir(exist_ok=True)
        if not adapter(tmp_path, "long").is_symlink():
            adapter(tmp_path, "long").symlink_to(mine)

    with playback.played(recorded, link):
        assert train(jobs_file(tmp_path)) == FAILED
    assert "long: a link, expected a folder of the training's own" in capsys.readouterr().err
    assert list(mine.iterdir()) == []


def test_a_damaged_state_is_not_exported(recorded, played, tmp_path, failing, capsys):
    """The adapter of a finished job, which no checkpoint has any more."""
    failing.add("short")
    path = jobs_file(tmp_path)
    assert train(path) == FAILED
    failing.clear()
    [state] = (tmp_path / "out/state").glob("short.*")
    flipped(state)
    capsys.readouterr()
    assert train(path) == FAILED
    assert re.search(r"short could not be exported: .*short\.\w+\.safetensors: damaged", capsys.readouterr().err)
    assert not adapter(tmp_path, "short").exists()


def test_a_job_without_all_its_rows_is_not_taken_for_done(recorded, played, tmp_path, capsys):
    path = jobs_file(tmp_path)
    training_rows = exporting.History.complete

    def without_the_first(self, job: str):
        return {step: row for step, row in training_rows(self, job).items() if (job, step) != ("short", 0)}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting.History, "complete", without_the_first)
        assert train(path) == FAILED
    assert "short: 1 of 2 steps have no row in its events, the first is 1" in capsys.readouterr().err
    assert train(path) == DONE
    assert json.loads((adapter(tmp_path, "short") / "training.json").read_text())["steps"][0]["step"] == 1


def test_a_card_shows_names_as_they_are(make_job, tmp_path):
    """None of them is Markdown, HTML or YAML to its readers."""
    model = read_model("tiny").model_copy(update={"weights": "acme/a_#b", "revision": "yes: [no]"})
    job = make_job(dataset="jsonl:<img src=x>|`a`*b*.jsonl", target_modules=("q_proj",))
    exporting.export(job, model, {}, {}, stopped=False, others=0, folder=tmp_path / "a")
    card = (tmp_path / "a" / "README.md").read_text()
    _, front_matter, text = card.split("---\n", 2)
    expected = {"library_name": "peft", "base_model": "acme/a_#b", "tags": ["lora", "lorafusion"]}
    assert yaml.safe_load(front_matter) == expected
    assert r"A LoRA adapter of acme/a\_\#b, revision yes: \[no\], trained" in text
    assert r"| dataset | jsonl:\<img src=x\>\|\`a\`\*b\*.jsonl, " in text
    assert "| target modules | q_proj |" in text


@pytest.mark.parametrize("is_there", [True, False])
def test_an_adapter_does_not_say_where_its_model_lies(make_job, tmp_path, is_there):
    """The card of a model whose folder was moved meanwhile named it as a repository of the hub."""
    folder = tmp_path / "private" / "llama"
    if is_there:
        folder.mkdir(parents=True)
    model = read_model("tiny").model_copy(update={"weights": str(folder)})
    exporting.export(make_job(), model, {}, {}, stopped=False, others=0, folder=tmp_path / "a")
    card, described = ((tmp_path / "a" / name).read_text() for name in ("README.md", "training.json"))
    assert "private" not in card + described
    assert "the model in a folder llama" in card
    assert json.loads(described)["base_model"]["weights"] == "./llama"
