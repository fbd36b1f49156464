"""Saves checkpoints in the background of training, atomically.

A save stops the ranks only for a copy of their state to host memory. A thread of each rank then writes, flushes and
hashes its files under RUN/checkpoints/.partial-step-00001000, and reports success or an error in a small file there.
Rank 0's thread waits for all reports, writes the manifest, renames the folder and replaces `latest`. No collective
takes part, so training is not disturbed. A save waits for the end of the previous one, but never for uploads to a
mirror, which have their own thread (mirror_uploader.py).
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

from ibq_scale.checkpoint.fetching import fetch_newest
from ibq_scale.checkpoint.files import HostCopies, StateFile, write_whole
from ibq_scale.checkpoint.mirror import Mirror
from ibq_scale.checkpoint.mirror_uploader import MirrorUploader
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

# Seconds between rank 0's polls for reports, and its limit after its own part is done.
POLL_SECONDS, PATIENCE_SECONDS = 0.1, 3600.0
SETTLE_SECONDS = 60.0
DONE = ".done-rank-"

log = logging.getLogger(__name__)
Written = dict[str, dict[str, Any]]
"""Sizes and hashes by file name."""


class CheckpointFolder:
    """RUN/checkpoints: saves by all ranks, with the retention `keep`. The run must hold its lock."""

    def __init__(self, folder: Path, world: World, keep: Retention, mirror: Mirror | None = None) -> None:
        self.folder = folder
        self.world = world
        self.keep = keep
        self.mirror = mirror
        self._host = HostCopies()
        self._writing: _Writing | None = None
        self._uploader: MirrorUploader | None = None
        self._stands = "there is no checkpoint yet"

    def newest(self, check_hashes: bool = True) -> Checkpoint | None:
        """The newest checkpoint with all hashes right, the same on every rank. Collective.

        The ranks share the hashing. A damaged one is reported with its faults, and the one before it used. Without any,
        the mirror's newest is fetched. Without `check_hashes` only sizes are compared.
        """
        found = self._newest_here(check_hashes) or self._fetch()
        if found is not None:
            self._stands = f"{found.path.name} stands"
            if self.world.is_main:
                # A kill between a checkpoint's rename and its pointer leaves an older pointer, or none.
                with suppress(OSError):
                    point(self.folder, found.path.name)
        return found

    def standing(self) -> str:
        """On rank 0: the newest whole checkpoint, and the duration of its save in this run. Reads no disk."""
        return self._stands

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
        """The mirror's newest copy, fetched by all ranks together."""
        copy = None if self.mirror is None else fetch_newest(self.mirror, self.folder, self.world)
        if copy is None:
            return None
        if self.world.is_main:
            _make_whole(copy.path, copy.manifest)
        dist.barrier()
        return Checkpoint(_final(copy.path), copy.manifest)

    def start_mirror(self) -> None:
        """Starts uploading checkpoints without a whole copy to the mirror, in the background. Collective."""
        if self.mirror is not None and self._uploader is None:
            self._uploader = MirrorUploader(self.folder, self.world, self.keep, self.mirror)

    def finish_mirror(self, seconds: float | None = None) -> None:
        """Waits, at most `seconds`, until all whole checkpoints have a copy in the mirror, or a fault is reported."""
        if self._uploader is not None:
            self._uploader.finish(seconds)

    def close(self) -> None:
        """Ends uploads to the mirror at any point. The next `start_mirror`, in any process, resumes them."""
        if self._uploader is not None:
            self._uploader.close()

    def save(self, facts: dict[str, Any], files: Sequence[StateFile]) -> None:
        """Starts saving the ranks' files as a checkpoint. Collective.

        `facts` go into its manifest: ``step``, and the ``metrics`` for `keep`. Returns when the files' tensors may
        change again. A failed save is reported, and earlier checkpoints stand: see `finish`.
        """
        self.finish()
        self.start_mirror()
        partial = self.folder / f".partial-step-{facts['step']:08d}"
        size = sum(of_all_ranks(self.world, sum(file.bytes for file in files)))
        fault = by_rank_0(self.world, lambda: self._begin(partial, size))
        copies = self._host.take(files) if fault is None else []
        self._writing = _Writing(lambda: self._write(partial, facts, copies), fault)

    def finish(self) -> bool:
        """Waits for the current save. Returns, the same on every rank, whether the last one is on disk. Collective."""
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
        """Removes the remains of a kill within the run's last save, if `last` is the newest checkpoint."""
        if self.world.is_main and whole_checkpoints(self.folder)[-1].step == last.step:
            with suppress(OSError):
                self._remove_leftovers()
                retire(self.folder, self.keep)

    def settle(self) -> None:
        """After a failure of the run: waits for the current save, if the other ranks live."""
        if self._writing is not None:
            self._writing.wait(SETTLE_SECONDS)

    def _begin(self, partial: Path, size: int) -> str | None:
        """Rank 0 makes the folder if the disk has space for the whole checkpoint. Returns the fault otherwise."""
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

    def _write(self, partial: Path, facts: dict[str, Any], files: Sequence[StateFile]) -> str | None:
        """This rank's part of a save, in a thread. Rank 0's part completes the checkpoint. Returns the fault."""
        began = time.monotonic()
        written: Written = {}
        fault = None
        try:
            for file in files:
                written[file.path] = file.write(partial)._asdict()
        except Exception as e:  # rank 0 waits for a report, whatever went wrong
            log.exception("a checkpoint's part could not be written")
            fault = f"rank {self.world.rank}: {(isinstance(e, OSError) and e.strerror) or repr(e)}"
        name = _final(partial).name
        if self._uploader is not None:
            self._uploader.wrote(name, sorted(written))
        if not self.world.is_main:
            _report(partial, self.world.rank, written, fault)
            return fault
        try:
            # With a fault here the checkpoint is lost. On a read-only file system the others cannot report either.
            faults, every = ([fault], {}) if fault else _gather(partial, self.world.size, written)
            if not faults:
                _make_whole(partial, facts | {"format_version": FORMAT_VERSION, "files": dict(sorted(every.items()))})
                self._stands = f"{name} stands, whose save took {time.monotonic() - began:.1f} s"
                self._retire()
                return None
        except OSError as e:
            faults = [f"rank 0: {e.strerror or e}"]
        shutil.rmtree(partial, ignore_errors=True)
        return _not_written(self.folder, faults[0])

    def _retire(self) -> None:
        if self._uploader is None:
            retire(self.folder, self.keep)
        else:
            self._uploader.notify()
            self._uploader.retire()


class _Writing:
    """The current save: its thread and its result. Without a thread it is over."""

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
        """Waits for the end. None on success, else the fault."""
        if self._thread is not None:
            self._thread.join(seconds)
        return self._fault


def _report(partial: Path, rank: int, written: Written, fault: str | None) -> None:
    """Writes a rank's report for rank 0 atomically. A full disk still has space for an empty file."""
    done = partial / f"{DONE}{rank:05d}"
    try:
        write_whole(done, json.dumps({"files": written, "fault": fault}))
    except OSError:
        done.touch()


def _gather(partial: Path, ranks: int, written: Written) -> tuple[list[str], Written]:
    """The other ranks' faults, and all files by name, after every rank's report."""
    faults: list[str] = []
    every = dict(written)
    for rank in range(1, ranks):
        done = partial / f"{DONE}{rank:05d}"
        if not _wait(done.exists):
            return [*faults, f"rank {rank} has not written its part"], every
        said = done.read_text(encoding="utf-8")
        no_space: dict[str, Any] = {"files": {}, "fault": f"rank {rank}: its disk is full"}
        reply = json.loads(said) if said else no_space
        every |= reply["files"]
        faults += [reply["fault"]] if reply["fault"] else []
        done.unlink()
    return faults, every


def _final(partial: Path) -> Path:
    return partial.with_name(partial.name.removeprefix(".partial-"))


def _make_whole(partial: Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest, flushes everything, renames the folder, replaces `latest`. Raises OSError."""
    (partial / MANIFEST).write_text(manifest_text(manifest), encoding="utf-8")
    _flush(partial / MANIFEST)
    for parent in {(partial / name).parent for name in manifest["files"]} | {partial}:
        _flush(parent)
    final, folder = _final(partial), partial.parent
    if final.exists():
        # The existing one of the same step is damaged, since the run did not resume from it.
        shutil.rmtree(final)
    partial.rename(final)
    _flush(folder)
    point(folder, final.name)


def point(folder: Path, name: str) -> None:
    """Replaces `latest`. Raises OSError."""
    pointer = folder / ".latest.partial"
    pointer.write_text(name + "\n", encoding="utf-8")
    _flush(pointer)
    pointer.replace(folder / "latest")
    _flush(folder)


def _wait(condition: Callable[[], bool]) -> bool:
    """Waits for another rank. False after `PATIENCE_SECONDS`."""
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(POLL_SECONDS)
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
