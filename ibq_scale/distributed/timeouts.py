"""Timeouts of collectives. The watchdog names the missing ranks, so no collective may time out before it."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d


def set_timeouts(timeout: timedelta) -> None:
    """Sets the timeout of every process group of this rank so far.

    DeepSpeed makes its own groups without a timeout. NCCL's default of ten minutes would end them.
    """
    # Older releases of torch have it under a private name.
    set_one = getattr(dist, "set_timeout", None) or c10d._set_pg_timeout
    for group in list(c10d._world.pg_map):
        set_one(timeout, group)
