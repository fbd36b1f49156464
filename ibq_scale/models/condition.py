"""A prefix of given vectors before the codes, such as a text encoder's output (`model.conditioning=embedding`)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ibq_scale.config.models import TransformerConfig


class Condition(NamedTuple):
    """Vectors (B, L, C) of any float dtype, of which the first lengths (B,) int64 count. 0 means no condition."""

    vectors_BLC: Tensor
    lengths_B: Tensor

    def visible(self) -> Tensor:
        """Bool (B, L), True for vectors that count."""
        return torch.arange(self.vectors_BLC.shape[1], device=self.lengths_B.device) < self.lengths_B[:, None]

    @staticmethod
    def of(vectors_BLC: Tensor | None, lengths_B: Tensor | None) -> Condition | None:
        """The two parts of a batch as one. None if it has none."""
        return None if vectors_BLC is None or lengths_B is None else Condition(vectors_BLC, lengths_B)

    def take(self, rows_N: Tensor) -> Condition:
        return Condition(self.vectors_BLC[rows_N], self.lengths_B[rows_N])

    def to(self, device: torch.device) -> Condition:
        return Condition(self.vectors_BLC.to(device), self.lengths_B.to(device))


class Prefix(NamedTuple):
    """What precedes the codes: vectors (B, L, E), visible (B, L) of them, and the token (B, E) that predicts code 0."""

    vectors_BLE: Tensor
    visible_BL: Tensor
    start_BE: Tensor


def padded(rows: list[Tensor], tokens: int) -> Condition:
    """Rows (l, C), l ≤ tokens, as one condition, fp32 on the CPU."""
    vectors = [F.pad(row.float(), (0, 0, 0, tokens - len(row))) for row in rows]
    return Condition(torch.stack(vectors), torch.tensor([len(row) for row in rows]))


class ConditionEmbedding(nn.Module):
    """Norm and projection of the vectors, since encoders differ in scale, and the token before code 0.

    A sample without a condition hides its vectors and has another token. In training `label_dropout` of the samples
    lose theirs, for guidance.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.dropout = config.label_dropout
        self.norm = nn.RMSNorm(config.condition_width, eps=1e-5)
        self.projection = nn.Linear(config.condition_width, config.width, bias=False)
        # Row 0 with a condition, row 1 without.
        self.start = nn.Embedding(2, config.width)

    def forward(self, condition: Condition) -> Prefix:
        lengths_B = condition.lengths_B
        if self.training and self.dropout > 0:
            dropped = torch.rand(lengths_B.shape, device=lengths_B.device) < self.dropout
            lengths_B = lengths_B.masked_fill(dropped, 0)
        vectors_BLC = condition.vectors_BLC.to(self.projection.weight.dtype)
        visible_BL = condition._replace(lengths_B=lengths_B).visible()
        start_BE = self.start((lengths_B == 0).long())
        return Prefix(self.projection(self.norm(vectors_BLC)), visible_BL, start_BE)


def visible_keys(visible_BL: Tensor, tokens: int) -> Tensor:
    """The attention mask bool (B, S, S) of L prefix vectors and `tokens` causal ones, S = L + tokens.

    The vectors see each other in both directions, as an encoder's output does. Hidden vectors see only themselves,
    since a softmax needs a key.
    """
    length = visible_BL.shape[1]
    places_S = torch.arange(length + tokens, device=visible_BL.device)
    before_SS = (places_S <= places_S[:, None]) | (places_S < length)
    keys_BS = F.pad(visible_BL, (0, tokens), value=True)
    return (before_SS & keys_BS[:, None]) | (places_S == places_S[:, None])
