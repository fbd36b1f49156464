"""An open micro-batch that runs out of memory in the first steps is halved, and the run starts again.

The limit is kept in RUN/auto.json, by device: a run that moves to larger GPUs chooses anew.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch

from ibq_scale.config.batch import accumulation_steps
from ibq_scale.config.run import AnyRun
from ibq_scale.data.store import open_store
from ibq_scale.distributed.agree import by_rank_0
from ibq_scale.distributed.world import World
from ibq_scale.documents import json_object
from ibq_scale.scaling.auto import HEADROOM, MICRO_BATCH, Choice, settle
from ibq_scale.scaling.fitting import largest_micro_batch
from ibq_scale.scaling.plan import Machine
from ibq_scale.supervise.preemption import StopRequest
from ibq_scale.supervise.restart import Restart
from ibq_scale.supervise.watchdog import Watchdog

NAME = "auto.json"
# Later the memory of a step is known to suffice, and an error has another cause.
FIRST_STEPS = 100
R = TypeVar("R", bound=AnyRun)


@dataclass(frozen=True)
class Limit:
    """The largest micro-batch to choose on a device, after `tried` ran out of memory on a rank, in a step."""

    micro_batch: int
    tried: int
    rank: int
    step: int


def settle_within_limit(config: R, run_dir: Path, machine: Machine, world: World) -> tuple[R, tuple[Choice, ...]]:
    """`settle` within the limit of RUN/auto.json. Collective: rank 0 reads it."""
    limit = by_rank_0(world, lambda: read_limit(run_dir, machine))
    settled, choices = settle(config, machine, limit.micro_batch if limit else None)
    if limit is None:
        return settled, choices
    said = f"{limit.tried} ran out of memory here on rank {limit.rank} in step {limit.step} ({NAME})"
    return settled, tuple(replace(c, reason=f"{c.reason}; {said}") if c.key == MICRO_BATCH else c for c in choices)


def read_limit(run_dir: Path, machine: Machine) -> Limit | None:
    """The limit on this kind of device, None without a readable one."""
    try:
        limit = Limit(**json_object(run_dir / NAME)[_device(machine)])
    except (KeyError, TypeError):
        return None
    return limit if all(isinstance(value, int) and value >= 0 for value in asdict(limit).values()) else None


class MemoryPressure:
    """Halves the micro-batch of a run where `is_open`, else says what fits."""

    def __init__(
        self, run_dir: Path, machine: Machine, world: World, restart: Restart, stop: StopRequest, *, is_open: bool
    ) -> None:
        self._run_dir = run_dir
        self._machine = machine
        self._world = world
        self._restart = restart
        self._stop = stop
        self._is_open = is_open

    @contextmanager
    def relieved(self, config: AnyRun, watchdog: Watchdog) -> Iterator[None]:
        """Around the steps. Does not return from an out-of-memory in the first ones if a smaller micro-batch helps."""
        try:
            yield
        except torch.OutOfMemoryError as e:
            if watchdog.phase == "step" and watchdog.steps < FIRST_STEPS:
                e.add_note(self._relieve(config, watchdog.step + 1))
            raise

    def _relieve(self, config: AnyRun, step: int) -> str:
        """A sentence for the error, where the run ends."""
        tried = config.train.micro_batch
        share = accumulation_steps(config.train, self._world.size) * tried
        half = max((m for m in range(1, tried // 2 + 1) if share % m == 0), default=0)
        if half == 0:
            return f"({MICRO_BATCH} is 1: no smaller one is left)"
        if not self._is_open:
            fits = self._fitting(config, tried - 1) or half
            return f"({MICRO_BATCH}={tried} is set, so it stays: {fits} or auto would fit, with the same global batch)"
        try:
            self._keep(Limit(half, tried, self._world.rank, step))
        except OSError as e:
            return f"({self._run_dir / NAME}: {e.strerror}: {MICRO_BATCH}={half} would fit)"
        if not self._stop.asked:
            self._restart.ask(
                f"{MICRO_BATCH}={tried} ran out of memory on rank {self._world.rank} in step {step}: starting again "
                f"with at most {half} and the same global batch ({self._run_dir / NAME})"
            )
        return f"({self._run_dir / NAME} has the limit: the same command goes on with a micro-batch of {half})"

    def _fitting(self, config: AnyRun, most: int) -> int | None:
        memory = self._machine.gpu_memory
        return None if memory is None else largest_micro_batch(config, self._machine.world, memory * HEADROOM, most)

    def _keep(self, limit: Limit) -> None:
        """Writes the limit. Several ranks may write theirs at once: each file is whole."""
        limits = json_object(self._run_dir / NAME) | {_device(self._machine): asdict(limit)}
        open_store(str(self._run_dir)).write(NAME, (json.dumps(limits, indent=1) + "\n").encode())


def _device(machine: Machine) -> str:
    memory = machine.gpu_memory
    return machine.device or "CPU" if memory is None else f"{machine.device or 'GPU'}, {memory / 1e9:.0f} GB"
