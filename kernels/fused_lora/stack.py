"""`AdapterStack`: the factors of several adapters in two tensors, which a step of training touches in place of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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
        present = [one for _, one in _named(adapters)]
        self.table = AdapterTable.of(adapters, present[0].a.device)
        self.rows = tuple(max((len(one.b) for one in row if one is not None), default=0) for row in adapters)
        self.a = _leaf([one.a.detach() for one in present])
        self.b = _leaf([one.b.detach().flatten() for one in present])
        row = place = 0
        for one in present:
            _tie(one.a, self.a, slice(row, row + one.rank))
            _tie(one.b, self.b, slice(place, place + one.b.numel()))
            row, place = row + one.rank, place + one.b.numel()
        # A factor of each adapter: they may have optimizers of their own.
        first = {index: one.a for row in reversed(adapters) for index, one in enumerate(row) if one is not None}
        self._watched = list(first.values())

    def __len__(self) -> int:
        """The number of linears."""
        return len(self.rows)

    def check_gradients(self) -> None:
        """Raise RuntimeError where an adapter's gradients were set to None: its optimizer would leave it out."""
        if any(one.grad is None for one in self._watched):
            raise RuntimeError(
                "adapters: expected gradients zeroed in place (set_to_none=False), found them set to None"
            )


def _leaf(parts: list[Tensor]) -> Tensor:
    """The parts in one tensor, with a gradient of zeros."""
    leaf = torch.cat(parts).requires_grad_()
    leaf.grad = torch.zeros_like(leaf)
    return leaf


def _tie(parameter: nn.Parameter, leaf: Tensor, place: slice) -> None:
    """Make a parameter and its gradient views of a leaf's part."""
    parameter.data = leaf.detach()[place].view(parameter.shape)
    parameter.grad = leaf.grad[place].view(parameter.shape)


def _named(adapters: Adapters) -> Iterator[tuple[str, LoRAAdapter]]:
    """Those with factors, linear after linear."""
    for linear, row in enumerate(adapters):
        for index, one in enumerate(row):
            if one is not None:
                yield f"adapters[{linear}][{index}]", one


def _check(adapters: Adapters) -> None:
    """Raise ValueError, one line, for factors that cannot be stacked."""
    counts = [len(row) for row in adapters]
    if len(set(counts)) > 1:
        raise ValueError(f"adapters: expected as many for each linear, found {counts}")
    seen: dict[int, str] = {}
    for name, one in _named(adapters):
        for factor, form, tensor in (("a", "[r, K]", one.a), ("b", "[N, r]", one.b)):
            found = f"{type(tensor).__name__} of {tensor.dtype} {list(tensor.shape)}"
            if not isinstance(tensor, nn.Parameter) or not tensor.requires_grad or not tensor.is_floating_point():
                raise ValueError(f"{name}.{factor}: expected a floating point Parameter that is trained, found {found}")
            if tensor.dim() != 2:
                raise ValueError(f"{name}.{factor}: expected {form}, found {found}")
            if seen.setdefault(id(tensor), f"{name}.{factor}") != f"{name}.{factor}":
                raise ValueError(f"{name}.{factor}: expected one of its own, found {seen[id(tensor)]}")
    if not seen:
        raise ValueError("adapters: expected one with factors, found none")
    _check_shapes(adapters)


def _check_shapes(adapters: Adapters) -> None:
    """They have the dtype, device and columns of the first, and the rows of the first on their linear."""
    like = next(one.a for _, one in _named(adapters))
    for linear, row in enumerate(adapters):
        rows = next((len(one.b) for one in row if one is not None), 0)
        for index, one in enumerate(row):
            if one is None:
                continue
            for factor, tensor, shape in (("a", one.a, (one.rank, like.shape[1])), ("b", one.b, (rows, one.rank))):
                if (tensor.dtype, tensor.device, tensor.shape) != (like.dtype, like.device, shape):
                    wanted = f"{like.dtype} {list(shape)} on {like.device}, as the first"
                    found = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
                    raise ValueError(f"adapters[{linear}][{index}].{factor}: expected {wanted}, found {found}")
