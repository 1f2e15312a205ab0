"""Sample lengths: what the table promises, and the same numbers everywhere."""

from __future__ import annotations

import numpy as np
import pytest

from lorafusion.core.config import CONFIGS
from lorafusion.core.schema import UserError
from lorafusion.data.lengths import draw_lengths, make_workload, read_table

TABLE = read_table()
PINNED = [488, 644, 192, 224, 538, 493]


@pytest.mark.parametrize("dataset", sorted(TABLE))
def test_the_draws_have_the_tables_mean_and_spread(dataset):
    row = TABLE[dataset]
    lengths = np.array(draw_lengths(dataset, 100_000, seed=0))
    # The clamp takes 1 % off WikiSum's mean and less off the others'.
    assert lengths.mean() == pytest.approx(row.mean, rel=0.02)
    assert np.log(lengths[lengths < row.maximum]).std() == pytest.approx(row.log_sigma, rel=0.05)
    assert lengths.max() <= row.maximum


def test_a_draw_is_a_pure_function_of_dataset_and_seed():
    """Pinned: a change here changes every workload, plan and number."""
    assert draw_lengths("xsum", 6, seed=1) == PINNED
    assert draw_lengths("xsum", 6, seed=2) != PINNED
    assert draw_lengths("wikisum", 6, seed=1) != PINNED


def test_scale_divides_lengths_but_leaves_something_to_predict():
    full, scaled = draw_lengths("wikisum", 200, 3), draw_lengths("wikisum", 200, 3, scale=16)
    assert all(abs(a / 16 - b) <= 0.5 + 1 / 32 for a, b in zip(full, scaled, strict=True))
    assert min(draw_lengths("xsum", 500, 3, scale=4096)) == 2


def test_mixed_draws_from_all_three():
    mean = np.mean(draw_lengths("mixed", 60_000, seed=5))
    assert mean == pytest.approx(np.mean([row.mean for row in TABLE.values()]), rel=0.02)


def test_an_unknown_dataset_is_named_with_the_known_ones():
    with pytest.raises(UserError, match="unknown dataset 'arxiv'; known: cnn_dailymail, mixed, wikisum, xsum"):
        draw_lengths("arxiv", 1, 0)


@pytest.mark.parametrize("path", sorted((CONFIGS / "workloads").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_workload_file_makes_a_workload(path):
    workload = make_workload(path, samples=9, global_batch=4, seed=3)
    assert len(workload.jobs) == 4
    assert len({job.seed for job in workload.jobs}) == 4
    assert [len(job.batches) for job in workload.jobs] == [3] * 4


def test_a_bad_workload_file_is_named(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("description: x\nadapters:\n  - {dataset: xsum, rank: 0, alpha: 1}\n")
    with pytest.raises(UserError, match=r"bad\.yaml: adapters\.0\.rank: input should be greater than or equal to 1"):
        make_workload(path, samples=1, global_batch=1)


def test_an_adapter_has_a_linear_apart_or_merged(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text(
        "description: x\nadapters:\n  - {dataset: xsum, rank: 1, alpha: 1, target_modules: [qkv_proj, k_proj]}\n"
    )
    with pytest.raises(UserError, match=r"twice\.yaml: adapters\.0: target_modules: qkv_proj is .*, found k_proj too"):
        make_workload(path, samples=1, global_batch=1)
