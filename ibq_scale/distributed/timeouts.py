"""How long collectives wait. The watchdog names who is missing, so that no collective may give up before it."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d


def set_timeouts(timeout: timedelta) -> None:
    """Of every process group that this rank has by now.

    DeepSpeed makes groups of its own, without a timeout: NCCL's default of ten minutes would end them.
    """
    # Older releases have it under another name.
    set_one = getattr(dist, "set_timeout", None) or c10d._set_pg_timeout
    for group in list(c10d._world.pg_map):
        set_one(timeout, group)
