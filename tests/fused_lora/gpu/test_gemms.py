"""Which products our GEMM takes, and with what settings; the launches are caught before they reach a GPU."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from fused_lora.gpu.host import calls, choices, gemms
from fused_lora.tools import build

FETCHABLE = {
    "whole rows": (lambda: torch.zeros(4, 64, dtype=torch.bfloat16), True),
    "float16": (lambda: torch.zeros(4, 8, dtype=torch.float16), True),
    "rows apart": (lambda: torch.zeros(4, 64, dtype=torch.bfloat16)[:, :24], True),
    "mask words": (lambda: torch.zeros(4, 4, dtype=torch.int32), True),
    "float32": (lambda: torch.zeros(4, 64), False),
    "rows that begin between 16 bytes": (lambda: torch.zeros(4, 12, dtype=torch.bfloat16), False),
    "mask words of 96 columns": (lambda: torch.zeros(4, 3, dtype=torch.int32), False),
    "columns apart": (lambda: torch.zeros(64, 64, dtype=torch.bfloat16).t(), False),
    "memory that begins between 16 bytes": (lambda: torch.zeros(257, dtype=torch.bfloat16)[1:].view(4, 64), False),
}


@pytest.mark.parametrize("name", list(FETCHABLE))
def test_what_the_copy_engine_can_fetch(name):
    make, expected = FETCHABLE[name]
    assert gemms._takes(make()) is expected


@pytest.mark.parametrize(("width", "chunk"), [(16, 16), (32, 32), (48, 16), (64, 32), (96, 32), (240, 16), (256, 32)])
def test_ranks_at_a_time_divide_the_width(width, chunk):
    assert gemms._chunk(width) == chunk
    assert width % chunk == 0


@pytest.mark.parametrize("segments", [1, 2, 3, 4, 7, 8, 9, 300])
def test_a_search_tells_all_counts_apart(segments):
    """None of the segments to all of them: each halving tells two halves of the answers apart."""
    steps = gemms._halvings(segments)
    assert steps == 0 if segments == 1 else 2**steps >= segments + 1 > 2 ** (steps - 1)


def launched(**settings):
    case = build.Case("a case", gemm=choices.own_gemm(), **settings)
    return Counter(one.kernel for one in build.launches(case, 90))


def test_our_gemm_takes_up_to_three_linears_at_a_time():
    """dx of the fourth is added by the library."""
    found = launched(linears=4)
    assert (found["output_gemm_kernel"], found["input_gemm_kernel"], found["expand_input_kernel"]) == (4, 1, 1)


def test_the_library_takes_what_ours_cannot():
    found = launched(dtype=torch.float32)
    assert not found["output_gemm_kernel"] + found["input_gemm_kernel"]
    assert found["expand_output_kernel"] == found["expand_input_kernel"] == 1


@pytest.mark.parametrize(("rank", "padded"), [(16, 0), (64, 0), (8, 2), (24, 2)])
def test_factors_are_padded_where_ranks_are_not_whole_blocks(rank, padded):
    assert launched(rank=rank)["pad_kernel"] == padded


UNALIGNED = {
    "an expanded row": torch.arange(64.0).expand(4, 64),
    "odd rows": torch.randn(5, 13).bfloat16(),
    "columns apart": torch.randn(64, 8).t(),
    "between 16 bytes": torch.randn(257)[1:].view(4, 64),
}


@pytest.mark.parametrize("name", list(UNALIGNED))
def test_what_the_copy_engine_cannot_fetch_is_copied(name):
    tensor = UNALIGNED[name]
    copy = calls.aligned(tensor)
    assert torch.equal(copy, tensor)
    assert copy.stride(0) * copy.element_size() % 16 == 0 < copy.stride(0)
    assert copy.stride(1) == 1
    assert copy.data_ptr() % 16 == 0


def test_what_it_can_fetch_is_not_copied():
    for tensor in (torch.randn(4, 64), torch.randn(4, 64)[:, :12], torch.randn(1, 8)):
        assert calls.aligned(tensor) is tensor
