"""One job at a time on a run directory, also where its file system knows no working flock.

RUN/lock/00000007 names its holder (host, process, job) and is touched while that lives; the highest number counts.
Whoever finds the holder gone, or released, creates the next number with O_EXCL, which one alone can, and has the lock
if its number is the highest then. Numbers only grow and the highest file is never removed, so nobody can create one
that was overtaken and keep it. Times are compared between files of one file system only: clocks of nodes may differ.
The file system's own may jump: a file that looks old is watched for some beats before that is believed.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from ibq_scale.console import tell
from ibq_scale.distributed.world import World
from ibq_scale.documents import read_json
from ibq_scale.errors import UserError

BEAT_SECONDS = 20.0
# A holder that nothing else is known about is gone when it has not touched its file for so long.
STALE_SECONDS = 300.0
# A file that names nobody is of one who died between creating it and writing its name: else it would be touched.
NAMELESS_SECONDS = 60.0
# One whose file is that old by its time alone is watched for so many beats: the clock may have jumped.
WATCHED_BEATS = 2.5
# A killed launcher's rank 0 follows it within a moment: the next job waits for that before it calls the lock held.
PATIENCE_SECONDS = 5.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Holder:
    """Who holds a lock. `start`: of the process, in ticks since boot; `boot`, `pids`: where its pid means something."""

    host: str
    pid: int
    start: int
    boot: str
    pids: str
    job: str | None
    restart: str | None
    since: str
    released: bool = False

    @classmethod
    def me(cls) -> Holder:
        """This process."""
        pid = os.getpid()
        return cls(
            host=socket.gethostname(),
            pid=pid,
            start=_start_of(pid) or 0,
            boot=_read("/proc/sys/kernel/random/boot_id"),
            pids=_namespace(),
            job=os.environ.get("SLURM_JOB_ID"),
            restart=os.environ.get("SLURM_RESTART_COUNT"),
            since=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def is_alive(self) -> bool | None:
        """Whether its process runs; None where that cannot be seen from here."""
        here = Holder.me()
        if self.job is not None and self.job == here.job and self.restart != here.restart:
            # The same job, requeued: Slurm ended its last part before it began this one.
            return False
        if (self.host, self.boot, self.pids) != (here.host, here.boot, here.pids):
            # Another boot of the same host has ended all that ran before.
            return False if self.host == here.host and self.boot != here.boot and self.boot and here.boot else None
        return _start_of(self.pid) == self.start

    def __str__(self) -> str:
        job = f", Slurm job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, since {self.since}"


class LockState(NamedTuple):
    """A lock as whoever looks on sees it. `touched`: when its file was, by the clock of its file system (s)."""

    holder: Holder | None
    touched: float


def read_lock(run_dir: Path) -> LockState | None:
    """The lock of `run_dir` as it is, without a claim to it; None where nobody ever had it, or has let it go."""
    try:
        path = max((p for p in (run_dir / "lock").iterdir() if p.name.isdigit()), default=None)
        held = None if path is None else LockState(_read_holder(path), path.stat().st_mtime)
    except OSError:
        return None
    return None if held is None or (held.holder is not None and held.holder.released) else held


@contextmanager
def locked(run_dir: Path, world: World) -> Iterator[None]:
    """Holds the lock of `run_dir` for all ranks. Collective; UserError on every rank where another job has it."""
    from ibq_scale.distributed.agree import by_rank_0

    held: list[RunLock] = []
    by_rank_0(world, lambda: held.append(RunLock(run_dir)))
    try:
        yield
    finally:
        for lock in held:
            lock.release()


class RunLock:
    """The lock of `run_dir`, for rank 0: held from construction to `release`, or to the end of the process.

    UserError where another job has it. Waits up to `STALE_SECONDS` for a holder on another host to show life.
    """

    def __init__(self, run_dir: Path) -> None:
        self.folder = run_dir / "lock"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._number = self._take()
        except OSError as e:
            raise UserError(f"cannot write to {run_dir} ({e.strerror}): give another out=…") from None
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="run lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Lets the next job have it at once."""
        self._released.set()
        self._thread.join(BEAT_SECONDS)
        path = self._path(self._number)
        partial = self.folder / f".released-{secrets.token_hex(8)}"
        # A full disk, say, is no reason to fail here: a lock of a process that is gone is as good as released.
        with suppress(OSError):
            if self._highest() == self._number:
                partial.write_text(json.dumps(asdict(Holder.me()) | {"released": True}), encoding="utf-8")
                partial.replace(path)

    def _take(self) -> int:
        """The number of a lock that is now ours. Tells a user whom it waits for."""
        began = time.monotonic()
        seen: tuple[int, float] | None = None
        # When what was `seen` was first seen.
        since = began
        while True:
            number = self._highest()
            unchanged = time.monotonic() - since if seen is not None and seen[0] == number else 0.0
            if number == 0 or self._is_free(number, unchanged):
                if self._create(number + 1):
                    return number + 1
                continue
            holder, now = self._holder(number), (number, self._touched(number))
            alive = holder is not None and holder.is_alive()
            if (alive and time.monotonic() - began > PATIENCE_SECONDS) or (seen is not None and now != seen):
                raise UserError(
                    f"another job trains in {self.folder.parent}: {holder or 'it has just begun'}. Wait for its end, "
                    f"stop it, or give another out=…"
                )
            if seen is None:
                since = time.monotonic()
            if seen is None and not alive:
                text = f"{self.folder.parent} is held by {holder or 'somebody unnamed'}: waiting for it to show life"
                tell(f"ibq-scale: {text}, at most {STALE_SECONDS if holder else NAMELESS_SECONDS:.0f} s")
            seen = now
            time.sleep(0.2)

    def _is_free(self, number: int, watched: float = 0.0) -> bool:
        """`watched`: seconds for which its file was seen not to be touched."""
        holder = self._holder(number)
        if holder is not None and holder.released:
            return True
        alive = holder.is_alive() if holder is not None else None
        if alive is not None:
            return not alive
        patience = NAMELESS_SECONDS if holder is None else STALE_SECONDS
        return watched > patience or (watched > WATCHED_BEATS * BEAT_SECONDS and self._age(number) > patience)

    def _create(self, number: int) -> bool:
        path = self._path(number)
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            return False
        if self._highest() != number:
            path.unlink(missing_ok=True)
            return False
        try:
            path.write_text(json.dumps(asdict(Holder.me())), encoding="utf-8")
        except OSError:
            # Held by a file that names nobody, the directory would be closed to all for minutes.
            path.unlink(missing_ok=True)
            raise
        for old in self._numbers():
            if old < number:
                self._path(old).unlink(missing_ok=True)
        return True

    def _beat(self) -> None:
        while not self._released.wait(BEAT_SECONDS):
            try:
                os.utime(self._path(self._number))
                overtaken = self._highest() != self._number
            except FileNotFoundError:
                overtaken = True
            except OSError as e:
                log.warning("could not touch the lock of %s: %s", self.folder.parent, e)
                continue
            if overtaken:
                text = f"another job took over {self.folder.parent}, since this one showed no life: it ends"
                log.error("%s", text)
                tell(f"ibq-scale: {text}")
                # At once: two jobs that write the same checkpoints are worse than a lost step.
                os._exit(1)

    def _age(self, number: int) -> float:
        """Seconds since the file was touched, by the file system's own clock."""
        now = self.folder / f".now-{secrets.token_hex(8)}"
        now.touch()
        try:
            return now.stat().st_mtime - self._touched(number)
        finally:
            now.unlink(missing_ok=True)

    def _touched(self, number: int) -> float:
        try:
            return self._path(number).stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def _holder(self, number: int) -> Holder | None:
        return _read_holder(self._path(number))

    def _numbers(self) -> list[int]:
        return [int(p.name) for p in self.folder.iterdir() if p.name.isdigit()]

    def _highest(self) -> int:
        return max(self._numbers(), default=0)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:08d}"


def _read_holder(path: Path) -> Holder | None:
    """None for a file that is being written at this moment, or is damaged: then its time alone counts."""
    try:
        found: Any = read_json(path)
        return Holder(**found)
    except (OSError, ValueError, TypeError):
        return None


def _start_of(pid: int) -> int | None:
    """When a process started, in ticks since boot (a clock that is set does not move it); None where it is no more."""
    stat = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    # Fields 3 and 22 of proc(5); a zombie does nothing any more.
    return None if not stat or stat[0] in "ZX" else int(stat[19])


def _namespace() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return ""
