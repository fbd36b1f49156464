"""Spikes: a step whose loss or gradient norm is an outlier of the last ones is applied on no rank.

The judgement stays on the device. It enters DeepSpeed's own test of the gradient norm, so it adds one all-reduce of a
scalar to a step, and no wait of the host.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from ibq_scale.checkpoint.files import StateFile, TensorFile
from ibq_scale.distributed.world import World

FILE = "spikes.safetensors"
# Steps in memory, and the steps before the first judgement.
WINDOW, LEAST = 128, 16
# Most spikes in a row. More are no matter of a batch: without a step the next ones would be alike.
MOST_IN_A_ROW = 3
# The standard deviation of a normal distribution over its median deviation.
SIGMA = 1.4826
# The least deviation, as a share of the median. Losses on a plateau differ in their last bits only.
LEAST_SHARE = 1e-3
NAMES = ("loss", "gradient norm")


class Spike(NamedTuple):
    """`text`: the values with their limits. `here`: whether this rank's samples may be the cause."""

    text: str
    here: bool


class Spikes:
    """Compares each step with the last `WINDOW`: above median + `sigma` × 1.4826 × median deviation it is a spike.

    These are a standard deviation's robust equivalents: a spike in memory does not move them. It enters the memory as
    the limit. After `MOST_IN_A_ROW` spikes the memory starts anew, at the new level. All ranks have the same memory.
    """

    def __init__(self, sigma: float, world: World) -> None:
        self.sigma = sigma
        self.world = world
        self._memory_N2 = torch.full((WINDOW, 2), torch.nan, device=world.device)
        self._in_a_row = torch.zeros((), device=world.device)
        self._own = torch.zeros((), device=world.device)
        self._seen_22 = torch.zeros(2, 2, device=world.device)
        """The last step's values, and their limits."""

    @torch.no_grad()
    def refuses(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Whether the step is a spike: bool scalar on the device, the same on every rank. Collective.

        `loss`: this rank's mean. `norm`: of the gradient over all ranks. Both enter the memory.
        """
        mean = loss.detach().float().clone()
        dist.all_reduce(mean)
        values_2 = torch.stack([mean / self.world.size, norm.detach().float().reshape(())])
        limits_2 = self._limits()
        above_2 = values_2 > limits_2
        longer_N2 = torch.cat([self._memory_N2[1:], torch.where(above_2, limits_2, values_2)[None]])
        spike = above_2.any()
        self._in_a_row = torch.where(spike, self._in_a_row + 1, 0)
        anew = self._in_a_row > MOST_IN_A_ROW
        memory_N2 = torch.where(values_2.isfinite().all(), longer_N2, self._memory_N2)
        self._memory_N2 = memory_N2.masked_fill(anew, torch.nan)
        self._own, self._seen_22 = loss.detach(), torch.stack([values_2, limits_2])
        return spike & ~anew

    def _limits(self) -> Tensor:
        median_2 = torch.nanquantile(self._memory_N2, 0.5, dim=0)
        deviation_2 = SIGMA * torch.nanquantile((self._memory_N2 - median_2).abs(), 0.5, dim=0)
        limits_2 = median_2 + self.sigma * torch.maximum(deviation_2, LEAST_SHARE * median_2.abs())
        enough = (~self._memory_N2[:, 0].isnan()).sum() >= LEAST
        return torch.where(enough, limits_2, torch.inf)

    def found(self) -> Spike | None:
        """The spike in the last step, if it is one. Waits for the device: call it for a step not applied."""
        values, limits = self._seen_22.tolist()
        above = [(n, v, limit) for n, v, limit in zip(NAMES, values, limits, strict=True) if v > limit]
        if not above:
            return None
        text = " and ".join(f"{name} {value:.4g} (limit {limit:.4g})" for name, value, limit in above)
        # A gradient alone does not tell the rank.
        return Spike(text, above[0][0] != NAMES[0] or float(self._own) > limits[0])

    def forget(self) -> None:
        """Starts anew, for a loss with other terms."""
        self._memory_N2.fill_(torch.nan)

    def state(self) -> list[StateFile]:
        """Rank 0 gives the memory, if spikes are skipped."""
        if not self.sigma or not self.world.is_main:
            return []
        return [TensorFile(FILE, {"memory": self._memory_N2, "in_a_row": self._in_a_row})]

    def load(self, directory: Path) -> None:
        """Restores the memory of `state`, on any number of ranks. A checkpoint without one leaves it empty."""
        if (directory / FILE).is_file():
            tensors = load_file(directory / FILE)
            self._memory_N2.copy_(tensors["memory"])
            self._in_a_row.copy_(tensors["in_a_row"])
