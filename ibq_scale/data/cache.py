"""Caches shards on local disk by content hash: one download per node, verified, evicted by last use.

```
SHA256                  a whole, verified shard, mtime = last use
SHA256.NAME.table       its index in one data set (NAME: hash of URL and content), binary, evicted with the shard
….partial               a file in writing, locked, a shard's at its final size to reserve space (unlocked: a leftover)
lock                    held during eviction, contains the bytes of all files, recounted only when space is short
```

Every file appears whole, by a rename. The kernel drops the locks of a killed process, so no process waits for it. The
next eviction removes its partial files. Other programs' files are neither counted nor touched.
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

    Concurrent downloads may exceed `limit` while they run. If the shards in use exceed it, they are downloaded again
    and again, with a warning: slow, but the same bytes.
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
        """The shard's path, present or not."""
        return self.folder / shard.sha256

    def has(self, shard: ShardInfo) -> bool:
        """Whether the whole shard is in the cache now."""
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
        """Downloads the shard unless it is in the cache, verifies it, and marks it as just used.

        UserError if the store lacks it, its content has changed, or the limit or the disk is too small.
        """
        with self._open(shard) as f:
            os.utime(f.fileno())

    def read_range(self, shard: ShardInfo, start: int, stop: int) -> bytes:
        """Bytes start … stop − 1, fewer if the shard ends before. Downloads and raises as `fetch`."""
        with self._open(shard) as f:
            return os.pread(f.fileno(), stop - start, start)

    def read(self, shard: ShardInfo) -> bytes:
        """The whole shard. Downloads and raises as `fetch`."""
        with self._open(shard) as f:
            return f.read()

    def map(self, shard: ShardInfo) -> mmap:
        """As `read`, in memory shared by all processes of the node. The mapping outlives the file."""
        with self._open(shard) as f:
            return mmap(f.fileno(), 0, access=ACCESS_READ)

    def table(self, shard: ShardInfo, read: Callable[[], bytes]) -> mmap:
        """The shard's table in this data set, by `read` if it is missing. Kept beside the shard, mapped as in `map`."""
        what = hashlib.sha256(f"{self.store.url}/{shard.name} {shard.index_sha256}".encode()).hexdigest()
        local = self.folder / f"{shard.sha256}.{what[:16]}.table"
        while True:
            with suppress(FileNotFoundError), local.open("rb") as f:
                return mmap(f.fileno(), 0, access=ACCESS_READ)
            data = read()
            with self._claim(local) as claimed:
                if claimed is not None:
                    claimed.write(data)
                    claimed.flush()
                    os.fsync(claimed.fileno())
                    _partial(local).replace(local)
                    with self._lock() as held:
                        held.add(len(data))

    def _open(self, shard: ShardInfo) -> BinaryIO:
        """Opens the shard, downloaded if missing. An open file outlives its eviction, so a reader never loses it."""
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
        """Evicts the least recently used shards and reserves the space at once, visible to other processes."""
        if shard.bytes > self.limit:
            name = f"{self.store.url}/{shard.name}"
            raise UserError(f"data.cache_bytes={self.limit} does not hold {name} of {shard.bytes} bytes: raise it")
        with self._lock() as held:
            if held.bytes is None or held.bytes + shard.bytes > self.limit:
                held.bytes = self._evict(shard.bytes)
            held.add(shard.bytes)
            os.ftruncate(claimed.fileno(), shard.bytes)

    def _evict(self, needed: int) -> int:
        """Removes files until `needed` bytes fit, and more old ones, so not every download lists the folder.

        Returns the bytes left.
        """
        self._sweep()
        groups: dict[str, list[tuple[Path, os.stat_result]]] = {}
        for path, sha256 in self._files():
            with suppress(FileNotFoundError):  # A partial may just have become its shard.
                status = path.stat()
                groups.setdefault(sha256, []).append((path, status))
        total = sum(status.st_size for files in groups.values() for _, status in files)
        # A table may arrive before its shard. Neither is evicted during the shard's download.
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
        """Warns once if this process downloaded the shard less than `RECENT_SECONDS` ago."""
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
        """Removes the partial files of killed processes."""
        for path, _ in self._files():
            if path.suffix == ".partial":
                _remove_leftover(path)

    def _files(self) -> Iterator[tuple[Path, str]]:
        """The cache's own files, each with the hash of its shard."""
        for path in sorted(self.folder.iterdir()):
            match = _NAME.fullmatch(path.name)
            if match is not None:
                yield path, match[1]

    @contextmanager
    def _claim(self, path: Path) -> Iterator[BinaryIO | None]:
        """The empty partial of `path`, locked, to be filled and renamed. None if another process has just done so.

        Waits while another process fills it. Removes the partial at the end if it was not renamed.
        """
        partial = _partial(path)
        with partial.open("ab") as f:
            fcntl.flock(f, fcntl.LOCK_EX)
            # During the wait the file may have become the shard, or been swept away.
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
    """Upper bound of the bytes of all files. None if they have not been counted."""

    bytes: int | None

    def add(self, size: int) -> None:
        if self.bytes is not None:
            self.bytes += size


def default_folder() -> Path:
    """The default of data.cache_dir."""
    # Slurm's temporary folder, if the site has one, is on the node's disk and is removed with the job.
    base = Path(os.environ.get("SLURM_TMPDIR") or tempfile.gettempdir())
    return base / f"ibq_scale-cache-{os.getuid()}"


def bytes_held(folder: Path) -> int:
    """Bytes of the cache files in a folder, 0 if there is none."""
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
        pass  # Another process is writing it, or has finished.
