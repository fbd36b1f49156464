"""Checkpoints come to be beside the training, and appear whole or not at all.

A save stops the ranks for a copy of their state to host memory; a thread of each rank then writes, flushes and hashes
its files under RUN/checkpoints/.partial-step-00001000, and says in a small file there that it is done, or why not. Rank
0's thread waits for all of them, writes the manifest, renames the folder and replaces `latest`. No collective takes
part, so training's own are not disturbed. One save is under way at a time: the next waits for it.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist

from ibq_scale.checkpoint.files import HostCopies, StateFile, write_whole
from ibq_scale.checkpoint.mirror import Mirror
from ibq_scale.checkpoint.reading import (
    FORMAT_VERSION,
    MANIFEST,
    Checkpoint,
    verify,
    whole_checkpoints,
)
from ibq_scale.config.run import TrainConfig
from ibq_scale.console import tell
from ibq_scale.distributed.environment import World
from ibq_scale.errors import UserError

T = TypeVar("T")
# How often rank 0 looks whether the others are done, and for how long after it is done itself.
LOOK_SECONDS, PATIENCE_SECONDS = 0.1, 3600.0
SETTLE_SECONDS = 60.0
DONE = ".done-rank-"

log = logging.getLogger(__name__)


class Retention(NamedTuple):
    """Which checkpoints stay: the `newest`, those of `every` so many steps, the one with the `best` metric."""

    newest: int
    every: int = 0
    best: str | None = None

    @staticmethod
    def of(train: TrainConfig) -> Retention:
        return Retention(train.keep_checkpoints, train.keep_every, train.keep_best)

    def retired(self, whole: Sequence[Checkpoint]) -> list[Checkpoint]:
        """Those of `whole`, oldest first, that go."""
        kept = {c.step for c in whole[-self.newest :]}
        kept |= {c.step for c in whole if self.every and c.step % self.every == 0}
        if self.best is not None:
            name, sign = self.best.removeprefix("-"), -1.0 if self.best.startswith("-") else 1.0
            judged = [
                (sign * c.manifest["metrics"][name], c.step) for c in whole if name in c.manifest.get("metrics", {})
            ]
            kept |= {min(judged)[1]} if judged else set()
        return [c for c in whole if c.step not in kept]


class CheckpointFolder:
    """RUN/checkpoints: saves with all ranks, keeps what `keep` says. The run holds its lock."""

    def __init__(self, folder: Path, world: World, keep: Retention, mirror: Mirror | None = None) -> None:
        self.folder = folder
        self.world = world
        self.keep = keep
        self.mirror = mirror
        self._host = HostCopies()
        self._writing: _Writing | None = None

    def newest(self, check_hashes: bool = True) -> Checkpoint | None:
        """The newest checkpoint whose every byte is what was written, the same on every rank. Collective.

        The ranks share the hashing. One that is damaged is told, with its faults, and the one before is taken. Where
        there is none, the mirror's newest is fetched. Without `check_hashes` the sizes have to do.
        """
        return self._newest_here(check_hashes) or self._fetch()

    def _newest_here(self, check_hashes: bool) -> Checkpoint | None:
        found: list[Any] = [None]
        if self.world.is_main:
            try:
                found = [whole_checkpoints(self.folder)]
            except UserError as e:
                found = [e]
        dist.broadcast_object_list(found, src=0, device=self.world.device)
        if isinstance(found[0], UserError):
            raise found[0]
        whole: list[Checkpoint] = found[0]
        for checkpoint in reversed(whole):
            names = sorted(checkpoint.manifest["files"])[self.world.rank :: self.world.size] if check_hashes else []
            faults = [fault for part in self._everyone(verify(checkpoint, names)) for fault in part]
            if not faults:
                return checkpoint
            if self.world.is_main:
                _tell(f"{checkpoint.path} is damaged and left out: {'; '.join(faults)}")
        return None

    def _fetch(self) -> Checkpoint | None:
        """The mirror's newest, brought here by all ranks together."""
        if self.mirror is None:
            return None
        found: list[Any] = [self.mirror.newest() if self.world.is_main else None]
        dist.broadcast_object_list(found, src=0, device=self.world.device)
        if found[0] is None:
            return None
        copy = self.mirror.manifest(found[0])
        partial = self.folder / f".partial-{found[0]}"
        if self.world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            _tell(f"{self.folder} has no checkpoint: fetching {found[0]} from {self.mirror.store.url}")
        dist.barrier()
        self.mirror.fetch(copy, sorted(copy.manifest["files"])[self.world.rank :: self.world.size], partial)
        dist.barrier()
        if self.world.is_main:
            _make_whole(partial, copy.manifest)
        dist.barrier()
        return self._newest_here(check_hashes=True)

    def save(self, facts: dict[str, Any], files: Sequence[StateFile]) -> None:
        """Begins to make the ranks' files a checkpoint; `facts` (with ``step``, and the ``metrics`` that
        `keep` may ask for) go into its manifest. Collective.

        Returns when the files' tensors may change again. Where it cannot be written, this is told, and the checkpoints
        before stand: see `finish`.
        """
        self.finish()
        partial = self.folder / f".partial-step-{facts['step']:08d}"
        size = sum(self._everyone(sum(file.bytes for file in files)))
        fault: list[Any] = [self._begin(partial, size) if self.world.is_main else None]
        dist.broadcast_object_list(fault, src=0, device=self.world.device)
        write = _Share(self, partial, facts, self._host.take(files) if fault[0] is None else [])
        self._writing = _Writing(write, fault[0])

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

    def settle(self) -> None:
        """At the end of a run that failed: lets the save under way come to its end, where the other ranks live."""
        if self._writing is not None:
            self._writing.wait(SETTLE_SECONDS)

    def _begin(self, partial: Path, size: int) -> str | None:
        """Rank 0 makes the folder, where the disk has room for the whole checkpoint; else what is wrong."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob(".partial-*"):
                shutil.rmtree(leftover, ignore_errors=True)
            free = shutil.disk_usage(self.folder).free
            if free < size:
                raise OSError(errno.ENOSPC, f"{size / 2**30:.1f} GiB are needed, {free / 2**30:.1f} are free")
            partial.mkdir()
        except OSError as e:
            return _not_written(self.folder, e.strerror or str(e))
        return None

    def _everyone(self, mine: T) -> list[T]:
        gathered: list[Any] = [None] * self.world.size
        dist.all_gather_object(gathered, mine)
        return gathered


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
        self.mirror = checkpoints.mirror
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
        if not self.world.is_main:
            self._say(written, fault)
            if fault is None:
                self._copy(sorted(written))
            return fault
        try:
            faults, every = self._gather(written, fault)
            if not faults:
                self._commit(every)
                self._copy(sorted(written))
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
        faults = [fault] if fault else []
        every = dict(written)
        for rank in range(1, self.world.size):
            done = self.partial / f"{DONE}{rank:05d}"
            if not _wait(done.exists):
                return [*faults, f"rank {rank} has not written its part"], every
            said = done.read_text()
            word: dict[str, Any] = (
                json.loads(said) if said else {"files": {}, "fault": f"rank {rank}: its disk is full"}
            )
            every |= word["files"]
            faults += [word["fault"]] if word["fault"] else []
            done.unlink()
        return faults, every

    def _commit(self, files: dict[str, dict[str, Any]]) -> None:
        if self.mirror is not None:
            self._words.mkdir(exist_ok=True)
        manifest = self.facts | {"format_version": FORMAT_VERSION, "files": dict(sorted(files.items()))}
        _make_whole(self.partial, manifest)
        self._retire()

    @property
    def _words(self) -> Path:
        """Where ranks leave word of what they have sent to the mirror."""
        return self.folder / f".mirror-{_final(self.partial).name}"

    def _copy(self, names: list[str]) -> None:
        """Sends this rank's files to the mirror once the checkpoint is whole; rank 0 seals. A fault is told only."""
        if self.mirror is None:
            return
        final = _final(self.partial)
        # Rank 0 either makes it whole or takes it away.
        if not _wait(lambda: not self.partial.exists()) or not final.exists():
            return
        fault = ""
        try:
            self.mirror.put(final, names)
        except (UserError, OSError) as e:
            fault = f"rank {self.world.rank}: {e}"
        if not self.world.is_main:
            write_whole(self._words / f"rank-{self.world.rank:05d}", fault)
            return
        faults = [fault] if fault else []
        for rank in range(1, self.world.size):
            word = self._words / f"rank-{rank:05d}"
            said = word.read_text() if _wait(word.exists) else f"rank {rank} has not sent its part"
            faults += [said] if said else []
        shutil.rmtree(self._words, ignore_errors=True)
        try:
            if not faults:
                self.mirror.seal(final)
                return
        except (UserError, OSError) as e:
            faults = [f"rank 0: {e}"]
        _tell(f"{self.mirror.store.url}: {final.name} COULD NOT BE COPIED THERE ({faults[0]}); it is whole here")

    def _retire(self) -> None:
        for old in self.keep.retired(whole_checkpoints(self.folder)):
            # Without its manifest it is no checkpoint any more, so a crash inside rmtree leaves nothing half-true.
            (old.path / MANIFEST).unlink()
            shutil.rmtree(old.path, ignore_errors=True)


def _final(partial: Path) -> Path:
    """Where a checkpoint goes when it is whole."""
    return partial.with_name(partial.name.removeprefix(".partial-"))


def _make_whole(partial: Path, manifest: dict[str, Any]) -> None:
    """The manifest, everything flushed, the folder's name, `latest`: in this order. Raises OSError."""
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
    _flush(partial / MANIFEST)
    for parent in {(partial / name).parent for name in manifest["files"]} | {partial}:
        _flush(parent)
    final, folder = _final(partial), partial.parent
    if final.exists():
        # The same step once more: the one that is there was damaged, or the run would have gone on from it.
        shutil.rmtree(final)
    partial.rename(final)
    _flush(folder)
    pointer = folder / ".latest.partial"
    pointer.write_text(final.name + "\n")
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
