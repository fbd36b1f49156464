"""Gathers rows from all ranks in an order independent of the ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ibq_scale.quantize.collectives import gather_uneven, sizes_in


def gather_rows(indices_n: Tensor, rows_nC: Tensor) -> Tensor:
    """All ranks' rows (N, C), by ascending index, on every rank. Collective. Ranks may have different numbers of rows.

    `indices_n`: int64. Each index must be on one rank only.
    """
    group = dist.group.WORLD
    sizes = sizes_in(len(indices_n), group, rows_nC.device)
    index_N = gather_uneven(indices_n.to(rows_nC.device), sizes, group)
    return gather_uneven(rows_nC, sizes, group)[torch.argsort(index_N)]
