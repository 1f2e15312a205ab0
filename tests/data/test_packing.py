"""A microbatch as tensors: packed end to end, or each sample in a row of its own length."""

from __future__ import annotations

import pytest
import torch

from lorafusion.core.plan import Bucket, Microbatch, Plan, statistics_of, violations
from lorafusion.core.schema import UserError
from lorafusion.data.packing import IGNORE, AdapterSegment, BatchBuilder
from lorafusion.data.tokens import SyntheticTokens, Tokens
from lorafusion.planning.common import segment

CPU = torch.device("cpu")


class Counted:
    """Token t of sample i of a job is 1000 (rank) + 100 i + t + 1: never 0, which rows are filled up with. The first
    half of a sample, at least one token, is not learnt."""

    def tokens(self, job, sample):
        return Tokens(1000 * job.rank + 100 * sample.id + 1 + torch.arange(sample.tokens), max(1, sample.tokens // 2))

    def labels(self, job, sample):
        return sample.tokens - max(1, sample.tokens // 2)


@pytest.fixture
def workload(make_job, make_workload):
    """Streams of 5 3 8 | 2 6, twice, and of 4 7 | 2 9."""
    return make_workload(
        make_job("a", (5, 3, 8, 2, 6), global_batch_size=3, epochs=2, rank=1), make_job("b", (4, 7, 2, 9), rank=2)
    )


def built(workload, places, row_tokens=None, bucket=None):
    parts = tuple(segment(workload, adapter, positions) for adapter, positions in places)
    microbatch = Microbatch(segments=parts, row_tokens=row_tokens, bucket=bucket)
    return BatchBuilder(workload, Counted(), CPU).build(microbatch)


def test_samples_are_packed_end_to_end(workload):
    batch = built(workload, [(0, (1, 2)), (1, (2,))])
    assert batch.input_ids.tolist() == [[1101, 1102, 1103, *range(1201, 1209), 2201, 2202]]
    assert batch.position_ids.tolist() == [[0, 1, 2, *range(8), 0, 1]]
    no = IGNORE
    assert batch.labels.tolist() == [1102, 1103, no, no, no, no, 1205, 1206, 1207, 1208, no, 2202, no]
    assert batch.positions.tolist() == [5, 6, 7, *range(8, 16), 11, 12]
    assert batch.borders.offsets.tolist() == [0, 3, 11, 13]
    assert batch.borders.offsets.dtype == torch.int32
    assert batch.borders.lengths == (3, 8, 2)
    assert batch.segments == (AdapterSegment(0, 11, 0, 0), AdapterSegment(11, 13, 1, 1))
    # 3 + 2 + 4 tokens of the first global batch are learnt, and 1 + 5 of the other adapter's second.
    assert batch.weights.tolist() == [1 / 9] * 11 + [1 / 6] * 2


def test_a_row_ends_in_padding_that_nothing_is_learnt_from(workload):
    batch = built(workload, [(0, (1, 2)), (1, (2,))], row_tokens=8)
    fill = [0] * 5
    assert batch.input_ids.tolist() == [[1101, 1102, 1103, *fill, *range(1201, 1209), 2201, 2202, 0, *fill]]
    assert batch.position_ids.tolist() == [[*range(8)] * 3]
    no = IGNORE
    assert batch.labels.tolist() == [
        *(1102, 1103, no, no, no, no, no, no),
        *(no, no, no, 1205, 1206, 1207, 1208, no),
        *(2202, no, no, no, no, no, no, no),
    ]
    assert batch.borders.offsets.tolist() == [0, 8, 16, 24]
    assert batch.borders.lengths == (8, 8, 8)
    assert batch.segments == (AdapterSegment(0, 16, 0, 0), AdapterSegment(16, 24, 1, 1))
    assert batch.weights.tolist() == [1 / 9] * 16 + [1 / 6] * 8
    # Padding runs into the places of the samples after it; what is computed there is not learnt from.
    assert batch.positions.tolist() == [*range(5, 13), *range(8, 16), *range(11, 19)]


@pytest.mark.parametrize("row_tokens", [None, 8])
def test_a_bucket_is_filled_by_a_sample_of_no_adapter(row_tokens, workload):
    places = [(0, (1, 2)), (1, (2,))]
    batch, filled = built(workload, places, row_tokens), built(workload, places, row_tokens, bucket=29)
    held = batch.input_ids.shape[1]
    for name in ("input_ids", "position_ids"):
        assert torch.equal(getattr(filled, name)[0], torch.cat([getattr(batch, name)[0], torch.zeros(29 - held)]))
    for name, value in (("labels", IGNORE), ("weights", 0.0), ("positions", 0)):
        before, after = getattr(batch, name), getattr(filled, name)
        assert torch.equal(after, torch.cat([before, torch.full((29 - held,), value, dtype=before.dtype)]))
        assert after.dtype == before.dtype
    assert filled.borders.lengths == (*batch.borders.lengths, 29 - held)
    assert filled.borders.offsets.tolist() == [*batch.borders.offsets.tolist(), 29]
    assert filled.segments == batch.segments
    assert built(workload, places, row_tokens, bucket=held).borders.lengths == batch.borders.lengths


@pytest.mark.parametrize("row_tokens", [8, 9, 16])
@pytest.mark.parametrize("places", [[(0, (0, 1, 2))], [(0, (3, 4)), (1, (0, 1))], [(0, (5, 6, 7))], [(0, (8,))]])
def test_real_tokens_are_the_same_in_rows_as_packed(places, row_tokens, workload):
    """Second epochs, too: places in the stream go on."""
    packed, rows = built(workload, places), built(workload, places, row_tokens)
    real = torch.cat([torch.arange(row_tokens) < length for length in packed.borders.lengths])
    assert len(real) == rows.input_ids.shape[1] == row_tokens * len(packed.borders.lengths)
    for name in ("input_ids", "position_ids"):
        assert torch.equal(getattr(rows, name)[0][real], getattr(packed, name)[0])
    for name in ("labels", "weights", "positions"):
        assert torch.equal(getattr(rows, name)[real], getattr(packed, name))
    assert (rows.labels[~real] == IGNORE).all()
    assert [(one.adapter, one.batch) for one in rows.segments] == [(one.adapter, one.batch) for one in packed.segments]


class Prompted(Counted):
    """Only the last token of a sample is learnt."""

    def tokens(self, job, sample):
        return super().tokens(job, sample)._replace(first_label=sample.tokens - 1)

    def labels(self, job, sample):
        return 1


@pytest.mark.parametrize("row_tokens", [None, 40])
def test_logits_are_made_of_what_is_learnt(row_tokens, make_job, make_workload):
    """And of some other tokens, so that there is a multiple of 16 of them."""
    workload = make_workload(make_job("a", (5, 30, 8, 2)), make_job("b", (40,)))
    microbatch = Microbatch(
        segments=(segment(workload, 0, (0, 1, 2, 3)), segment(workload, 1, (0,))), row_tokens=row_tokens
    )
    batch = BatchBuilder(workload, Prompted(), CPU).build(microbatch)
    learnt = (batch.labels != IGNORE).nonzero()[:, 0].tolist()
    assert len(learnt) == 5
    rows = batch.rows.tolist()
    assert (rows, len(rows)) == (sorted(set(rows)), 16)
    assert set(learnt) <= set(rows)
    assert torch.equal(batch.of(batch.tensors).rows, batch.rows)


def test_logits_are_made_of_all_tokens_where_that_costs_no_more(make_job, make_workload):
    workload = make_workload(make_job("a", (5, 3, 8)), make_job("b", (17, 100), global_batch_size=1))
    short, long = ((segment(workload, index, (0,)),) for index in range(2))
    for source, parts, expected in (
        (Prompted(), short, None),
        (Prompted(), long, 16),
        (SyntheticTokens(9), long, None),
    ):
        batch = BatchBuilder(workload, source, CPU).build(Microbatch(segments=parts))
        assert (batch.rows if batch.rows is None else len(batch.rows)) == expected


def test_the_microbatches_of_a_bucket_have_logits_of_as_many_tokens(make_job, make_workload):
    """Of as many as that with the most labels needs; one that needs all has them made of all in the others too."""
    workload = make_workload(make_job("a", (40, 8, 12), global_batch_size=1))
    parts = [(segment(workload, 0, (position,)),) for position in range(3)]
    builder, bucket = BatchBuilder(workload, Counted(), CPU), Bucket(tokens=64, samples=2, segments=1, longest=64)
    microbatches = [Microbatch(segments=part, bucket=64) for part in parts]
    assert builder.logit_rows(bucket, [Microbatch(noop=True), *microbatches]) == 32  # 20 labels
    assert builder.logit_rows(bucket, microbatches[1:]) == 16
    assert builder.logit_rows(bucket.model_copy(update={"tokens": 32}), microbatches) is None
    assert BatchBuilder(workload, SyntheticTokens(9), CPU).logit_rows(bucket, microbatches) is None
    for microbatch in microbatches:
        batch = builder.build(microbatch, bucket, 32)
        assert len(batch.rows) == 32
        assert set((batch.labels != IGNORE).nonzero()[:, 0].tolist()) <= set(batch.rows.tolist())
        assert builder.build(microbatch, bucket, None).rows is None


def test_places_in_the_stream_do_not_begin_again_with_an_epoch(workload):
    batch = built(workload, [(0, (5, 6))], row_tokens=6)
    assert batch.positions.tolist() == [*range(24, 30), *range(29, 35)]
    assert batch.segments[0].batch == 2


@pytest.mark.parametrize("row_tokens", [None, 2, 7])
def test_the_shortest_sample_has_one_label(row_tokens, make_job, make_workload):
    batch = built(make_workload(make_job("a", (2,), rank=3)), [(0, (0,))], row_tokens)
    assert batch.labels.tolist() == [3002] + [IGNORE] * ((row_tokens or 2) - 1)
    assert batch.weights.unique().tolist() == [1.0]


def test_the_weights_of_what_is_learnt_in_a_global_batch_add_up_to_one(workload):
    """However it is cut into microbatches, in rows or not."""
    batches = [built(workload, [(0, (0,)), (1, (0, 1))], 7), built(workload, [(0, (1, 2))])]
    learnt = {0: 0.0, 1: 0.0}
    for batch in batches:
        for part in batch.segments:
            here = slice(part.start, part.stop)
            learnt[part.adapter] += float(batch.weights[here][batch.labels[here] != IGNORE].sum())
    assert learnt == pytest.approx({0: 1.0, 1: 1.0})


@pytest.mark.parametrize(
    ("row_tokens", "capacity", "expected"),
    [
        (5, 10, []),
        (8, 16, []),
        (4, 16, ["microbatch 0: a sample of 'a' has 5 tokens, its row 4"]),
        (1, 16, ["microbatch 0: a sample of 'a' has 5 tokens, its row 1"]),
        (8, 15, ["microbatch 0: 16 tokens exceed the capacity of 15"]),
        (5, 9, ["microbatch 0: 10 tokens exceed the capacity of 9"]),
        (None, 8, []),
        (None, 7, ["microbatch 0: 8 tokens exceed the capacity of 7"]),
    ],
)
def test_the_checker_sees_rows_that_cannot_be(row_tokens, capacity, expected, make_job, make_workload):
    workload = make_workload(make_job("a", (5, 3, 2)))
    microbatches = (
        Microbatch(segments=(segment(workload, 0, (0, 1)),), step_after=(0,), row_tokens=row_tokens),
        Microbatch(segments=(segment(workload, 0, (2,)),), step_after=(0,)),
    )
    plan = Plan(
        system="test", workload_hash=workload.content_hash, stages=1, capacity=capacity, microbatches=microbatches,
        statistics=statistics_of(microbatches, capacity),
    )  # fmt: skip
    assert violations(plan, workload) == expected
    assert plan.statistics.tokens == 10  # real ones


def test_a_sample_of_another_length_than_the_workloads_is_refused(workload):
    class Longer(Counted):
        def tokens(self, job, sample):
            return super().tokens(job, sample._replace(tokens=sample.tokens + 1))

    builder = BatchBuilder(workload, Longer(), CPU)
    with pytest.raises(UserError, match="sample 0 of 'a' has 6 tokens, the workload says 5"):
        builder.build(Microbatch(segments=(segment(workload, 0, (0,)),)))
