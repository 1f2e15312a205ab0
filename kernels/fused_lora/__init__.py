"""The LoRA linear for one or many adapters in one batch: y = x w^T + bias + c_i dropout_i(x) a_i^T b_i^T.

`lora_linear` is the reference in plain PyTorch, forward and backward: the oracle that kernels are tested against, and
the path on a CPU. Dropout is stateless (`philox`): a token's mask depends on its adapter and on its place in that
adapter's own stream, not on what it is batched with.
"""

from fused_lora.philox import keep_mask, mask_key
from fused_lora.reference import LoRAAdapter, LoRASegment, lora_backward, lora_forward, lora_linear

__all__ = [
    "LoRAAdapter",
    "LoRASegment",
    "keep_mask",
    "lora_backward",
    "lora_forward",
    "lora_linear",
    "mask_key",
]
