"""Which rank holds up the others. A step takes all ranks the same time, since they wait for the slowest inside of it;
so what is compared is the time that each spent on its own.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from ibq_scale.distributed.memory import peak_bytes
from ibq_scale.distributed.waiting import CollectiveClock
from ibq_scale.distributed.world import World

# A straggler takes so many times the median's time, on so many logged lines running.
SLOW, LINES = 1.5, 3
# Differences below this are the clock's own.
LEAST_SECONDS = 0.01
PROBE_SIZE = 4096


class Stragglers:
    """Times this rank's steps, compares all ranks once a logged line, and names who is slow line after line.

    `own`: seconds a step outside of collectives, waiting for data included. On GPUs collectives run beside the host, so
    own time tells of data and host only; there a product of fixed size is timed on the device, too.
    """

    def __init__(self, world: World, hosts: Sequence[str]) -> None:
        self._world = world
        self._hosts = hosts
        self._clock = CollectiveClock()
        self._seconds = 0.0
        self._steps = 0
        self._lines = [0] * world.size

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around each step."""
        begin, waited = time.perf_counter(), self._clock.seconds
        yield
        self._seconds += time.perf_counter() - begin - (self._clock.seconds - waited)
        self._steps += 1

    def compare(self, data_seconds: float) -> tuple[dict[str, float], list[str]]:
        """Metrics over the ranks since the last call, and a line for each straggler. Collective: four floats a rank.

        `data_seconds`: this rank's, of its steps, waiting for data.
        """
        steps = max(1, self._steps)
        device = self._world.device
        mine = [max(0.0, self._seconds) / steps, data_seconds / steps, _probe(device), float(peak_bytes(device))]
        self._seconds, self._steps = 0.0, 0
        here = torch.tensor(mine, device=device, dtype=torch.float32)
        ranks = torch.empty(self._world.size * len(mine), device=device)
        dist.all_gather_into_tensor(ranks, here)
        own, data, probe, memory = ranks.cpu().view(-1, len(mine)).T.contiguous()
        values = _quantiles("own_step_s", own) | {"memory_bytes": float(memory.max())}
        if bool(probe.any()):
            values |= _quantiles("probe_s", probe)
        return values, self.slow_ranks(own.tolist(), data.tolist(), probe.tolist())

    def slow_ranks(self, own: list[float], data: list[float], probe: list[float]) -> list[str]:
        """One line's seconds of each rank; returns what there is to say about those slow for `LINES` lines, once."""
        typical, typical_probe = statistics.median_low(own), statistics.median_low(probe)
        told = []
        for rank, seconds in enumerate(own):
            slow = seconds > max(SLOW * typical, typical + LEAST_SECONDS)
            slow_device = probe[rank] > SLOW * typical_probe
            self._lines[rank] = self._lines[rank] + 1 if slow or slow_device else 0
            if self._lines[rank] != LINES:
                continue
            what = (
                f"{seconds:.3g} s a step of its own, {data[rank]:.3g} s of it waiting for data (median {typical:.3g} s)"
                if slow
                else f"{probe[rank]:.3g} s for a product on its device (median {typical_probe:.3g} s)"
            )
            told.append(f"rank {rank} on {self._hosts[rank]} holds up the others: for {LINES} lines {what}")
        return told

    def close(self) -> None:
        """Stops the clock."""
        self._clock.close()


def _quantiles(name: str, seconds: Tensor) -> dict[str, float]:
    middle, high = torch.quantile(seconds, torch.tensor([0.5, 0.95])).tolist()
    return {f"{name}_p50": middle, f"{name}_p95": high, f"{name}_max": float(seconds.max())}


def _probe(device: torch.device) -> float:
    """Seconds of a product on a GPU (well below a millisecond), 0 on a CPU, whose own time tells all."""
    if device.type != "cuda":
        return 0.0
    a_NN = torch.ones(PROBE_SIZE, PROBE_SIZE, device=device, dtype=torch.bfloat16)
    begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    torch.cuda.synchronize(device)
    begin.record()
    torch.mm(a_NN, a_NN)
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000
