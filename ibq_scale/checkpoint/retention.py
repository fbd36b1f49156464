"""Retention of checkpoints, in the run directory and in the mirror."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ibq_scale.checkpoint.reading import Checkpoint, whole_checkpoints
from ibq_scale.config.run import TrainConfig


class Retention(NamedTuple):
    """Keeps the `newest` checkpoints, those at multiples of `every` steps, and the one with the `best` metric."""

    newest: int
    every: int = 0
    best: str | None = None

    @staticmethod
    def of(train: TrainConfig) -> Retention:
        return Retention(train.keep_checkpoints, train.keep_every, train.keep_best)

    def retired(self, whole: Sequence[Checkpoint]) -> list[Checkpoint]:
        """The checkpoints of `whole` (oldest first) to remove."""
        kept = {c.step for c in whole[-self.newest :]}
        kept |= {c.step for c in whole if self.every and c.step % self.every == 0}
        if self.best is not None:
            name, sign = self.best.removeprefix("-"), -1.0 if self.best.startswith("-") else 1.0
            measured = [
                (sign * c.manifest["metrics"][name], c.step) for c in whole if name in c.manifest.get("metrics", {})
            ]
            kept |= {min(measured)[1]} if measured else set()
        return [c for c in whole if c.step not in kept]


def retire(folder: Path, keep: Retention, spared: str | None = None) -> None:
    """Removes checkpoints under `folder` by the rules of `keep`, except the one named `spared`. Raises OSError."""
    for old in keep.retired(whole_checkpoints(folder)):
        if old.path.name != spared:
            # Renamed first: after a crash inside rmtree the next save removes the hidden remainder.
            gone = old.path.rename(folder / f".partial-retired-{old.path.name}")
            shutil.rmtree(gone, ignore_errors=True)
