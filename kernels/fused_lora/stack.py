"""`AdapterStack`: the factors of several adapters in two tensors, which a step of training touches in place of each."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fused_lora.adapters import AdapterTable, LoRAAdapter

Adapters = Sequence[Sequence[LoRAAdapter | None]]


class AdapterStack:
    """G adapters on P linears that share their input, as two leaves of autograd, a and b.

    Without it each call copies all factors into one tensor, and its backward pass adds to the gradient of each factor
    apart: two launches for each adapter and linear. Here the factors are parts of the leaves from the beginning:
    `parameter.data` is a view of a leaf, and `parameter.grad` one of the leaf's gradient, which is always there and
    which autograd adds to in place. Optimizers, checkpoints and all else that works on the parameters go on as they
    did, within limits: gradients are zeroed in place and never set to None; nothing gives a parameter other memory, as
    `module.to` does; no adapter is stepped between a forward pass with tokens of it and its backward pass, which would
    take the new factors and not notice; and autograd knows the leaves, not the parameters.

    adapters [P][G], None where one has no factors on a linear. The factors are `nn.Parameter`s that are trained, all of
    one dtype and device; they keep their values, and their gradients begin at zero. Raises ValueError naming the
    factor, what was found and what was expected.

    a [R, K]: every a, linear after linear. b: every b [N, r] flat, in the same order.
    rows: N of each linear; 0 where no adapter has factors.
    """

    @torch.inference_mode(False)
    def __init__(self, adapters: Adapters) -> None:
        _check(adapters)
        present = [adapter for _, adapter in _named(adapters)]
        self.table = AdapterTable.of(adapters, present[0].a.device)
        self.rows = tuple(
            max((len(adapter.b) for adapter in row if adapter is not None), default=0) for row in adapters
        )
        self.a = _leaf([adapter.a.detach() for adapter in present])
        self.b = _leaf([adapter.b.detach().flatten() for adapter in present])
        row = place = 0
        for adapter in present:
            _tie(adapter.a, self.a, slice(row, row + adapter.rank))
            _tie(adapter.b, self.b, slice(place, place + adapter.b.numel()))
            row, place = row + adapter.rank, place + adapter.b.numel()
        # A factor of each adapter: they may have optimizers of their own.
        first = {
            index: adapter.a for row in reversed(adapters) for index, adapter in enumerate(row) if adapter is not None
        }
        self._watched = list(first.values())

    def __len__(self) -> int:
        """The number of linears."""
        return len(self.rows)

    def check_gradients(self) -> None:
        """Raise RuntimeError where an adapter's gradients were set to None: its optimizer would leave it out."""
        if any(adapter.grad is None for adapter in self._watched):
            raise RuntimeError(
                "adapters: expected gradients zeroed in place (set_to_none=False), found them set to None"
            )


def _leaf(parts: list[Tensor]) -> Tensor:
    """The parts in one tensor, with a gradient of zeros."""
    leaf = torch.cat(parts).requires_grad_()
    leaf.grad = torch.zeros_like(leaf)
    return leaf


def _tie(parameter: Tensor, leaf: Tensor, place: slice) -> None:
    """Make a parameter and its gradient views of a leaf's part."""
    parameter.data = leaf.detach()[place].view(parameter.shape)
    gradient: Any = leaf.grad  # there from the beginning
    parameter.grad = gradient[place].view(parameter.shape)


def _named(adapters: Adapters) -> Iterator[tuple[str, LoRAAdapter]]:
    """Those with factors, linear after linear."""
    for linear, row in enumerate(adapters):
        for index, adapter in enumerate(row):
            if adapter is not None:
                yield f"adapters[{linear}][{index}]", adapter


def _check(adapters: Adapters) -> None:
    """Raise ValueError, one line, for factors that cannot be stacked."""
    counts = [len(row) for row in adapters]
    if len(set(counts)) > 1:
        raise ValueError(f"adapters: expected as many for each linear, found {counts}")
    seen: dict[int, str] = {}
    for name, adapter in _named(adapters):
        for factor, form, tensor in (("a", "[r, K]", adapter.a), ("b", "[N, r]", adapter.b)):
            actual = f"{type(tensor).__name__} of {tensor.dtype} {list(tensor.shape)}"
            if not isinstance(tensor, nn.Parameter) or not tensor.requires_grad or not tensor.is_floating_point():
                raise ValueError(
                    f"{name}.{factor}: expected a floating point Parameter that is trained, found {actual}"
                )
            if tensor.dim() != 2:
                raise ValueError(f"{name}.{factor}: expected {form}, found {actual}")
            if seen.setdefault(id(tensor), f"{name}.{factor}") != f"{name}.{factor}":
                raise ValueError(f"{name}.{factor}: expected one of its own, found {seen[id(tensor)]}")
    if not seen:
        raise ValueError("adapters: expected one with factors, found none")
    _check_shapes(adapters)


def _check_shapes(adapters: Adapters) -> None:
    """They have the dtype, device and columns of the first, and the rows of the first on their linear."""
    like = next(adapter.a for _, adapter in _named(adapters))
    for linear, row in enumerate(adapters):
        rows = next((len(adapter.b) for adapter in row if adapter is not None), 0)
        for index, adapter in enumerate(row):
            if adapter is None:
                continue
            for factor, tensor, shape in (
                ("a", adapter.a, (adapter.rank, like.shape[1])),
                ("b", adapter.b, (rows, adapter.rank)),
            ):
                if (tensor.dtype, tensor.device, tensor.shape) != (like.dtype, like.device, shape):
                    wanted = f"{like.dtype} {list(shape)} on {like.device}, as the first"
                    actual = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
                    raise ValueError(f"adapters[{linear}][{index}].{factor}: expected {wanted}, found {actual}")
