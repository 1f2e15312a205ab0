"""The profile of the systems has a bar for each system and merging, a panel for each workload, and medians in it."""

from __future__ import annotations

import pandas as pd
import pytest
from typer.testing import CliRunner

from lorafusion.cli.main import app
from lorafusion.core.schema import UserError
from lorafusion.core.seals import seal
from lorafusion.lab.report.registry import FIGURES
from lorafusion.lab.table.table import MeasurementError
from lorafusion.lab.tuning import PROFILE_COLUMNS

CLASSES = {"idle": 10.0, "GEMM": 60.0, "LoRA": 30.0}  # in the wrong order on purpose


def profile(path, system, workload="mixed", qkv="separate", times=1.0):
    """A file as the profile of a cell is written."""
    whole = sum(CLASSES.values())
    rows = [
        {"suite": "h200", "cell": f"{workload}-{system}-{qkv}", "workload": workload, "qkv": qkv, "system": system,
         "gpu_name": "a GPU", "git_sha": "a" * 40, "class": name, "milliseconds": times * value, "kernels": 1,
         "share": value / whole}
        for name, value in CLASSES.items()
    ]  # fmt: skip
    pd.DataFrame(rows, columns=PROFILE_COLUMNS).to_csv(path, index=False)
    seal(path)
    return path


@pytest.fixture
def profiles(tmp_path):
    """Two workloads, two systems, one of them merged too and one measured thrice."""
    return [
        profile(tmp_path / "1.csv", "lorafusion", "wikisum"),
        profile(tmp_path / "2.csv", "lorafusion"),
        profile(tmp_path / "3.csv", "lorafusion", qkv="merged", times=0.5),
        *(profile(tmp_path / f"peft-{times}.csv", "peft", times=times) for times in (2.0, 9.0, 3.0)),
    ]


def test_the_profiles_are_drawn_by_workload_and_system(profiles, tmp_path):
    data = pd.read_csv(FIGURES["system_profile"].draw(profiles, tmp_path / "out" / "system_profile")[2])
    bars = data[["workload", "variant"]].drop_duplicates()
    assert bars.to_numpy().tolist() == [
        ["wikisum", "lorafusion"],
        ["mixed", "peft"],
        ["mixed", "lorafusion"],
        ["mixed", "lorafusion, q k v merged"],
    ]
    assert list(data["class"][:3]) == ["GEMM", "LoRA", "idle"]
    assert list(data.loc[data["system"] == "peft", "milliseconds"]) == [180, 90, 30]
    assert list(data["share"][:3]) == pytest.approx([0.6, 0.3, 0.1])


@pytest.mark.parametrize("name", ["config_hash", "plan_hash"])
def test_profiles_of_two_configurations_of_a_cell_have_no_median(tmp_path, name):
    paths = []
    for value in ("old", "new"):
        paths.append(profile(tmp_path / f"{value}.csv", "peft"))
        pd.read_csv(paths[-1]).assign(**{name: value}).to_csv(paths[-1], index=False)
        seal(paths[-1])
    with pytest.raises(MeasurementError, match=f"its profiles differ in {name}"):
        FIGURES["system_profile"].draw(paths, tmp_path / "out")


def test_the_command_draws_the_profiles_that_it_is_given(profiles, tmp_path):
    stem = tmp_path / "system_profile"
    result = CliRunner().invoke(
        app, ["lab", "figure", "smoke", "system_profile", *map(str, profiles), "--out", str(stem)]
    )
    assert result.exit_code == 0, result.output
    assert all(stem.with_suffix(end).stat().st_size for end in (".pdf", ".png", ".csv"))


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "other.csv").write_text("suite,cell\nh200,x\n")
    seal(tmp_path / "other.csv")
    with pytest.raises(MeasurementError, match=r"other.csv: no column 'class'; a step profile writes them"):
        FIGURES["system_profile"].draw([tmp_path / "other.csv"], tmp_path / "out")


def test_a_profile_that_was_cut_is_refused(profiles, tmp_path):
    lines = profiles[0].read_text().splitlines(keepends=True)
    profiles[0].write_text("".join(lines[:-1]))
    with pytest.raises(UserError, match=r"1\.csv: cut or edited"):
        FIGURES["system_profile"].draw(profiles, tmp_path / "out")
