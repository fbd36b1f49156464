"""Keys and values of the codes so far, in memory that never moves: what compiled and captured steps need."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ibq_scale.config.models import TransformerConfig


class LayerCache(NamedTuple):
    """One layer's part: the keys and values (B, S, kv_heads, d) that a step reads, and where it puts its own.

    `seen_S`: which of them are there already, None where all are.
    """

    keys_BSGd: Tensor
    values_BSGd: Tensor
    place_1: Tensor
    seen_S: Tensor | None

    def extend(self, k_B1Gd: Tensor, v_B1Gd: Tensor) -> tuple[Tensor, Tensor]:
        """Puts a step's own in its place; all keys and values that it reads."""
        self.keys_BSGd.index_copy_(1, self.place_1, k_B1Gd)
        self.values_BSGd.index_copy_(1, self.place_1, v_B1Gd)
        return self.keys_BSGd, self.values_BSGd


class KVCache:
    """Keys and values of all layers, (B, tokens, kv_heads, d) each, filled from the front.

    Where a step stands (`place_1`) is on the device, so that one captured step serves many places; how many keys it
    reads is on the host: all that are there (`reach` None), or the first `reach`, and a mask hides those still to come.
    """

    def __init__(self, config: TransformerConfig, batch: int, device: torch.device, dtype: torch.dtype) -> None:
        shape = (batch, config.tokens, config.kv_groups, config.head_dim)
        # Tensors of their own: what is compiled may not write into memory that its arguments share.
        self._keys, self._values = (
            [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.depth)] for _ in range(2)
        )
        self.place_1 = torch.zeros(1, device=device, dtype=torch.int64)
        self.length = 0
        self.reach: int | None = None
        self.condition_BE = torch.empty(0)
        self.kept: list[Tensor] = []

    def clear(self) -> None:
        """Begins anew. Old keys stay where they are: no step sees them before they are written over."""
        self.length = 0
        self.place_1.zero_()

    def keep(self, condition_BE: Tensor, modulations: list[Tensor]) -> None:
        """Holds the classes' embedding and what each block makes of it, in the memory that the first call took."""
        if not self.kept:
            self.condition_BE, self.kept = condition_BE.clone(), [t.clone() for t in modulations]
            return
        for old, new in zip([self.condition_BE, *self.kept], [condition_BE, *modulations], strict=True):
            old.copy_(new)

    def layer(self, index: int, seen_S: Tensor | None) -> LayerCache:
        """A layer's part; `seen_S` is what `seen()` gave for this step."""
        keys, values = self._keys[index][:, : self._read], self._values[index][:, : self._read]
        return LayerCache(keys, values, self.place_1, seen_S)

    def seen(self) -> Tensor | None:
        """Which of the keys that a step reads are there, its own among them; None where all are."""
        if self.reach is None:
            return None
        return torch.arange(self._read, device=self.place_1.device) <= self.place_1

    def advance(self) -> None:
        """After a step."""
        self.length += 1
        self.place_1.add_(1)

    @property
    def nbytes(self) -> int:
        """Memory of all keys and values."""
        return sum(t.nbytes for t in [*self._keys, *self._values])

    @property
    def _read(self) -> int:
        return self.length + 1 if self.reach is None else self.reach
