"""The codebook's use over a run: histogram by window, steps since each code was chosen, codes due for revival."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from ibq_scale.checkpoint.files import StateFile, TensorFile
from ibq_scale.distributed.world import World
from ibq_scale.quantize.usage import CodeUsage
from ibq_scale.supervise.dashboards import Histogram

FILE = "usage.safetensors"
DEAD_AFTER = 1000
"""Steps without a token after which a code counts as dead in the metrics."""


def by_powers_of_two(counts_K: Tensor) -> Histogram:
    """Counts int64 (K,) spread over 0, 1, 2 to 3, 4 to 7 … up to the largest."""
    # frexp's exponent of n is the next power of two's, and 0 for 0. It is exact in float64 below 2^53.
    bins = torch.bincount(torch.frexp(counts_K.double()).exponent.long())
    edges = [0, *(2**i for i in range(len(bins)))]
    return Histogram(bins.tolist(), edges)


class UsageTracker:
    """Counts this rank's indices on the device. The ranks' counts are summed for a logged line only."""

    def __init__(self, codebook_size: int, revive_after: int, world: World) -> None:
        self.world = world
        self.revive_after = revive_after
        self.window = CodeUsage(codebook_size, world.device)
        self.since_revival = CodeUsage(codebook_size, world.device) if revive_after else None
        self.age_K = torch.zeros(codebook_size, dtype=torch.int32, device=world.device)
        """Steps since each code was last chosen. The resolution is one logged window."""
        self.steps = 0
        self.choices = Histogram((), ())
        """How many codes the last window chose never, once, 2 or 3 times, 4 to 7 times, and so on."""

    def update(self, indices_N: Tensor) -> None:
        """Counts one micro-batch."""
        self.window.update(indices_N)
        if self.since_revival is not None:
            self.since_revival.update(indices_N)

    def end_step(self) -> None:
        self.steps += 1

    def due_for_revival(self, step: int) -> Tensor | None:
        """Every `revive_after` steps: bool (K,), true for codes without a token since the last time. Collective."""
        if self.since_revival is None or step % self.revive_after:
            return None
        self.since_revival.reduce()
        dead_K = self.since_revival.counts_K == 0
        self.since_revival.reset()
        return dead_K

    def log(self) -> dict[str, float]:
        """Metrics of the window. Starts a new one. Collective.

        `usage`, `dead`: shares of the codes. `code_age`: the oldest code's age in steps.
        """
        self.window.reduce()
        self.age_K = torch.where(self.window.counts_K > 0, 0, self.age_K + self.steps).int()
        values = {
            "usage": self.window.usage,
            "perplexity": self.window.perplexity,
            "dead": float((self.age_K >= DEAD_AFTER).double().mean()),
            "code_age": float(self.age_K.max()),
        }
        self.choices = by_powers_of_two(self.window.counts_K)
        self.window.reset()
        self.steps = 0
        return values

    def state(self) -> list[StateFile]:
        """Rank 0 gives the sums over ranks. Collective."""
        tensors = {"age": self.age_K, "steps": torch.tensor(self.steps)}
        for name, usage in self._counters().items():
            tensors[name] = usage.counts_K.clone()
            dist.all_reduce(tensors[name])
        return [TensorFile(FILE, tensors)] if self.world.is_main else []

    def load(self, directory: Path) -> None:
        """Restores the files of `state`, on any number of ranks. Rank 0 holds the sums."""
        tensors = load_file(directory / FILE)
        self.age_K.copy_(tensors["age"])
        self.steps = int(tensors["steps"])
        for name, usage in self._counters().items():
            # Revival may be new in this run.
            if self.world.is_main and name in tensors:
                usage.counts_K.copy_(tensors[name])

    def _counters(self) -> dict[str, CodeUsage]:
        revival = {} if self.since_revival is None else {"since_revival": self.since_revival}
        return {"window": self.window} | revival
