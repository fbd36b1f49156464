"""Saves a state of a given size: time without training, and write rate compared with a plain write."""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from ibq_scale.bench.disk import write_rate
from ibq_scale.checkpoint.files import TensorFile
from ibq_scale.checkpoint.retention import Retention
from ibq_scale.checkpoint.saving import CheckpointFolder
from ibq_scale.distributed.agree import by_rank_0
from ibq_scale.distributed.world import World

TENSORS = 64


@dataclass(frozen=True)
class CheckpointReport:
    """Medians over the saves, in bytes of all ranks. `stall_s`: the ranks' longest time within `save`.

    `written_s`: from the start of a save until it is whole on disk. `disk_bytes_per_s`: one process, one file, flushed.
    """

    folder: str
    ranks: int
    bytes: int
    saves: int
    stall_s: float
    written_s: float
    bytes_per_s: float
    disk_bytes_per_s: float

    @property
    def of_disk(self) -> float:
        """The save's rate divided by the disk's."""
        return self.bytes_per_s / self.disk_bytes_per_s


def bench_checkpoint(folder: Path, world: World, *, megabytes: int, saves: int) -> CheckpointReport:
    """Saves `megabytes` per rank under `folder`, several times. Collective. OSError if it cannot be written."""
    here = Path(by_rank_0(world, lambda: tempfile.mkdtemp(prefix="bench-", dir=folder)))
    try:
        elements = megabytes * 2**20 // (4 * TENSORS)
        tensors = {f"t{i}": torch.randn(elements, device=world.device) for i in range(TENSORS)}
        file = TensorFile(f"rank-{world.rank:05d}.safetensors", tensors)
        checkpoints = CheckpointFolder(here / "checkpoints", world, Retention(1))
        stalls, totals = [], []
        disk = []
        for step in range(saves):
            disk.append(write_rate(here, megabytes * 2**20 * world.size) if world.is_main else 0.0)
            dist.barrier()
            begin = time.perf_counter()
            checkpoints.save({"step": step}, [file])
            stalls.append(_longest(time.perf_counter() - begin, world))
            if not checkpoints.finish():
                raise OSError(f"{here}: the checkpoint could not be written")
            totals.append(_longest(time.perf_counter() - begin, world))
        size = megabytes * 2**20 * world.size
        written = statistics.median(totals)
        return CheckpointReport(
            folder=str(folder),
            ranks=world.size,
            bytes=size,
            saves=saves,
            stall_s=statistics.median(stalls),
            written_s=written,
            bytes_per_s=size / written,
            disk_bytes_per_s=statistics.median(disk),
        )
    finally:
        dist.barrier()
        if world.is_main:
            shutil.rmtree(here, ignore_errors=True)


def _longest(seconds: float, world: World) -> float:
    longest = torch.tensor([seconds], dtype=torch.float64, device=world.device)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    return float(longest.item())
