"""Finds the ranks that slow down the others. A step takes equally long on all ranks, since its collectives wait for the
slowest. Therefore the time outside of collectives is compared.
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

# A straggler's time over the median, and the number of consecutive lines.
SLOW, LINES = 1.5, 3
# Smaller differences are noise of the clock.
LEAST_SECONDS = 0.01
PROBE_SIZE = 4096


class Stragglers:
    """Times this rank's steps, compares all ranks once a logged line, and names ranks with several slow lines.

    `own`: seconds a step outside of collectives, including the wait for data. On GPUs collectives run beside the host,
    so `own` measures data and host only. A matrix product of fixed size measures the device.
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
        begin, waited = time.perf_counter(), self._clock.seconds
        yield
        self._seconds += time.perf_counter() - begin - (self._clock.seconds - waited)
        self._steps += 1

    def compare(self, data_seconds: float) -> tuple[dict[str, float], list[str]]:
        """Metrics over the ranks since the last call, and a line for each straggler. Collective: four floats a rank.

        `data_seconds`: this rank's wait for data, in all its steps.
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
        """A text for each rank with `LINES` slow lines, once. All arguments: seconds of each rank in this line."""
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
        self._clock.close()


def _quantiles(name: str, seconds: Tensor) -> dict[str, float]:
    middle, high = torch.quantile(seconds, torch.tensor([0.5, 0.95])).tolist()
    return {f"{name}_p50": middle, f"{name}_p95": high, f"{name}_max": float(seconds.max())}


def _probe(device: torch.device) -> float:
    """Seconds of a product on a GPU (well below a millisecond). 0 on a CPU, where `own` includes the device."""
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
