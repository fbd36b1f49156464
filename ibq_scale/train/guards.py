"""What a run puts up with before it stops, decided by all ranks together."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import torch
import torch.distributed as dist

from ibq_scale.distributed.environment import World

FILE = "bad_samples.json"

log = logging.getLogger(__name__)


class TooManyBadSamplesError(RuntimeError):
    """More samples were damaged than `data.bad_samples` allows."""


class BadSamples:
    """Counts this rank's damaged samples, each replaced by a neighbour; the sum over ranks may not pass the budget."""

    def __init__(self, budget: int, world: World) -> None:
        self.budget = budget
        self.world = world
        self._here = 0
        self._before = 0

    def note(self, faults: tuple[str, ...]) -> None:
        """Logs a batch's faults and counts them."""
        for fault in faults:
            log.warning("a sample was replaced: %s", fault)
        self._here += len(faults)

    def log(self) -> dict[str, float]:
        """The run's count so far. Collective; raises on all ranks together past the budget."""
        total = self._total()
        if total > self.budget:
            raise TooManyBadSamplesError(
                f"{total} damaged samples so far, data.bad_samples allows {self.budget}: see logs/ for their names, "
                f"check the data with 'ibq-scale data verify', or raise the budget"
            )
        return {"bad_samples": float(total)}

    def save(self, directory: Path) -> None:
        """Rank 0 writes the run's count. Collective."""
        total = self._total()
        if self.world.is_main:
            (directory / FILE).write_text(json.dumps({"bad_samples": total}) + "\n")

    def load(self, directory: Path) -> None:
        """Takes up the count that `save` wrote."""
        self._before = int(json.loads((directory / FILE).read_text())["bad_samples"])
        self._here = 0

    def _total(self) -> int:
        here = torch.tensor([self._here], device=self.world.device)
        dist.all_reduce(here)
        return self._before + int(here.item())
