"""Shards on local disk under their content's hash: downloaded once a node, verified, evicted by age."""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ibq_scale.data.manifest import ShardInfo
from ibq_scale.data.store import Store
from ibq_scale.errors import UserError

# A shard that a rank was promised may be opened by its workers until then; it is not evicted before.
IN_USE_SECONDS = 600.0


class ShardCache:
    """Files NAME = sha256 in `folder`, shared by the ranks and runs of a node, at most about `limit` bytes."""

    def __init__(self, folder: Path, limit: int, store: Store) -> None:
        self.folder = folder
        self.limit = limit
        self.store = store
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, shard: ShardInfo) -> Path:
        """Where the shard is, or will be."""
        return self.folder / shard.sha256

    def fetch(self, shard: ShardInfo) -> None:
        """Makes sure that the whole, verified shard is there. UserError where the store's content has changed."""
        path = self.path(shard)
        with self._lock(shard.sha256):
            if not path.is_file():
                self._download(shard, path)
            os.utime(path)

    def _download(self, shard: ShardInfo, path: Path) -> None:
        self._evict(shard.bytes)
        partial = path.with_name(f"{shard.sha256}.{os.getpid()}.partial")
        try:
            for attempt in (1, 2):
                self.store.download(shard.name, partial)
                with partial.open("rb") as f:
                    digest = hashlib.file_digest(f, "sha256").hexdigest()
                if digest == shard.sha256:
                    partial.replace(path)
                    return
                if attempt == 2:
                    raise UserError(f"{self.store.url}/{shard.name} is not what the manifest says (sha256 differs)")
        finally:
            partial.unlink(missing_ok=True)

    def _evict(self, coming: int) -> None:
        """Oldest use first. Half-written files of dead processes count as files of their age."""
        files = sorted((p.stat().st_mtime, p.stat().st_size, p) for p in self._files())
        total = sum(size for _, size, _ in files) + coming
        for used, size, path in files:
            if total <= self.limit or time.time() - used < IN_USE_SECONDS:
                break
            path.unlink(missing_ok=True)
            total -= size

    def _files(self) -> Iterator[Path]:
        return (p for p in self.folder.iterdir() if p.suffix != ".lock")

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        """One downloader a shard and node; the kernel drops the lock of a killed one."""
        with (self.folder / f"{name}.lock").open("w") as f:
            fcntl.flock(f, fcntl.LOCK_EX)
            yield
