"""Triton's launches without a GPU: all of Triton runs, up to a CUDA driver that only writes down what it is told.

`pretend_cuda.c` is that driver; gcc, which Triton itself needs to launch anything, builds it. Kernels are compiled for
sm_90 to machine code, tensors stay on the CPU, and `recorded()` gives each launch as the driver got it.
"""

from __future__ import annotations

import ctypes
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia

from fused_lora import ops
from fused_lora.gpu.host import calls, choices

H200 = choices.Target("NVIDIA H200", (9, 0), 132)
PARAMETER = 0x17  # of a kernel, in the section .nv.info of its machine code
STREAM = 77


class DriverLaunch(NamedTuple):
    """What the driver was told: the kernel, its settings and the words of its parameters."""

    kernel: str
    settings: tuple[int, ...]  # stream, grid, block, shared bytes, attributes
    parameters: tuple[tuple[int, ...], ...]


class PretendDriver(nvidia.CudaDriver):
    """Triton's driver for one H200 that is not there."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.utils = nvidia.CudaUtils()
        self.launcher_cls = nvidia.CudaLauncher
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: STREAM
        self.get_device_capability = lambda device: (9, 0)
        self.library, self.kernels, self.sizes = library, {}, {}
        self.loads, self.utils.load_binary = self.utils.load_binary, self.load_binary

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple:
        sizes = parameter_sizes(binary)
        self.library.pretend_parameters(len(sizes), (ctypes.c_int * len(sizes))(*sizes))
        loaded = self.loads(name, binary, shared, device)
        self.kernels[loaded[1]], self.sizes[loaded[1]] = name, sizes
        return loaded

    def launches(self) -> list[DriverLaunch]:
        """Those since recording began."""
        words = ctypes.POINTER(ctypes.c_uint64)()
        self.library.pretend_log.restype = ctypes.c_size_t
        rest = iter(words[: self.library.pretend_log(ctypes.byref(words))])
        launches = []
        for function in rest:
            settings = [next(rest) for _ in range(9)]
            settings += [next(rest) for _ in range(2 * settings[-1])]
            parameters = tuple(tuple(next(rest) for _ in range(-(-size // 8))) for size in self.sizes[function])
            launches.append(DriverLaunch(self.kernels[function], tuple(settings), parameters))
        return launches


def parameter_sizes(binary: bytes) -> list[int]:
    """Bytes of each parameter of the one kernel in a cubin: an ELF file, whose sections .nv.info describe them."""
    table, entry, count, names = struct.unpack_from("<Q10xHHH", binary, 40)
    sections = [struct.unpack_from("<I20xQQ", binary, table + entry * index) for index in range(count)]
    first = sections[names][1]
    sizes = {}
    for name, offset, size in sections:
        if not binary[first + name :].startswith(b".nv.info."):
            continue
        place = offset
        while place < offset + size:
            form, attribute, length = struct.unpack_from("<BBH", binary, place)
            if attribute == PARAMETER:
                ordinal, flags = struct.unpack_from("<4xH2xI", binary, place + 4)
                sizes[ordinal] = flags >> 18
            place += 4 + (length if form == 4 else 0)
    return [sizes[ordinal] for ordinal in range(len(sizes))]


@contextmanager
def pretended() -> Iterator[Callable]:
    """Kernels for tensors on the CPU are launched on a pretended H200. Gives a function that says what another one
    launches."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "libcuda.so.1")
        headers = Path(nvidia.__file__).parent / "include"
        source = Path(__file__).with_suffix(".c")
        command = ["gcc", "-shared", "-fPIC", "-O2", "-w", f"-I{headers}", "-Wl,-soname,libcuda.so.1"]
        subprocess.run([*command, "-o", str(library), str(source)], check=True, stdout=sys.stderr)
        loaded = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        triton.knobs.nvidia.libcuda_path = folder
        driver = PretendDriver(loaded)
        triton.runtime.driver.set_active(driver)

        def recorded(function: Callable[[], object]) -> list[DriverLaunch]:
            loaded.pretend_record(1)
            function()
            launches = driver.launches()
            loaded.pretend_record(0)
            return launches

        kernels = dict(ops.KERNELS)
        ops.KERNELS.update({(operator, "cpu"): kernels[operator, "cuda"] for operator, _ in kernels})
        try:
            with calls.launching(target_of=lambda device: H200):
                yield recorded
        finally:
            ops.KERNELS.update(kernels)
