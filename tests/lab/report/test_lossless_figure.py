"""The figure of losses is drawn from whole curves alone."""

from __future__ import annotations

import pandas as pd
import pytest

from lorafusion.core.schema import UserError
from lorafusion.core.seals import seal
from lorafusion.lab.checks.verdicts import PLAIN, Curve, write_curves
from lorafusion.lab.report.figures.lossless import ALONE
from lorafusion.lab.report.registry import FIGURES


@pytest.fixture
def curves(tmp_path):
    path = tmp_path / "lossless.csv"
    write_curves([Curve("job-0", trainer, [2.0, 1.5]) for trainer in (ALONE, "2x1", PLAIN)], path)
    return path


def test_the_curves_are_drawn_with_their_difference_from_alone(curves, tmp_path):
    paths = FIGURES["lossless"].draw([curves], tmp_path / "figure")
    assert pd.read_csv(paths[2])["difference"].tolist() == [0.0] * 6


def test_curves_that_were_cut_or_edited_are_not_drawn(curves, tmp_path):
    text = curves.read_text()
    for changed in (text[: len(text) // 2], text.replace("1.5", "1.4")):
        curves.write_text(changed)
        with pytest.raises(UserError, match=r"lossless\.csv: cut or edited"):
            FIGURES["lossless"].draw([curves], tmp_path / "figure")
    assert not (tmp_path / "figure.png").exists()


def test_another_table_is_not_taken_for_curves(tmp_path):
    (tmp_path / "other.csv").write_text("job,value\na,1\n")
    seal(tmp_path / "other.csv")
    with pytest.raises(UserError, match=r"other\.csv: no column trainer; expected what the check lossless writes"):
        FIGURES["lossless"].draw([tmp_path / "other.csv"], tmp_path / "figure")
