"""Passes batches from data workers to their rank through /dev/shm, often limited to 64 MB in containers."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

from torch import Tensor

from ibq_scale.console import gigabytes
from ibq_scale.errors import UserError

FOLDER = Path("/dev/shm")
# Data workers where the needs are not known.
USUAL_WORKERS = 4


class SharedMemoryError(RuntimeError):
    """A data worker could not pass on a batch."""


def ranks_of_node() -> int:
    """Ranks on this node, from the launcher's environment variables."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE") or "1")


def cpus_of_rank() -> int:
    """CPUs for this rank: those that Slurm gives to its task, else its share of those that this process may use."""
    usable = len(os.sched_getaffinity(0))
    given = os.environ.get("SLURM_CPUS_PER_TASK", "")
    # torchrun starts several ranks within a task.
    alone = os.environ.get("SLURM_NTASKS") == os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS"))
    if given.isdigit() and alone:
        return max(1, min(int(given), usable))
    return max(1, usable // ranks_of_node())


def workers_within(cpus: int, needed: int) -> int:
    """Data workers of a rank with so many CPUs: one CPU is the rank's own."""
    return max(1, min(needed, cpus - 1))


def require_room(batch_bytes: int, batches: int) -> None:
    """UserError if FOLDER cannot hold this number of batches for each rank of this node.

    Without space a worker loses a batch, and its rank waits for it forever (torch's queues only print the error).
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
    """Moves a batch's tensors into FOLDER. SharedMemoryError if it is full: a queue would just lose the batch."""
    try:
        for part in batch:
            if isinstance(part, Tensor):
                part.share_memory_()  # type: ignore[no-untyped-call]
    except RuntimeError as e:
        raise SharedMemoryError(
            f"a data worker on {socket.gethostname()} cannot hand over its batch through {FOLDER} "
            f"({str(e).splitlines()[0]}): remove what others left there, enlarge it, or use fewer data.workers"
        ) from None
