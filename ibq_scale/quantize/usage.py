"""How much of the codebook is in use: an exact global histogram of indices."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def counts_of(indices: Tensor, codebook_size: int) -> Tensor:
    """Histogram (K,) int64 of indices of any shape, without the negative ones. It does not wait for a GPU."""
    flat = indices.reshape(-1)
    counts_K = torch.zeros(codebook_size, dtype=torch.int64, device=flat.device)
    # Not bincount: on a GPU it waits, to learn how many codes there are.
    return counts_K.index_add_(0, flat.clamp(min=0), (flat >= 0).long())


def share_used(counts_K: Tensor) -> Tensor:
    """Share of the codes that were chosen at least once, 0 to 1, fp64 scalar."""
    return (counts_K > 0).double().mean()


def perplexity(counts_K: Tensor) -> Tensor:
    """exp of the entropy of the empirical code distribution, fp64 scalar: 1 (one code) to K, 0 if empty."""
    total = counts_K.sum()
    p_K = counts_K.double() / total.clamp(min=1)
    return torch.where(total > 0, torch.special.entr(p_K).sum().exp(), 0.0)


class CodeUsage:
    """Counts codes on the device. Reading `usage` or `perplexity` waits for it."""

    def __init__(self, codebook_size: int, device: torch.device | str = "cpu") -> None:
        self.counts_K = torch.zeros(codebook_size, dtype=torch.int64, device=device)

    def update(self, indices: Tensor) -> None:
        """Adds int64 indices of any shape. Negative ones, of masked tokens, do not count."""
        self.add(counts_of(indices, len(self.counts_K)))

    def add(self, counts_K: Tensor) -> None:
        """Adds a histogram, and follows it to its device."""
        self.counts_K = self.counts_K.to(counts_K.device).add_(counts_K)

    def reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Sums the counts over the group (None: all ranks), in place. Call it once, before reading."""
        dist.all_reduce(self.counts_K, group=group)

    @property
    def usage(self) -> float:
        """Share of the codes chosen at least once, 0 to 1."""
        return float(share_used(self.counts_K))

    @property
    def perplexity(self) -> float:
        """exp of the entropy of the empirical code distribution: 1 (one code) to K (all equally often), 0 if empty."""
        return float(perplexity(self.counts_K))

    def reset(self) -> None:
        self.counts_K.zero_()
