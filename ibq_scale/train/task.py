"""The trainer's interface to a stage: batches, a step, state, pictures. The trainer knows no model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from ibq_scale.checkpoint.files import StateFile
from ibq_scale.supervise.alarms import Rule
from ibq_scale.supervise.dashboards import Histogram
from ibq_scale.supervise.spikes import Spike

# Metric tensors stay on the device until a line is logged: an earlier read would wait for the device.
StepMetrics = dict[str, Tensor]


class Step(NamedTuple):
    """The result of an optimizer step. `metrics`: scalars, this rank's means.

    `applied`: whether every part of the state took the step, the same on every rank. `finite`: whether this rank's
    losses were finite (bool, on the device). It shows the cause of a step not applied, as does `spike`.
    """

    metrics: StepMetrics
    applied: bool
    finite: Tensor
    spike: Spike | None = None


class Validation(NamedTuple):
    """Global values by metric, and pictures by name, uint8 (3, H, W) on the CPU. Empty if not due."""

    values: Mapping[str, float] = MappingProxyType({})
    pictures: Mapping[str, Tensor] = MappingProxyType({})


class Task(Protocol):
    """One stage of training on this rank. Every method is called by all ranks at the same point."""

    shown: tuple[str, ...]
    """Metrics for the progress line."""
    alarms: tuple[Rule, ...]
    """Alarms on the logged metrics."""

    def batches(self, start: int) -> Iterator[Any]:
        """This rank's micro-batches from the absolute sample position `start` on, without end."""

    def set_rates(self, samples: int) -> dict[str, float]:
        """Sets the learning rates of the step after `samples`. Returns them for the log."""

    def train_step(self, batches: Iterator[Any]) -> Step:
        """One optimizer step over as many micro-batches as the accumulation needs.

        A gradient that is not finite on any rank is applied on no rank, to no part of the state. Nor is a spike.
        """

    def histograms(self) -> dict[str, Histogram]:
        """Of the window closed by `log_metrics`, the same on all ranks."""

    def log_metrics(self) -> dict[str, float]:
        """Global metrics since the last call. Collective."""

    def validate(self, step: int, progress: Callable[[], None]) -> Validation:
        """Measures held-out samples, if due after `step`. Collective.

        All ranks have equal shares and results. The state does not change: later training is the same to the last bit.
        Calls `progress` in between.
        """

    def state(self) -> list[StateFile]:
        """This rank's part of the state, and of the weights for inference in ``model/``. Collective. Writes nothing."""

    def load(self, directory: Path) -> None:
        """Restores the files of `state`, on any number of ranks and under any layout."""

    def draw(self) -> dict[str, Tensor]:
        """Rank 0: pictures of the current state by name, uint8 (3, H, W) on the CPU, if the stage has any."""
