"""Uploads whole checkpoints to the mirror during training: newest first, one at a time, by all ranks together.

Each rank has a thread. At the start and after each save, rank 0's thread looks for the newest whole checkpoint without
a copy: the one just saved, or one with an upload cut short by a kill or an outage. The ranks share its files, and each
reports its part. Rank 0 then writes the copy's manifest, removes retired copies, and looks again. Saves never wait for
uploads. A slow mirror skips checkpoints. After a fault the next save tries again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from threading import Condition, Event, Thread
from typing import Any

from ibq_scale.checkpoint.mirror import Copies, Mirror, shares
from ibq_scale.checkpoint.reading import Checkpoint, NotWholeError, read_checkpoint, verify, whole_checkpoints
from ibq_scale.checkpoint.retention import Retention, retire
from ibq_scale.console import tell
from ibq_scale.distributed.side_channel import SideChannel
from ibq_scale.distributed.world import World
from ibq_scale.errors import UserError

# Seconds between polls for another rank's message, and the limit for a checkpoint already visible to rank 0.
POLL_SECONDS, APPEARS_SECONDS = 0.5, 120.0
CLOSE_SECONDS = 5.0
REMEMBERED = 16

log = logging.getLogger(__name__)
_numbers = count()


class MirrorUploader:
    """One rank's upload thread, started at once. The constructor is collective."""

    def __init__(self, folder: Path, world: World, keep: Retention, mirror: Mirror) -> None:
        self.folder = folder
        self.world = world
        self.keep = keep
        self.mirror = mirror
        self._channel = SideChannel(world) if world.size > 1 else None
        self._prefix = f"mirror/{next(_numbers)}"
        self._closed = Event()
        self._changed = Condition()
        # Guarded by the condition's lock.
        self._news, self._ending = True, False
        self._uploading: str | None = None
        self._retire_later = False
        self._wrote: dict[str, list[str]] = {}
        # Used by the thread only.
        self._damaged: set[str] = set()
        self._job = 0
        work = self._lead if world.is_main else self._follow
        self._thread = Thread(target=self._run, args=(work,), name="mirror", daemon=True)
        self._thread.start()

    def wrote(self, name: str, files: list[str]) -> None:
        """Notes this rank's files of a checkpoint. The rank uploads its own files."""
        with self._changed:
            self._wrote[name] = files
            # The same number on every rank.
            for old in list(self._wrote)[:-REMEMBERED]:
                del self._wrote[old]

    def notify(self) -> None:
        """On rank 0: a new checkpoint exists."""
        with self._changed:
            self._news = True
            self._changed.notify()

    def retire(self) -> None:
        """On rank 0: removes retired local checkpoints. One under upload is removed after its upload."""
        with self._changed:
            self._retire_later = self._uploading is not None
            retire(self.folder, self.keep, self._uploading)

    def finish(self, seconds: float | None = None) -> None:
        """Uploads everything pending, and ends. Each rank waits for its own thread, at most so many seconds."""
        with self._changed:
            self._ending = True
            self._changed.notify()
        self._thread.join(seconds)

    def close(self) -> None:
        """Ends soon, also during an upload. The next start resumes it."""
        self._closed.set()
        self.mirror.store.stop()
        with self._changed:
            self._changed.notify()
        self._thread.join(CLOSE_SECONDS)

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception:
            # Usually rank 0's process is gone, and this one will end too.
            if not (self._closed.is_set() or self._ending):
                log.exception("checkpoints are no longer copied to the mirror")

    def _lead(self) -> None:
        try:
            while self._waited():
                try:
                    self._send_all()
                except Exception as e:
                    if not isinstance(e, (UserError, OSError)):
                        log.exception("while checkpoints were copied to the mirror")
                    self._tell(f"{self.mirror.store.url}: CHECKPOINTS ARE NOT COPIED THERE FOR NOW ({e})")
        finally:
            self._order({"name": None})

    def _waited(self) -> bool:
        """Waits for a new checkpoint. False at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._news or self._ending or self._closed.is_set())
            news, self._news = self._news, False
            return news and not self._closed.is_set()

    def _order(self, order: dict[str, Any]) -> None:
        if self._channel is not None:
            self._channel.put(f"{self._prefix}/{self._job}", order)

    def _send_all(self) -> None:
        """Uploads checkpoints without a copy, newest first, until none is left or one fails."""
        tidied = False
        while not self._closed.is_set():
            copies = self.mirror.copies()
            wanted = self._wanted(copies)
            if not wanted:
                if not tidied:
                    self.mirror.tidy(self.keep, ())
                return
            checkpoint = wanted.pop()
            with self._changed:
                if not checkpoint.path.exists():
                    continue
                self._uploading = checkpoint.path.name
            try:
                sent = self._send(checkpoint, copies)
            finally:
                with self._changed:
                    self._uploading = None
                    if self._retire_later:
                        self._retire_later = False
                        retire(self.folder, self.keep)
            if sent:
                self.mirror.tidy(self.keep, {c.path.name for c in wanted})
                tidied = True
            elif checkpoint.path.name not in self._damaged:
                return

    def _wanted(self, copies: Copies) -> list[Checkpoint]:
        """Local checkpoints without a copy that retention keeps in the mirror, oldest first."""
        return [
            checkpoint
            for checkpoint in whole_checkpoints(self.folder)
            if checkpoint.path.name not in self._damaged
            and not self.mirror.holds(checkpoint, copies)
            and self.mirror.wants(checkpoint, copies, self.keep)
        ]

    def _send(self, checkpoint: Checkpoint, copies: Copies) -> bool:
        """Rank 0 leads the upload of one checkpoint. False, with a message, if it failed."""
        name = checkpoint.path.name
        if name in copies.sealed:
            # The same step was saved again, or files of the copy are gone.
            self.mirror.unseal(name)
        job, fresh = self._job, name in self._wrote
        self._order({"name": name, "fresh": fresh})
        self._job += 1
        replies = [self._send_share(name, fresh), *self._replies(job)]
        faults = [reply["fault"] for reply in replies if reply["fault"]]
        sent = sorted(file for reply in replies for file in reply["sent"])
        if not faults and sent != sorted(checkpoint.manifest["files"]):
            faults = ["the ranks disagree about their shares"]
        try:
            if not faults:
                self.mirror.seal(checkpoint)
                return True
        except (UserError, OSError) as e:
            faults = [f"rank 0: {e}"]
        then = "it is whole here, and sent again after the next save or start"
        if any(reply["damaged"] for reply in replies):
            self._damaged.add(name)
            then = "it is left out"
        self._tell(f"{self.mirror.store.url}: {name} COULD NOT BE COPIED THERE ({faults[0]}); {then}")
        return False

    def _replies(self, job: int) -> list[dict[str, Any]]:
        """The other ranks' replies. No time limit: each request has one, and a dead rank ends the run."""
        channel, name = self._channel, f"{self._prefix}/{job}"
        if channel is None:
            return []
        while channel.count(f"{name}/sent", 0) < self.world.size - 1:
            if self._closed.wait(POLL_SECONDS):
                raise UserError("stopped")
        return [reply for reply in channel.of_each_rank(name) if reply is not None]

    def _follow(self) -> None:
        channel = self._channel
        assert channel is not None
        for job in count():
            name = f"{self._prefix}/{job}"
            while (order := channel.get(name)) is None:
                if self._closed.wait(POLL_SECONDS):
                    return
            if order["name"] is None:
                return
            channel.put(f"{name}/{self.world.rank}", self._send_share(order["name"], order["fresh"]))
            channel.count(f"{name}/sent")

    def _send_share(self, name: str, fresh: bool) -> dict[str, Any]:
        """Uploads the files written by this rank if all ranks remember theirs, else a verified share of all files."""
        reply = {"sent": list[str](), "fault": "", "damaged": False}
        try:
            if fresh:
                mine = self._wrote.get(name, [])
            else:
                checkpoint = self._appeared(name)
                mine = shares(checkpoint.manifest["files"], self.world.size)[self.world.rank]
                faults = verify(checkpoint, mine)
                if faults:
                    return reply | {"fault": f"it is damaged here: {'; '.join(faults)}", "damaged": True}
            self.mirror.put(self.folder / name, mine)
            return reply | {"sent": mine}
        except Exception as e:  # rank 0 waits for a reply, whatever went wrong
            if not isinstance(e, (UserError, OSError)):
                log.exception("a checkpoint's part could not be sent")
            return reply | {"fault": f"rank {self.world.rank}: {e}"}

    def _appeared(self, name: str) -> Checkpoint:
        """The checkpoint, waited for: a network file system may show another node's rename late."""
        end = time.monotonic() + APPEARS_SECONDS
        while True:
            try:
                return read_checkpoint(self.folder / name)
            except NotWholeError:
                if time.monotonic() > end or self._closed.wait(POLL_SECONDS):
                    raise

    def _tell(self, message: str) -> None:
        if not self._closed.is_set():
            log.error("%s", message)
            tell(message)
