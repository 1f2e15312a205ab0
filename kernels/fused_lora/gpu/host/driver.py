"""Launches of compiled kernels by CUDA's driver, without Triton's Python, which takes the host 20 us for each.

Triton compiles a kernel and says how its parameters lie (`_parameters` lays them out as its own launcher does);
`tests/fused_lora/gpu/test_replay.py` compares what the driver is told by both.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor
from triton.backends.nvidia.driver import make_tensordesc_arg
from triton.compiler.compiler import CompiledKernel

from fused_lora.gpu.host.record import Launch, Reference

MOST_MAPS = 1024  # of one parameter: a layer's weight and a few activations each
MAP_BYTES = 128  # of a tensor map, the end of Triton's object
OVERLAP = 6  # the attribute of a launch that may begin while the kernel before it ends
INTEGERS = ("i32", "i64")


class UnknownLaunchError(Exception):
    """A launch that only Triton can do."""


class Attribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16))


class Configuration(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(Attribute)),
        ("attribute_count", ctypes.c_uint),
    )


_thread = threading.local()


@cache
def _cuda() -> ctypes.CDLL:
    library = ctypes.CDLL("libcuda.so.1")
    library.cuLaunchKernelEx.argtypes = [ctypes.c_void_p] * 4
    return library


def bind(device: int) -> None:
    """Give this thread the device's context, unless it has one: PyTorch does so only before it uses the GPU itself, and
    autograd's thread may come to us first."""
    if getattr(_thread, "bound", False):
        return
    context, cuda = ctypes.c_void_p(), _cuda()
    errors = cuda.cuCtxGetCurrent(ctypes.byref(context))
    if not context:
        errors |= cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device) | cuda.cuCtxSetCurrent(context)
    if errors:
        raise RuntimeError(f"CUDA's driver has no context for device {device}, error {errors}")
    _thread.bound = True


class DriverLaunch:
    """A recorded launch, to be done again with other addresses: of memory slots, plus offsets in bytes.

    refer: the reference to a tensor of the record. Raises UnknownLaunchError."""

    def __init__(self, launch: Launch, refer: Callable[[Tensor], Reference]) -> None:
        compiled = launch.kernel.run(*launch.arguments, grid=launch.grid, warmup=True, **launch.settings)
        compiled._init_handles()
        metadata = compiled.metadata
        if metadata.num_ctas != 1 or metadata.launch_cooperative_grid or metadata.global_scratch_size:
            raise UnknownLaunchError
        self._compiled: CompiledKernel = compiled
        self._pointers: list[tuple[int, int, int]] = []  # place, slot, offset
        self._maps: list[tuple[int, int, int, _TensorMaps]] = []
        values = self._parameters(launch, refer)
        self._values = (ctypes.c_int64 * len(values))(*values)
        first = ctypes.addressof(self._values)
        self._places = (ctypes.c_uint64 * len(values))(*range(first, first + ctypes.sizeof(self._values), 8))
        attributes = (Attribute * 1)(Attribute(OVERLAP, 0, (1,)))
        self._configuration = Configuration(
            (*launch.grid, 1, 1)[:3], (32 * metadata.num_warps, 1, 1), metadata.shared, None, attributes,
            int(metadata.launch_pdl),
        )  # fmt: skip
        parts = (self._configuration, self._places)
        configuration, places = map(ctypes.addressof, parts)
        self._arguments = (configuration, compiled.function, places, None)
        self._call = _cuda().cuLaunchKernelEx
        self.slots = {slot for _, slot, *_ in (*self._pointers, *self._maps)}

    def _parameters(self, launch: Launch, refer: Callable[[Tensor], Reference]) -> list[int]:
        """The numbers among the parameters, with zeros where pointers, maps and scratch memory are."""
        named = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False)) | launch.settings
        forms = iter(self._compiled.metadata.tensordesc_meta or ())
        values: list[int] = []
        for name, kind in self._compiled.src.signature.items():
            value = named[name]
            if kind == "constexpr":
                continue
            if kind.startswith("*"):
                self._pointers.append((len(values), *_place(refer(value))))
                values.append(0)
            elif kind.startswith("tensordesc"):
                self._maps.append((len(values), *_place(refer(value.base)), _TensorMaps(value, next(forms, None))))
                values += [0, *value.shape, *value.strides]
            elif kind in INTEGERS:
                values.append(value)
            else:
                raise UnknownLaunchError
        return [*values, 0, 0]

    def run(self, tensors: list, addresses: list[int], stream: int) -> None:
        values = self._values
        for place, slot, offset in self._pointers:
            values[place] = addresses[slot] + offset
        for place, slot, offset, maps in self._maps:
            address = addresses[slot] + offset
            self._places[place] = maps.places.get(address) or maps.make(address)
        self._configuration.stream = stream
        error = self._call(*self._arguments)
        if error:
            raise RuntimeError(f"{self._compiled.name}: CUDA's driver refused to launch it, error {error}")


class _TensorMaps:
    """Tensor maps for one parameter, by the address of the tensor: what Triton makes of a descriptor."""

    padding, round_f32_to_tf32 = "zero", False

    def __init__(self, descriptor: Any, form: dict | None) -> None:
        if form is None:  # of a GPU without a copy engine
            raise UnknownLaunchError
        self.shape, self.strides, self.base = descriptor.shape, descriptor.strides, self
        self.places: dict[int, int] = {}
        self._form, self._maps, self._address = form, [], 0

    def data_ptr(self) -> int:
        return self._address

    def make(self, address: int) -> int:
        """Where the new map of the memory at an address is."""
        if len(self._maps) == MOST_MAPS:
            self._maps, self.places = [], {}
        self._address = address
        self._maps.append(make_tensordesc_arg(self, self._form)[0])
        self.places[address] = id(self._maps[-1]) + type(self._maps[-1]).__basicsize__ - MAP_BYTES
        return self.places[address]


def _place(reference: Reference) -> tuple[int, int]:
    return reference.slot, reference.offset * reference.dtype.itemsize
