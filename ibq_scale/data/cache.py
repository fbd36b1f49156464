"""Shards on local disk under their content's hash: downloaded once a node, verified, evicted by age.

```
SHA256                  a whole, verified shard; its time is that of its last promise to a reader
SHA256.NAME.index       its index as one data set has it (NAME: hash of URL and content); goes when the shard goes
….partial               being written by whoever holds its lock, and is as large as it will be; unlocked, a leftover
lock                    held while room is made
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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ibq_scale.data.folder import Store
from ibq_scale.data.manifest import ShardInfo
from ibq_scale.errors import UserError

log = logging.getLogger(__name__)
_NAME = re.compile(r"([0-9a-f]{64})(\.[0-9a-f]{16}\.index)?(\.partial)?")
# Whoever evicts a shard that was promised this short a time ago is told that the cache is too small.
RECENT_SECONDS = 60.0


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
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with self._lock():
                self._sweep()
        except OSError as e:
            raise UserError(f"cannot use {folder} as a cache ({e.strerror}): correct data.cache_dir") from None

    def path(self, shard: ShardInfo) -> Path:
        """Where the shard is, or will be."""
        return self.folder / shard.sha256

    def fetch(self, shard: ShardInfo, index: str | None = None) -> None:
        """Makes sure that the whole, verified shard is there, and makes it the last to be evicted.

        `index` is the store's file with the shard's index, which then is there too. UserError where either is missing
        or the shard's content has changed, or where the limit or the disk does not hold it.
        """
        with self._open(shard) as f:
            os.utime(f.fileno())
        if index is not None and not self._index_path(shard, index).exists():
            self.read_index(shard, index)

    def read_range(self, shard: ShardInfo, start: int, stop: int) -> bytes:
        """Bytes start … stop − 1, fewer where the shard ends before. Raises as `fetch`, which it calls at need."""
        with self._open(shard) as f:
            return os.pread(f.fileno(), stop - start, start)

    def read(self, shard: ShardInfo) -> bytes:
        """The whole shard. Raises as `fetch`, which it calls at need."""
        with self._open(shard) as f:
            return f.read()

    def read_index(self, shard: ShardInfo, index: str) -> bytes:
        """The shard's index, which is the store's file `index`; kept with the shard. UserError where it is missing."""
        local = self._index_path(shard, index)
        while True:
            with suppress(FileNotFoundError):
                return local.read_bytes()
            try:
                data = self.store.read(index)
            except FileNotFoundError:
                raise UserError(f"{self.store.url}/{index} is missing: prepare again") from None
            with self._claim(local) as f:
                if f is not None:
                    f.write(data)
                    f.flush()
                    os.fsync(f.fileno())
                    _partial(local).replace(local)
                    return data

    def _index_path(self, shard: ShardInfo, index: str) -> Path:
        what = hashlib.sha256(f"{self.store.url}/{index} {shard.index_sha256}".encode()).hexdigest()
        return self.folder / f"{shard.sha256}.{what[:16]}.index"

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
        with self._lock():
            self._sweep()
            held: dict[str, list[tuple[Path, os.stat_result]]] = {}
            for path, sha256 in self._files():
                with suppress(FileNotFoundError):  # A partial that has just become its shard.
                    held.setdefault(sha256, []).append((path, path.stat()))
            total = shard.bytes + sum(status.st_size for files in held.values() for _, status in files)
            whole = [(path.name, status) for files in held.values() for path, status in files if not path.suffix]
            for sha256, used in sorted(whole, key=lambda file: file[1].st_mtime):
                if total <= self.limit:
                    break
                self._warn_where_recent(used.st_mtime)
                for path, status in held[sha256]:
                    if path.suffix != ".partial":
                        path.unlink(missing_ok=True)
                        total -= status.st_size
            os.ftruncate(claimed.fileno(), shard.bytes)

    def _warn_where_recent(self, used: float) -> None:
        if time.time() - used < RECENT_SECONDS and not self._warned:
            self._warned = True
            log.warning(
                "data.cache_bytes=%d is less than the shards in use: they will be downloaded again and again (%s)",
                self.limit,
                self.folder,
            )

    def _sweep(self) -> None:
        """Removes what killed processes left, and the indices of shards that are gone."""
        for path, sha256 in self._files():
            if path.suffix == ".partial":
                _remove_leftover(path)
            elif path.suffix == ".index" and not any(
                (self.folder / name).exists() for name in (sha256, f"{sha256}.partial")
            ):
                path.unlink(missing_ok=True)

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
    def _lock(self) -> Iterator[None]:
        with (self.folder / "lock").open("w", encoding="utf-8") as f:
            fcntl.flock(f, fcntl.LOCK_EX)
            yield


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
