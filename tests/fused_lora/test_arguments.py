"""Bad arguments of the LoRA linear: each is named in one line, with what was found and what was expected."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch._subclasses import FakeTensor, FakeTensorMode

from fused_lora import AdapterTable, LoRAAdapter, LoRABatch, LoRASegment, lora_linear, lora_linears
from fused_lora.adapters import MOST_TABLES, AdapterTables

M, K, N = 23, 13, 17
CPU = torch.device("cpu")


def adapter(rank=2, columns=K, rows=N, **settings):
    return LoRAAdapter(torch.zeros(rank, columns), torch.zeros(rows, rank), **({"scaling": 1.0} | settings))


ADAPTERS = [adapter(1), adapter(5), adapter(16)]


ONE = {"segments": [LoRASegment(0, M, 0)]}  # for a single adapter
BAD = {
    "x has no dimension": (
        {"x": torch.tensor(1.0)},
        r"x: expected floating point \[..., K\], found torch.float32 \[\]",
    ),
    "x has no columns": ({"x": torch.zeros(M, 0)}, r"x: expected floating point \[..., K\], found torch.float32"),
    "x is integer": ({"x": torch.zeros(M, K, dtype=torch.int64)}, "x: expected floating point"),
    "weight does not fit x": (
        {"weight": torch.zeros(N, K + 1, dtype=torch.float64)},
        rf"weight: expected torch.float64 \[{N}, {K}\] on cpu, found torch.float64 \[{N}, {K + 1}\] on cpu",
    ),
    "weight has another dtype": ({"weight": torch.zeros(N, K)}, "weight: expected torch.float64"),
    "weight has one dimension": ({"weight": torch.zeros(K)}, r"weight: expected floating point \[N, K\], found"),
    "weight is on another device": (
        {"weight": torch.zeros(N, K, dtype=torch.float64, device="meta")},
        rf"weight: expected torch.float64 \[{N}, {K}\] on cpu, found torch.float64 \[{N}, {K}\] on meta",
    ),
    "weight has no dimension": ({"weight": torch.tensor(1.0)}, r"weight: expected floating point \[N, K\], found"),
    "weight is transposed": (
        {"weight": torch.zeros(K, N, dtype=torch.float64).T},
        rf"weight: expected contiguous rows, found strides \[1, {N}\]",
    ),
    "weight is trained": (
        {"weight": torch.zeros(N, K, dtype=torch.float64, requires_grad=True)},
        "weight and its bias: expected frozen ones, found one that requires a gradient",
    ),
    "bias is trained": (
        {"bias": torch.zeros(N, dtype=torch.float64, requires_grad=True)},
        "weight and its bias: expected frozen ones, found one that requires a gradient",
    ),
    "bias has another length": ({"bias": torch.zeros(N - 1, dtype=torch.float64)}, rf"bias: expected .* \[{N}\]"),
    "positions have another length": ({"positions": torch.arange(M - 1)}, rf"positions: expected torch.int64 \[{M}\]"),
    "positions are int32": ({"positions": torch.arange(M, dtype=torch.int32)}, "positions: expected torch.int64"),
    "positions are on another device": ({"positions": torch.arange(M, device="meta")}, "positions: .* on meta"),
    "a does not fit x": (
        {**ONE, "adapters": [LoRAAdapter(torch.zeros(2, K - 1), torch.zeros(N, 2), 1.0)]},
        rf"adapters\[0\].a: expected floating point \[2, {K}\] on cpu, found torch.float32 \[2, {K - 1}\]",
    ),
    "a is on another device": (
        {**ONE, "adapters": [LoRAAdapter(torch.zeros(2, K, device="meta"), torch.zeros(N, 2), 1.0)]},
        r"adapters\[0\].a: .* found torch.float32 .* on meta",
    ),
    "b is integer": (
        {**ONE, "adapters": [LoRAAdapter(torch.zeros(2, K), torch.zeros(N, 2, dtype=torch.int64), 1.0)]},
        r"adapters\[0\].b: expected floating point \[N, r\], found torch.int64",
    ),
    "a key of 65 bits": (
        {**ONE, "adapters": [LoRAAdapter(torch.zeros(2, K), torch.zeros(N, 2), 1.0, key=2**64)]},
        r"adapters\[0\].key: expected an integer in \[0, 2\^64\)",
    ),
    "dropout is not a number": (
        {**ONE, "adapters": [LoRAAdapter(torch.zeros(2, K), torch.zeros(N, 2), 1.0, math.nan)]},
        r"adapters\[0\].dropout: expected a probability",
    ),
    "rank 0": (
        {**ONE, "adapters": [LoRAAdapter(torch.zeros(0, K), torch.zeros(N, 0), 1.0)]},
        r"adapters\[0\].a: expected a rank from 1 to 256, found \[0, 13\]",
    ),
    "rank 257": (
        {**ONE, "adapters": [LoRAAdapter(torch.zeros(257, K), torch.zeros(N, 257), 1.0)]},
        r"adapters\[0\].a: expected a rank from 1 to 256, found \[257, 13\]",
    ),
    "an infinite scaling": (
        {**ONE, "adapters": [LoRAAdapter(torch.zeros(2, K), torch.zeros(N, 2), math.inf)]},
        r"adapters\[0\].scaling: expected a finite number, found inf",
    ),
    "an adapter without tokens is bad": (
        {"adapters": [*ADAPTERS, LoRAAdapter(torch.zeros(2, K), torch.zeros(N, 3), 1.0)]},
        rf"adapters\[3\].b: expected floating point \[{N}, 2\]",
    ),
    "b has another rank": (
        {**ONE, "adapters": [LoRAAdapter(torch.zeros(2, K), torch.zeros(N, 3), 1.0)]},
        rf"adapters\[0\].b: expected floating point \[{N}, 2\]",
    ),
    "dropout of 1": (
        {**ONE, "adapters": [LoRAAdapter(torch.zeros(2, K), torch.zeros(N, 2), 1.0, 1.0)]},
        r"adapters\[0\].dropout: expected a probability in \[0, 1\), found 1.0",
    ),
    "an adapter that is not there": (
        {"segments": [LoRASegment(0, 1, 3)]},
        r"segments\[0\]: expected an adapter in \[0, 3\), found 3",
    ),
    "segments overlap": (
        {"segments": [LoRASegment(0, 5, 0), LoRASegment(4, 6, 0)]},
        r"segments\[1\]: expected a span within \[5, 23\), in order, found \[4, 6\)",
    ),
    "a segment ends outside": ({"segments": [LoRASegment(20, 24, 0)]}, r"segments\[0\]: expected a span within"),
    "a segment runs backwards": ({"segments": [LoRASegment(5, 4, 0)]}, r"segments\[0\]: expected a span within"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_a_bad_argument_is_named_in_one_line(name):
    change, message = BAD[name]
    arguments = {
        "x": torch.zeros(M, K, dtype=torch.float64),
        "weight": torch.zeros(N, K, dtype=torch.float64),
        "bias": torch.zeros(N, dtype=torch.float64),
        "adapters": ADAPTERS,
        "segments": (LoRASegment(0, 6, 0), LoRASegment(6, 7, 2), LoRASegment(7, 7, 1), LoRASegment(9, 20, 1)),
        "positions": torch.arange(M),
    }
    lora_linear(**arguments)  # those of its form are checked but once
    with pytest.raises(ValueError, match=message) as caught:
        lora_linear(**(arguments | change))
    assert "\n" not in str(caught.value)


BATCH = LoRABatch.of([LoRASegment(0, 4, 0), LoRASegment(6, M, 1)], torch.arange(M))
ROWS = [[adapter(), adapter(3)], [None, adapter(rows=9)]]
BAD_OF_SEVERAL = {
    "no linear": ({"weights": [], "biases": [], "adapters": []}, "one entry for each linear, found 0, 0 and 0"),
    "a bias is missing": ({"biases": [None]}, "weights, biases, adapters: expected one entry .* found 2, 1 and 2"),
    "adapters of one linear": ({"adapters": ROWS[:1]}, "expected one entry for each linear, found 2, 2 and 1"),
    "another count of adapters": (
        {"adapters": [ROWS[0], ROWS[1][:1]]},
        r"adapters: expected as many for each linear, found \[2, 1\]",
    ),
    "the second weight": (
        {"weights": [torch.zeros(N, K), torch.zeros(9, K + 1)]},
        rf"weights\[1\]: expected torch.float32 \[9, {K}\]",
    ),
    "the second bias": ({"biases": [None, torch.zeros(8)]}, r"biases\[1\]: expected torch.float32 \[9\]"),
    "the second linear's second adapter": (
        {"adapters": [ROWS[0], [None, adapter(rows=8)]]},
        r"adapters\[1\]\[1\].b: expected floating point \[9, 2\]",
    ),
    "a table of other ranks": (
        {"table": AdapterTable.of([ROWS[0], [None, adapter(5, rows=9)]], CPU)},
        r"table: expected one of ranks \(\(2, 3\), \(0, 2\)\), found \(\(2, 3\), \(0, 5\)\)",
    ),
    "int64 offsets": (
        {"batch": replace(BATCH, offsets=BATCH.offsets.long())},
        r"offsets: expected torch.int32 \[4\] on cpu, found torch.int64 \[4\] on cpu",
    ),
    "an offset too few": ({"batch": replace(BATCH, offsets=BATCH.offsets[1:])}, r"offsets: expected torch.int32 \[4\]"),
    "adapters on another device": (
        {"batch": replace(BATCH, adapters=BATCH.adapters.to("meta"))},
        "adapters of the batch: expected .* on cpu, found .* on meta",
    ),
    "two positions": (
        {"batch": replace(BATCH, positions=torch.arange(2))},
        rf"positions: expected torch.int64 \[{M}\] on cpu, found torch.int64 \[2\] on cpu",
    ),
}


@pytest.mark.parametrize("name", list(BAD_OF_SEVERAL))
def test_a_bad_argument_of_several_linears_is_named_in_one_line(name):
    change, message = BAD_OF_SEVERAL[name]
    weights = [torch.zeros(N, K), torch.zeros(9, K)]
    arguments = {"x": torch.zeros(M, K), "weights": weights, "biases": [None, None], "adapters": ROWS, "batch": BATCH}
    assert [y.shape for y in lora_linears(**arguments)] == [(M, N), (M, 9)]
    with pytest.raises(ValueError, match=message) as caught:
        lora_linears(**(arguments | change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([(3, 2)], r"segments\[0\]: expected a span from 0, in order, found \[3, 2\)"),
        ([(0, 5), (4, 9)], r"segments\[1\]: expected a span from 5, in order, found \[4, 9\)"),
    ],
)
def test_a_batch_of_segments_out_of_order_is_refused(spans, message):
    with pytest.raises(ValueError, match=message):
        LoRABatch.of([LoRASegment(*span, 0) for span in spans], torch.arange(9))


def test_a_batch_gives_its_segments_back():
    """Gaps between them become segments of no adapter, which are left out again; tokens after the last are in none."""
    segments = [LoRASegment(2, 5, 1), LoRASegment(5, 5, 0), LoRASegment(9, 12, 1)]
    batch = LoRABatch.of(segments, torch.arange(20))
    assert batch.offsets.tolist() == [0, 2, 5, 5, 9, 12]
    assert batch.adapters.tolist() == [-1, 1, 0, -1, 1]
    assert batch.segments() == segments


def test_a_table_lays_the_factors_of_all_linears_after_each_other():
    table = AdapterTable.of([[adapter(2, scaling=3.0, dropout=0.25, key=2**64 - 1), None], [None, adapter(5)]], CPU)
    assert table.ranks == ((2, 0), (0, 5))
    assert table.rank_offsets.tolist() == [[0, 2, 2], [2, 2, 7]]
    assert (table.total_ranks, table.max_rank, table.dropout) == ([2, 5], 5, 0.25)
    assert table.scalings.tolist() == [[3.0, 0.0], [0.0, 1.0]]
    assert table.factors.tolist() == [[4.0, 0.0], [0.0, 1.0]]
    assert table.thresholds.tolist() == [[16384, 0], [0, 0]]
    assert table.keys.tolist() == [[-1, 0], [0, 0]]


def test_tables_are_kept_for_each_setting_but_not_for_ever_more_of_them():
    """None that is kept is given up for another: a CUDA graph may read it."""
    tables, x = AdapterTables(), torch.zeros(1, K)
    settings = [adapter(2, scaling=float(i), dropout=i / 1000) for i in range(MOST_TABLES + 5)]
    made = [tables.of([[one]], x) for one in settings]
    assert [table.scalings.item() for table in made] == [one.scaling for one in settings]
    again = [tables.of([[one]], x) for one in settings]
    assert [one is other for one, other in zip(made, again, strict=True)] == [True] * MOST_TABLES + [False] * 5
    assert copy.deepcopy(tables).of([[settings[0]]], x) is not made[0]


def test_tables_of_fake_tensors_are_not_kept():
    tables, one, x = AdapterTables(), adapter(), torch.zeros(1, K)
    with FakeTensorMode() as mode:
        assert isinstance(tables.of([[one]], mode.from_tensor(x)).keys, FakeTensor)
    kept = tables.of([[one]], x)
    assert type(kept.keys) is torch.Tensor
    with FakeTensorMode() as mode:
        assert isinstance(tables.of([[one]], mode.from_tensor(x)).keys, FakeTensor)
    assert tables.of([[one]], x) is kept
