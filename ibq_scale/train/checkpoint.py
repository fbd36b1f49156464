"""Checkpoint directories that appear whole or not at all.

RUN/checkpoints/step-00001000/ is written under a temporary name by all ranks, every file hashed into its
manifest.json, flushed, and renamed; then the one-line file RUN/checkpoints/latest is replaced. A directory without
the manifest, or with a file of another size, is not a checkpoint.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from ibq_scale.console import tell
from ibq_scale.distributed.environment import World
from ibq_scale.errors import UserError
from ibq_scale.train.files import StateFile

log = logging.getLogger(__name__)
T = TypeVar("T")
FORMAT_VERSION = 2
MANIFEST = "manifest.json"
STEP_NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class Checkpoint:
    """One whole checkpoint on disk: its directory and what its manifest says."""

    path: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    @property
    def samples(self) -> int:
        return int(self.manifest["samples"])

    @property
    def bytes(self) -> int:
        return sum(int(f["bytes"]) for f in self.manifest["files"].values())


class NotWholeError(UserError):
    """A directory that has not become a checkpoint, or is one no more."""


def read_checkpoint(path: Path) -> Checkpoint:
    """Opens a checkpoint directory. NotWholeError, or UserError where it is of another format."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except FileNotFoundError:
        raise NotWholeError(f"{path} is no whole checkpoint: it has no {MANIFEST}") from None
    except json.JSONDecodeError as e:
        raise NotWholeError(f"{path / MANIFEST} is damaged: {e}") from None
    if manifest.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {manifest.get('format_version')}, this program reads {FORMAT_VERSION}: go on "
            f"with the program that wrote it, or give another out=…"
        )
    return Checkpoint(path, manifest)


def whole_checkpoints(folder: Path) -> list[Checkpoint]:
    """The checkpoints under RUN/checkpoints whose files are all there with their sizes, oldest first.

    UserError where one is of another format: a run that left it out would begin anew.
    """
    found = []
    for path in sorted(folder.glob("step-*")) if folder.is_dir() else []:
        if not STEP_NAME.fullmatch(path.name):
            continue
        try:
            checkpoint = read_checkpoint(path)
        except NotWholeError:
            continue
        if not any(_size(path / name) != info["bytes"] for name, info in checkpoint.manifest["files"].items()):
            found.append(checkpoint)
    return found


def newest_or_this(path: Path) -> Checkpoint:
    """The checkpoint at `path`, or the newest whole one of the run at `path`. UserError where there is none."""
    if (path / "checkpoints").is_dir():
        whole = whole_checkpoints(path / "checkpoints")
        if not whole:
            raise UserError(f"{path} has no whole checkpoint")
        return whole[-1]
    if not path.is_dir():
        raise UserError(f"{path} does not exist: give a checkpoint or a run directory")
    return read_checkpoint(path)


def verify(checkpoint: Checkpoint, names: Iterable[str] | None = None) -> list[str]:
    """Re-hashes these files, or all; returns one line a fault, none when all is well."""
    faults = []
    files = checkpoint.manifest["files"]
    for name in files if names is None else names:
        info = files[name]
        path = checkpoint.path / name
        if not path.is_file():
            faults.append(f"{name}: missing")
        elif path.stat().st_size != info["bytes"]:
            faults.append(f"{name}: {path.stat().st_size} bytes instead of {info['bytes']}")
        elif file_sha256(path) != info["sha256"]:
            faults.append(f"{name}: content changed (sha256 differs)")
    return faults


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, hex."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


class CheckpointFolder:
    """RUN/checkpoints: saves with all ranks, keeps the newest few."""

    def __init__(self, folder: Path, world: World, keep: int) -> None:
        self.folder = folder
        self.world = world
        self.keep = keep

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint whose every byte is what was written, the same on every rank. Collective.

        The ranks share the hashing. One that is damaged is told, with its faults, and the one before is taken.
        """
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
            names = sorted(checkpoint.manifest["files"])[self.world.rank :: self.world.size]
            faults = [fault for part in self._everyone(verify(checkpoint, names)) for fault in part]
            if not faults:
                return checkpoint
            if self.world.is_main:
                _tell(f"{checkpoint.path} is damaged and left out: {'; '.join(faults)}")
        return None

    def save(self, facts: dict[str, Any], files: Sequence[StateFile]) -> bool:
        """Writes the ranks' files and makes them a checkpoint; `facts` (with ``step``) go into its manifest.

        False, on every rank, where it could not be written: this is told, and the checkpoints before stand. Collective.
        """
        name = f"step-{facts['step']:08d}"
        partial = self.folder / f".partial-{name}"
        if not self._agree(lambda: self._begin(partial, self._sum(file.bytes for file in files))):
            return False
        written: dict[str, dict[str, Any]] = {}

        def write() -> None:
            for file in files:
                file.write(partial)
                path = partial / file.path
                _flush(path)
                written[file.path] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}

        complete = self._agree(write)
        parts = self._everyone(written)

        def commit() -> None:
            if self.world.is_main and complete:
                every = dict(sorted((k, v) for part in parts for k, v in part.items()))
                self._commit(partial, self.folder / name, facts | {"format_version": FORMAT_VERSION, "files": every})

        if complete and self._agree(commit):
            return True
        if self.world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        return False

    def _begin(self, partial: Path, size: int) -> None:
        """Rank 0 makes the folder, where the disk has room for the whole checkpoint."""
        if self.world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            self.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free
            if free < size:
                raise OSError(errno.ENOSPC, f"{size / 2**30:.1f} GiB are needed, {free / 2**30:.1f} are free")
            partial.mkdir()

    def _agree(self, work: Callable[[], None]) -> bool:
        """Does it, and whether all ranks could. What went wrong is told by rank 0."""
        fault = ""
        try:
            work()
        except OSError as e:
            fault = f"rank {self.world.rank}: {e.strerror or e}"
        faults = [told for told in self._everyone(fault) if told]
        if faults and self.world.is_main:
            _tell(f"{self.folder}: THIS CHECKPOINT COULD NOT BE WRITTEN ({faults[0]}); the run goes on without it")
        return not faults

    def _everyone(self, mine: T) -> list[T]:
        gathered: list[Any] = [None] * self.world.size
        dist.all_gather_object(gathered, mine)
        return gathered

    def _sum(self, numbers: Iterable[int]) -> int:
        return sum(self._everyone(sum(numbers)))

    def _commit(self, partial: Path, final: Path, manifest: dict[str, Any]) -> None:
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
        _flush(partial / MANIFEST)
        for folder in {p.parent for p in _files(partial)} | {partial}:
            _flush(folder)
        if final.exists():
            # The same step saved again (a resumed run that stopped at once): the old one is whole until this moment.
            shutil.rmtree(final)
        partial.rename(final)
        _flush(self.folder)
        pointer = self.folder / ".latest.partial"
        pointer.write_text(final.name + "\n")
        _flush(pointer)
        pointer.replace(self.folder / "latest")
        _flush(self.folder)
        self._retire()

    def _retire(self) -> None:
        for old in whole_checkpoints(self.folder)[: -self.keep]:
            # Without its manifest it is no checkpoint any more, so a crash inside rmtree leaves nothing half-true.
            (old.path / MANIFEST).unlink()
            shutil.rmtree(old.path, ignore_errors=True)


def _tell(message: str) -> None:
    log.error("%s", message)
    tell(message)


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def _flush(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1
