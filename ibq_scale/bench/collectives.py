"""All-reduces between the ranks: correctness of the sums, and speed."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ibq_scale.bench.device import shown, wait
from ibq_scale.distributed.world import World

SMALL = 8 << 10


@dataclass(frozen=True)
class CollectivesReport:
    """Medians of the slowest rank. `bus_bytes_per_s`: rate of each rank's link, 2·(n − 1)/n · bytes / seconds,
    independent of the number of ranks (definition of nccl-tests). `latency_s`: of 8 KiB.
    """

    ranks: int
    nodes: int
    backend: str
    device: str
    bytes: int
    repeats: int
    seconds: float
    latency_s: float
    bus_bytes_per_s: float
    right: bool


def bench_collectives(world: World, *, megabytes: int, repeats: int) -> CollectivesReport:
    """All-reduces `megabytes` (2²⁰ bytes) of fp32 `repeats` times. Collective."""
    small, _ = _all_reduce(world, SMALL // 4, repeats)
    size = megabytes << 20
    seconds, right = _all_reduce(world, size // 4, repeats)
    # The first rank of each node counts it.
    firsts = torch.tensor([float(world.local_rank == 0)], device=world.device)
    dist.all_reduce(firsts)
    return CollectivesReport(
        ranks=world.size,
        nodes=int(firsts.item()),
        backend=dist.get_backend(),
        device=shown(world.device),
        bytes=size,
        repeats=repeats,
        seconds=seconds,
        latency_s=small,
        bus_bytes_per_s=2 * (world.size - 1) / world.size * size / seconds,
        right=right,
    )


def _all_reduce(world: World, elements: int, repeats: int) -> tuple[float, bool]:
    """Seconds (the slowest rank's median), and whether the sum was right on all ranks."""
    values = torch.empty(elements, device=world.device)
    times = []
    right = True
    for turn in range(repeats + 1):
        values.fill_(world.rank + 1)
        dist.barrier()
        wait(world.device)
        begin = time.perf_counter()
        dist.all_reduce(values)
        wait(world.device)
        # The first one opens the connections.
        times += [time.perf_counter() - begin] if turn else []
        right = right and bool((values == world.size * (world.size + 1) // 2).all())
    worst = torch.tensor([statistics.median(times), float(not right)], dtype=torch.float64, device=world.device)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    seconds, wrong = worst.tolist()
    return seconds, not wrong
