"""What the trainer asks of a stage: batches, a step, state, pictures. The trainer knows no model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from ibq_scale.checkpoint.files import StateFile
from ibq_scale.supervise.alarms import Rule
from ibq_scale.supervise.dashboards import Histogram

# Metric tensors stay on the device until a line is logged: reading them earlier would wait for the device.
StepMetrics = dict[str, Tensor]


class Step(NamedTuple):
    """What came of an optimizer step: scalar `metrics`, this rank's means.

    `applied`: whether every part of the state took it; the same on every rank. `finite`: whether this rank's losses
    were (bool, on the device), which tells where to look when the step was not applied.
    """

    metrics: StepMetrics
    applied: bool
    finite: Tensor


class Validation(NamedTuple):
    """Global values by metric, and pictures by name, uint8 (3, H, W) on the CPU; empty where nothing was due."""

    values: Mapping[str, float] = MappingProxyType({})
    pictures: Mapping[str, Tensor] = MappingProxyType({})


class Task(Protocol):
    """One stage of training on this rank. Every method is called by all ranks at the same point."""

    shown: tuple[str, ...]
    """Metrics for the progress line."""
    alarms: tuple[Rule, ...]
    """What to watch in the logged metrics."""

    def batches(self, start: int) -> Iterator[Any]:
        """Micro-batches of this rank from the absolute sample position `start` on, without end."""
        ...

    def set_rates(self, samples: int) -> dict[str, float]:
        """Sets learning rates for the step that starts after `samples`; returns them for the log."""
        ...

    def train_step(self, batches: Iterator[Any]) -> Step:
        """One optimizer step over as many micro-batches as the accumulation needs.

        A gradient that is not finite on any rank is applied on none, to no part of the state.
        """
        ...

    def histograms(self) -> dict[str, Histogram]:
        """Of the window that `log_metrics` closed, the same on all ranks."""
        ...

    def log_metrics(self) -> dict[str, float]:
        """Metrics gathered since the last call, already global (collective)."""
        ...

    def validate(self, step: int, progress: Callable[[], None]) -> Validation:
        """Measures of samples that training does not see, where they are due after `step`.

        All ranks have equal shares and answers. Nothing of the state changes: what is trained afterwards is the same
        to the last bit. `progress` is called as it gets on (collective).
        """
        ...

    def state(self) -> list[StateFile]:
        """This rank's part of the state, and of the weights for inference in ``model/``. Collective, writes nothing."""
        ...

    def load(self, directory: Path) -> None:
        """Restores what `state` gave, on any number of ranks and under any layout."""
        ...

    def draw(self) -> dict[str, Tensor]:
        """Rank 0: pictures of the current state by name, uint8 (3, H, W) on the CPU, if the stage has any."""
        ...
