"""The figure of tunings has a panel a workload, a row a system, and says what was tried and taken."""

from __future__ import annotations

import json

import pandas as pd
import pytest
from typer.testing import CliRunner

from lorafusion.cli import app
from lorafusion.errors import UserError
from lorafusion.report.tunings_figure import draw, tunings, tunings_data
from lorafusion.tuning import VERSION

FULL = {"status": "oom", "note": "it went wrong"}


@pytest.fixture
def tuned(tmp_path):
    """Writes the file of a cell; trials by capacity, a number or why there is none."""

    def tuned(system, trials, workload="mixed", gpus=1, qkv="", model="tiny"):
        cell = f"model~{model}/workload~{workload}/gpus~{gpus}/batch~8{qkv}/system~{system}"
        tried = [
            {"capacity": capacity} | ({"throughput": rate} if isinstance(rate, float) else rate)
            for capacity, rate in trials.items()
        ]
        made = {
            "version": VERSION,
            "suite": "h200",
            "cell": cell,
            "system": system,
            "stages": gpus,
            "trials": tried,
            "data_parallel": 1,
            "workload_hash": "h",
            "gpu_name": "a GPU",
            "git_sha": "a" * 40,
            "git_dirty": False,
        }
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        path.write_text(json.dumps(made))
        return path

    return tuned


def test_what_was_tried_and_taken_is_in_order(tuned, tmp_path):
    files = [tuned("lorafusion", {64: FULL, 32: 900.0, 16: 450.0}), tuned("mlora", {64: 100.0, 32: 100.0}),
             tuned("lorafusion", {64: FULL}, "xsum")]  # fmt: skip
    png, csv = tunings(files, tmp_path / "out" / "tunings")[1:]
    assert png.stat().st_size
    data = pd.read_csv(csv)
    assert list(data["panel"].unique()) == ["xsum", "mixed"]
    mixed = data[data["panel"] == "mixed"]
    assert list(mixed["variant"].unique()) == ["mlora", "lorafusion"]
    ours = mixed[mixed["system"] == "lorafusion"]
    assert ours[["capacity", "taken"]].to_numpy().tolist() == [[16, False], [32, True], [64, False]]
    assert list(ours["ratio"][:2]) == [0.5, 1.0]
    assert list(ours["status"]) == ["ok", "ok", "oom"]
    assert list(mixed.loc[mixed["system"] == "mlora", "taken"]) == [False, True]  # of equal ones the largest


def test_names_have_what_differs(tuned):
    data = tunings_data([tuned("mlora", {8: 1.0}), tuned("mlora", {8: 1.0}, gpus=2, qkv="/qkv~merged", model="large")])
    assert list(data["panel"]) == ["mixed, large", "mixed, tiny"]
    assert list(data["variant"]) == ["mlora, GPUs 2, batch 8, q k v merged", "mlora, GPUs 1, batch 8"]


def test_words_and_frames_are_drawn(tuned):
    figure = draw(tunings_data([tuned("lorafusion", {64: FULL, 32: 12_340.0})]))
    (ax,) = figure.axes
    assert {text.get_text() for text in ax.texts} == {"OOM", "12.3"}
    assert sum(not patch.get_fill() or patch.get_facecolor()[3] == 0 for patch in ax.patches) == 1
    assert [label.get_text() for label in ax.get_yticklabels()] == ["lorafusion"]


def test_the_command_draws_them_and_refuses_other_files(tuned, tmp_path):
    stem = tmp_path / "tunings"
    result = CliRunner().invoke(app, ["figure", "tunings", str(tuned("mlora", {8: 1.0})), "--out", str(stem)])
    assert result.exit_code == 0, result.output
    assert all(stem.with_suffix(end).stat().st_size for end in (".pdf", ".png", ".csv"))
    (tmp_path / "other.json").write_text(json.dumps({"version": 1}))
    with pytest.raises(UserError, match="other.json: tuning of version 1, expected version 2; make it again"):
        tunings([tmp_path / "other.json"], stem)
