"""Traces of a few steps and snapshots of GPU memory, written to RUN/profile by chosen ranks.

``rank-00000.steps-100-102.json.gz`` opens in https://ui.perfetto.dev or chrome://tracing, ``….memory.pickle`` in
https://docs.pytorch.org/memory_viz. Both pages read files on the reader's own machine.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from ibq_scale.distributed.world import World
from ibq_scale.profiling import part

FOLDER = "profile"
# Newest allocations and frees in a snapshot.
HISTORY = 200_000

log = logging.getLogger(__name__)


class StepProfile:
    """Records the steps from ``steps[0]`` to ``steps[1]`` on `ranks`. Nothing is recorded where `steps` is None.

    A resumed run records the steps of the range that are left. A failed write, on a full disk for example, is logged
    and does not end the run. On a GPU allocations are recorded from the start, with a stack trace each.
    """

    def __init__(self, run_dir: Path, steps: tuple[int, int] | None, ranks: tuple[int, ...], world: World) -> None:
        self._folder = run_dir / FOLDER
        self._world = world
        self._steps = steps if world.rank in ranks else None
        self._running: profile | None = None
        self._first = self._now = 0
        if self._steps is not None and world.device.type == "cuda":
            torch.cuda.memory._record_memory_history(max_entries=HISTORY)

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        self._now = number
        if self._steps is not None and self._running is None and self._steps[0] <= number <= self._steps[1]:
            self._first = number
            activities = [ProfilerActivity.CPU]
            if self._world.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._running = profile(activities=activities, record_shapes=True, profile_memory=True)
            self._running.start()
        with part(f"rank {self._world.rank}, step {number}"):
            yield
        if self._steps is not None and number >= self._steps[1]:
            self.close()

    def close(self) -> None:
        """Stops the recording and writes it. Does nothing where none is running."""
        if self._running is None:
            return
        running, self._running = self._running, None
        running.stop()
        name = f"rank-{self._world.rank:05d}.steps-{self._first}-{self._now}"
        self._write(f"{name}.json.gz", lambda path: running.export_chrome_trace(str(path)))
        if self._world.device.type == "cuda":
            self._write(f"{name}.memory.pickle", _snapshot)

    @contextmanager
    def out_of_memory(self) -> Iterator[None]:
        """Writes a snapshot of the GPU memory at an out-of-memory error. Every rank does, also without `steps`."""
        try:
            yield
        except torch.OutOfMemoryError as e:
            if self._world.device.type == "cuda":
                name = f"rank-{self._world.rank:05d}.out-of-memory.memory.pickle"
                self._write(name, _snapshot)
                e.add_note(f"memory snapshot: {self._folder / name}, for https://docs.pytorch.org/memory_viz")
            raise

    def _write(self, name: str, write: Callable[[Path], object]) -> None:
        path = self._folder / name
        # Torch compresses by the file's ending.
        unfinished = path.with_name(f".{name}")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write(unfinished)
            unfinished.replace(path)
            log.info("profile: %s", path)
        except OSError as e:
            log.warning("profile: %s could not be written: %s", path, e)
            with suppress(OSError):
                unfinished.unlink()


def _snapshot(path: Path) -> None:
    torch.cuda.memory._dump_snapshot(str(path))  # type: ignore[no-untyped-call]
