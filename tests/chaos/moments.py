"""When to kill: instants chosen from the seed or watched for in the run directory, and what the instant turned out
to be."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

from ibq_scale.checkpoint.reading import MANIFEST
from tests.chaos.disk import last_step, latest, newest_name
from tests.chaos.processes import Life
from tests.chaos.scenario import SAVE_EVERY

START, STEP, SAVE = "start-up", "step", "save"
RENAME, RETIRE = "rename to latest", "retiring"
# How often each is aimed at; the last two are milliseconds wide, and not every shot hits.
AIMS = {START: 4, STEP: 6, SAVE: 5, RENAME: 3, RETIRE: 2}
# Only rank 0 seals and retires checkpoints, so other victims would not interrupt it.
SEALERS = ("rank 0", "all ranks", "launcher")
VICTIMS = ("rank", "rank", "data worker", "all ranks", "launcher")
LOOK_SECONDS = 0.002
# Saves that a shot at a narrow instant waits for before it is fired anyhow.
PATIENCE_SAVES = 3


def choose(random: Random, workers: int) -> tuple[str, str]:
    """An aim and a kind of victim."""
    aim = random.choices(list(AIMS), list(AIMS.values()))[0]
    kinds = SEALERS if aim in (RENAME, RETIRE) else VICTIMS
    kind = random.choice([k for k in kinds if workers or k != "data worker"])
    if kind == "data worker" and aim == START:
        aim = STEP  # there are none yet
    return aim, kind


class Watch:
    """Looks at a life's run directory for the instant aimed at. `start_s`: start to first step; `step_s`: a step."""

    def __init__(self, run: Path, life: Life, random: Random, start_s: float, step_s: float) -> None:
        self.folder = run / "checkpoints"
        self.run = run
        self.life = life
        self.random = random
        self.start_s = start_s
        self.step_s = step_s
        self.first_step_s: float | None = None
        self._newest = newest_name(self.folder)

    def until(self, aim: str) -> bool:
        """Waits for the instant; False where the life ended by itself before."""
        if aim == START:
            delay = self.random.uniform(0.0, self.start_s)
            return self._wait(lambda: self.life.seconds > delay)
        if not self._wait(self.stepped):
            return False
        steps = last_step(self.run) + self.random.randrange(5)
        if aim in (STEP, SAVE) and not self._wait(lambda: last_step(self.run) >= steps):
            return False
        if aim == STEP:
            time.sleep(self.random.uniform(0.0, 2.0 * self.step_s))
        if aim == SAVE:
            found = self._wait(self.saving)
            time.sleep(self.random.choice((0.0, self.random.uniform(0.0, 0.1))))
            return found
        if aim in (RENAME, RETIRE):
            return self._spin(self.renamed if aim == RENAME else self.retiring)
        return not self.life.ended

    def phase(self) -> str:
        """What this very moment is, as the disk tells it."""
        if not self.stepped():
            return START
        if self.renamed():
            return RENAME
        if self.saving():
            return SAVE
        return RETIRE if self.retiring() else STEP

    def stepped(self) -> bool:
        """Whether this life has logged a step."""
        if self.first_step_s is None and "img/s" in self.life.said():
            self.first_step_s = self.life.seconds
        return self.first_step_s is not None

    def saving(self) -> bool:
        return any(self._is_new(name) for name in _names(self.folder) if name.startswith(".partial-step-"))

    def renamed(self) -> bool:
        newest = newest_name(self.folder)
        return newest > self._newest and newest != latest(self.folder)

    def retiring(self) -> bool:
        """A checkpoint that is being removed: hidden, or without its manifest."""
        for name in _names(self.folder):
            if name.startswith(".partial-retired-") and self._is_new(name):
                return True
            if name.startswith("step-") and not (self.folder / name / MANIFEST).exists() and self._is_new(name):
                return True
        return False

    def _is_new(self, name: str) -> bool:
        """Of this life, and not left by one before."""
        try:
            return (self.folder / name).stat().st_ctime_ns > self.life.began_ns
        except FileNotFoundError:
            return False

    def _wait(self, condition: Callable[[], bool]) -> bool:
        while not condition():
            if self.life.ended:
                return False
            time.sleep(LOOK_SECONDS)
        return True

    def _spin(self, condition: Callable[[], bool]) -> bool:
        """As `_wait`, without a pause between looks; content with any instant after some saves."""
        last = last_step(self.run) + PATIENCE_SAVES * SAVE_EVERY
        looks = 0
        while not condition():
            looks += 1
            if looks % 200 == 0 and (self.life.ended or last_step(self.run) >= last):
                break
        return not self.life.ended


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)  # noqa: PTH208  many thousand times a second
    except FileNotFoundError:
        return []
