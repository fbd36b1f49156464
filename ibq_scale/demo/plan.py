"""The demo's amounts of work, its paths, and the results of its stages."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ibq_scale.demo.server import BUCKET

IMAGES, HELD_OUT, CODES = (f"s3://{BUCKET}/{name}" for name in ("photographs", "held-out", "codes"))


@dataclass(frozen=True)
class Plan:
    """The demo's amounts of work. The defaults take minutes on two CPU cores. Crops are counted per photograph."""

    crops: int = 80
    held_out_crops: int = 20
    tokenizer_steps: int = 300
    ar_steps: int = 500
    per_class: int = 8
    guidance: float = 2.0
    ranks: int = 2


@dataclass(frozen=True)
class Stage:
    """A command and its duration."""

    name: str
    command: str
    seconds: float


@dataclass
class Demo:
    """Results of the stages, for the report."""

    to: Path
    plan: Plan
    stages: list[Stage] = field(default_factory=list)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)

    def crops_dir(self, name: str) -> Path:
        """``photographs`` for training, or ``held-out``."""
        return self.to / name

    def run_dir(self, name: str) -> Path:
        """``ibq``, ``vq`` or ``ar``."""
        return self.to / name

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)
