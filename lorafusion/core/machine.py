"""Where a number comes from: commit, software, device."""

import os
import platform
import resource
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from lorafusion.core.source_tree import state

GPU_FIELDS = {
    "gpu_name": "name",
    "gpu_uuid": "uuid",
    "driver": "driver_version",
    "clock_mhz": "clocks.sm",
    "power_w": "power.draw",
}
ANSWER_SECONDS = 30  # that nvidia-smi may take


def provenance(device: str) -> dict[str, str | float | bool | None]:
    """Commit and source files, package versions and, for a run on a GPU, the device and its state now."""
    import torch

    return {
        **state(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "peft": _version("peft"),
        "megatron_core": _version("megatron-core"),
        "python": platform.python_version(),
        "hostname": platform.node(),
        "cpu": _cpu_name(),
        **(gpu_state() if device == "cuda" else dict.fromkeys(GPU_FIELDS)),
    }


def gpu_state() -> dict[str, str | float | None]:
    """Name, identity, driver, clock (MHz) and power (W) of the first GPU that this process may use, as nvidia-smi says;
    None where it cannot."""
    query = ",".join(GPU_FIELDS.values())
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"
    lines = _lines("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits", f"--id={first}") or [""]
    values = [value.strip() for value in lines[0].split(",")]
    if len(values) != len(GPU_FIELDS):
        return dict.fromkeys(GPU_FIELDS)
    state = dict(zip(GPU_FIELDS, values, strict=True))
    return {key: _number(value) if key in ("clock_mhz", "power_w") else value for key, value in state.items()}


def neighbours() -> dict[str, str | float | None]:
    """What else may disturb a run that starts on this node now: the host's load (processes, over a minute), and others'
    processes on its GPUs, None where nvidia-smi does not say."""
    processes = _lines("nvidia-smi", "--query-compute-apps=pid,process_name,used_memory", "--format=csv,noheader")
    ours = {str(process.pid) for process in _family()}
    others = processes and [line for line in processes if line.partition(",")[0] not in ours]
    return {
        "host_load": os.getloadavg()[0],
        "other_gpu_processes": None if others is None else "; ".join(others),
    }


def _family() -> list[psutil.Process]:
    """This process, those that it comes from, and those that come from it."""
    process = psutil.Process()
    return [process, *process.parents(), *process.children(recursive=True)]


def _lines(*command: str) -> list[str] | None:
    """What a program says, without empty lines; None where it is not here or does not answer."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def process_seconds() -> float:
    """Since this process was started."""
    return time.time() - psutil.Process().create_time()


def has_gpu() -> bool:
    """Is there an NVIDIA GPU that its driver can list?"""
    return gpu_state()["gpu_name"] is not None


def largest_resident_set() -> int:
    """Bytes: the most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )
