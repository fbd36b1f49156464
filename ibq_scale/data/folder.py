"""The interface to a folder of files, and its implementation on a file system. Object storage: store.py."""

from __future__ import annotations

import errno
import filecmp
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ibq_scale.data.local import walk
from ibq_scale.documents import DocumentError, open_regular
from ibq_scale.errors import UserError

DOWNLOAD_CHUNK = 16 << 20
PARTIAL = ".partial"
# Limit in bytes of a file read whole into memory: manifests, indices, shards of codes, pictures.
MOST_WHOLE = 2 << 30


class Unfinished(NamedTuple):
    """The remains of a killed upload: its target path, and the store's own name for it."""

    path: str
    id: str


class Store(ABC):
    """A folder of files named by relative paths with ``/``."""

    url: str
    local = False
    """Whether this is a folder on a file system, where a read costs no request."""

    @abstractmethod
    def read(self, path: str) -> bytes:
        """The whole file. FileNotFoundError if it is missing, UnreadableError above `MOST_WHOLE` bytes."""

    def map(self, path: str) -> bytes | mmap:
        """As `read`. On a file system: memory shared by its readers, without a copy."""
        return self.read(path)

    @abstractmethod
    def read_range(self, path: str, start: int, stop: int) -> bytes:
        """Exactly the bytes start … stop − 1. UserError if the file ends before, FileNotFoundError if it is missing."""

    @abstractmethod
    def write(self, path: str, data: bytes) -> None:
        """Creates or replaces a file atomically: readers see the old or the new one, never a part."""

    @abstractmethod
    def size(self, path: str) -> int:
        """The file's bytes. FileNotFoundError if it is missing."""

    @abstractmethod
    def download(self, path: str, local: Path) -> None:
        """Copies a file over `local` and flushes it to the disk. FileNotFoundError if it is missing.

        UserError if the file changes meanwhile (S3: its ETag or size). `local` keeps its inode, and its size until
        the end, since a cache has reserved the space for it.
        """

    @abstractmethod
    def upload(self, local: Path, path: str) -> None:
        """Copies a local file here, atomically as `write`."""

    @abstractmethod
    def upload_resumable(self, local: Path, path: str) -> None:
        """As `upload`, but skips bytes already here: the whole file, or the parts sent by an earlier try.

        A failed upload leaves its own parts (`unfinished`).
        """

    @abstractmethod
    def unfinished(self) -> list[Unfinished]:
        """The remains of killed or failed uploads in this folder."""

    @abstractmethod
    def abort(self, upload: Unfinished) -> None:
        """Removes an upload's remains."""

    @abstractmethod
    def delete(self, paths: Iterable[str]) -> None:
        """Removes files. A missing one is no error."""

    def stop(self) -> None:
        """Makes the operations of other threads fail soon, current and later ones. Permanent."""
        self._stopped = True

    _stopped = False

    def exists(self, path: str) -> bool:
        try:
            self.size(path)
        except FileNotFoundError:
            return False
        return True

    @abstractmethod
    def files(self) -> dict[str, int]:
        """The bytes of every file in this folder, by path, sorted. FileNotFoundError if a local folder is missing."""


class UnreadableError(UserError):
    """A file exists but cannot be read."""


class LocalStore(Store):
    """A folder on a file system. `links`: whether its files may be links out of it, as in a user's own pictures.

    In a prepared set they may not: its manifest comes from other people, and could name any file.
    """

    local = True

    def __init__(self, root: Path, *, links: bool = False) -> None:
        self.root = root
        self.url = str(root)
        self._links = links

    def read(self, path: str) -> bytes:
        with self._open(path) as f, self._told(path):
            require_fit(f"{self.url}/{path}", os.fstat(f.fileno()).st_size)
            return f.read()

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        with self._open(path) as f, self._told(path):
            # No memory is taken for bytes beyond the file's end.
            stop_there = min(stop, os.fstat(f.fileno()).st_size)
            data = os.pread(f.fileno(), stop_there - start, start) if start < stop_there else b""
        if len(data) != stop - start:
            raise too_short(f"{self.url}/{path}", stop)
        return data

    def map(self, path: str) -> bytes | mmap:
        with self._open(path) as f, self._told(path):
            # An empty file cannot be mapped.
            return mmap(f.fileno(), 0, access=ACCESS_READ) if os.fstat(f.fileno()).st_size else b""

    def _open(self, path: str) -> BinaryIO:
        """Opens a file. FileNotFoundError if it is missing, UnreadableError for other faults."""
        with self._told(path):
            file = open_regular(self.root / path)
        if not self._links:
            # Checks the open file, since a link may change meanwhile.
            there = str(Path(f"/proc/self/fd/{file.fileno()}").readlink())
            if not there.startswith(self._whole_root):
                file.close()
                raise UnreadableError(f"cannot read {self.url}/{path}: it is a link out of this folder")
        return file

    @cached_property
    def _whole_root(self) -> str:
        """The resolved root, ending with a slash."""
        return f"{str(self.root.resolve()).rstrip('/')}/"

    @contextmanager
    def _told(self, path: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), f"{self.url}/{path}") from None
        except DocumentError as e:
            raise UnreadableError(f"cannot read {self.url}/{path}: {e}") from None
        except OSError as e:
            raise UnreadableError(f"cannot read {self.url}/{path}: {e.strerror}") from None

    def write(self, path: str, data: bytes) -> None:
        self._fill(path, lambda f: f.write(data))

    def _fill(self, path: str, fill: Callable[[BinaryIO], object]) -> None:
        target = self.root / path
        partial = target.with_name(f".{target.name}.{os.getpid()}{PARTIAL}")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as f:
                fill(f)
                f.flush()
                os.fsync(f.fileno())
            partial.replace(target)
        except OSError as e:
            partial.unlink(missing_ok=True)
            raise UserError(f"cannot write {target}: {e.strerror}") from None

    def size(self, path: str) -> int:
        with self._told(path):
            found = (self.root / path).stat()
            if not stat.S_ISREG(found.st_mode):
                raise DocumentError("it is no regular file")
        return found.st_size

    def download(self, path: str, local: Path) -> None:
        def chunk() -> bytes:
            with self._told(path):
                return source.read(DOWNLOAD_CHUNK)

        with self._open(path) as source, over(local) as f:
            for data in iter(chunk, b""):
                f.write(data)
            f.truncate()
            f.flush()
            os.fsync(f.fileno())

    def upload(self, local: Path, path: str) -> None:
        with local.open("rb") as source:
            self._fill(path, lambda f: self._copy(source, f))

    def upload_resumable(self, local: Path, path: str) -> None:
        there = self.root / path
        if not (there.is_file() and filecmp.cmp(local, there, shallow=False)):
            self.upload(local, path)

    def _copy(self, source: BinaryIO, target: BinaryIO) -> None:
        while chunk := source.read(DOWNLOAD_CHUNK):
            if self._stopped:
                raise InterruptedError(errno.EINTR, "stopped")
            target.write(chunk)

    def unfinished(self) -> list[Unfinished]:
        left = [path for path in self.root.rglob(f".*{PARTIAL}") if path.is_file()]
        # .NAME.PID.partial
        names = [(path.parent / path.name[1:].rsplit(".", 2)[0], path) for path in left]
        return [Unfinished(*(p.relative_to(self.root).as_posix() for p in pair)) for pair in names]

    def abort(self, upload: Unfinished) -> None:
        self.delete([upload.id])

    def delete(self, paths: Iterable[str]) -> None:
        for path in paths:
            try:
                (self.root / path).unlink(missing_ok=True)
                for parent in (self.root / path).parents:
                    if parent == self.root or any(parent.iterdir()):
                        break
                    parent.rmdir()
            except FileNotFoundError:
                continue
            except OSError as e:
                raise UserError(f"cannot remove {self.root / path}: {e.strerror}") from None

    def files(self) -> dict[str, int]:
        return walk(self.root)[0]


def too_short(name: str, stop: int) -> UserError:
    return UserError(f"{name} ends before byte {stop}, where its index has more: it changed after it was prepared")


def require_fit(url: str, size: int) -> None:
    """UnreadableError for a file above `MOST_WHOLE` bytes."""
    if size > MOST_WHOLE:
        raise UnreadableError(f"cannot read {url}: it has {size:,} bytes, and {MOST_WHOLE:,} are the most")


def over(local: Path) -> BinaryIO:
    """Opens a file for writing from its start. Later bytes stay until it is truncated."""
    return os.fdopen(os.open(local, os.O_WRONLY | os.O_CREAT, 0o666), "wb")
