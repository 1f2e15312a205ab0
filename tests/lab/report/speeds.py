"""Runs of every system at speeds whose ratios are known, for the contributions and their figure."""

from __future__ import annotations

from lorafusion.lab.report.ratios import CORNERS

# tokens/s: schedule 500/400, schedule and packing 600/320, kernels 900/600; mlora-packed is the best baseline, 900/650.
SPEEDS = {
    "peft": 300.0,
    "peft-bf16": 400.0,
    "megatron-fsdp": 380.0,
    "megatron-pp": 450.0,
    "mlora": 520.0,
    "mlora-packed": 650.0,
    "mlora-paper-setting": 500.0,
    "unfused-sequential": 320.0,
    "fused-sequential": 440.0,
    "fused-mlora": 800.0,
    "unfused-ours": 600.0,
    "lorafusion": 900.0,
}
MERGED = {system: 2 * SPEEDS[system] for system in CORNERS.values()} | {"lorafusion": 2000.0}
