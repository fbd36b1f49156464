"""Batches on their way from data workers to their rank: in /dev/shm, which containers often have 64 MB of."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

from torch import Tensor

from ibq_scale.console import gigabytes
from ibq_scale.errors import UserError

FOLDER = Path("/dev/shm")


class SharedMemoryError(RuntimeError):
    """A batch that a data worker could not hand over."""


def ranks_of_node() -> int:
    """Ranks on this node, by what launchers say."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE") or "1")


def require_room(batch_bytes: int, batches: int) -> None:
    """UserError where FOLDER cannot hold so many batches of each rank of this node.

    Without the room, a worker loses a batch and its rank waits for that without end (torch's queues only print so).
    """
    ranks = ranks_of_node()
    wanted = ranks * batches * batch_bytes
    try:
        there = os.statvfs(FOLDER)
    except OSError:
        return
    if (free := there.f_bavail * there.f_frsize) < wanted:
        raise UserError(
            f"{FOLDER} has {gigabytes(free)} free, and the batches of {ranks} ranks' data workers take "
            f"{gigabytes(wanted)}: enlarge it (docker --shm-size=16g), or set data.workers=0"
        )


def share(batch: tuple[Any, ...]) -> None:
    """Moves a batch's tensors into FOLDER. SharedMemoryError where it is full: a queue would only lose the batch."""
    try:
        for part in batch:
            if isinstance(part, Tensor):
                part.share_memory_()  # type: ignore[no-untyped-call]
    except RuntimeError as e:
        raise SharedMemoryError(
            f"a data worker on {socket.gethostname()} cannot hand over its batch through {FOLDER} "
            f"({str(e).splitlines()[0]}): remove what others left there, enlarge it, or use fewer data.workers"
        ) from None
