"""Shards on local disk under their content's hash: downloaded once a node, verified, evicted by age.

```
SHA256                  a whole, verified shard; its time is that of its last promise to a reader
SHA256.NAME.table       its index as one data set has it (NAME: hash of URL and content), binary; goes with the shard
….partial               being written by whoever holds its lock, and is as large as it will be; unlocked, a leftover
lock                    held while room is made; the bytes of all files, counted anew only for want of room
```

Every file appears whole, by a rename. The kernel drops the locks of a killed process, so nobody waits for the dead, and
the next to make room removes what they left. Files that the cache did not write are neither counted nor touched.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import BinaryIO

from ibq_scale.data.folder import Store
from ibq_scale.data.manifest import ShardInfo
from ibq_scale.errors import UserError

log = logging.getLogger(__name__)
# Earlier versions kept ….index, as JSON.
_NAME = re.compile(r"([0-9a-f]{64})(\.[0-9a-f]{16}\.(?:table|index))?(\.partial)?")
# Two downloads of a shard within this time mean a cache too small. Shards used within it are evicted only at need.
RECENT_SECONDS = 60.0
# Part of the limit to free at once.
SPARE = 16


class ShardCache:
    """Files in `folder`, shared by the ranks and runs of a node, at most `limit` bytes.

    More than `limit` only while several processes download at once what it cannot hold together. Where it is less than
    the shards in use, they are downloaded again and again, with a warning: slow, but the same bytes.
    """

    def __init__(self, folder: Path, limit: int, store: Store) -> None:
        self.folder = folder
        self.limit = limit
        self.store = store
        self._warned = False
        self._came: dict[str, float] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with self._lock():
                self._sweep()
        except OSError as e:
            raise UserError(f"cannot use {folder} as a cache ({e.strerror}): correct data.cache_dir") from None

    def path(self, shard: ShardInfo) -> Path:
        """Where the shard is, or will be."""
        return self.folder / shard.sha256

    def has(self, shard: ShardInfo) -> bool:
        """Whether the whole shard is there now."""
        try:
            return self.path(shard).stat().st_size == shard.bytes
        except FileNotFoundError:
            return False

    def touch(self, shard: ShardInfo) -> bool:
        """As `has`. Marks the shard as used, for eviction."""
        with suppress(FileNotFoundError):
            if self.has(shard):
                os.utime(self.path(shard))
                return True
        return False

    def fetch(self, shard: ShardInfo) -> None:
        """Makes sure that the whole, verified shard is there, and makes it the last to be evicted.

        UserError where it is missing or its content has changed, or where the limit or the disk does not hold it.
        """
        with self._open(shard) as f:
            os.utime(f.fileno())

    def read_range(self, shard: ShardInfo, start: int, stop: int) -> bytes:
        """Bytes start … stop − 1, fewer where the shard ends before. Raises as `fetch`, which it calls at need."""
        with self._open(shard) as f:
            return os.pread(f.fileno(), stop - start, start)

    def read(self, shard: ShardInfo) -> bytes:
        """The whole shard. Raises as `fetch`, which it calls at need."""
        with self._open(shard) as f:
            return f.read()

    def map(self, shard: ShardInfo) -> mmap:
        """As `read`, in memory shared by all processes of the node. It outlives the file."""
        with self._open(shard) as f:
            return mmap(f.fileno(), 0, access=ACCESS_READ)

    def table(self, shard: ShardInfo, index: str, convert: Callable[[bytes], bytes]) -> mmap:
        """The store's file `index` as changed by `convert`. Kept beside the shard, in memory as `map`.

        UserError where the file is missing, or from `convert`.
        """
        what = hashlib.sha256(f"{self.store.url}/{index} {shard.index_sha256}".encode()).hexdigest()
        local = self.folder / f"{shard.sha256}.{what[:16]}.table"
        while True:
            with suppress(FileNotFoundError), local.open("rb") as f:
                return mmap(f.fileno(), 0, access=ACCESS_READ)
            try:
                data = convert(self.store.read(index))
            except FileNotFoundError:
                raise UserError(f"{self.store.url}/{index} is missing: prepare again") from None
            with self._claim(local) as claimed:
                if claimed is not None:
                    claimed.write(data)
                    claimed.flush()
                    os.fsync(claimed.fileno())
                    _partial(local).replace(local)
                    with self._lock() as held:
                        held.add(len(data))

    def _open(self, shard: ShardInfo) -> BinaryIO:
        """An open file outlives its eviction, so a reader that has one cannot lose the race against others' room."""
        path = self.path(shard)
        while True:
            try:
                file = path.open("rb")
            except FileNotFoundError:
                pass
            else:
                if os.fstat(file.fileno()).st_size == shard.bytes:
                    return file
                file.close()
                path.unlink(missing_ok=True)
            with self._claim(path) as claimed:
                if claimed is not None:
                    return self._download(shard, claimed)

    def _download(self, shard: ShardInfo, claimed: BinaryIO) -> BinaryIO:
        self._warn_where_again(shard)
        self._make_room(shard, claimed)
        path = self.path(shard)
        for attempt in (1, 2):
            try:
                self.store.download(shard.name, _partial(path))
            except FileNotFoundError:
                raise UserError(f"{self.store.url}/{shard.name} is missing, though the manifest names it") from None
            file = _partial(path).open("rb")
            same = hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256
            if same and os.fstat(file.fileno()).st_size == shard.bytes:
                _partial(path).replace(path)
                file.seek(0)
                return file
            file.close()
            log.warning("%s/%s is not what the manifest says (attempt %d)", self.store.url, shard.name, attempt)
        raise UserError(f"{self.store.url}/{shard.name} is not what the manifest says (sha256 differs): prepare again")

    def _make_room(self, shard: ShardInfo, claimed: BinaryIO) -> None:
        """Evicts the shards that were promised the longest ago, and takes the room at once, for others to see."""
        if shard.bytes > self.limit:
            name = f"{self.store.url}/{shard.name}"
            raise UserError(f"data.cache_bytes={self.limit} does not hold {name} of {shard.bytes} bytes: raise it")
        with self._lock() as held:
            if held.bytes is None or held.bytes + shard.bytes > self.limit:
                held.bytes = self._evict(shard.bytes)
            held.add(shard.bytes)
            os.ftruncate(claimed.fileno(), shard.bytes)

    def _evict(self, needed: int) -> int:
        """Removes files until `needed` bytes fit, and some more old ones, so not every download lists the folder.

        Returns the bytes left.
        """
        self._sweep()
        groups: dict[str, list[tuple[Path, os.stat_result]]] = {}
        for path, sha256 in self._files():
            with suppress(FileNotFoundError):  # A partial that has just become its shard.
                status = path.stat()
                groups.setdefault(sha256, []).append((path, status))
        total = sum(status.st_size for files in groups.values() for _, status in files)
        # An index may come before its shard, but nothing goes while the shard comes.
        idle = [files for files in groups.values() if not any(path.suffix == ".partial" for path, _ in files)]
        last_use = [(max(status.st_mtime for _, status in files), files) for files in idle]
        now = time.time()
        for used, files in sorted(last_use, key=lambda group: group[0]):
            recent = now - used < RECENT_SECONDS
            if total + needed <= (self.limit if recent else self.limit - self.limit // SPARE):
                break
            for path, status in files:
                path.unlink(missing_ok=True)
                total -= status.st_size
        return total

    def _warn_where_again(self, shard: ShardInfo) -> None:
        """Where this process had the shard a short time ago."""
        now = time.time()
        self._came = {sha256: came for sha256, came in self._came.items() if now - came < RECENT_SECONDS}
        again = shard.sha256 in self._came
        self._came[shard.sha256] = now
        if again and not self._warned:
            self._warned = True
            log.warning(
                "data.cache_bytes=%d is less than the shards in use: they will be downloaded again and again (%s)",
                self.limit,
                self.folder,
            )

    def _sweep(self) -> None:
        """Removes what killed processes left."""
        for path, _ in self._files():
            if path.suffix == ".partial":
                _remove_leftover(path)

    def _files(self) -> Iterator[tuple[Path, str]]:
        """The cache's own files, and the hash of the shard each belongs to."""
        for path in sorted(self.folder.iterdir()):
            match = _NAME.fullmatch(path.name)
            if match is not None:
                yield path, match[1]

    @contextmanager
    def _claim(self, path: Path) -> Iterator[BinaryIO | None]:
        """The empty partial of `path`, locked, to be filled and renamed; None where another has just done so.

        Waits for whoever else fills it. What is not renamed by the end is removed.
        """
        partial = _partial(path)
        with partial.open("ab") as f:
            fcntl.flock(f, fcntl.LOCK_EX)
            # While this process waited, the file may have become the shard, or have been swept away.
            if not _is_at(f, partial):
                yield None
                return
            if path.exists():
                partial.unlink()
                yield None
                return
            f.truncate(0)
            try:
                yield f
            except OSError as e:
                if e.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise UserError(f"{self.folder} is full: lower data.cache_bytes below what the disk has") from None
            finally:
                if _is_at(f, partial):
                    partial.unlink()

    @contextmanager
    def _lock(self) -> Iterator[_Held]:
        with (self.folder / "lock").open("a+", encoding="utf-8") as f:
            fcntl.flock(f, fcntl.LOCK_EX)
            f.seek(0)
            text = f.read()
            held = _Held(int(text) if text.isdecimal() else None)
            yield held
            f.truncate(0)
            f.write("" if held.bytes is None else str(held.bytes))


@dataclass
class _Held:
    """Bytes of all files, at most: None where they have not been counted."""

    bytes: int | None

    def add(self, size: int) -> None:
        if self.bytes is not None:
            self.bytes += size


def default_folder() -> Path:
    """Where shards go unless data.cache_dir says otherwise."""
    # Slurm's own temporary folder, where a site makes one, is on the node's disk and goes with the job.
    base = Path(os.environ.get("SLURM_TMPDIR") or tempfile.gettempdir())
    return base / f"ibq_scale-cache-{os.getuid()}"


def bytes_held(folder: Path) -> int:
    """Bytes of the cache files in a folder, or 0 where there is none."""
    total = 0
    for path in folder.iterdir() if folder.is_dir() else ():
        if _NAME.fullmatch(path.name):
            with suppress(FileNotFoundError):
                total += path.stat().st_size
    return total


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


def _is_at(file: BinaryIO, path: Path) -> bool:
    """Whether `path` still names this open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _remove_leftover(partial: Path) -> None:
    try:
        with partial.open("rb") as f:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(f, partial):
                partial.unlink()
    except (BlockingIOError, FileNotFoundError):
        pass  # Someone is at work on it, or done.
