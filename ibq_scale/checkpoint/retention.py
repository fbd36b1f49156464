"""Which checkpoints stay, here and in the mirror."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ibq_scale.checkpoint.reading import Checkpoint, whole_checkpoints
from ibq_scale.config.run import TrainConfig


class Retention(NamedTuple):
    """Which checkpoints stay: the `newest`, those of `every` so many steps, the one with the `best` metric."""

    newest: int
    every: int = 0
    best: str | None = None

    @staticmethod
    def of(train: TrainConfig) -> Retention:
        return Retention(train.keep_checkpoints, train.keep_every, train.keep_best)

    def retired(self, whole: Sequence[Checkpoint]) -> list[Checkpoint]:
        """Those of `whole`, oldest first, that go."""
        kept = {c.step for c in whole[-self.newest :]}
        kept |= {c.step for c in whole if self.every and c.step % self.every == 0}
        if self.best is not None:
            name, sign = self.best.removeprefix("-"), -1.0 if self.best.startswith("-") else 1.0
            judged = [
                (sign * c.manifest["metrics"][name], c.step) for c in whole if name in c.manifest.get("metrics", {})
            ]
            kept |= {min(judged)[1]} if judged else set()
        return [c for c in whole if c.step not in kept]


def retire(folder: Path, keep: Retention, held: str | None = None) -> None:
    """Removes the checkpoints under `folder` that `keep` lets go, but not the one named `held`. Raises OSError."""
    for old in keep.retired(whole_checkpoints(folder)):
        if old.path.name != held:
            # Under a name that is no checkpoint's: a crash inside rmtree leaves what the next save takes away.
            gone = old.path.rename(folder / f".partial-retired-{old.path.name}")
            shutil.rmtree(gone, ignore_errors=True)
