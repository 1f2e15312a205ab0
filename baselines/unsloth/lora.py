"""Unsloth's fused LoRA operations on the modules of every other system.

Used, through its functions alone, from the package `unsloth` (its kernels are Apache-2.0; their signatures were read in
unsloth/kernels/fast_lora.py at f4633d8 and 0050c73, where they are the same): `apply_lora_qkv`, `apply_lora_o` and
`apply_lora_mlp_swiglu`, which take an attention or an MLP with PEFT's linears in it and read the active adapter there.
They are one autograd function each for q, k and v, for o, and for a whole gated MLP, whose backward passes write the
input's gradient over the input.

As in Unsloth they are for adapters without dropout, on linears without a bias, that are on all linears of the group;
the others, and linears of other names (a merged q, k and v), have PEFT's own forward. Where dropout is the reason,
there is one warning. One adapter a microbatch. Not used: Unsloth's model loading, quantisation, norms, rotation,
attention, loss and offloading of activations; those are the same as in every other system (Liger's, where installed).

**Never run against the real package**, which needs a GPU and its own choice of transformers and torch: what is tested
is that its functions get the right modules and the right adapter, with functions of these signatures in plain torch.
Importing it changes transformers, PEFT and torch within the process; a run of this system is a process of its own.
"""

import warnings
from collections.abc import Callable, Sequence

import torch

from fused_lora.modules import SharedInput
from lorafusion.core.workload import MERGED_PARTS, Job
from lorafusion.model.lora import ActiveBatch, StageLinear, peft
from lorafusion.model.stage import is_gated_mlp

MLP = ("gate_proj", "up_proj", "down_proj")


def fast(linears: Sequence[StageLinear], active: ActiveBatch) -> None:
    """The LoRA kind: Unsloth's functions where it would use them itself, PEFT's forward elsewhere."""
    from unsloth.kernels import fast_lora  # patches much of the process, so only where it is wanted

    dropped = sorted({job.name for linear in linears for job in linear.jobs if job.dropout})
    if dropped:
        warnings.warn(
            f"unsloth: its LoRA operations are without dropout; PEFT's are used for {', '.join(dropped)}, as Unsloth "
            f"does itself",
            stacklevel=2,
        )
    peft(linears, active)
    families: dict[str, dict[str, StageLinear]] = {}
    for linear in linears:
        parent, _, name = linear.name.rpartition(".")
        families.setdefault(parent, {})[name] = linear
    for family in families.values():
        if all(name in family for name in MERGED_PARTS):
            _Group([family[name] for name in MERGED_PARTS], active).share(fast_lora.apply_lora_qkv)
        if "o_proj" in family:
            group = _Group([family["o_proj"]], active)
            group.replace(family["o_proj"].layer, fast_lora.apply_lora_o)
        if all(name in family for name in MLP) and is_gated_mlp(family["gate_proj"].parent):
            group = _Group([family[name] for name in MLP], active)
            group.replace(group.parent, fast_lora.apply_lora_mlp_swiglu)


class _Group:
    """Linears of one module that one of Unsloth's functions computes; it takes that module and x [1, T, K]."""

    def __init__(self, linears: list[StageLinear], active: ActiveBatch) -> None:
        self.layers, self.parent = [linear.layer for linear in linears], linears[0].parent
        self.jobs, self.active = linears[0].jobs, active

    def replace(self, module: torch.nn.Module, function: Callable) -> None:
        """Compute the forward of `module` by the function, or as it was."""
        original = module.forward

        def forward(x: torch.Tensor) -> torch.Tensor:
            return function(self.parent, x) if self._takes(self._job()) else original(x)

        module.forward = forward

    def share(self, function: Callable) -> None:
        """Compute the linears, which are called one after another with the same x, by one call of the function."""
        shared = SharedInput(lambda x: list(function(self.parent, x)))

        def forward_of(index: int, original: Callable) -> Callable:
            def forward(x: torch.Tensor) -> torch.Tensor:
                job = self._job()
                return shared.output(index, x, job.name) if self._takes(job) else original(x)

            return forward

        for index, layer in enumerate(self.layers):
            layer.forward = forward_of(index, layer.forward)

    def _job(self) -> Job:
        """The job of the microbatch; PEFT's forward, which this one may replace, takes one, too."""
        adapters = {segment.adapter for segment in self.active.batch.segments}
        if len(adapters) != 1:
            raise ValueError(f"Unsloth's functions take one adapter a microbatch, found {len(adapters)}")
        return self.jobs[adapters.pop()]

    def _takes(self, job: Job) -> bool:
        """Would Unsloth use its function for this adapter? Then it becomes the linears' active one."""
        if job.dropout or any(
            job.name not in layer.lora_A or layer.get_base_layer().bias is not None for layer in self.layers
        ):
            return False
        for layer in self.layers:
            layer._active_adapter = [job.name]  # not set_adapter(): it would freeze the others
        return True
