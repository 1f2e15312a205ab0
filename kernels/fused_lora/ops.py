"""The LoRA linear as PyTorch operators, forward and backward: what autograd, `torch.compile` and fake tensors know.

`fused_lora::linear` computes P linears that share their input, for G adapters; `fused_lora::linear_backward` computes
all of its gradients. On a CPU they run the reference (in `cpu`), on a GPU the Triton kernels. Their arguments:

    the fields of `Operands` and of `Settings`, as `linear.operator_arguments` makes them
    inputs: x [M, K]; or gate and up [M, K], for one linear of x = silu(gate) * up. They are kept for the backward
        pass, which computes x again: the linears before it hand them over anyway
    weights: P times [N_p, K]. biases: P times [N_p], empty for a linear without one
    keep_bits: keep the mask for the backward pass, or draw it again there?
    dys: P times [M, N_p]. wanted: the gradients of the inputs? of the factors?

The results beside y are what the backward pass needs: s [P, M, rank_width(max_rank)], of which an adapter fills as
many columns as its rank and zeros beyond, and the mask bits, int32 [P, M, word_count(K)].

An operator of PyTorch takes a flat list of arguments. It is packed in `_flat` and unpacked in `_packed`; the kernels
get the tuples themselves.

`run_linear` is how they are called. In eager mode the kernels are called through an autograd function of their own:
what PyTorch does around an operator with lists of tensors takes the host 0.2 ms in each pass of q, k and v, as long as
all that the kernels want of it. It is one node of autograd, between what the caller has (factors of each adapter,
inputs of any form) and the y: to stack factors and to flatten inputs before it would be a node each.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from fused_lora import cpu
from fused_lora.adapters import Operands, Settings, Tensors, rank_width
from fused_lora.philox import word_count

KERNELS: dict[tuple[CustomOpDef, str], Callable] = {}  # what computes an operator, by type of device
OPERANDS_SCHEMA = ", ".join(f"Tensor {name}" for name in Operands._fields)
SETTINGS_SCHEMA = "SymInt[] ranks, SymInt max_rank, bool masked"


def _operator(name: str, schema: str, on_cpu: Callable, on_gpu: Callable) -> CustomOpDef:
    """An operator of the shared arguments and those of the schema, and the kernels that compute it."""

    def flat(kernel: Callable) -> Callable:
        return lambda *arguments: kernel(*_packed(arguments))

    schema = f"({OPERANDS_SCHEMA}, {SETTINGS_SCHEMA}, {schema}"
    operator = torch.library.custom_op(
        f"fused_lora::{name}", flat(on_cpu), mutates_args=(), device_types="cpu", schema=schema
    )
    operator.register_kernel("cuda")(flat(on_gpu))
    KERNELS[operator, "cpu"], KERNELS[operator, "cuda"] = on_cpu, on_gpu
    return operator


def _packed(arguments: Iterable) -> tuple:
    """An operator's flat arguments as operands, settings and the others."""
    rest = iter(arguments)
    operands = Operands(*islice(rest, len(Operands._fields)))
    return operands, Settings(*islice(rest, len(Settings._fields))), *rest


def _flat(operands: Operands, settings: Settings, *others: Any) -> tuple:
    return *operands, *settings, *others


def is_eager(x: Tensor) -> bool:
    """Are there x and its numbers? Not under a compiler, in a dispatch mode, and for tensors of another kind, such as
    fake ones."""
    plain = type(x) in (Tensor, torch.nn.Parameter)
    return plain and not torch.compiler.is_compiling() and not is_in_torch_dispatch_mode()


def _kernel(operator: CustomOpDef, x: Tensor) -> Callable | None:
    """What computes an operator for x in eager mode. None where the operator itself has to be called."""
    return KERNELS.get((operator, x.device.type)) if is_eager(x) else None


def run_linear(
    factors: tuple[Tensors, Tensors], tables: Tensors, settings: Settings, inputs: Tensors, *others: Any
) -> list[Tensor]:
    """The y [..., N_p] of `fused_lora::linear` for inputs [..., K], by the shortest way.

    factors, tables: what `stacked` makes operands of; others: weights, biases and keep_bits."""
    x = inputs[0]
    with without_autocast(x):
        if _kernel(linear, x):
            return list(_Linear.apply((factors, tables, settings, others), *factors[0], *factors[1], *inputs))
        ys, _, _ = linear(*_flat(stacked(factors, tables), settings, list(map(_flattened, inputs)), *others))
        return [y.view(*x.shape[:-1], y.shape[-1]) for y in ys]


def stacked(factors: tuple[Tensors, Tensors], tables: Tensors) -> Operands:
    """The operands from the adapters' a [r, K] and b [N, r]; autograd gives each its part of the gradient. tables: the
    other operands."""
    a, b = factors
    if len(a) == 1:
        return Operands(a[0].contiguous(), b[0].reshape(-1), *tables)
    return Operands(torch.cat(a), torch.cat([factor.reshape(-1) for factor in b]), *tables)


def _flattened(tensor: Tensor) -> Tensor:
    """[..., K] as [M, K]."""
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])


def _shaped(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """A new tensor [M, K] in another shape, and no view of it: autograd may add to it in place."""
    return tensor if len(shape) == 2 else torch.ops.aten._unsafe_view(tensor, shape)


def without_autocast(x: Tensor) -> AbstractContextManager:
    """The operators' dtypes are those of their arguments: autocast would change them inside."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


@cache
def _host() -> Any:
    """The host code of the kernels; a statement that imports it takes time at each call."""
    from fused_lora.gpu.host import launch

    return launch


# Triton launches on the current device, which need not be the tensors'.
def _linear_on_gpu(operands, *arguments):
    with torch.cuda.device_of(operands.a):
        return _host().forward(operands, *arguments)


def _linear_backward_on_gpu(operands, *arguments):
    with torch.cuda.device_of(operands.a):
        return _host().backward(operands, *arguments)


linear = _operator(
    "linear",
    "Tensor[] inputs, Tensor[] weights, Tensor[] biases, bool keep_bits) -> (Tensor[], Tensor, Tensor)",
    cpu.linear,
    _linear_on_gpu,
)
linear_backward = _operator(
    "linear_backward",
    "Tensor[] dys, Tensor[] inputs, Tensor[] weights, Tensor s, Tensor bits, bool[] wanted)"
    " -> (Tensor[], Tensor, Tensor)",
    cpu.linear_backward,
    _linear_backward_on_gpu,
)


@linear.register_fake
def _(*arguments):
    _, settings, inputs, weights, _, keep_bits = _packed(arguments)
    x = inputs[0]
    tokens, columns = x.shape
    bits_shape = (len(weights), tokens, word_count(columns)) if settings.masked and keep_bits else (0,)
    ys = [x.new_empty(tokens, weight.shape[0]) for weight in weights]
    s = x.new_empty(len(weights), tokens, rank_width(settings.max_rank))
    return ys, s, x.new_empty(bits_shape, dtype=torch.int32)


@linear_backward.register_fake
def _(*arguments):
    operands, _, _, inputs, *_, (wants_inputs, wants_factors) = _packed(arguments)
    gradients = [x.new_empty(x.shape if wants_inputs else 0) for x in inputs]
    return gradients, *(factor.new_empty(factor.shape if wants_factors else 0) for factor in (operands.a, operands.b))


def _keep(ctx, arguments: tuple, output: tuple) -> None:
    """Keep what the backward pass needs, from the packed arguments of `linear` and its results."""
    operands, ctx.settings, inputs, weights, _, _ = arguments
    _, s, bits = output
    ctx.input_count = len(inputs)
    ctx.set_materialize_grads(False)  # zeros as large as s and the bits would be made at each call
    ctx.save_for_backward(s, bits, *operands, *inputs, *weights)


def _gradients(
    ctx, dys: Sequence[Tensor | None], wanted: list[bool], factors: tuple[Tensors, Tensors] | None = None
) -> tuple[list, Any, Any]:
    """The gradients of the inputs, of a and of b; None for those that are not wanted. factors: what a and b are stacked
    of, where autograd knows those."""
    saved = iter(ctx.saved_tensors)
    s, bits, operands = next(saved), next(saved), Operands(*islice(saved, len(Operands._fields)))
    inputs, weights = [_flattened(tensor) for tensor in islice(saved, ctx.input_count)], list(saved)
    x = inputs[0]
    dys = [
        x.new_zeros(x.shape[0], weight.shape[0]) if dy is None else _flattened(dy.contiguous())
        for dy, weight in zip(dys, weights, strict=True)
    ]
    # With gradients enabled it must be the operator, which refuses to be differentiated once more.
    again = torch.is_grad_enabled()
    if again and factors:
        operands = stacked(factors, operands[2:])
    arguments = (operands, ctx.settings, dys, inputs, weights, s, bits, wanted)
    with without_autocast(x):  # a backward pass under autocast computes as the forward did
        kernel = None if again else _kernel(linear_backward, x)
        dinputs, da, db = kernel(*arguments) if kernel else linear_backward(*_flat(*arguments))
    wants_inputs, wants_factors = wanted
    dinputs = dinputs if wants_inputs else [None] * len(inputs)
    return dinputs, *((da, db) if wants_factors else (None, None))


def _setup_context(ctx, inputs, output) -> None:
    _keep(ctx, _packed(inputs), output)
    # Neither s nor the bits are results to differentiate: a second derivative through them would be silently wrong.
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, dys, _s, _bits):
    # What PyTorch says of each argument is laid out as the arguments are.
    operands, settings, inputs, weights, biases, _ = _packed(ctx.needs_input_grad)
    dinputs, da, db = _gradients(ctx, dys, [any(inputs), operands.a or operands.b])
    others = ([None] * len(weights), [None] * len(biases), None)
    no_operands = Operands(*[None] * len(operands))
    return _flat(no_operands._replace(a=da, b=db), [None] * len(settings), dinputs, *others)


linear.register_autograd(_backward, setup_context=_setup_context)


class _Linear(torch.autograd.Function):
    """`fused_lora::linear` in eager mode: from factors and inputs, which autograd sees, to the y."""

    @staticmethod
    def forward(ctx, arguments, *tensors):
        ctx.factors, tables, settings, others = arguments
        inputs = tensors[2 * len(ctx.factors[0]) :]
        ctx.shape = shape = inputs[0].shape
        operands, flat = stacked(ctx.factors, tables), [_flattened(tensor) for tensor in inputs]
        output = KERNELS[linear, inputs[0].device.type](operands, settings, flat, *others)
        _keep(ctx, (operands, settings, inputs, *others), output)
        return tuple([_shaped(y, (*shape[:-1], y.shape[1])) for y in output[0]])

    @staticmethod
    def backward(ctx, *dys):
        a, b = factors = ctx.factors
        _, *wanted = ctx.needs_input_grad
        count = len(a) + len(b)
        dinputs, da, db = _gradients(ctx, dys, [any(wanted[count:]), any(wanted[:count])], factors)
        if da is None:
            parts = [None] * count
        elif len(a) == 1:
            parts = [da, db.view(b[0].shape)]
        else:  # `Tensor.split` is Python's
            parts_of_b = zip(b, db.split_with_sizes([factor.numel() for factor in b]), strict=True)
            parts = [*da.split_with_sizes([*map(len, a)]), *(part.view(like.shape) for like, part in parts_of_b)]
        return None, *parts, *(None if dx is None else _shaped(dx, ctx.shape) for dx in dinputs)
