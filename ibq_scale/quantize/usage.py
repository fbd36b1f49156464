"""How much of the codebook is in use: an exact global histogram of indices."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class CodeUsage:
    """Counts codes on the device. Reading `usage` or `perplexity` waits for it."""

    def __init__(self, codebook_size: int, device: torch.device | str = "cpu") -> None:
        self.counts_K = torch.zeros(codebook_size, dtype=torch.int64, device=device)

    def update(self, indices: Tensor) -> None:
        """Adds int64 indices of any shape."""
        flat = indices.reshape(-1)
        # Not bincount: on a GPU it waits, to learn how many codes there are.
        self.counts_K.index_add_(0, flat, torch.ones_like(flat))

    def reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Sums the counts over the group (None: all ranks), in place. Call it once, before reading."""
        dist.all_reduce(self.counts_K, group=group)

    @property
    def usage(self) -> float:
        """Share of the codes chosen at least once, 0 to 1."""
        return float((self.counts_K > 0).double().mean())

    @property
    def perplexity(self) -> float:
        """exp of the entropy of the empirical code distribution: 1 (one code) to K (all equally often), 0 if empty."""
        total = self.counts_K.sum()
        if not total:
            return 0.0
        p_K = self.counts_K.double() / total
        return float(torch.special.entr(p_K).sum().exp())

    def reset(self) -> None:
        """Forgets everything counted."""
        self.counts_K.zero_()
