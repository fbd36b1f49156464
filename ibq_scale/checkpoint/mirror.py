"""Copies of checkpoints in another place, object storage as a rule, from which a bare node can go on.

The manifest of a copy comes last and goes first, so a copy without one does not count there either. How the ranks share
the sending: copying.py; the fetching: fetching.py.
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
    """What is in the mirror under names of checkpoints."""

    files: Mapping[str, Mapping[str, int]]
    """By checkpoint, the bytes of its files, by their names in it."""
    sealed: list[str]
    """Checkpoints with a manifest, oldest first."""

    def faults(self, copy: Checkpoint) -> list[str]:
        """One line for each file that is missing or of another size; none where the copy is whole."""
        found = self.files.get(copy.path.name, {})
        return [
            f"{name}: missing" if name not in found else f"{name}: {found[name]} bytes instead of {info['bytes']}"
            for name, info in copy.manifest["files"].items()
            if found.get(name) != info["bytes"]
        ]


class Mirror:
    """The folder or ``s3://bucket/prefix`` of one run's copies, with the checkpoints' own names in it.

    Every method raises UserError where the store refuses, or does not answer for long.
    """

    def __init__(self, url: str) -> None:
        self.store = open_store(url)
        self._manifests: dict[str, Checkpoint] = {}

    @staticmethod
    def of(url: str | None) -> Mirror | None:
        return None if url is None else Mirror(url)

    def put(self, checkpoint: Path, names: Iterable[str]) -> None:
        """Sends files of a checkpoint, but no byte that is there already. OSError where one is not here."""
        for name in names:
            self.store.upload_resumable(checkpoint / name, f"{checkpoint.name}/{name}")

    def seal(self, checkpoint: Checkpoint) -> None:
        """Sends the manifest, when every file is there."""
        name = checkpoint.path.name
        self.store.upload(checkpoint.path / MANIFEST, f"{name}/{MANIFEST}")
        self._manifests[name] = Checkpoint(Path(name), checkpoint.manifest)

    def unseal(self, name: str) -> None:
        """Before its files change, or go."""
        self._manifests.pop(name, None)
        self.store.delete([f"{name}/{MANIFEST}"])

    def copies(self) -> Copies:
        """What is there now."""
        files: dict[str, dict[str, int]] = {}
        try:
            found = self.store.files()
        except FileNotFoundError:
            found = {}
        for path, size in found.items():
            name, separator, rest = path.partition("/")
            # Of a folder on a file system, what lies behind a link is no copy of ours: it could be removed with one.
            inside = not isinstance(self.store, LocalStore) or is_inside(self.store.root, path)
            if separator and STEP_NAME.fullmatch(name) and inside:
                files.setdefault(name, {})[rest] = size
        return Copies(files, sorted(name for name in files if MANIFEST in files[name]))

    def manifest(self, name: str) -> Checkpoint:
        """What a sealed copy's manifest says; its path is `name`. Raises as `read_checkpoint`."""
        if name not in self._manifests:
            text = self.store.read(f"{name}/{MANIFEST}").decode(errors="replace")
            self._manifests[name] = parse_manifest(text, Path(name))
        return self._manifests[name]

    def whole(self, copies: Copies) -> list[Checkpoint]:
        """The copies that a run can go on from, oldest first."""
        readable = [self.manifest(name) for name in copies.sealed if self._readable(name)]
        return [copy for copy in readable if not copies.faults(copy)]

    def holds(self, checkpoint: Checkpoint, copies: Copies) -> bool:
        """Whether this very checkpoint, not just one of the same step, has a whole copy."""
        return any(copy.manifest == checkpoint.manifest for copy in self.whole(copies))

    def wants(self, checkpoint: Checkpoint, copies: Copies, keep: Retention) -> bool:
        """Whether a copy would stay."""
        others = [copy for copy in self.whole(copies) if copy.step != checkpoint.step]
        return checkpoint not in keep.retired(sorted([*others, checkpoint], key=lambda c: c.step))

    def tidy(self, keep: Retention, pending: Iterable[str]) -> None:
        """Removes the copies that `keep` lets go, and what never became one and never will.

        That is copies that are not whole and older than the newest that is, and uploads that nobody goes on with; but
        nothing of the checkpoints `pending`, nothing without a checkpoint's name, no copy with a manifest that is not
        understood, and never the newest whole copy.
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
        """Brings files of a copy to `into`, each checked by its hash; one that is right there already is left.

        Returns one line for each that is not what was sent. Raises OSError where it cannot be written here.
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
    """The files of a manifest, dealt out so that each rank has about as many bytes."""
    dealt: list[list[str]] = [[] for _ in range(ranks)]
    loads = [(0, rank) for rank in range(ranks)]
    for name in sorted(files, key=lambda name: (-int(files[name]["bytes"]), name)):
        load, rank = heapq.heappop(loads)
        dealt[rank].append(name)
        heapq.heappush(loads, (load + int(files[name]["bytes"]), rank))
    return dealt


def _is(path: Path, info: Mapping[str, Any]) -> bool:
    return path.is_file() and path.stat().st_size == info["bytes"] and file_sha256(path) == info["sha256"]
