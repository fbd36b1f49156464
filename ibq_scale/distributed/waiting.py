"""Waiting in collectives: the one in progress, seen from another thread, the time spent, and the timeouts."""

from __future__ import annotations

import random
import sys
import threading
import time
from datetime import timedelta
from types import FrameType

import torch.distributed as dist
import torch.distributed.distributed_c10d as collectives

# Often enough for the share of a step's time, rare enough to cost nothing (a sample takes about 20 µs).
SAMPLE_SECONDS = 0.05


def collective_in_progress() -> str | None:
    """The name of a collective in progress in another thread of this process (``all_reduce``), or None.

    On a GPU most collectives are only enqueued here. The wait is on the device, and the flight recorder knows its
    cause.
    """
    me = threading.get_ident()
    for thread, frame in sys._current_frames().items():
        name = None if thread == me else _collective(frame)
        if name is not None:
            return name
    return None


def _collective(frame: FrameType | None) -> str | None:
    """The outermost function of torch.distributed on a stack: the program's own call."""
    name = None
    while frame is not None:
        # Wrappers (of its logging, of no_grad) have this name in the same file.
        if frame.f_code.co_filename == collectives.__file__ and frame.f_code.co_name != "wrapper":
            name = frame.f_code.co_name
        frame = frame.f_back
    return name


class CollectiveClock:
    """Adds up the time of this process inside of collectives, by 20 samples a second.

    Torch has no hook for the start of a collective. Wrappers of all collectives would stand in the way of
    torch.compile.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._closed = threading.Event()
        # Not the global generator, since its state belongs to the run. Irregular, to avoid aliasing with the steps.
        self._random = random.Random(0)
        self._thread = threading.Thread(target=self._look, name="collective clock", daemon=True)
        self._thread.start()

    def _look(self) -> None:
        before = time.perf_counter()
        while not self._closed.wait(SAMPLE_SECONDS * self._random.uniform(0.5, 1.5)):
            inside = collective_in_progress() is not None
            now = time.perf_counter()
            self.seconds += (now - before) * inside
            before = now

    def close(self) -> None:
        self._closed.set()
        self._thread.join()


def set_timeouts(timeout: timedelta) -> None:
    """Sets the timeout of every process group of this rank so far.

    The watchdog names the missing ranks, so no collective may time out before it. DeepSpeed makes its own groups
    without a timeout. NCCL's default of ten minutes would end them.
    """
    # Older releases of torch have it under a private name.
    set_one = getattr(dist, "set_timeout", None) or collectives._set_pg_timeout
    for group in list(collectives._world.pg_map):
        set_one(timeout, group)
