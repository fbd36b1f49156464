"""Checkpoints come to be beside the training, and appear whole or not at all.

A save stops the ranks for a copy of their state to host memory; a thread of each rank then writes, flushes and hashes
its files under RUN/checkpoints/.partial-step-00001000, and says in a small file there that it is done, or why not. Rank
0's thread waits for all of them, writes the manifest, renames the folder and replaces `latest`. No collective takes
part, so training's own are not disturbed. One save is under way at a time: the next waits for it. What goes to a mirror
goes in a thread of its own (copying.py), which saves do not wait for.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any

import torch.distributed as dist

from ibq_scale.checkpoint.copying import Copier
from ibq_scale.checkpoint.fetching import fetch_newest
from ibq_scale.checkpoint.files import HostCopies, StateFile, write_whole
from ibq_scale.checkpoint.mirror import Mirror
from ibq_scale.checkpoint.reading import (
    FORMAT_VERSION,
    MANIFEST,
    Checkpoint,
    examine,
    manifest_text,
    verify,
    whole_checkpoints,
)
from ibq_scale.checkpoint.retention import Retention, retire
from ibq_scale.console import gigabytes, tell
from ibq_scale.distributed.agree import by_rank_0, of_all_ranks
from ibq_scale.distributed.world import World

# How often rank 0 looks whether the others are done, and for how long after it is done itself.
LOOK_SECONDS, PATIENCE_SECONDS = 0.1, 3600.0
SETTLE_SECONDS = 60.0
DONE = ".done-rank-"

log = logging.getLogger(__name__)


class CheckpointFolder:
    """RUN/checkpoints: saves with all ranks, keeps what `keep` says. The run holds its lock."""

    def __init__(self, folder: Path, world: World, keep: Retention, mirror: Mirror | None = None) -> None:
        self.folder = folder
        self.world = world
        self.keep = keep
        self.mirror = mirror
        self._host = HostCopies()
        self._writing: _Writing | None = None
        self._copier: Copier | None = None
        self._stands = "there is no checkpoint yet"

    def newest(self, check_hashes: bool = True) -> Checkpoint | None:
        """The newest checkpoint whose every byte is what was written, the same on every rank. Collective.

        The ranks share the hashing. One that is damaged is told, with its faults, and the one before is taken. Where
        there is none, the mirror's newest is fetched. Without `check_hashes` the sizes have to do.
        """
        found = self._newest_here(check_hashes) or self._fetch()
        if found is not None:
            self._stands = f"{found.path.name} stands"
            if self.world.is_main:
                # A kill between a checkpoint's rename and its pointer leaves an older one's, or none.
                with suppress(OSError):
                    _point(self.folder, found.path.name)
        return found

    def standing(self) -> str:
        """On rank 0: the newest whole checkpoint, and how long its save took if this run made it. Reads no disk."""
        return self._stands

    def note_whole(self, name: str, seconds: float) -> None:
        """Rank 0's thread made a checkpoint whole, so many seconds after its save began."""
        self._stands = f"{name} stands, whose save took {seconds:.1f} s"

    def _newest_here(self, check_hashes: bool) -> Checkpoint | None:
        whole, damage = by_rank_0(self.world, lambda: examine(self.folder))
        if self.world.is_main:
            for fault in damage:
                _tell(f"{fault}: it is left out")
        for checkpoint in reversed(whole):
            names = sorted(checkpoint.manifest["files"])[self.world.rank :: self.world.size] if check_hashes else []
            faults = [fault for part in of_all_ranks(self.world, verify(checkpoint, names)) for fault in part]
            if not faults:
                return checkpoint
            if self.world.is_main:
                _tell(f"{checkpoint.path} is damaged and left out: {'; '.join(faults)}")
        return None

    def _fetch(self) -> Checkpoint | None:
        """The mirror's newest, brought here by all ranks together."""
        copy = None if self.mirror is None else fetch_newest(self.mirror, self.folder, self.world)
        if copy is None:
            return None
        if self.world.is_main:
            _make_whole(copy.path, copy.manifest)
        dist.barrier()
        return Checkpoint(_final(copy.path), copy.manifest)

    def start_mirror(self) -> None:
        """Begins to send to the mirror, in the background, what has no whole copy there. Collective."""
        if self.mirror is not None and self._copier is None:
            self._copier = Copier(self.folder, self.world, self.keep, self.mirror)

    def finish_mirror(self, seconds: float | None = None) -> None:
        """Waits, for so long at most, until what is whole here has a copy in the mirror, or a fault has been told."""
        if self._copier is not None:
            self._copier.finish(seconds)

    def close(self) -> None:
        """Ends the sending to the mirror wherever it is; the next `start_mirror`, in whatever process, goes on."""
        if self._copier is not None:
            self._copier.close()

    def save(self, facts: dict[str, Any], files: Sequence[StateFile]) -> None:
        """Begins to make the ranks' files a checkpoint; `facts` (with ``step``, and the ``metrics`` that
        `keep` may ask for) go into its manifest. Collective.

        Returns when the files' tensors may change again. Where it cannot be written, this is told, and the checkpoints
        before stand: see `finish`.
        """
        self.finish()
        self.start_mirror()
        partial = self.folder / f".partial-step-{facts['step']:08d}"
        size = sum(of_all_ranks(self.world, sum(file.bytes for file in files)))
        fault = by_rank_0(self.world, lambda: self._begin(partial, size))
        write = _Share(self, partial, facts, self._host.take(files) if fault is None else [])
        self._writing = _Writing(write, fault)

    def finish(self) -> bool:
        """Waits for the save under way; whether the last one is on disk, the same on every rank. Collective."""
        if self._writing is None:
            return True
        fault: list[Any] = [self._writing.wait()]
        dist.broadcast_object_list(fault, src=0, device=self.world.device)
        if isinstance(fault[0], BaseException):
            self._writing = None
            raise fault[0]
        self._writing = _Writing(None, fault[0])
        return fault[0] is None

    def tidy(self, last: Checkpoint) -> None:
        """Removes what a kill within the run's last save left, where `last` is the newest there is."""
        if self.world.is_main and whole_checkpoints(self.folder)[-1].step == last.step:
            with suppress(OSError):
                self._remove_leftovers()
                retire(self.folder, self.keep)

    def settle(self) -> None:
        """At the end of a run that failed: lets the save under way come to its end, where the other ranks live."""
        if self._writing is not None:
            self._writing.wait(SETTLE_SECONDS)

    def _begin(self, partial: Path, size: int) -> str | None:
        """Rank 0 makes the folder, where the disk has room for the whole checkpoint; else what is wrong."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_leftovers()
            free = shutil.disk_usage(self.folder).free
            if free < size:
                raise OSError(errno.ENOSPC, f"{gigabytes(size)} are needed, {gigabytes(free)} are free")
            partial.mkdir()
        except OSError as e:
            return _not_written(self.folder, e.strerror or str(e))
        return None

    def _remove_leftovers(self) -> None:
        for leftover in self.folder.glob(".partial-*"):
            if leftover.is_symlink():
                leftover.unlink()
            shutil.rmtree(leftover, ignore_errors=True)


class _Writing:
    """The save under way: its thread, and what came of it. Without a thread it is over."""

    def __init__(self, work: Callable[[], str | None] | None, fault: str | None) -> None:
        self._fault: str | BaseException | None = fault
        self._thread: Thread | None = None
        if work is not None and fault is None:
            self._thread = Thread(target=self._run, args=(work,), name="checkpoint", daemon=True)
            self._thread.start()

    def _run(self, work: Callable[[], str | None]) -> None:
        try:
            self._fault = work()
        except BaseException as e:
            self._fault = e

    def wait(self, seconds: float | None = None) -> str | BaseException | None:
        """None where all is well."""
        if self._thread is not None:
            self._thread.join(seconds)
        return self._fault


class _Share:
    """One rank's part in one checkpoint; rank 0's makes it one. Runs in a thread and answers what went wrong."""

    def __init__(
        self, checkpoints: CheckpointFolder, partial: Path, facts: dict[str, Any], files: Sequence[StateFile]
    ) -> None:
        self.folder = checkpoints.folder
        self.world = checkpoints.world
        self.keep = checkpoints.keep
        self.copier = checkpoints._copier
        self.note_whole = checkpoints.note_whole
        self.began = time.monotonic()
        self.partial = partial
        self.facts = facts
        self.files = files

    def __call__(self) -> str | None:
        written: dict[str, dict[str, Any]] = {}
        fault = None
        try:
            for file in self.files:
                written[file.path] = file.write(self.partial)._asdict()
        except Exception as e:  # rank 0 waits for word, whatever went wrong
            log.exception("a checkpoint's part could not be written")
            fault = f"rank {self.world.rank}: {(isinstance(e, OSError) and e.strerror) or repr(e)}"
        if self.copier is not None:
            self.copier.wrote(_final(self.partial).name, sorted(written))
        if not self.world.is_main:
            self._say(written, fault)
            return fault
        try:
            faults, every = self._gather(written, fault)
            if not faults:
                self._commit(every)
                return None
        except OSError as e:
            faults = [f"rank 0: {e.strerror or e}"]
        shutil.rmtree(self.partial, ignore_errors=True)
        return _not_written(self.folder, faults[0])

    def _say(self, written: dict[str, dict[str, Any]], fault: str | None) -> None:
        """Leaves word for rank 0, whole: by a rename. On a full disk there is room for a name, at least."""
        done = self.partial / f"{DONE}{self.world.rank:05d}"
        try:
            write_whole(done, json.dumps({"files": written, "fault": fault}))
        except OSError:
            done.touch()

    def _gather(
        self, written: dict[str, dict[str, Any]], fault: str | None
    ) -> tuple[list[str], dict[str, dict[str, Any]]]:
        """The ranks' faults, and all files by name, when every rank has left word."""
        if fault:
            # The checkpoint is lost. On a file system that is read-only now, the others cannot leave word either.
            return [fault], {}
        faults: list[str] = []
        every = dict(written)
        for rank in range(1, self.world.size):
            done = self.partial / f"{DONE}{rank:05d}"
            if not _wait(done.exists):
                return [*faults, f"rank {rank} has not written its part"], every
            said = done.read_text(encoding="utf-8")
            word: dict[str, Any] = (
                json.loads(said) if said else {"files": {}, "fault": f"rank {rank}: its disk is full"}
            )
            every |= word["files"]
            faults += [word["fault"]] if word["fault"] else []
            done.unlink()
        return faults, every

    def _commit(self, files: dict[str, dict[str, Any]]) -> None:
        manifest = self.facts | {"format_version": FORMAT_VERSION, "files": dict(sorted(files.items()))}
        _make_whole(self.partial, manifest)
        self.note_whole(_final(self.partial).name, time.monotonic() - self.began)
        if self.copier is None:
            retire(self.folder, self.keep)
        else:
            self.copier.look()
            self.copier.retire()


def _final(partial: Path) -> Path:
    """Where a checkpoint goes when it is whole."""
    return partial.with_name(partial.name.removeprefix(".partial-"))


def _make_whole(partial: Path, manifest: dict[str, Any]) -> None:
    """The manifest, everything flushed, the folder's name, `latest`: in this order. Raises OSError."""
    (partial / MANIFEST).write_text(manifest_text(manifest), encoding="utf-8")
    _flush(partial / MANIFEST)
    for parent in {(partial / name).parent for name in manifest["files"]} | {partial}:
        _flush(parent)
    final, folder = _final(partial), partial.parent
    if final.exists():
        # The same step once more: the one that is there was damaged, or the run would have gone on from it.
        shutil.rmtree(final)
    partial.rename(final)
    _flush(folder)
    _point(folder, final.name)


def _point(folder: Path, name: str) -> None:
    """`latest` names this checkpoint from now on. Raises OSError."""
    pointer = folder / ".latest.partial"
    pointer.write_text(name + "\n", encoding="utf-8")
    _flush(pointer)
    pointer.replace(folder / "latest")
    _flush(folder)


def _wait(condition: Callable[[], bool]) -> bool:
    """Waits for what another rank does; False where it does not within reason."""
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(LOOK_SECONDS)
    return True


def _not_written(folder: Path, why: str) -> str:
    _tell(f"{folder}: THIS CHECKPOINT COULD NOT BE WRITTEN ({why}); the run goes on without it")
    return why


def _tell(message: str) -> None:
    log.error("%s", message)
    tell(message)


def _flush(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
