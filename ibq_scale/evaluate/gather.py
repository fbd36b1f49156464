"""Rows that ranks hold, brought together in an order that does not depend on the ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ibq_scale.quantize.collectives import gather_uneven, sizes_in


def gather_rows(indices_n: Tensor, rows_nC: Tensor) -> Tensor:
    """All ranks' rows (N, C), by ascending index, on every rank. Collective; ranks may hold different numbers of rows.

    `indices_n`, int64, are each held by one rank only.
    """
    group = dist.group.WORLD
    sizes = sizes_in(len(indices_n), group, rows_nC.device)
    index_N = gather_uneven(indices_n.to(rows_nC.device), sizes, group)
    return gather_uneven(rows_nC, sizes, group)[torch.argsort(index_N)]
