"""The LoRA linear for one or many adapters in one batch: y = x w^T + bias + c_i dropout_i(x) a_i^T b_i^T.

`lora_linear` is the function, `lora_linears` its form for linears that share their input, and `lora_gated_linear` its
form for the down projection of a gated MLP. On a GPU they run Triton kernels, on a CPU the reference in plain PyTorch
(`fused_lora.reference`), the oracle that the kernels are tested against. Dropout is stateless (`philox`): a token's
mask depends on its adapter and on its place in that adapter's own stream, not on what it is batched with.
`AdapterStack` holds the factors of all adapters of a training in two tensors. `patch` puts the kernels under a PEFT
model.
"""

from fused_lora.adapters import AdapterTable, LoRAAdapter, LoRABatch, LoRASegment
from fused_lora.linear import lora_gated_linear, lora_linear, lora_linears
from fused_lora.modules import LoRALinear, LoRASettings
from fused_lora.peft import PatchSummary, patch, unpatch
from fused_lora.philox import keep_mask, mask_key
from fused_lora.stack import AdapterStack

__all__ = [
    "AdapterStack",
    "AdapterTable",
    "LoRAAdapter",
    "LoRABatch",
    "LoRALinear",
    "LoRASegment",
    "LoRASettings",
    "PatchSummary",
    "keep_mask",
    "lora_gated_linear",
    "lora_linear",
    "lora_linears",
    "mask_key",
    "patch",
    "unpatch",
]
