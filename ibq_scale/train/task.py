"""What the trainer asks of a stage: batches, a step, state, pictures. The trainer knows no model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

# Metric tensors stay on the device until a line is logged: reading them earlier would wait for the device.
StepMetrics = dict[str, Tensor]


class Task(Protocol):
    """One stage of training on this rank. Every method is called by all ranks at the same point."""

    shown: tuple[str, ...]
    """Metrics for the progress line."""

    def batches(self, start: int) -> Iterator[Any]:
        """Micro-batches of this rank from the absolute sample position `start` on, without end."""
        ...

    def set_rates(self, samples: int) -> dict[str, float]:
        """Sets learning rates for the step that starts after `samples`; returns them for the log."""
        ...

    def train_step(self, batches: Iterator[Any]) -> StepMetrics:
        """One optimizer step over as many micro-batches as the accumulation needs. Scalars, this rank's means."""
        ...

    def log_metrics(self) -> dict[str, float]:
        """Metrics gathered since the last call, already global (collective)."""
        ...

    def save(self, directory: Path) -> None:
        """Writes this rank's part of the state, and the weights for inference under ``model/``."""
        ...

    def load(self, directory: Path) -> None:
        """Restores what `save` wrote on the same number of ranks."""
        ...

    def draw(self, directory: Path, step: int) -> None:
        """Rank 0: leaves pictures of the current state, if the stage has any."""
        ...
