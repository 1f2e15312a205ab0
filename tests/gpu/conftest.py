"""Tests that need a GPU skip with the reason where there is none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

# To ask whether there is a GPU must not stop processes that are forked later from using it (tests/forked.py).
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="this machine has no usable NVIDIA GPU"))
