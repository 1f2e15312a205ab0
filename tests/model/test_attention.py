"""Which library computes attention, and what cuDNN is told of a microbatch. Its results: tests/gpu."""

from __future__ import annotations

import pytest
import torch

from lorafusion.core.config import read_model
from lorafusion.core.schema import UserError
from lorafusion.data.packing import SampleBorders
from lorafusion.model.attention import chosen_backend, prepared
from lorafusion.model.cudnn_attention import Heads, RaggedBorders, why_not

CPU = torch.device("cpu")
HEADS = Heads(8, 2, 64)


def test_heads_are_those_of_the_model():
    assert Heads.of(read_model("llama-3.1-8b")) == (32, 8, 128)


@pytest.mark.parametrize("word", ["auto", "flash"])
def test_a_cpu_has_no_cudnn(word):
    assert chosen_backend(word, CPU, torch.bfloat16, HEADS) == "flash"


def test_cudnn_that_cannot_be_used_is_a_mistake():
    with pytest.raises(UserError, match=r"^attention: cudnn, but it needs a GPU; expected auto or flash$"):
        chosen_backend("cudnn", CPU, torch.bfloat16, HEADS)


@pytest.mark.parametrize(
    ("capability", "dtype", "size", "reason"),
    [
        ((8, 0), torch.bfloat16, 128, "sm_90"),
        ((9, 0), torch.float32, 128, "torch.bfloat16 alone, found torch.float32"),
        ((9, 0), torch.bfloat16, 72, "found 72"),
        ((9, 0), torch.bfloat16, 272, "found 272"),
    ],
)
def test_what_cudnn_is_not_for_is_said(monkeypatch, capability, dtype, size, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert reason in why_not(torch.device("cuda"), dtype, Heads(8, 2, size))


def test_without_the_package_it_is_flash_attention_and_a_line_says_so(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with caplog.at_level("INFO"):
        assert chosen_backend("auto", torch.device("cuda"), torch.bfloat16, HEADS) == "flash"
    assert caplog.messages == [
        "attention: FlashAttention-2; not cuDNN's, for nvidia-cudnn-frontend is not installed",
    ]


def test_borders_for_cudnn_are_in_elements_and_have_room():
    borders = RaggedBorders.of(SampleBorders.of((3, 130, 1), CPU), 134, Heads(4, 2, 16))
    offsets = torch.tensor([0, 3, 133, 134, 134, 134, 134, 134, 134], dtype=torch.int32)
    assert borders.longest == 256
    assert torch.equal(borders.offsets, offsets)
    assert [tensor.dtype for tensor in borders.tensors] == [torch.int32] * 4
    for starts, columns in zip(borders.starts, (64, 32, 4), strict=True):
        assert torch.equal(starts, offsets * columns)
    assert borders.sizes.tolist() == [3, 130, 1, 0, 0, 0, 0, 0]


def test_the_borders_of_many_samples_have_the_same_bounds():
    """So that one plan serves them: a plan takes tens of milliseconds."""
    bounds = {
        (len(borders.sizes), borders.longest)
        for count in range(9, 17)
        for borders in [RaggedBorders.of(SampleBorders.of((300,) * count, CPU), 300 * count, HEADS)]
    }
    assert bounds == {(16, 512)}


def test_a_cpu_takes_borders_as_they_are():
    borders = SampleBorders.of((3, 2), CPU)
    assert prepared(borders, "cudnn", HEADS, torch.zeros(1, 5, 8)) is borders
