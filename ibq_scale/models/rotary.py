"""2D rotary positions (arXiv 2104.09864, per axis): the table of all positions, and the rotation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ibq_scale.config.models import TransformerConfig

ROTARY_BASE = 10_000.0


def rotary_table(config: TransformerConfig) -> Tensor:
    """cos and sin (2, tokens + 2, head_dim/2) fp32 of the class prefix, code 0, … code tokens − 1, and before code 0.

    The first half of the pairs turns with the row, the second with the column. The prefix's cos and sin are zero, so
    its query and key are zero, as in the published models. Vectors of ``conditioning=embedding``, and the token after
    them, do not turn. Raster order reads the first `tokens` rows only. The last row is the place left of code 0 (row 0,
    column −1), for other orders. The table is always built on the CPU, since a model on the meta device needs it too.
    """
    half = config.head_dim // 4
    frequency = ROTARY_BASE ** (-torch.arange(half, dtype=torch.float32, device="cpu") / half)
    angle = torch.arange(-1, config.grid, dtype=torch.float32, device="cpu")[:, None] * frequency
    rows = angle[1:, None, :].expand(-1, config.grid, -1)
    columns = angle[None, 1:, :].expand(config.grid, -1, -1)
    grid = torch.cat([rows, columns], dim=-1).flatten(0, 1)
    before = torch.cat([angle[1], angle[0]])[None]
    angles = torch.cat([grid, before])
    table = F.pad(torch.stack([angles.cos(), angles.sin()]), (0, 0, 1, 0))
    table[0, 0] = float(config.conditioning == "embedding")
    return table


def rotate(x_BTHd: Tensor, table_2Tp: Tensor) -> Tensor:
    """Rotates interleaved pairs (x0, x1), (x2, x3), … in fp32. The result has x's dtype.

    The table may also hold the positions of each sample, (2, B, T, p).
    """
    cos, sin = table_2Tp.unsqueeze(-2)
    even, odd = x_BTHd.float().view(*x_BTHd.shape[:-1], -1, 2).unbind(-1)
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    return turned.flatten(-2).to(x_BTHd.dtype)
