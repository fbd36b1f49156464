"""Checkpoint directories that appear whole or not at all.

RUN/checkpoints/step-00001000/ is written under a temporary name by all ranks, every file hashed into its
manifest.json, flushed, and renamed; then the one-line file RUN/checkpoints/latest is replaced. A directory without
the manifest, or with a file of another size, is not a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ibq_scale.distributed.environment import World
from ibq_scale.errors import UserError

FORMAT_VERSION = 1
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


def read_checkpoint(path: Path) -> Checkpoint:
    """Opens a checkpoint directory. UserError where it is not whole or of another format."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is no whole checkpoint: it has no {MANIFEST}") from None
    except json.JSONDecodeError as e:
        raise UserError(f"{path / MANIFEST} is damaged: {e}") from None
    if manifest.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {manifest.get('format_version')}, this program reads {FORMAT_VERSION}"
        )
    return Checkpoint(path, manifest)


def whole_checkpoints(folder: Path) -> list[Checkpoint]:
    """The checkpoints under RUN/checkpoints whose files are all there with their sizes, oldest first."""
    found = []
    for path in sorted(folder.glob("step-*")) if folder.is_dir() else []:
        if not STEP_NAME.fullmatch(path.name):
            continue
        try:
            checkpoint = read_checkpoint(path)
        except UserError:
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


def verify(checkpoint: Checkpoint) -> list[str]:
    """Re-hashes every file; returns one line a fault, none when all is well."""
    faults = []
    for name, info in checkpoint.manifest["files"].items():
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
        """The newest whole checkpoint, the same on every rank (rank 0 looks)."""
        found: list[Any] = [None]
        if self.world.is_main:
            whole = whole_checkpoints(self.folder)
            found = [whole[-1] if whole else None]
        dist.broadcast_object_list(found, src=0, device=self.world.device)
        newest: Checkpoint | None = found[0]
        return newest

    def save(self, facts: dict[str, Any], write: Callable[[Path], None]) -> Path:
        """Collective. `write(directory)` puts this rank's files there; `facts` (with ``step``) go into the manifest."""
        name = f"step-{facts['step']:08d}"
        partial = self.folder / f".partial-{name}"
        if self.world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        write(partial)
        dist.barrier()
        # Files are hashed by turns, so that no rank reads them all: rank r takes every W-th.
        mine = {}
        for path in _files(partial)[self.world.rank :: self.world.size]:
            _flush(path)
            mine[str(path.relative_to(partial))] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        gathered: list[Any] = [None] * self.world.size
        dist.all_gather_object(gathered, mine)
        final = self.folder / name
        if self.world.is_main:
            files = dict(sorted((k, v) for part in gathered for k, v in part.items()))
            self._commit(partial, final, facts | {"format_version": FORMAT_VERSION, "files": files})
        dist.barrier()
        return final

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
