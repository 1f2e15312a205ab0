"""The figure of tunings has a panel a workload, a row a system, and says what was tried and taken."""

from __future__ import annotations

import json

import pandas as pd
import pytest
from typer.testing import CliRunner

from lorafusion.cli.main import app
from lorafusion.core.schema import UserError
from lorafusion.lab.report import style
from lorafusion.lab.report.figures.tunings import draw_tunings, tunings_data
from lorafusion.lab.report.registry import FIGURES
from lorafusion.lab.table.table import MeasurementError
from lorafusion.lab.tuned import Tuned

FULL = {"status": "oom", "note": "it went wrong"}


@pytest.fixture
def tuned(tmp_path):
    """Writes the file of a cell; trials by capacity, a number or why there is none."""

    def tuned(system, trials, workload="mixed", gpus=1, qkv="", model="tiny", batch=8):
        cell = f"model~{model}/workload~{workload}/gpus~{gpus}/batch~{batch}{qkv}/system~{system}"
        tried = [
            {"capacity": capacity} | ({"throughput": rate} if isinstance(rate, float) else rate)
            for capacity, rate in trials.items()
        ]
        made = {
            "suite": "h200",
            "cell": cell,
            "system": system,
            "stages": gpus,
            "trials": tried,
            "data_parallel": 1,
            "config_hash": "c",
            "workload_hash": "h",
            "gpu_name": "a GPU",
            "git_sha": "a" * 40,
            "git_dirty": False,
            "tree_hash": "b" * 16,
        }
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        path.write_text(Tuned.model_validate(made).to_json())
        return path

    return tuned


def test_what_was_tried_and_taken_is_in_order(tuned, tmp_path):
    files = [tuned("lorafusion", {64: FULL, 32: 900.0, 16: 450.0}), tuned("mlora", {64: 100.0, 32: 100.0}),
             tuned("lorafusion", {64: FULL}, "xsum"), tuned("mlora", {64: 1.0}, model="large")]  # fmt: skip
    png, csv = FIGURES["tunings"].draw(files, tmp_path / "out" / "tunings", "tiny")[1:]
    assert png.stat().st_size
    data = pd.read_csv(csv)
    assert set(data["model"]) == {"tiny"}
    assert list(data["variant"].unique()) == ["mlora", "lorafusion"]
    ours = data[data["system"] == "lorafusion"]
    assert ours[["workload", "capacity", "taken"]].to_numpy().tolist() == [
        ["xsum", 64, True],  # the run will say what is wrong
        ["mixed", 16, False],
        ["mixed", 32, True],
        ["mixed", 64, False],
    ]
    assert list(ours["ratio"][1:3]) == [0.5, 1.0]
    assert list(ours["status"]) == ["oom", "ok", "ok", "oom"]
    assert list(data.loc[data["system"] == "mlora", "taken"]) == [False, True]  # of equal ones the largest


def test_rows_are_named_by_what_differs_and_in_order(tuned):
    files = [tuned("mlora", {8: 1.0}, gpus=gpus, qkv=qkv) for gpus in (16, 4) for qkv in ("", "/qkv~merged")]
    files.append(tuned("peft", {8: 1.0}, gpus=4))
    variants = list(tunings_data(files, "tiny")["variant"])
    assert variants == ["peft, 4 GPUs", "mlora, 4 GPUs", "mlora, 16 GPUs", "mlora, q k v merged, 4 GPUs",
                        "mlora, q k v merged, 16 GPUs"]  # fmt: skip
    batches = tunings_data([tuned("mlora", {8: 1.0}, batch=batch) for batch in (16, 8)], "tiny")
    assert list(batches["variant"]) == ["mlora, 8 a batch", "mlora, 16 a batch"]


def frames(ax):
    return sum(patch.get_facecolor()[3] == 0 for patch in ax.patches)


def test_words_and_frames_are_drawn(tuned):
    figure = draw_tunings(
        tunings_data([tuned("lorafusion", {64: FULL, 32: 12_340.0}), tuned("mlora", {64: FULL})], "tiny")
    )
    (ax,) = figure.axes
    assert sorted(text.get_text() for text in ax.texts) == ["12.3", "OOM", "OOM"]
    assert frames(ax) == 1  # none around a size that was not run to its end
    assert [label.get_text() for label in ax.get_yticklabels()] == ["mlora", "lorafusion"]


@pytest.mark.parametrize(("sizes", "lines"), [(1, 2), (3, 3), (6, 3), (9, 5)])
def test_numbers_have_room(tuned, sizes, lines):
    """Of five workloads and 15 systems, whatever the number of sizes."""
    rates = {512 * 2**place: 12_345.0 for place in range(sizes)}
    systems = list(style.SYSTEMS)[:15]
    figure = draw_tunings(
        tunings_data([tuned(one, rates, name) for name in style.WORKLOADS for one in systems], "tiny")
    )
    figure.draw_without_rendering()
    shown = [ax for ax in figure.axes if ax.texts]
    assert len({round(ax.get_position().y0, 3) for ax in shown}) == lines
    for ax in shown:
        box = ax.get_window_extent()
        text = ax.texts[0].get_window_extent()
        assert text.width < box.width / sizes
        assert text.height < box.height / len(systems)


def test_the_command_draws_them_and_refuses_other_files(tuned, tmp_path):
    stem, file = tmp_path / "tunings", tuned("mlora", {8: 1.0})
    command = ["lab", "figure", "smoke", "tunings", str(file), "--model", "tiny", "--out", str(stem)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert all(stem.with_suffix(end).stat().st_size for end in (".pdf", ".png", ".csv"))
    with pytest.raises(MeasurementError, match="no tuning of a cell of large in"):
        FIGURES["tunings"].draw([file], stem, "large")
    (tmp_path / "other.json").write_text(json.dumps({"version": 1}))
    with pytest.raises(UserError, match="other.json: tuning of version 1, expected version 3; make it again"):
        FIGURES["tunings"].draw([tmp_path / "other.json"], stem, "tiny")
