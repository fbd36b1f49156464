"""Keys and values of the codes so far, in fixed memory, as compiled and captured steps need it."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ibq_scale.config.models import TransformerConfig
from ibq_scale.models.condition import visible_keys


class LayerCache(NamedTuple):
    """One layer's part: the keys and values (B, S, kv_heads, d) read by a step, and the slots of the step's own."""

    keys_BSGd: Tensor
    values_BSGd: Tensor
    slots_T: Tensor

    def extend(self, k_BTGd: Tensor, v_BTGd: Tensor) -> tuple[Tensor, Tensor]:
        """Writes a step's keys and values, and returns all keys and values to read."""
        self.keys_BSGd.index_copy_(1, self.slots_T, k_BTGd)
        self.values_BSGd.index_copy_(1, self.slots_T, v_BTGd)
        return self.keys_BSGd, self.values_BSGd


class KVCache:
    """Keys and values of all layers, (B, L + tokens, kv_heads, d) each, filled from the front: L prefix vectors, codes.

    The position of a step (`position_1`) is on the device, so one captured step serves many positions. The number of
    keys to read is on the host: all written ones (`reach` None), or the prefix and the first `reach` with a mask over
    unwritten ones.
    """

    def __init__(self, config: TransformerConfig, batch: int, device: torch.device, dtype: torch.dtype) -> None:
        self.prefix = config.condition_tokens
        shape = (batch, self.prefix + config.tokens, config.kv_groups, config.head_dim)
        # Separate tensors: compiled code may not write to memory shared by its arguments.
        self._keys, self._values = (
            [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.depth)] for _ in range(2)
        )
        self.position_1 = torch.zeros(1, device=device, dtype=torch.int64)
        self.length = 0
        self.reach: int | None = None
        self.kept: list[Tensor] = []
        """Each block's modulation, and the token before code 0."""
        visible_BL = torch.zeros(batch, self.prefix, device=device, dtype=torch.bool)
        self._visible_BL = visible_BL if self.prefix else None

    def clear(self) -> None:
        """Restarts at the first position. Old keys are overwritten before any step reads them."""
        self.length = 0
        self.position_1.zero_()

    def keep(self, values: list[Tensor], visible_BL: Tensor | None = None) -> None:
        """Copies `kept` and the visible prefix to memory that every batch has in common."""
        if not self.kept:
            self.kept = [torch.empty_like(value) for value in values]
        for there, here in zip(self.kept, values, strict=True):
            there.copy_(here)
        if self._visible_BL is not None and visible_BL is not None:
            self._visible_BL.copy_(visible_BL)

    def slots(self, count: int) -> Tensor:
        """Slots int64 (count,) of a step's tokens. The last one is the position's, the others are the prefix."""
        last_1 = self.position_1 + self.prefix
        return last_1 if count == 1 else last_1 + torch.arange(1 - count, 1, device=last_1.device)

    def layer(self, index: int, slots_T: Tensor) -> LayerCache:
        """A layer's part. `slots_T` is the result of `slots` for this step."""
        keys, values = self._keys[index][:, : self._read], self._values[index][:, : self._read]
        return LayerCache(keys, values, slots_T)

    def visible(self, count: int = 1) -> Tensor | None:
        """Bool (1 or B, `count`, S), True for the visible keys of a step's tokens, with their own. None if all are."""
        if self.reach is None and self._visible_BL is None:
            return None
        codes = self._read - self.prefix
        seen_1C = torch.arange(codes, device=self.position_1.device)[None] <= self.position_1
        if self._visible_BL is None:
            return seen_1C[None]
        if count > 1:
            return F.pad(visible_keys(self._visible_BL, 1), (0, codes - 1))
        return torch.cat([self._visible_BL, seen_1C.expand(len(self._visible_BL), -1)], dim=1)[:, None]

    def advance(self) -> None:
        self.length += 1
        self.position_1.add_(1)

    @property
    def nbytes(self) -> int:
        """Memory of all keys and values."""
        return sum(t.nbytes for t in [*self._keys, *self._values])

    @property
    def _read(self) -> int:
        return self.prefix + (self.length + 1 if self.reach is None else self.reach)
