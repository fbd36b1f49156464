"""Stop signals: all ranks agree to stop after the same step, save a checkpoint and exit within the grace time."""

from __future__ import annotations

import logging
import math
import os
import select
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from threading import Thread
from typing import TYPE_CHECKING, NamedTuple

from ibq_scale.console import tell, tells
from ibq_scale.distributed.signals import ASKING, ignore, unblock

if TYPE_CHECKING:
    import torch

    from ibq_scale.distributed.world import World

# EX_TEMPFAIL of sysexits.h, "try again later". A batch script requeues on this code only.
REQUEUE_EXIT_CODE = 75
# The ranks' grace times end within moments. The first exit breaks the collectives of the other ranks, so an error this
# close to the end is taken for its result.
CLOSE_SECONDS = 5.0
# Limit for the last log line: the log's file system may hang.
SAY_SECONDS = 2.0

log = logging.getLogger(__name__)


class _Question(NamedTuple):
    """The minimum over ranks of the seconds left, asked at `time`. In host memory once `event` has passed."""

    time: float
    seconds: torch.Tensor
    pending: torch.distributed.Work | None
    event: torch.cuda.Event | None

    def answer(self) -> float:
        if self.pending is not None:
            self.pending.wait()
        if self.event is not None:
            self.event.synchronize()
        return float(self.seconds)


class StopRequest:
    """Turns the signals of `ASKING` into one request to stop, from construction on.

    The trainer calls `agreed_before` after each step, on every rank. `grace` seconds after the signal a thread ends the
    process with the requeue code, even inside of a hanging step. Python's C handler wakes the thread at once
    (`signal.set_wakeup_fd`).

    `standing`: returns the checkpoint to resume from, in words. The checkpoint folder sets it. `leaving`: called with
    the reason before the thread ends the process.
    """

    def __init__(self, grace: float) -> None:
        self.grace = grace
        self.standing: Callable[[], str] = lambda: "training had not begun, nothing is lost"
        self.leaving: Callable[[str], None] = lambda _: None
        self._deadline = math.inf
        self._stood_down = False
        self._asked: _Question | None = None
        self._ear, self._mouth = socket.socketpair()
        self._mouth.setblocking(False)
        for signum in ASKING:
            signal.signal(signum, lambda *_: None)
        # A full buffer holds repeated signals only.
        signal.set_wakeup_fd(self._mouth.fileno(), warn_on_full_buffer=False)
        Thread(target=self._listen, name="stop request", daemon=True).start()
        unblock()

    def agreed(self, world: World) -> bool:
        """Whether any rank has a request to stop. All ranks then get the earliest deadline. Collective, since a save
        needs all ranks.
        """
        return self._agree_on(self._ask(world))

    def agreed_before(self, world: World) -> bool:
        """The answer to the previous call's question, False at the first call. Collective.

        Each call starts one all-reduce and reads the result of the one before, so the host does not wait for the step
        still running on a GPU.
        """
        before, self._asked = self._asked, self._ask(world)
        return before is not None and self._agree_on(before)

    def _ask(self, world: World) -> _Question:
        import torch
        import torch.distributed as dist

        now = time.monotonic()
        left = torch.tensor([self._deadline - now])
        if world.device.type == "cpu":
            return _Question(now, left, dist.all_reduce(left, op=dist.ReduceOp.MIN, async_op=True), None)
        left = left.pin_memory()
        there = left.to(world.device, non_blocking=True)
        # The stream waits for it, not the host.
        dist.all_reduce(there, op=dist.ReduceOp.MIN)
        left.copy_(there, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return _Question(now, left, None, event)

    def _agree_on(self, question: _Question) -> bool:
        seconds = question.answer()
        if math.isinf(seconds):
            return False
        deadline = question.time + seconds
        if deadline < self._deadline:
            self._deadline = deadline
            with suppress(BlockingIOError):
                self._mouth.send(b"\0")
        return True

    @property
    def asked(self) -> bool:
        """Whether a signal asks this rank to stop, or the ranks have agreed to."""
        return not math.isinf(self._deadline)

    def stand_down(self) -> None:
        """Leaves the exit to the watchdog, with its own code: a hanging job is not requeued."""
        self._stood_down = True

    def leave_if_due(self) -> None:
        """Ends the process within `CLOSE_SECONDS` of its deadline."""
        if self._deadline - time.monotonic() < CLOSE_SECONDS:
            self._leave()

    def close(self) -> None:
        """Ignores signals and the deadline from now on, for a process near its end."""
        ignore()
        self._stood_down = True
        signal.set_wakeup_fd(-1)
        self._mouth.close()

    def _listen(self) -> None:
        while True:
            left = self._deadline - time.monotonic()
            if left <= 0:
                self._leave()
                return
            heard, _, _ = select.select([self._ear], [], [], None if math.isinf(left) else left)
            numbers = self._ear.recv(64) if heard else b""
            if heard and not numbers:
                return
            asking = [number for number in numbers if number in ASKING]
            if asking and math.isinf(self._deadline):
                self._deadline = time.monotonic() + self.grace
                name = signal.Signals(asking[0]).name
                _say(f"{name}: saving and leaving after the next step, within {self.grace:.0f} s (train.grace)")

    def _leave(self) -> None:
        if self._stood_down:
            return
        text = f"the {self.grace:.0f} s after the signal (train.grace) are over before all is saved: {self.standing()}"
        _say(f"{text}. The same command goes on from there")
        self.leaving(text)
        os._exit(REQUEUE_EXIT_CODE)


def _say(text: str) -> None:
    def say() -> None:
        log.warning("%s", text)
        if tells():
            tell(text)

    thread = Thread(target=say, name="last words", daemon=True)
    thread.start()
    thread.join(SAY_SECONDS)
