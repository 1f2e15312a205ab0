"""What a machine is asked about itself, where the programs that know it are stand-ins."""

from __future__ import annotations

import os

import pytest

from lorafusion.core.machine import gpu_state, neighbours

PROCESSES = f"{os.getpid()}, python, 900 MiB\n4242, /usr/bin/other, 1024 MiB\n"


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """A function that puts a program in the place of all others."""
    monkeypatch.setenv("PATH", str(tmp_path))

    def put(name: str, output: str, status: int = 0) -> None:
        (tmp_path / name).write_text(f"#!/bin/sh\nprintf '%s' '{output}'\nexit {status}\n")
        (tmp_path / name).chmod(0o755)

    return put


def test_a_run_knows_others_processes_on_the_gpus(programs):
    assert neighbours()["other_gpu_processes"] is None
    programs("nvidia-smi", PROCESSES)
    assert neighbours()["other_gpu_processes"] == "4242, /usr/bin/other, 1024 MiB"
    programs("nvidia-smi", "")
    assert neighbours()["other_gpu_processes"] == ""


def test_a_run_knows_the_host_s_load(programs):
    assert neighbours()["host_load"] >= 0


@pytest.mark.parametrize("output", ["", "no devices were found\n"])
def test_a_driver_without_a_gpu_has_no_state(programs, output):
    programs("nvidia-smi", output)
    assert set(gpu_state().values()) == {None}


def test_a_gpu_has_a_state(programs):
    programs("nvidia-smi", "NVIDIA H200, GPU-1, 570.1, 1980, [N/A]\n")
    state = {"gpu_name": "NVIDIA H200", "gpu_uuid": "GPU-1", "driver": "570.1", "clock_mhz": 1980.0, "power_w": None}
    assert gpu_state() == state
