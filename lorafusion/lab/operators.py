"""What a piece of work costs in operators of PyTorch: how many of which class, the bytes that they move, and
those that they keep.

It counts on any device and never depends on its speed. On a GPU an operator may be several kernels, and kernels of
Triton are none: `profiler` counts those.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS, RANDOM, ELEMENTWISE, COMMUNICATION = "matrix products", "random numbers", "elementwise", "communication"
HOST_READS = "host reads"  # of what a device has computed, for which the host waits
NAMESPACES = {"fused_lora": "LoRA", "c10d": COMMUNICATION, "_c10d_functional": COMMUNICATION}
READING_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
# An operator is of the first class that its name, without namespace and overload, tells.
NAMES = {
    PRODUCTS: re.compile("(mm|addmm_?|bmm|baddbmm_?|addbmm|mv|addmv|dot|matmul|linear|_grouped_mm)"),
    "attention": re.compile("_scaled_dot_product_.*|_(flash|efficient|cudnn)_attention_.*"),
    "optimizer": re.compile("_fused_.*|_foreach_.*|_amp_.*"),
    "loss": re.compile("(_log_softmax|nll_loss).*"),
    RANDOM: re.compile("native_dropout.*|dropout.*|bernoulli.*|(rand|normal|uniform|exponential|multinomial).*"),
    "copies": re.compile(
        "clone|copy_?|_to_copy|cat|stack|repeat|repeat_interleave|roll|constant_pad_nd|pin_memory|_pin_memory|contiguous"
        "|resize_|(select|slice)_(backward|scatter)|split.*_copy|embedding|index|index_select|gather"
    ),
    "fills": re.compile("(new_)?(zeros|ones|full)(_like)?|fill_?|zero_?|arange|scalar_tensor|eye|tril|triu"),
    "reductions": re.compile(
        "sum|mean|prod|amax|amin|max|min|any|all|var.*|std.*|cumsum.*|(linalg_vector_)?norm|nansum"
    ),
}
# They move nothing.
FREE = re.compile("(new_)?empty(_like|_strided)?(_strided)?|_unsafe_view|_reshape_alias|lift_fresh|set_|record_stream")


class Operation(NamedTuple):
    """An operator that ran: its name and class, the bytes of its arguments and results, and its arguments' dtypes."""

    name: str
    kind: str
    read: int
    written: int
    dtypes: tuple[str, ...]


class OperatorTotals(NamedTuple):
    """What the operators of a class come to."""

    operators: int
    read: int
    written: int


class Counting(TorchDispatchMode):
    """Within it `note` is told each operator that moves something; views and allocations move nothing."""

    def __init__(self, note: Callable[[Operation], object]) -> None:
        super().__init__()
        self._note = note

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        kind, arguments, results = class_of(function), _tensors([args, kwargs]), _tensors(result)
        if kind is not None and (arguments or results):
            read, written = (sum(tensor.nbytes for tensor in tensors) for tensors in (arguments, results))
            self._note(
                Operation(_short(function), kind, read, written, tuple(dtype_name(tensor) for tensor in arguments))
            )
        return result


@cache
def class_of(function: torch._ops.OpOverload) -> str | None:
    """The class of an operator; None for views and allocations. What has no class is one of its own."""
    name, tags = _short(function), set(function.tags)
    if function.namespace in NAMESPACES:
        return NAMESPACES[function.namespace]
    if function.is_view or FREE.fullmatch(name):
        return None
    if tags & READING_TAGS or name == "_local_scalar_dense":
        return HOST_READS
    named = next((kind for kind, pattern in NAMES.items() if pattern.fullmatch(name)), None)
    if named is None and torch.Tag.nondeterministic_seeded in tags:
        return RANDOM
    return named or (ELEMENTWISE if torch.Tag.pointwise in tags else f"other: {name}")


def by_class(operations: Iterable[Operation]) -> dict[str, OperatorTotals]:
    """Sums of each class, in the order of their names."""
    classes: dict[str, list[Operation]] = defaultdict(list)
    for operation in operations:
        classes[operation.kind].append(operation)
    return {
        kind: OperatorTotals(len(group), sum(item.read for item in group), sum(item.written for item in group))
        for kind, group in sorted(classes.items())
    }


def product_dtypes(operations: Iterable[Operation]) -> dict[str, int]:
    """How many matrix products have arguments of which dtypes."""
    products = (operation for operation in operations if operation.kind == PRODUCTS)
    counts = Counter(" x ".join(sorted(set(operation.dtypes))) for operation in products)
    return dict(sorted(counts.items()))


def saved_bytes(forward: Callable[[], torch.Tensor], frozen: set[int]) -> int:
    """Bytes that a forward pass keeps for its backward pass, each storage once.

    frozen: storages (`data_ptr`) that exist anyway and are not counted: weights, and the input.
    """
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in frozen:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        held = forward()  # while the graph lives, no storage is given away and counted twice or not at all
    del held
    return sum(kept.values())


def dtype_name(tensor: torch.Tensor) -> str:
    """Its dtype, without the module's name."""
    return str(tensor.dtype).removeprefix("torch.")


def _short(function: torch._ops.OpOverload) -> str:
    """The name without namespace and overload."""
    return function.overloadpacket.__name__


def _tensors(value: Any) -> list[torch.Tensor]:
    """Those of an operator's arguments or results, which nest in lists, tuples and dicts alone."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return []
    return [tensor for part in value for tensor in _tensors(part)]
