"""Budgets of tolerated faults. All ranks stop together when one is exceeded."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import torch
import torch.distributed as dist

from ibq_scale.checkpoint.files import StateFile, TextFile
from ibq_scale.distributed.agree import of_all_ranks
from ibq_scale.distributed.world import World
from ibq_scale.documents import read_json

BAD_SAMPLES = "bad_samples.json"
SKIPPED = "skipped_steps.json"
# Steps of one budget of skipped steps, and samples named in a log line.
PERIOD, NAMED = 1000, 8

log = logging.getLogger(__name__)


class TooManyBadSamplesError(RuntimeError):
    """More samples were damaged than `data.bad_samples` allows."""


class BadSamples:
    """Counts damaged samples, each replaced by a neighbour. The budget bounds the sum over all ranks."""

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
        """The run's count so far. Collective. TooManyBadSamplesError on all ranks beyond the budget."""
        total = self._total()
        if total > self.budget:
            raise TooManyBadSamplesError(
                f"{total} damaged samples so far, data.bad_samples allows {self.budget}: see logs/ for their names, "
                f"check the data with 'ibq-scale data verify', or raise the budget"
            )
        return {"bad_samples": float(total)}

    def state(self) -> list[StateFile]:
        """Rank 0 gives the run's count. Collective."""
        text = json.dumps({"bad_samples": self._total()}) + "\n"
        return [TextFile(BAD_SAMPLES, text)] if self.world.is_main else []

    def load(self, directory: Path) -> None:
        self._before = int(read_json(directory / BAD_SAMPLES)["bad_samples"])
        self._here = 0

    def _total(self) -> int:
        here = torch.tensor([self._here], device=self.world.device)
        dist.all_reduce(here)
        return self._before + int(here.item())


class TooManySkippedStepsError(RuntimeError):
    """Losses or gradients were not finite, or spikes, too often: the run has diverged."""


class SkippedSteps:
    """Steps skipped on all ranks, because a loss or gradient was not finite on some rank, or a spike."""

    def __init__(self, budget: int, world: World) -> None:
        self.budget = budget
        self.world = world
        self.steps: list[int] = []

    def note(self, step: int, samples: list[str], spike: str | None = None) -> None:
        """Logs a skipped step and the samples of each rank under suspicion. Collective.

        `samples`: of this rank, empty for a finite loss without a spike. `spike`: in words, None if the step was not
        finite. TooManySkippedStepsError on all ranks beyond the budget.
        """
        everyone = of_all_ranks(self.world, samples[:NAMED])
        self.steps.append(step)
        named = [f"rank {rank}: {', '.join(names)}" for rank, names in enumerate(everyone) if names]
        if spike is not None:
            why = f"a spike: {spike}: {'; '.join(named)}"
        else:
            where = f"losses of {'; '.join(named)}" if named else "a gradient, while every loss was finite"
            why = f"not finite: {where}"
        text = f"step {step} was skipped on all ranks: {why}"
        if self.world.is_main:
            log.warning("%s", text)
        recent = sum(skipped > step - PERIOD for skipped in self.steps)
        if recent > self.budget:
            raise TooManySkippedStepsError(
                f"{text}. That makes {recent} of the last {PERIOD} steps, train.skipped_steps allows {self.budget}: "
                f"resume from the newest checkpoint with a lower optimizer.lr, or from the one before if it stops "
                f"again. 'ibq-scale data trace RUN --step {step}' names all samples"
            )

    def state(self) -> list[StateFile]:
        """Rank 0 gives the list."""
        return [TextFile(SKIPPED, json.dumps({"steps": self.steps}) + "\n")] if self.world.is_main else []

    def load(self, directory: Path) -> None:
        self.steps = list(read_json(directory / SKIPPED)["steps"])
