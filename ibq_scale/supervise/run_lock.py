"""One job at a time on a run directory, also on file systems without a working flock.

RUN/lock/00000007 names its holder (host, process, job). The holder touches the file regularly. The highest number
counts. After the holder's end or release, the next job creates the next number with O_EXCL: only one job can. It has
the lock if its number is then the highest. Numbers only grow and the highest file is never removed, so an overtaken
number never becomes a lock. Only times of files on one file system are compared, since clocks of nodes may differ. A
file system's clock may jump: an old file is watched for some beats first.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
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
# An unreachable holder is dead after this time without a touch.
STALE_SECONDS = 300.0
# A file without a name: its creator died before it wrote the name, else it would touch the file.
NAMELESS_SECONDS = 60.0
# An old file is watched for this many beats, since the clock may have jumped.
WATCHED_BEATS = 2.5
# A killed launcher's rank 0 ends a moment later. The next job waits for it before it reports the lock as held.
PATIENCE_SECONDS = 5.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Holder:
    """The holder of a lock. `start`: of its process, in ticks since boot. `boot`, `pids`: the scope of its pid."""

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
        """Whether its process runs. None: not visible from here."""
        here = Holder.me()
        if self.job is not None and self.job == here.job and self.restart != here.restart:
            # The same job, requeued: Slurm ended the earlier attempt before it began this one.
            return False
        if (self.host, self.boot, self.pids) != (here.host, here.boot, here.pids):
            # A reboot of the host ended all earlier processes.
            return False if self.host == here.host and self.boot != here.boot and self.boot and here.boot else None
        return _start_of(self.pid) == self.start

    def __str__(self) -> str:
        job = f", Slurm job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, since {self.since}"


class LockState(NamedTuple):
    """A held lock, read without a claim. `touched`: by the clock of its file system (s)."""

    holder: Holder | None
    touched: float


def read_lock(run_dir: Path) -> LockState | None:
    """The lock of `run_dir`, without a claim to it. None: never held, or released."""
    try:
        path = max((p for p in (run_dir / "lock").iterdir() if p.name.isdigit()), default=None)
        held = None if path is None else LockState(_read_holder(path), path.stat().st_mtime)
    except OSError:
        return None
    return None if held is None or (held.holder is not None and held.holder.released) else held


@contextmanager
def locked(run_dir: Path, world: World) -> Iterator[Callable[[], None]]:
    """Holds the lock of `run_dir` for all ranks. Collective. UserError on every rank if another job has it.

    Yields its release, for a process that begins another program.
    """
    from ibq_scale.distributed.agree import by_rank_0

    held: list[RunLock] = []
    by_rank_0(world, lambda: held.append(RunLock(run_dir)))

    def release() -> None:
        for lock in held:
            lock.release()

    try:
        yield release
    finally:
        release()


class RunLock:
    """The lock of `run_dir`, for rank 0: held from construction to `release` or the end of the process.

    UserError if another job has it. Waits up to `STALE_SECONDS` for a sign of life of a holder on another host.
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
        self._released.set()
        self._thread.join(BEAT_SECONDS)
        path = self._path(self._number)
        partial = self.folder / f".released-{secrets.token_hex(8)}"
        # No error, for example on a full disk: the end of the process frees the lock too.
        with suppress(OSError):
            if self._highest() == self._number:
                partial.write_text(json.dumps(asdict(Holder.me()) | {"released": True}), encoding="utf-8")
                partial.replace(path)

    def _take(self) -> int:
        """Waits for the lock, tells the user its holder, and returns the new number."""
        began = time.monotonic()
        seen: tuple[int, float] | None = None
        # The time of `seen`.
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
                text = f"{self.folder.parent} is locked by {holder or 'an unknown process'}: waiting for a sign of life"
                tell(f"ibq-scale: {text}, at most {STALE_SECONDS if holder else NAMELESS_SECONDS:.0f} s")
            seen = now
            time.sleep(0.2)

    def _is_free(self, number: int, watched: float = 0.0) -> bool:
        """`watched`: seconds of observation without a touch."""
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
            # A file without a name would block the directory for `NAMELESS_SECONDS`.
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
                text = f"another job took the lock of {self.folder.parent} after no sign of life: this job ends"
                log.error("%s", text)
                tell(f"ibq-scale: {text}")
                # At once: two writers of the same checkpoints are worse than a lost step.
                os._exit(1)

    def _age(self, number: int) -> float:
        """Seconds since the last touch, by the file system's clock."""
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
    """None for a damaged or half-written file. Then only its time counts."""
    try:
        found: Any = read_json(path)
        return Holder(**found)
    except (OSError, ValueError, TypeError):
        return None


def _start_of(pid: int) -> int | None:
    """A process's start in ticks since boot, independent of the clock. None: it has ended."""
    stat = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    # Fields 3 and 22 of proc(5). A zombie has ended.
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
