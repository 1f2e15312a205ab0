"""Calls of the host code that are done again from a record of an earlier one: `remembered`.

A record holds all that is found out at each call: which kernels, their grids and numbers, and whose addresses go where.
What is left to do is to allocate memory, to fill in addresses, and to call the driver.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce, wraps
from operator import or_
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from triton import knobs
from triton.runtime import driver

from fused_lora.adapters import Operands, Settings
from fused_lora.gpu.host import calls
from fused_lora.gpu.host.driver import DriverLaunch, UnknownLaunchError, bind
from fused_lora.gpu.host.record import Allocation, Launch, Operation, Recorder, Reference, Step, stand_in

MOST_PLANS = 1024
ALIGNED = 16  # bytes: what a record relies on

NEW, SEEN, NEVER = "new", "seen", "never"  # kinds of calls without a plan: recorded at the second call; not at all

Results = tuple[list[Tensor], Tensor, Tensor]


class Plan:
    """A call of the host code, to be done again with other tensors of the same kind. Raises UnknownLaunchError."""

    def __init__(self, function: Callable[..., Results], settings: Settings, arguments: tuple) -> None:
        inputs: list[Tensor] = []

        def replaced(tensor: Tensor) -> Tensor:
            inputs.append(stand_in(tensor))
            return inputs[-1]

        target = calls.target_for(arguments[0].a)
        if target.name == calls.INTERPRETER:
            raise UnknownLaunchError
        self._device = arguments[0].a.device
        operands, *others = tree_map_only(Tensor, replaced, arguments)
        recorder = Recorder(inputs, target)
        with calls.recording(recorder):
            parts, *rest = function(operands, settings, *others)
        self._memory = [recorder.reference(tensor) for tensor in recorder.memory]
        self._empty = [0] * (len(self._memory) - len(inputs))
        results = [recorder.reference(tensor) for tensor in (*parts, *rest)]
        if any(result != self._memory[result.slot] or result.slot < len(inputs) for result in results):
            raise UnknownLaunchError
        self._results = [result.slot for result in results]
        self._steps = self._with_releases([self._step(step, recorder) for step in recorder.steps], len(inputs))
        self._lock = Lock()

    def _step(self, step: Step, recorder: Recorder) -> tuple[Callable[..., None], set[int]]:
        """What does a step again, and the slots that it uses."""
        if isinstance(step, Launch):
            launch = DriverLaunch(step, recorder.reference)
            return launch.run, launch.slots
        if isinstance(step, Allocation):
            return _allocation(step.memory, self._device), {step.memory.slot}
        used = [value.slot for value in (*step.arguments, *step.keywords.values()) if isinstance(value, Reference)]
        return partial(self._operate, step), {*used} if step.result is None else {*used, step.result}

    def _with_releases(self, steps: list[tuple[Callable, set[int]]], inputs: int) -> list[Callable[..., None]]:
        """The steps. Memory is given back after the last one that uses it, as the host code does."""
        last = {slot: index for index, (_, slots) in enumerate(steps) for slot in slots}
        complete = []
        for index, (step, slots) in enumerate(steps):
            complete.append(step)
            done = {slot for slot in slots if slot >= inputs and last[slot] == index}.difference(self._results)
            if done:
                complete.append(partial(_release, done))
        return complete

    def _operate(self, step: Operation, tensors: list, addresses: list[int], stream: int) -> None:
        arguments = [self._tensor(argument, tensors) for argument in step.arguments]
        keywords = {name: self._tensor(argument, tensors) for name, argument in step.keywords.items()}
        result = step.function(*arguments, **keywords)
        if step.result is not None:
            tensors[step.result], addresses[step.result] = result, result.data_ptr()

    def _tensor(self, argument: Any, tensors: list) -> Any:
        """The tensor that a reference stands for; another argument as it is."""
        if not isinstance(argument, Reference):
            return argument
        tensor = tensors[argument.slot]
        if argument == self._memory[argument.slot]:
            return tensor
        return tensor.as_strided(argument.shape, argument.strides, tensor.storage_offset() + argument.offset)

    def run(self, inputs: Sequence[Tensor], addresses: Sequence[int]) -> Results:
        """The results of the host code for inputs at addresses."""
        tensors, addresses = [*inputs, *self._empty], [*addresses, *self._empty]
        stream = driver.active.get_current_stream(self._device.index or 0)
        with self._lock:  # the launches' parameters are there once
            for step in self._steps:
                step(tensors, addresses, stream)
        *parts, first, second = [tensors[slot] for slot in self._results]
        return parts, first, second


def _allocation(memory: Reference, device: torch.device) -> Callable[..., None]:
    # Sizes as arguments of their own: PyTorch takes twice the time for a tuple of them, and longer to read a device.
    empty, slot = partial(torch.empty(0, dtype=memory.dtype, device=device).new_empty, *memory.shape), memory.slot

    def allocate(tensors: list, addresses: list[int], stream: int) -> None:
        tensors[slot] = tensor = empty()
        addresses[slot] = tensor.data_ptr()

    return allocate


def _release(slots: set[int], tensors: list, addresses: list[int], stream: int) -> None:
    for slot in slots:
        tensors[slot] = None


def _watched() -> bool:
    """Does a profiler want to hear of Triton's launches?"""
    hook = knobs.runtime.launch_enter_hook
    return bool(getattr(hook, "calls", hook))


def remembered(function: Callable[..., Results]) -> Callable[..., Results]:
    """A pass of the host code, (operands, settings, *arguments) -> Results, that comes from its record where there is
    one."""
    return wraps(function)(partial(_from_record, function))


def _from_record(function: Callable[..., Results], operands: Operands, settings: Settings, *arguments: Any) -> Results:
    """function(operands, settings, *arguments), from its record where there is one.

    arguments: tensors, bools, which tell kinds of calls apart, and sequences of either. The first call of a kind is not
    recorded, as there may be no second. Nor are calls while someone else launches, or watches Triton's launches."""
    launcher = calls.launcher()
    if launcher.run_of is not calls.RUN:
        return function(operands, settings, *arguments)
    if calls.target_for(operands.a).name != calls.INTERPRETER:
        bind(operands.a.device.index or 0)
    if not launcher.remembers or _watched():
        return function(operands, settings, *arguments)
    tensors: list[Tensor] = [*operands]
    numbers: list[Any] = [settings.max_rank, settings.masked, *settings.ranks]
    for argument in arguments:
        if isinstance(argument, Tensor):
            tensors.append(argument)
        elif isinstance(argument, bool):
            numbers.append(argument)
        elif isinstance(argument[0], Tensor):
            tensors += argument
        else:
            numbers += argument
    addresses = list(map(Tensor.data_ptr, tensors))
    strides = () if all(map(Tensor.is_contiguous, tensors)) else map(Tensor.stride, tensors)
    kind = (
        function, operands.a.get_device(), operands.a.dtype, operands.b.dtype, tensors[len(operands)].dtype, *numbers,
        *map(Tensor.size, tensors), *strides,
    )  # fmt: skip
    plan = launcher.plans.get(kind, NEW) if reduce(or_, addresses) % ALIGNED == 0 else NEVER
    if plan == SEEN:
        try:
            plan = Plan(function, settings, (operands, *arguments))
        except UnknownLaunchError:
            plan = NEVER
        launcher.plans[kind] = plan
    if isinstance(plan, Plan):
        return plan.run(tensors, addresses)
    if plan == NEW:
        if len(launcher.plans) >= MOST_PLANS:
            del launcher.plans[next(iter(launcher.plans))]
        launcher.plans[kind] = SEEN
    return function(operands, settings, *arguments)
