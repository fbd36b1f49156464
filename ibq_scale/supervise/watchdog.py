"""Ends a hanging run and names the missing ranks, from a thread in every rank, outside of collectives."""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import torch._C._distributed_c10d as c10d

from ibq_scale.checkpoint.files import write_whole
from ibq_scale.console import tell
from ibq_scale.distributed.heartbeats import Heartbeats, Missing, Place, find_missing, leave
from ibq_scale.distributed.side_channel import NoAnswerError, SideChannel
from ibq_scale.distributed.waiting import collective_in_progress
from ibq_scale.distributed.world import World

# EX_SOFTWARE of sysexits.h. Not 75: a run that hung may hang again, and a person should look.
HUNG_EXIT_CODE = 70
# The first step includes loading, compiling and autotuning.
FIRST_STEP_FACTOR = 3.0
# Phases before the first step.
START_UP = ("data sets", "building", "loading")
BEAT_SECONDS = 30.0
LEAVE_SECONDS = 10.0
LAST_RESORT_SECONDS = 60.0
# Steps of the mean in heartbeat.json.
RECENT_STEPS = 20

log = logging.getLogger(__name__)


class Watchdog:
    """Watches one rank's progress. After `timeout` seconds without any, it compares the heartbeats of all ranks, names
    the missing ones, writes stacks and torch's record of collectives to RUN/logs, and exits with code 70.

    `step`: the last one that ended on this rank. `phase`: what the rank does since. Rank 0 also writes
    RUN/heartbeat.json. The threads do not touch the run's state. `ending` is called before the process ends, and `hung`
    with the message by each rank that prints it.
    """

    def __init__(
        self,
        run_dir: Path,
        world: World,
        hosts: Sequence[str],
        timeout: float,
        start_step: int,
        ending: Callable[[], None] = lambda: None,
        hung: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.run_dir = run_dir
        self.world = world
        self.hosts = hosts
        self.timeout = timeout
        self._start = self.step = start_step
        self._ending = ending
        self._hung = hung
        self.phase = START_UP[0]
        self._patience = FIRST_STEP_FACTOR * timeout
        self._progress = time.monotonic()
        self._ends: deque[float] = deque(maxlen=RECENT_STEPS + 1)
        self._closed = threading.Event()
        self._stacks = (run_dir / "logs" / f"stacks-rank-{world.rank:05d}.txt").open("a", encoding="utf-8")
        self._channel = SideChannel(world)
        self._interval = min(BEAT_SECONDS, timeout / 4)
        self._heartbeats = Heartbeats(self._channel, self._interval, self._place)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def report(self, phase: str) -> None:
        """Notes progress, and the new phase."""
        self.phase = phase
        self._progress = time.monotonic()

    @property
    def steps(self) -> int:
        return self.step - self._start

    def step_ended(self, step: int) -> None:
        self.step = step
        self._patience = self.timeout
        self.report("step")
        self._ends.append(self._progress)

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
        self._heartbeats.close()
        faulthandler.cancel_dump_traceback_later()
        self._stacks.close()

    def _place(self) -> Place:
        return Place(self.step, self.phase, collective_in_progress())

    def _watch(self) -> None:
        while True:
            # Hanging C code with Python's lock also stops this thread. faulthandler's thread then ends the process.
            faulthandler.dump_traceback_later(2 * self._patience + LAST_RESORT_SECONDS, exit=True, file=self._stacks)
            if self.world.is_main:
                self._write_heartbeat()
            left = self._progress + self._patience - time.monotonic()
            if left <= 0:
                self._end()
            if self._closed.wait(max(0.01, min(left, self._interval))):
                return

    def _end(self) -> None:
        try:
            self._ending()
            print(f"--- no progress since step {self.step}, in {self.phase}", file=self._stacks, flush=True)
            faulthandler.dump_traceback(self._stacks, all_threads=True)
            self._dump_flight_record()
            missing = find_missing(self._channel, self.hosts, self._interval)
            self._tell(missing)
            if not (missing.silent and 0 in missing.ranks):
                leave(self._channel, missing, LEAVE_SECONDS)
        except NoAnswerError:
            pass
        except Exception:
            log.exception("the watchdog could not report everything before it ends the process")
        finally:
            os._exit(HUNG_EXIT_CODE)

    def _tell(self, missing: Missing) -> None:
        what = f"the start ({self.phase})" if self.phase in START_UP else f"step {self.step + 1}"
        text = (
            f"{what} does not end: no progress for {self._patience:.0f} s (train.hang_timeout). "
            f"{missing.why}. Stacks are in {self.run_dir / 'logs'}"
        )
        log.error("%s", text)
        # One line for all ranks, from rank 0. If rank 0 is missing, each rank prints it.
        if self.world.is_main or 0 in missing.ranks:
            tell(f"HANG: {text}")
            self._hung(text)

    def _dump_flight_record(self) -> None:
        """Torch's record of the last collectives, for ``torchfrtrace``. TORCH_FR_BUFFER_SIZE=0 turns it off."""
        name = "_dump_nccl_trace" if self.world.device.type == "cuda" else "_dump_fr_trace"
        if os.environ.get("TORCH_FR_BUFFER_SIZE") == "0" or not hasattr(c10d, name):
            return
        folder = self.run_dir / "logs" / "flight-record"
        folder.mkdir(exist_ok=True)
        (folder / f"rank_{self.world.rank}").write_bytes(getattr(c10d, name)())

    def _write_heartbeat(self) -> None:
        ends = list(self._ends)
        seconds = (ends[-1] - ends[0]) / (len(ends) - 1) if len(ends) > 1 else None
        beat = {"step": self.step, "phase": self.phase, "time": time.time(), "step_s": seconds}
        beat |= {"host": self.hosts[0], "pid": os.getpid(), "idle_s": time.monotonic() - self._progress}
        path = self.run_dir / "heartbeat.json"
        try:
            write_whole(path, json.dumps(beat) + "\n")
        except OSError as e:
            log.warning("could not write %s: %s", path, e)
