"""Run the smoke suite's decoder layer with and without Liger on a CPU, for `test_liger.py`: a process of its own, as
Triton's interpreter is chosen before Triton is imported.

Prints, for each implementation, a line of JSON: the largest relative error of y and the gradients, whether running it
again gives the same, and the bytes that are kept for the backward pass, without Liger and with it.
"""

from __future__ import annotations

import json
import os
from unittest.mock import patch

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton.language as tl
from liger_kernel.ops import rms_norm
from triton.runtime import interpreter

from lorafusion.lab.experiments import EXPERIMENTS, implementations
from lorafusion.lab.experiments.kernel_suite import KernelBench, KernelCase
from lorafusion.lab.experiments.kernel_times import existing
from lorafusion.lab.operators import saved_bytes
from lorafusion.model import liger

TOKENS = 40


def run(bench: KernelBench, case: KernelCase) -> tuple[list[torch.Tensor], bool, int]:
    """y and the gradients; are they the same twice; what is kept."""
    builder = implementations.Builder(bench, implementations.Setting(torch.device("cpu"), torch.float32, 1))
    subject = builder.build(case)
    dy = subject.dy.clone()
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        found.append([subject.forward().detach(), *subject.both()])
    same = all(torch.equal(*pair) for pair in zip(*found, strict=True)) and torch.equal(dy, subject.dy)
    return found[0], same, saved_bytes(subject.forward, existing(subject))


def main() -> None:
    convert = interpreter._implicit_cvt

    def converted(argument):
        """The interpreter hands floats to a kernel as they are, and Liger's ask them for `.to`."""
        if isinstance(argument, float):
            handle = interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32)
            return tl.tensor(handle, tl.float32)
        return convert(argument)

    interpreter._implicit_cvt = converted
    rms_norm.rsqrt = lambda x: 1.0 / tl.sqrt(x)  # libdevice's is for GPUs
    plain = EXPERIMENTS["kernels"].point("smoke", "layer~tiny/rank~16/dropout~0.1").subject
    lean = plain.model_copy(update={"block": plain.block.model_copy(update={"liger": True})})
    with patch.object(implementations, "use_liger", liger.install):
        for case in plain.cases(TOKENS):
            (expected, _, kept), (ours, same, lean_kept) = run(plain, case), run(lean, case)
            error = max(
                float((one - other).abs().max() / other.abs().max()) for one, other in zip(ours, expected, strict=True)
            )
            name = f"{case.implementation}, {case.adapters} adapters"
            print(json.dumps({"name": name, "error": error, "same": same, "kept": [kept, lean_kept]}), flush=True)


if __name__ == "__main__":
    main()
