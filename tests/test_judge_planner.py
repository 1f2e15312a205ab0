"""tools/judge_planner.py: its record is of this planner."""

from __future__ import annotations

import importlib.util

import pandas as pd
import pytest

from lorafusion.core.config import CONFIGS

ROOT = CONFIGS.parent


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("judge_planner", ROOT / "tools" / "judge_planner.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_case_is_in_the_record_once(tool):
    record = pd.read_csv(ROOT / "results/reference/cpu/planner_judged.csv")
    assert len(record) == len(tool.GRID) + tool.ODD
    assert not record.duplicated(["workload", "adapters", "stages", "model", "capacity"]).any()


@pytest.mark.parametrize("seed", [2, 5, 11])
def test_a_case_is_judged_as_it_is_recorded(tool, seed):
    record = pd.read_csv(ROOT / "results/reference/cpu/planner_judged.csv").set_index("workload")
    judged = tool.judged(tool.odd_case(seed))
    for name, value in judged.items():
        if isinstance(value, float):
            assert record.loc[f"odd-{seed}", name] == pytest.approx(value, rel=1e-4), name
