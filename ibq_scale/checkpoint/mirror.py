"""Copies of checkpoints in a second place, usually object storage, from which an empty run directory resumes.

The manifest of a copy is written last and removed first, so a copy without one does not count. mirror_uploader.py
shares the upload out over ranks, fetching.py the download.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ibq_scale.checkpoint.reading import (
    MANIFEST,
    STEP_NAME,
    Checkpoint,
    NotWholeError,
    OtherFormatError,
    file_sha256,
    parse_manifest,
)
from ibq_scale.checkpoint.retention import Retention
from ibq_scale.data.folder import LocalStore
from ibq_scale.data.store import open_store
from ibq_scale.names import is_inside


class Copies(NamedTuple):
    """The mirror's files under names of checkpoints."""

    files: Mapping[str, Mapping[str, int]]
    """By checkpoint and file name, the size in bytes."""
    sealed: list[str]
    """Checkpoints with a manifest, oldest first."""

    def faults(self, copy: Checkpoint) -> list[str]:
        """One line for each file missing or of another size, none for a whole copy."""
        found = self.files.get(copy.path.name, {})
        return [
            f"{name}: missing" if name not in found else f"{name}: {found[name]} bytes instead of {info['bytes']}"
            for name, info in copy.manifest["files"].items()
            if found.get(name) != info["bytes"]
        ]


class Mirror:
    """The folder or ``s3://bucket/prefix`` of one run's copies, named as the checkpoints.

    Every method raises UserError if the store refuses, or does not answer for long.
    """

    def __init__(self, url: str) -> None:
        self.store = open_store(url)
        self._manifests: dict[str, Checkpoint] = {}

    @staticmethod
    def of(url: str | None) -> Mirror | None:
        return None if url is None else Mirror(url)

    def put(self, checkpoint: Path, names: Iterable[str]) -> None:
        """Uploads files of a checkpoint, except bytes already there. OSError if a local file is missing."""
        for name in names:
            self.store.upload_resumable(checkpoint / name, f"{checkpoint.name}/{name}")

    def seal(self, checkpoint: Checkpoint) -> None:
        """Uploads the manifest, once every file is there."""
        name = checkpoint.path.name
        self.store.upload(checkpoint.path / MANIFEST, f"{name}/{MANIFEST}")
        self._manifests[name] = Checkpoint(Path(name), checkpoint.manifest)

    def unseal(self, name: str) -> None:
        """Removes the manifest, before files of the copy change or are removed."""
        self._manifests.pop(name, None)
        self.store.delete([f"{name}/{MANIFEST}"])

    def copies(self) -> Copies:
        files: dict[str, dict[str, int]] = {}
        try:
            found = self.store.files()
        except FileNotFoundError:
            found = {}
        for path, size in found.items():
            name, separator, rest = path.partition("/")
            # In a local folder a linked directory is no copy of this run, and must not be removed as one.
            inside = not isinstance(self.store, LocalStore) or is_inside(self.store.root, path)
            if separator and STEP_NAME.fullmatch(name) and inside:
                files.setdefault(name, {})[rest] = size
        return Copies(files, sorted(name for name in files if MANIFEST in files[name]))

    def manifest(self, name: str) -> Checkpoint:
        """The manifest of a complete copy, with the path `name`. Raises as `read_checkpoint`."""
        if name not in self._manifests:
            text = self.store.read(f"{name}/{MANIFEST}").decode(errors="replace")
            self._manifests[name] = parse_manifest(text, Path(name))
        return self._manifests[name]

    def whole(self, copies: Copies) -> list[Checkpoint]:
        """The whole copies, oldest first."""
        readable = [self.manifest(name) for name in copies.sealed if self._readable(name)]
        return [copy for copy in readable if not copies.faults(copy)]

    def holds(self, checkpoint: Checkpoint, copies: Copies) -> bool:
        """Whether this checkpoint (not another one of the same step) has a whole copy."""
        return any(copy.manifest == checkpoint.manifest for copy in self.whole(copies))

    def wants(self, checkpoint: Checkpoint, copies: Copies, keep: Retention) -> bool:
        """Whether retention would keep a copy."""
        others = [copy for copy in self.whole(copies) if copy.step != checkpoint.step]
        return checkpoint not in keep.retired(sorted([*others, checkpoint], key=lambda c: c.step))

    def tidy(self, keep: Retention, pending: Iterable[str]) -> None:
        """Removes copies retired by `keep`, incomplete copies older than the newest whole one, and orphaned uploads.

        Not removed: files of the checkpoints `pending`, anything without a checkpoint's name, copies with an unknown
        manifest, and the newest whole copy.
        """
        copies, pending = self.copies(), set(pending)
        for upload in self.store.unfinished():
            name, separator, _ = upload.path.partition("/")
            if separator and STEP_NAME.fullmatch(name) and name not in pending:
                self.store.abort(upload)
        whole = self.whole(copies)
        if not whole:
            return
        names, newest = {copy.path.name for copy in whole}, whole[-1].path.name
        strange = {name for name in copies.sealed if not self._readable(name)}
        broken = {name for name in copies.files if name < newest} - names - strange
        retired = {copy.path.name for copy in keep.retired(whole)} - {newest}
        for name in sorted((broken | retired) - pending):
            self.unseal(name)
            self.store.delete(f"{name}/{file}" for file in copies.files[name] if file != MANIFEST)

    def _readable(self, name: str) -> bool:
        try:
            self.manifest(name)
        except (FileNotFoundError, NotWholeError, OtherFormatError):
            return False
        return True

    def fetch(self, copy: Checkpoint, names: Iterable[str], into: Path) -> list[str]:
        """Fetches files of a copy to `into` and verifies their hashes. Existing files with the right hash are kept.

        Returns one line for each damaged file. Raises OSError for local write errors.
        """
        faults = []
        for name in names:
            target, info = into / name, copy.manifest["files"][name]
            if not is_inside(into, name):
                faults.append(f"{name}: leads out of the checkpoint")
                continue
            if _is(target, info):
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                self.store.download(f"{copy.path}/{name}", target)
            except FileNotFoundError:
                faults.append(f"{name}: missing")
                continue
            if not _is(target, info):
                faults.append(f"{name}: content changed (sha256 differs)")
        return faults


def shares(files: Mapping[str, Mapping[str, Any]], ranks: int) -> list[list[str]]:
    """The files of a manifest by rank, with about the same number of bytes each."""
    dealt: list[list[str]] = [[] for _ in range(ranks)]
    loads = [(0, rank) for rank in range(ranks)]
    for name in sorted(files, key=lambda name: (-int(files[name]["bytes"]), name)):
        load, rank = heapq.heappop(loads)
        dealt[rank].append(name)
        heapq.heappush(loads, (load + int(files[name]["bytes"]), rank))
    return dealt


def _is(path: Path, info: Mapping[str, Any]) -> bool:
    return path.is_file() and path.stat().st_size == info["bytes"] and file_sha256(path) == info["sha256"]
