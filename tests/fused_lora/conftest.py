"""What tests of several files share."""

from __future__ import annotations

import pytest
import torch

import fused_lora.peft as fused


@pytest.fixture
def computed(monkeypatch):
    """How many linears each call of the kernels computed."""
    counts, original = [], fused.lora_linears

    def counted(x, weights, *arguments, **keywords):
        counts.append(len(weights))
        return original(x, weights, *arguments, **keywords)

    monkeypatch.setattr(fused, "lora_linears", counted)
    return counts


@pytest.fixture
def nothing_compiled():
    """torch.compile knows nothing of earlier tests."""
    torch.compiler.reset()
