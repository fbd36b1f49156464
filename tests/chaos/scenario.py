"""What is trained while processes are killed: two small runs, started as users start them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ibq_scale.data.prepare import prepare_images
from tests.samples import SMALL_AR, write_codes, write_pictures

SAVE_EVERY = 2
KEPT = 2
COMMON = (f"train.checkpoint_every={SAVE_EVERY}", f"train.keep_checkpoints={KEPT}", "train.log_every=1")


@dataclass(frozen=True)
class Scenario:
    """A stage with its sizes. `global_batch` does not divide the samples of an epoch in every stage: so some epochs
    span checkpoints and restarts."""

    task: str
    ranks: int
    workers: int
    global_batch: int
    overrides: tuple[str, ...]
    make_data: Callable[[Path], None]

    def command(self, data: Path, run: Path, steps: int) -> list[str]:
        """The command line, as a user would type it; `steps` is the length of the run."""
        words = ["train", self.task, "tiny", f"data.train={data}", f"out={run}", f"train.steps={steps}"]
        words += [f"data.workers={self.workers}", f"train.global_batch={self.global_batch}", *COMMON, *self.overrides]
        return [sys.executable, "-m", "ibq_scale", *words, "--ranks", str(self.ranks)]


def _make_images(folder: Path) -> None:
    pictures = folder.with_name(f"{folder.name}-pictures")
    write_pictures(pictures)
    prepare_images(pictures, str(folder), shard_bytes=8_000)


SCENARIOS = {
    # Everything that a tokenizer run has a state of: two engines, a sharded codebook, LeCAM, EMA, dropout, ZeRO-2.
    "tokenizer": Scenario(
        task="tokenizer",
        ranks=2,
        workers=1,
        global_batch=8,
        overrides=(
            "train.micro_batch=4",
            "model.channel_multipliers=[1,1]",
            "model.resolution=16",
            "model.attention_resolutions=[8]",
            "model.z_channels=8",
            "model.dropout=0.1",
            "quantizer.dim=8",
            "quantizer.codebook_size=64",
            "data.lanes=3",
        ),
        make_data=_make_images,
    ),
    # Dropout of every kind, EMA, accumulation, three ranks, epochs that end in the middle of a step.
    "ar": Scenario(
        task="ar",
        ranks=3,
        workers=0,
        global_batch=18,
        overrides=(
            "train.micro_batch=3",
            *SMALL_AR,
            "ema_decay=0.9",
            "data.lanes=3",
        ),
        make_data=write_codes,
    ),
}
