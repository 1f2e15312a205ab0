"""Cross-entropy of packed samples, weighted so that what an adapter learns does not depend on its neighbours."""

import torch
import torch.nn.functional as F

from lorafusion.data.packing import IGNORE

# Of logits that exist at once on a GPU. All of 8192 tokens of Llama-3.1 would take 2 GiB, and their gradient in float32
# 4 GiB more, at the moment when every layer's activations are kept.
CHUNK_ROWS = 2048


def weighted_losses(
    hidden: torch.Tensor,
    head: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """Each token's share of its adapter's loss, [T] in float64.

    hidden [1, T, H], what the head takes; head [V, H], frozen; labels int64 [T], IGNORE where nothing is to be
    predicted; weights float64 [T], one over the label tokens of the adapter's global batch; rows int64 [R], the tokens
    of which logits are made, each once: all that have a label, and perhaps others; None: all tokens. The sum over all
    tokens of a global batch, whatever microbatches they came in, is the mean token loss of that batch.

    On a GPU logits are made and used up chunk by chunk, by Liger's kernel where it is installed.
    """
    if rows is None:
        return _losses(hidden[0], head, labels) * weights
    losses = _losses(hidden[0].index_select(0, rows), head, labels.index_select(0, rows))
    return losses.new_zeros(len(labels)).index_copy(0, rows, losses) * weights


def _losses(hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Each token's loss [T], of hidden states [T, H]."""
    if hidden.is_cuda and liger_kernel() is not None:
        return _ChunkedCrossEntropy.apply(hidden, head, labels)
    logits = F.linear(hidden, head)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(dtype), labels, ignore_index=IGNORE, reduction="none")


def liger_kernel():
    """Liger's kernel, which writes the gradient of its logits over them; None where it is not installed."""
    try:
        from liger_kernel.ops.cross_entropy import liger_cross_entropy_kernel
    except ImportError:
        return None
    return liger_cross_entropy_kernel


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Each token's loss [T] of hidden [T, H] and the frozen head [V, H]. The gradient is made with the loss: a token's
    loss depends on its own hidden state alone, so that what comes from above is a factor for each row."""

    @staticmethod
    def forward(ctx, hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        wanted = ctx.needs_input_grad[0]
        losses = torch.zeros(len(hidden), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if wanted else None
        for first in range(0, len(hidden), CHUNK_ROWS):
            rows = slice(first, first + CHUNK_ROWS)
            logits = hidden[rows] @ head.T
            _losses_and_gradient(logits, labels[rows], losses[rows], wanted)
            if wanted:
                torch.mm(logits, head, out=gradient[rows])
        if wanted:
            ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx, upstream: torch.Tensor):
        (gradient,) = ctx.saved_tensors
        # Not upstream in the gradient's dtype: all tokens of an adapter have the same factor, and its rounding too.
        return torch.mul(gradient, upstream[:, None], out=torch.empty_like(gradient)), None, None


def _losses_and_gradient(logits: torch.Tensor, labels: torch.Tensor, losses: torch.Tensor, wanted: bool) -> None:
    """Fill losses, and write the gradient over the logits where it is wanted.

    The kernel itself and not Liger's function around it, which waits for the device to count labels, and rounds a loss
    to the dtype of the logits.
    """
    from liger_kernel.ops.cross_entropy import MAX_FUSED_SIZE

    rows, columns = logits.shape
    block = min(MAX_FUSED_SIZE, 1 << (columns - 1).bit_length())
    liger_kernel()[(rows,)](
        X_ptr=logits, X_stride=logits.stride(0), Y_ptr=labels, Y_stride=labels.stride(0), weight_ptr=None,
        loss_ptr=losses, z_loss_ptr=None, loss_stride=losses.stride(0), token_accuracy_ptr=None,
        token_accuracy_stride=0, predicted_tokens_ptr=None, predicted_tokens_stride=0, n_cols=columns,
        n_non_ignore=rows, sum_non_ignore_weight=rows, weight_sum=0.0, ignore_index=IGNORE, lse_square_scale=0.0,
        label_smoothing=0.0, reduction="sum", softcap=None, RETURN_Z_LOSS=False, RETURN_TOKEN_ACCURACY=False,
        RETURN_PREDICTED_TOKENS=False, BLOCK_SIZE=block, HAS_WEIGHT=False, HAS_SOFTCAPPING=False,
        HAS_GRADIENTS=wanted, num_warps=32,
    )  # fmt: skip
