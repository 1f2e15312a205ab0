"""The loss of a microbatch, with logits of all tokens and of some."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lorafusion.data.packing import IGNORE
from lorafusion.model.loss import weighted_losses

TOKENS, HIDDEN, WORDS = 96, 64, 512


def losses_and_gradient(labels, weights, rows=None):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, TOKENS, HIDDEN, dtype=torch.float64, generator=generator).requires_grad_()
    head = torch.randn(WORDS, HIDDEN, dtype=torch.float64, generator=generator)
    losses = weighted_losses(hidden, head, labels, weights, rows)
    losses.sum().backward()
    expected = F.cross_entropy(hidden[0] @ head.T, labels, ignore_index=IGNORE, reduction="none") * weights
    torch.testing.assert_close(losses, expected)
    return losses.detach(), hidden.grad[0]


@pytest.mark.parametrize("learnt", [(), (0,), (TOKENS - 1,), (3, 4, 50), range(40, 70), range(TOKENS)])
@pytest.mark.parametrize("others", [0, 16])
def test_logits_of_some_tokens_give_the_same_bits(learnt, others):
    """others: tokens without a label, the first ones, of which logits are made too."""
    labels = torch.full((TOKENS,), IGNORE)
    labels[list(learnt)] = 5 + torch.arange(len(learnt)) % (WORDS - 5)
    weights = torch.rand(TOKENS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    count = -(-(len(learnt) + others) // 16) * 16
    rows = (labels == IGNORE).byte().argsort(stable=True)[:count].sort().values
    whole, some = (losses_and_gradient(labels, weights, choice) for choice in (None, rows))
    for value, expected in zip(some, whole, strict=True):
        assert torch.equal(value, expected)
    assert some[0].count_nonzero() == some[1].count_nonzero(dim=1).count_nonzero() == len(learnt)
