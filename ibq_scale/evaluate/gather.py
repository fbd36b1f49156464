"""Rows that ranks hold, brought together in an order that does not depend on the ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ibq_scale.distributed.world import World


def gather_rows(indices_n: Tensor, rows_nC: Tensor, world: World) -> Tensor:
    """All ranks' rows (N, C), by ascending index, on every rank. Collective; ranks may hold different numbers of rows.

    `indices_n`, int64, are each held by one rank only.
    """
    indices_n = indices_n.to(rows_nC.device)
    counts = [torch.zeros(1, dtype=torch.int64, device=rows_nC.device) for _ in range(world.size)]
    dist.all_gather(counts, torch.tensor([len(indices_n)], device=rows_nC.device))
    most = max(int(count) for count in counts)
    index_N = _gather(F.pad(indices_n, (0, most - len(indices_n)), value=-1), world)
    rows_NC = _gather(F.pad(rows_nC, (0, 0, 0, most - len(rows_nC))), world)
    order = torch.argsort(index_N)[int((index_N < 0).sum()) :]
    return rows_NC[order]


def _gather(x: Tensor, world: World) -> Tensor:
    parts = [torch.empty_like(x) for _ in range(world.size)]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)
