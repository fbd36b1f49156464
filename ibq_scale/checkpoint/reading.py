"""Reads checkpoint directories. A checkpoint is whole or does not count. saving.py writes them.

RUN/checkpoints/step-00001000/ holds the ranks' files and manifest.json with the sha256 of each. The one-line file
RUN/checkpoints/latest names the newest. A directory without a manifest, or with a file of another size, is not a
checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ibq_scale.documents import DocumentError, parse_json, read_text
from ibq_scale.errors import UserError
from ibq_scale.names import file_name, is_inside, is_sha256

FORMAT_VERSION = 3
# Version 2 differs only by an additional full copy of the model for inference.
READ_VERSIONS = (2, FORMAT_VERSION)
MANIFEST = "manifest.json"
OWN_SHA256 = "manifest_sha256"
HASHING_THREADS = 8
STEP_NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class Checkpoint:
    """One whole checkpoint on disk: its directory and manifest."""

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
    """An incomplete or damaged checkpoint directory."""


class OtherFormatError(UserError):
    """A checkpoint of another version of this program."""


def read_checkpoint(path: Path) -> Checkpoint:
    """Opens a checkpoint directory. NotWholeError, or OtherFormatError."""
    try:
        text = read_text(path / MANIFEST)
    except FileNotFoundError:
        raise NotWholeError(f"{path} is no whole checkpoint: it has no {MANIFEST}") from None
    except (DocumentError, OSError) as e:
        raise NotWholeError(f"{path / MANIFEST} is damaged: {e}") from None
    return parse_manifest(text, path)


def parse_manifest(text: str, path: Path) -> Checkpoint:
    """The checkpoint at `path` with this manifest. Raises as `read_checkpoint`."""
    try:
        manifest = parse_json(text)
    except DocumentError as e:
        raise NotWholeError(f"{path / MANIFEST} is damaged: {e}") from None
    if not isinstance(manifest, dict):
        raise NotWholeError(f"{path / MANIFEST} is damaged: it is no JSON object")
    sha256 = manifest.pop(OWN_SHA256, None)
    if sha256 is not None and sha256 != _content_sha256(manifest):
        raise NotWholeError(f"{path / MANIFEST} is damaged: its sha256 differs from the one in it")
    if manifest.get("format_version") not in READ_VERSIONS:
        raise OtherFormatError(
            f"{path} has format version {manifest.get('format_version')}, this program reads "
            f"{' and '.join(map(str, READ_VERSIONS))}: go on with the program that wrote it, or give another out=…"
        )
    if fault := _manifest_fault(manifest):
        raise NotWholeError(f"{path / MANIFEST} is damaged: {fault}")
    return Checkpoint(path, manifest)


def _manifest_fault(manifest: dict[str, Any]) -> str | None:
    """The fault of a manifest, None if it is valid. Names become paths, so each is checked."""
    files = manifest.get("files")
    if not isinstance(manifest.get("step"), int) or not isinstance(files, dict):
        return "it has no step, or no files"
    for name, info in files.items():
        try:
            file_name(name)
        except ValueError as e:
            return str(e)
        size = info.get("bytes") if isinstance(info, dict) else None
        if not isinstance(size, int) or size < 0 or not is_sha256(info.get("sha256")):
            return f"{name} has no size or no sha256"
    return None


def manifest_text(manifest: dict[str, Any]) -> str:
    """The text of a manifest, with its own hash, for `parse_manifest`."""
    return json.dumps(manifest | {OWN_SHA256: _content_sha256(manifest)}, indent=1)


def _content_sha256(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def whole_checkpoints(folder: Path) -> list[Checkpoint]:
    """The checkpoints under RUN/checkpoints with all files in their sizes, oldest first.

    UserError for another format, since a run that skipped it would start afresh.
    """
    return examine(folder)[0]


def examine(folder: Path) -> tuple[list[Checkpoint], list[str]]:
    """`whole_checkpoints`, and one line with the fault of each other one. Raises as `whole_checkpoints`."""
    paths = sorted(folder.glob("step-*")) if folder.is_dir() else []
    found = [_whole_or_fault(path) for path in paths if STEP_NAME.fullmatch(path.name) and path.is_dir()]
    return [f for f in found if isinstance(f, Checkpoint)], [f for f in found if isinstance(f, str)]


def _whole_or_fault(path: Path) -> Checkpoint | str:
    try:
        checkpoint = read_checkpoint(path)
    except NotWholeError as e:
        return str(e)
    files = checkpoint.manifest["files"]
    wrong = [n for n, info in files.items() if not is_inside(path, n) or _size(path / n) != info["bytes"]]
    return f"{path} is no whole checkpoint: {'; '.join(verify(checkpoint, wrong))}" if wrong else checkpoint


def newest_or_this(path: Path) -> Checkpoint:
    """The checkpoint at `path`, or the newest whole one of the run at `path`. UserError if there is none."""
    if (path / "checkpoints").is_dir():
        whole = whole_checkpoints(path / "checkpoints")
        if not whole:
            raise UserError(f"{path} has no whole checkpoint")
        return whole[-1]
    if not path.is_dir():
        raise UserError(f"{path} does not exist: give a checkpoint or a run directory")
    return read_checkpoint(path)


def verify(checkpoint: Checkpoint, names: Iterable[str] | None = None) -> list[str]:
    """Hashes these files (default: all), several at once. Returns one line per fault."""
    files = checkpoint.manifest["files"]
    chosen = list(files if names is None else names)
    with ThreadPoolExecutor(min(HASHING_THREADS, len(os.sched_getaffinity(0)))) as threads:
        faults = list(threads.map(lambda name: _fault(checkpoint.path, name, files[name]), chosen))
    return [f"{name}: {fault}" for name, fault in zip(chosen, faults, strict=True) if fault]


def _fault(folder: Path, name: str, info: dict[str, Any]) -> str | None:
    path = folder / name
    if not is_inside(folder, name):
        return "leads out of the checkpoint"
    if not path.is_file():
        return "missing"
    if path.stat().st_size != info["bytes"]:
        return f"{path.stat().st_size} bytes instead of {info['bytes']}"
    return None if file_sha256(path) == info["sha256"] else "content changed (sha256 differs)"


def file_sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1
