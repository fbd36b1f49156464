"""Keys and values of the codes so far, in fixed memory, as compiled and captured steps need it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ibq_scale.config.models import TransformerConfig


class LayerCache(NamedTuple):
    """One layer's part: the keys and values (B, S, kv_heads, d) read by a step, and the position of the step's own.

    `seen_S`: bool, True for keys already written. None if all are.
    """

    keys_BSGd: Tensor
    values_BSGd: Tensor
    position_1: Tensor
    seen_S: Tensor | None

    def extend(self, k_B1Gd: Tensor, v_B1Gd: Tensor) -> tuple[Tensor, Tensor]:
        """Writes a step's key and value, and returns all keys and values to read."""
        self.keys_BSGd.index_copy_(1, self.position_1, k_B1Gd)
        self.values_BSGd.index_copy_(1, self.position_1, v_B1Gd)
        return self.keys_BSGd, self.values_BSGd


class KVCache:
    """Keys and values of all layers, (B, tokens, kv_heads, d) each, filled from the front.

    The position of a step (`position_1`) is on the device, so one captured step serves many positions. The number of
    keys to read is on the host: all written ones (`reach` None), or the first `reach` with a mask over unwritten ones.
    """

    def __init__(self, config: TransformerConfig, batch: int, device: torch.device, dtype: torch.dtype) -> None:
        shape = (batch, config.tokens, config.kv_groups, config.head_dim)
        # Separate tensors: compiled code may not write to memory shared by its arguments.
        self._keys, self._values = (
            [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.depth)] for _ in range(2)
        )
        self.position_1 = torch.zeros(1, device=device, dtype=torch.int64)
        self.length = 0
        self.reach: int | None = None
        self.condition_BE = torch.empty(0)
        self.kept: list[Tensor] = []

    def clear(self) -> None:
        """Restarts at the first position. Old keys are overwritten before any step reads them."""
        self.length = 0
        self.position_1.zero_()

    def keep(self, condition_BE: Tensor, modulations: list[Tensor]) -> None:
        """Copies the classes' embedding and each block's modulation to memory allocated by the first call."""
        if not self.kept:
            self.condition_BE, self.kept = condition_BE.clone(), [t.clone() for t in modulations]
            return
        for old, new in zip([self.condition_BE, *self.kept], [condition_BE, *modulations], strict=True):
            old.copy_(new)

    def layer(self, index: int, seen_S: Tensor | None) -> LayerCache:
        """A layer's part. `seen_S` is the result of `seen()` for this step."""
        keys, values = self._keys[index][:, : self._read], self._values[index][:, : self._read]
        return LayerCache(keys, values, self.position_1, seen_S)

    def seen(self) -> Tensor | None:
        """Bool (S,), True for the written keys among those of a step, with its own. None if all are written."""
        if self.reach is None:
            return None
        return torch.arange(self._read, device=self.position_1.device) <= self.position_1

    def advance(self) -> None:
        """Moves to the next position."""
        self.length += 1
        self.position_1.add_(1)

    @property
    def nbytes(self) -> int:
        """Memory of all keys and values."""
        return sum(t.nbytes for t in [*self._keys, *self._values])

    @property
    def _read(self) -> int:
        return self.length + 1 if self.reach is None else self.reach
