"""What is published offline is what the table says, stays on the machine, and does not double."""

from __future__ import annotations

import json
import os

import pytest

from lorafusion.core.schema import UserError
from lorafusion.lab.report import wandb_publisher
from lorafusion.lab.report.wandb_publisher import publish
from tests.lab.report.wandb_reader import read_back


@pytest.fixture(autouse=True)
def _no_network(monkeypatch, tmp_path):
    """No key, no home, and a proxy that refuses every connection."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "home")


@pytest.fixture
def runs(make_run):
    return [
        *(make_run(repeat=repeat) for repeat in (1, 2)),
        make_run("mlora"),
        make_run("mlora", repeat=2, status="oom"),
    ]


@pytest.fixture
def picture(tmp_path):
    from PIL import Image

    path = tmp_path / "end-to-end.png"
    Image.new("RGB", (4, 4), "white").save(path)
    return path


def test_what_is_read_back_is_the_table(runs, make_table, picture, tmp_path, capfd):
    table = make_table(runs)
    ids = publish(table, runs, [picture], tmp_path / "wandb", project="p")
    assert capfd.readouterr() == ("", "")
    assert list((tmp_path / "home").iterdir()) == []
    back = read_back(tmp_path / "wandb")
    assert list(back) == ids
    lorafusion, mlora, compare = (back[run] for run in ids)

    medians = table[(table["statistic"] == "median") & (table["system"] == "lorafusion")]
    for row in medians.to_dict("records"):
        extra = "/canary-gemm" if row["metric"] == "time" else ""
        assert lorafusion["summary"][f"{row['metric']}/{row['window']}{extra}"] == row["value"]
    assert (lorafusion["summary"]["status"], lorafusion["summary"]["repeats"]) == ("ok", 2)
    assert lorafusion["config"]["system"] == "lorafusion"
    assert lorafusion["config"]["implementation"] == "fused"
    assert lorafusion["config"]["python"] == "3.11.2"
    assert lorafusion["config"]["started_at"] == ["2025-01-01T00:00:01", "2025-01-01T00:00:02"]
    assert lorafusion["name"] == "model~tiny/workload~xsum/gpus~1/batch~8/system~lorafusion"
    assert (lorafusion["job_type"], lorafusion["tags"], lorafusion["exit_code"]) == (
        "end_to_end",
        ["measured", "ok"],
        0,
    )
    assert lorafusion["group"] == mlora["group"] == compare["group"]

    assert (mlora["tags"], mlora["exit_code"]) == (["measured", "oom"], 1)
    assert mlora["summary"]["note"] == "1 of 2 repeats failed (oom: it went wrong)"
    assert not any(key.startswith("throughput") for key in mlora["summary"])
    assert compare["job_type"] == "compare"
    assert compare["config"]["cells"] == {"ok": 1, "oom": 1}


def test_history_has_a_line_a_repeat_and_a_line_a_global_batch(runs, make_table, tmp_path):
    ids = publish(make_table(runs), runs, [], tmp_path / "wandb")
    history = read_back(tmp_path / "wandb")[ids[0]]["history"]
    assert len(history) == 2 * (1 + 3)
    assert history[0]["repeats/throughput/whole"] == 1441.0
    assert history[0]["repeat"] == 1
    assert history[2] == {"global_batch": 2, "loss/adapter-0/repeat-1": 3.1}
    assert history[4]["repeats/throughput/whole"] == 1448.0
    assert history[5] == {"global_batch": 1, "loss/adapter-0/repeat-2": 3.5, "loss/adapter-1/repeat-2": 3.25}


def test_the_comparison_holds_every_row_and_the_figure(runs, make_table, picture, tmp_path):
    table = make_table(runs)
    ids = publish(table, runs, [picture], tmp_path / "wandb")
    manifest = json.loads((tmp_path / "wandb" / "runs.json").read_text())
    files = tmp_path / "wandb" / manifest["runs"][ids[-1]]["folder"] / "files"
    published = {path.name.split("_")[0]: json.loads(path.read_text()) for path in files.rglob("*.table.json")}
    assert set(published) == {"medians", "repeats"}
    for name, statistic in (("medians", "median"), ("repeats", "single")):
        rows = table[table["statistic"] == statistic]
        assert published[name]["columns"] == list(table.columns)
        values = [row[list(table.columns).index("value")] for row in published[name]["data"]]
        assert values == [None if value is wandb_publisher.pd.NA else value for value in rows["value"]]
    (image,) = files.rglob("*.png")
    assert image.read_bytes() == picture.read_bytes()


def test_publishing_twice_replaces(runs, make_table, tmp_path):
    first = publish(make_table(runs), runs, [], tmp_path / "wandb")
    again = publish(make_table(runs), runs, [], tmp_path / "wandb")
    assert first == again
    assert len(list((tmp_path / "wandb" / "wandb").glob("offline-run-*"))) == len(first) == 3
    manifest = json.loads((tmp_path / "wandb" / "runs.json").read_text())
    assert list(manifest["runs"]) == first
    assert manifest["runs"][first[1]]["status"] == "oom"
    other = publish(make_table(runs[:2]), runs[:2], [], tmp_path / "other")
    assert not set(first) & set(other)  # another table is another sweep


def test_the_users_settings_of_wandb_are_neither_used_nor_lost(runs, make_table, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "elsewhere"))
    ids = publish(make_table(runs[:1]), runs[:1], [], tmp_path / "wandb")
    assert "mine" not in ids
    assert not (tmp_path / "elsewhere").exists()
    assert os.environ["WANDB_RUN_ID"] == "mine"
    assert "WANDB_DATA_DIR" not in os.environ


def test_a_table_longer_than_wandb_shows_is_split(runs, make_table, tmp_path, monkeypatch):
    monkeypatch.setattr(wandb_publisher, "MOST_ROWS", 4)
    ids = publish(make_table(runs), runs, [], tmp_path / "wandb")
    manifest = json.loads((tmp_path / "wandb" / "runs.json").read_text())
    files = tmp_path / "wandb" / manifest["runs"][ids[-1]]["folder"] / "files"
    names = sorted(path.name.split("_")[0] for path in files.rglob("*.table.json"))
    assert names == ["medians", "medians-2", "repeats", "repeats-2", "repeats-3"]


def test_mistakes_are_one_line(runs, make_table, tmp_path):
    table = make_table(runs)
    with pytest.raises(UserError, match="wandb: unknown mode 'on'; known: offline, online"):
        publish(table, runs, [], tmp_path / "wandb", mode="on")
    with pytest.raises(UserError, match="a.pdf: expected a PNG file"):
        publish(table, runs, [tmp_path / "a.pdf"], tmp_path / "wandb")
    with pytest.raises(UserError, match="wandb: No API key"):
        publish(table, runs, [], tmp_path / "wandb", mode="online")


def test_other_peoples_folders_are_not_emptied(runs, make_table, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("important")
    with pytest.raises(
        UserError, match="thesis: chapter.tex was not published there as it is; name a new or an empty folder"
    ):
        publish(make_table(runs), runs, [], tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "important"


def test_without_wandb_publishing_is_refused_in_one_line(runs, make_table, picture, tmp_path, monkeypatch):
    monkeypatch.setattr(wandb_publisher, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"publish: wandb is not installed; `pip install 'lorafusion\[wandb\]'`"):
        publish(make_table(runs), runs, [picture], tmp_path / "wandb")
    assert not (tmp_path / "wandb").exists()


def test_a_folder_without_a_whole_publication_is_not_read(tmp_path):
    with pytest.raises(UserError, match="no whole publication"):
        read_back(tmp_path)
