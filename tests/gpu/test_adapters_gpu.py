"""An adapter's step on a GPU, where AdamW is another kernel than on a CPU."""

from __future__ import annotations

from functools import partial

import pytest

from tests.engine import test_adapters as on_cpu


@pytest.fixture
def adapter(tmp_path):
    return partial(on_cpu.build, tmp_path, device="cuda")


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_an_adapter_begins_with_the_same_numbers_in_every_dtype(adapter, dtype):
    on_cpu.test_an_adapter_begins_with_the_same_numbers_in_every_dtype(adapter, dtype)


@pytest.mark.parametrize("scale", [1e-2, 1e-4, 1e-6])
def test_a_float16_adapter_is_trained_as_a_float32_one_is(adapter, scale):
    on_cpu.test_a_float16_adapter_is_trained_as_a_float32_one_is(adapter, scale, bound=0.5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_is_gone_on_with_ends_in_the_same_bits(adapter, dtype):
    on_cpu.test_what_is_gone_on_with_ends_in_the_same_bits(adapter, dtype)
