"""LoRAFusion: train many LoRA adapters of one frozen base model together, and measure it honestly.

Data flows one way: workload (jobs) -> plan (microbatches) -> run (training) -> measurements -> report.
`planning` imports no torch, so planning works on any machine.
"""

__version__ = "0.1.0"
