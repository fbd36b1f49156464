"""The head over the codebook, and its cross-entropy without all logits in memory.

At 262,144 codes the logits of 16,384 tokens would take 16 GiB in fp32, and their gradient as much again.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Memory of one chunk of logits in fp32: small beside a large model, large enough for full speed.
CHUNK_BYTES = 512 * 2**20


class Head(nn.Linear):
    """E → V without bias."""

    def __init__(self, width: int, codes: int) -> None:
        super().__init__(width, codes, bias=False)

    def forward(self, x_BTE: Tensor, targets_BT: Tensor | None = None) -> Tensor:
        """Logits (B, T, V), or with int64 targets the cross-entropy of each token (B, T), fp32.

        The loss is part of this forward pass because ZeRO-3 gathers the weights only there.
        """
        if targets_BT is None:
            return super().forward(x_BTE)
        losses_N = _cross_entropy(x_BTE.flatten(0, 1), self.weight, targets_BT.flatten())
        return losses_N.view(targets_BT.shape)


def chunk_tokens(codes: int) -> int:
    return max(1, CHUNK_BYTES // (4 * codes))


def _cross_entropy(x_NE: Tensor, weight_VE: Tensor, targets_N: Tensor) -> Tensor:
    if not hasattr(F, "linear_cross_entropy"):
        return _in_chunks(x_NE, weight_VE, targets_N)
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk_tokens(len(weight_VE)))
    # Under bf16 weights its mean would be rounded to bf16, three digits. The fp32 mean of losses, each rounded by
    # itself, is unbiased.
    return F.linear_cross_entropy(x_NE, weight_VE, targets_N, reduction="none", options=options).float()


def _in_chunks(x_NE: Tensor, weight_VE: Tensor, targets_N: Tensor) -> Tensor:
    """The same before torch 2.14, with logits in the weights' dtype. Recomputing them costs one more product."""

    def losses(x_nE: Tensor, targets_n: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x_nE, weight_VE).float(), targets_n, reduction="none")

    rows = chunk_tokens(len(weight_VE))
    chunks = zip(torch.split(x_NE, rows), torch.split(targets_N, rows), strict=True)
    return torch.cat([checkpoint(losses, *chunk, use_reentrant=False) for chunk in chunks])
