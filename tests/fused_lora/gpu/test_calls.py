"""What one call's kernels share: sizes as Triton would compute them, and what is remembered from call to call."""

from __future__ import annotations

import pytest
import torch
import triton
from triton.experimental.gluon import language as gl

from fused_lora.adapters import Operands, Settings
from fused_lora.gpu.host import calls, choices
from fused_lora.gpu.host.calls import Call, launching


def made(tokens=8, columns=16, rows=(24, 8), ranks=(5, 3)):
    """A call of one adapter, of no matter but for its sizes."""
    weights = [torch.zeros(one, columns) for one in rows]
    b = torch.arange(float(sum(one * rank for one, rank in zip(rows, ranks, strict=True))))
    table = [torch.zeros(len(rows), 1)] * 3 + [torch.zeros(len(rows), 2)]
    batch = torch.zeros(2), torch.zeros(1), torch.zeros(tokens)
    operands = Operands(torch.zeros(sum(ranks), columns), b, *table, *batch)
    return Call(operands, Settings(list(ranks), max(ranks), True), torch.zeros(tokens, columns), weights)


def test_sizes_are_those_that_triton_computes():
    for size in range(1, 300):
        assert calls.power_of_2(size) == triton.next_power_of_2(size)
        assert [calls.cdiv(size, part) for part in range(1, 70)] == [triton.cdiv(size, part) for part in range(1, 70)]


def test_each_linear_has_its_part_of_b():
    call = made()
    parts = [call.b_of(linear, call.operands.b).tolist() for linear in range(2)]
    assert parts == [list(range(120)), list(range(120, 144))]


def test_a_choice_is_made_once_and_cannot_be_changed():
    asked = []

    def choose(kernel, shape, target):
        asked.append((kernel, shape))
        return choices.defaults(kernel, shape, target)

    with launching(choose=choose):
        first, again, other = (made(tokens).choice("project", 16, linears=2) for tokens in (8, 8, 9))
    assert first is again
    assert first is not other
    assert asked == [("project", choices.Shape(tokens, 16, 0, 2, 16, 32, True)) for tokens in (8, 9)]
    assert first == choices.defaults(*asked[0], calls.target_of(torch.device("cpu")))
    with pytest.raises(TypeError):
        first["rows"] = 1


def test_who_chooses_otherwise_is_asked_anew():
    """As the tuner does for each candidate, with a call that is made before."""
    call, chosen = made(), []
    for rows in (1, 2):
        with launching(choose=lambda *_, rows=rows: {"rows": rows}):
            chosen.append(call.choice("masks", 16)["rows"])
    assert chosen == [1, 2]
    assert call.choice("masks", 16)["rows"] == choices.defaults("masks", choices.Shape(8, 16), call.target)["rows"]


@pytest.mark.parametrize("dtype", list(calls.GLUON_TYPES))
@pytest.mark.parametrize("block", [(128, 64), (64, 256), (128, 16), (256, 32), (64, 8)])
def test_layouts_are_those_that_triton_makes(block, dtype):
    tensor = torch.zeros(256, 256, dtype=dtype)
    for _ in range(2):
        found = calls.gluon_described(tensor, *block)
        assert found.layout == gl.NVMMASharedLayout.get_default_for(list(block), calls.GLUON_TYPES[dtype])
        assert (found.base is tensor, found.shape, found.block_shape) == (True, [256, 256], list(block))
