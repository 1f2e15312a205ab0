"""The LoRA linear as a function: `lora_linear`, `lora_linears` for linears that share their input, and
`lora_gated_linear` for the down projection of a gated MLP.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from operator import attrgetter

import torch
import torch.nn.functional as F

from fused_lora import ops
from fused_lora.adapters import AdapterTable, LoRAAdapter, LoRABatch, LoRASegment, Operands, Settings
from fused_lora.reference import gated
from fused_lora.stack import AdapterStack

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SIGNATURE, NEEDS_GRADIENT = attrgetter("shape", "dtype", "device"), attrgetter("requires_grad")
MOST_FORMS = 4096  # of arguments, that are remembered to fit: those of one model's linears for a hundred lengths
_fitting: set[tuple] = set()


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    adapters: Sequence[LoRAAdapter],
    segments: Sequence[LoRASegment],
    positions: torch.Tensor,
    training: bool = True,
) -> torch.Tensor:
    """y [..., N] = x w^T + bias + c_i dropout_i(x) a_i^T b_i^T, with gradients for x and the adapters.

    x [..., K], M tokens; weight [N, K] and bias [N] or None are frozen; segments in order and apart, over the tokens
    of x: those in none of them get the base linear alone; positions int64 [M], each token's place in its adapter's own
    stream. An adapter without tokens gets no gradient. Differentiable once.

    Convenient, but it copies what it is told to the device at each call; `lora_linears` does not.
    Raises ValueError naming the argument, what was found and what was expected.
    """
    _check_x(x)
    _expect("weight", weight, 2, "[N, K]")
    tokens = x.numel() // x.shape[-1]
    end = 0
    for index, segment in enumerate(segments):
        if not 0 <= segment.adapter < len(adapters):
            raise ValueError(f"segments[{index}]: expected an adapter in [0, {len(adapters)}), found {segment.adapter}")
        if not end <= segment.start <= segment.stop <= tokens:
            span = f"[{segment.start}, {segment.stop})"
            raise ValueError(f"segments[{index}]: expected a span within [{end}, {tokens}), in order, found {span}")
        end = segment.stop
    filled = [segment for segment in segments if segment.start < segment.stop]
    used = sorted({segment.adapter for segment in filled})
    AdapterTable.of([adapters], torch.device("cpu"))  # those without tokens are checked too
    for index, adapter in enumerate(adapters):
        _check_adapter(f"adapters[{index}]", adapter, x, weight)
    present = [replace(segment, adapter=used.index(segment.adapter)) for segment in filled]
    batch = LoRABatch.of(present, positions)
    return lora_linears(x, [weight], [bias], [[adapters[index] for index in used]], batch, training)[0]


def lora_linears(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    adapters: Sequence[Sequence[LoRAAdapter | None]] | AdapterStack,
    batch: LoRABatch,
    training: bool = True,
    table: AdapterTable | None = None,
    keep_bits: bool = True,
) -> list[torch.Tensor]:
    """y of P linears that share their input, such as q, k and v: x is read once, and their gradients to it are added
    where they arise. Each linear draws masks of its own.

    x [..., K], M tokens; weights P times [N_p, K] and biases P times [N_p] or None, frozen; adapters [P][G], None where
    one has no factors on a linear, or a stack of them, whose two tensors get the gradients then. table: of the same
    adapters, where the caller has it from an earlier call: making one copies to the device, and a stack has its own.
    keep_bits: keep the dropout masks for the backward pass, one bit an element, or
    draw them again there. Factors may have another floating dtype than x: products are computed in x's, gradients come
    in the factors'. Every adapter gets a gradient: zeros without tokens, and on a linear whose y is not used.
    Differentiable once; no call waits for the device. Raises ValueError naming the argument, what was found and what
    was expected.
    """
    _check(x, weights, biases, adapters, batch)
    table = _table(adapters, x, table)
    if table.max_rank == 0 or not batch.adapters.numel():
        return [F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    return _run([x], weights, biases, adapters, batch, table, training, keep_bits)


def lora_gated_linear(
    gate: torch.Tensor,
    up: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    adapters: Sequence[LoRAAdapter | None] | AdapterStack,
    batch: LoRABatch,
    training: bool = True,
    table: AdapterTable | None = None,
    keep_bits: bool = True,
) -> torch.Tensor:
    """y [..., N] of one linear of h = silu(gate) * up, a gated MLP's down projection, without keeping h.

    gate and up [..., K], M tokens, are kept for the backward pass, where h is computed again. y is what `lora_linears`
    gives for h, which is silu in float32, times up, rounded once to the dtype of gate (all in float64 for float64);
    PyTorch's `F.silu(gate) * up` rounds twice. adapters [G], or a stack of them on one linear; table: of [adapters].
    The rest is as for `lora_linears`. Raises ValueError naming the argument, what was found and what was expected.
    """
    _check_x(gate, "gate")
    _expect_like("up", up, gate, gate.shape)
    rows = adapters if isinstance(adapters, AdapterStack) else [adapters]
    _check(gate, [weight], [bias], rows, batch)
    table = _table(rows, gate, table)
    if table.max_rank == 0 or not batch.adapters.numel():
        return F.linear(gated(gate, up), weight, bias)
    return _run([gate, up], [weight], [bias], rows, batch, table, training, keep_bits)[0]


def _run(inputs, weights, biases, adapters, batch, table, training: bool, keep_bits: bool) -> list[torch.Tensor]:
    """The operator's y, of arguments that fit each other."""
    none = inputs[0].new_empty(0)
    biases = [none if bias is None else bias for bias in biases]
    tables, settings = tables_and_settings(batch, table, training)
    return ops.run_linear(factors_of(adapters), tables, settings, inputs, list(weights), biases, keep_bits)


def _table(adapters, x, table: AdapterTable | None) -> AdapterTable:
    """The stack's table; or the caller's, if it fits the adapters, or a new one."""
    if isinstance(adapters, AdapterStack):
        if table is not None:
            raise ValueError("table: expected None, since a stack of adapters has its own")
        return adapters.table
    table = table or AdapterTable.of(adapters, x.device)
    expected = tuple(tuple(0 if adapter is None else adapter.rank for adapter in row) for row in adapters)
    if table.ranks != expected:
        raise ValueError(f"table: expected one of ranks {expected}, found {table.ranks}")
    return table


def operator_arguments(
    adapters: Sequence[Sequence[LoRAAdapter | None]] | AdapterStack,
    batch: LoRABatch,
    table: AdapterTable,
    training: bool,
) -> tuple[Operands, Settings]:
    """What the operators of `ops` take first. adapters [P][G], or their stack."""
    tables, settings = tables_and_settings(batch, table, training)
    return ops.stacked(factors_of(adapters), tables), settings


def factors_of(
    adapters: Sequence[Sequence[LoRAAdapter | None]] | AdapterStack,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Every a and every b, linear after linear; a stack has one of each."""
    if isinstance(adapters, AdapterStack):
        return [adapters.a], [adapters.b]
    present = [adapter for adapter in chain.from_iterable(adapters) if adapter is not None]
    return [adapter.a for adapter in present], [adapter.b for adapter in present]


def tables_and_settings(
    batch: LoRABatch, table: AdapterTable, training: bool
) -> tuple[tuple[torch.Tensor, ...], Settings]:
    """The operands beside the factors, and what the host knows of the call."""
    scales = table.factors if training else table.scalings
    tables = (scales, table.thresholds, table.keys, table.rank_offsets, batch.offsets, batch.adapters, batch.positions)
    return tables, Settings(table.total_ranks, table.max_rank, training and table.dropout > 0)


def _check(x, weights, biases, adapters, batch) -> None:
    """Raise ValueError, one line, for arguments that do not fit each other. Those of a form that did are not looked at
    one by one again, which took the host as long as the launches."""
    stack = isinstance(adapters, AdapterStack)
    if stack:
        adapters.check_gradients()
    form = _form(x, weights, biases, adapters, batch) if ops.is_eager(x) else None
    if form and form in _fitting:  # what a compiler traces must not depend on what was seen
        return
    _check_x(x)
    if not len(weights) == len(biases) == len(adapters) or not weights:
        counts = f"{len(weights)}, {len(biases)} and {len(adapters)}"
        raise ValueError(f"weights, biases, adapters: expected one entry for each linear, found {counts}")
    _check_frozen(x, weights, biases)
    (_check_stack if stack else _check_adapters)(adapters, x, weights)
    _check_batch(x, batch)
    if form:
        if len(_fitting) == MOST_FORMS:
            _fitting.clear()
        _fitting.add(form)


def _form(x, weights, biases, adapters, batch) -> tuple:
    """All that `_check` looks at."""
    layout: tuple
    if isinstance(adapters, AdapterStack):
        a, b, layout = [adapters.a], [adapters.b], adapters.rows
    else:
        (a, b), layout = factors_of(adapters), tuple([tuple([lora is None for lora in row]) for row in adapters])
    frozen = [*weights, *(bias for bias in biases if bias is not None)]
    tensors = (x, batch.positions, batch.offsets, batch.adapters, *frozen, *a, *b)
    return (
        type(adapters), layout, len(weights), tuple([bias is None for bias in biases]),
        *map(torch.Tensor.stride, weights), *map(NEEDS_GRADIENT, frozen), *map(SIGNATURE, tensors),
    )  # fmt: skip


def _check_frozen(x, weights, biases) -> None:
    several = len(weights) > 1
    for index, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        name = f"weights[{index}]" if several else "weight"
        _expect(name, weight, 2, "[N, K]")
        _expect_like(name, weight, x, (weight.shape[0], x.shape[-1]))
        if weight.stride() != (weight.shape[1], 1):
            raise ValueError(f"{name}: expected contiguous rows, found strides {list(weight.stride())}")
        if bias is not None:
            _expect_like(f"biases[{index}]" if several else "bias", bias, x, (weight.shape[0],))
        for frozen in (weight, bias):
            if frozen is not None and frozen.requires_grad:
                raise ValueError(f"{name} and its bias: expected frozen ones, found one that requires a gradient")


def _check_x(x, name="x") -> None:
    if x.dim() < 1 or not x.is_floating_point() or x.shape[-1] < 1:
        raise ValueError(f"{name}: expected floating point [..., K], found {x.dtype} {list(x.shape)}")
    if x.device.type == "cuda" and x.dtype not in KERNEL_DTYPES:
        raise ValueError(f"{name}: expected bfloat16, float16 or float32 on a GPU, found {x.dtype}")


def _check_batch(x, batch) -> None:
    tokens = x.numel() // x.shape[-1]
    segments = batch.adapters.shape[0]
    for name, tensor, dtype, shapes in (
        ("positions", batch.positions, torch.int64, ((tokens,), (1,))),
        ("offsets", batch.offsets, torch.int32, ((segments + 1,),)),
        ("adapters of the batch", batch.adapters, torch.int32, ((segments,),)),
    ):
        if tensor.dtype != dtype or tuple(tensor.shape) not in shapes or tensor.device != x.device:
            actual = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            raise ValueError(f"{name}: expected {dtype} {list(shapes[0])} on {x.device}, found {actual}")


def _check_stack(stack: AdapterStack, x: torch.Tensor, weights: Sequence[torch.Tensor]) -> None:
    _expect_like("the stack's a", stack.a, x, (stack.a.shape[0], x.shape[-1]), dtype=False)
    for index, (weight, rows) in enumerate(zip(weights, stack.rows, strict=True)):
        if rows not in (0, weight.shape[0]):
            name = f"weights[{index}]" if len(weights) > 1 else "weight"
            raise ValueError(f"{name}: expected {rows} rows, as the stack's b have, found {weight.shape[0]}")


def _check_adapters(adapters, x: torch.Tensor, weights: Sequence[torch.Tensor]) -> None:
    if len({len(row) for row in adapters}) > 1:
        raise ValueError(f"adapters: expected as many for each linear, found {[len(row) for row in adapters]}")
    for index, (weight, row) in enumerate(zip(weights, adapters, strict=True)):
        name = f"adapters[{index}]" if len(weights) > 1 else "adapters"
        for place, adapter in enumerate(row):
            if adapter is not None:
                _check_adapter(f"{name}[{place}]", adapter, x, weight)


def _check_adapter(name: str, adapter: LoRAAdapter, x: torch.Tensor, weight: torch.Tensor) -> None:
    _expect(f"{name}.a", adapter.a, 2, "[r, K]")
    _expect(f"{name}.b", adapter.b, 2, "[N, r]")
    _expect_like(f"{name}.a", adapter.a, x, (adapter.rank, x.shape[-1]), dtype=False)
    _expect_like(f"{name}.b", adapter.b, x, (weight.shape[0], adapter.rank), dtype=False)


def _expect(name: str, tensor: torch.Tensor, dimensions: int, form: str) -> None:
    if tensor.dim() != dimensions or not tensor.is_floating_point():
        actual = f"{tensor.dtype} {list(tensor.shape)}"
        raise ValueError(f"{name}: expected floating point {form}, found {actual}")


def _expect_like(name, tensor, x, shape, dtype=True) -> None:
    if tensor.shape != shape or tensor.device != x.device or (dtype and tensor.dtype != x.dtype):
        wanted = f"{x.dtype if dtype else 'floating point'} {list(shape)} on {x.device}"
        actual = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
        raise ValueError(f"{name}: expected {wanted}, found {actual}")
