"""Folders of files, wherever they are, and the one on a file system. Those in object storage: store.py."""

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
# What is read whole, into memory: manifests, indices, shards of codes, pictures.
MOST_WHOLE = 2 << 30


class Unfinished(NamedTuple):
    """What an upload that was killed has left: the path that it was for, and the store's own name of it."""

    path: str
    id: str


class Store(ABC):
    """A folder of files named by relative paths with ``/``."""

    url: str
    local = False
    """Whether this is a file system's folder, where a read costs no request."""

    @abstractmethod
    def read(self, path: str) -> bytes:
        """The whole file. FileNotFoundError; UnreadableError where it has more bytes than `MOST_WHOLE`."""

    def map(self, path: str) -> bytes | mmap:
        """As `read`; of a file system, memory that its readers share and that is no copy."""
        return self.read(path)

    @abstractmethod
    def read_range(self, path: str, start: int, stop: int) -> bytes:
        """Bytes start … stop − 1, exactly that many: UserError where the file ends before.

        FileNotFoundError where there is no file.
        """

    @abstractmethod
    def write(self, path: str, data: bytes) -> None:
        """Creates or replaces a file; readers see the old or the new one, never a part."""

    @abstractmethod
    def size(self, path: str) -> int:
        """Bytes. FileNotFoundError where there is no file."""

    @abstractmethod
    def download(self, path: str, local: Path) -> None:
        """Copies a file over `local`, flushed to the disk. FileNotFoundError where there is none.

        UserError where the file changes meanwhile (S3: its ETag or size). `local` keeps its inode, and its size until
        the end: a cache has taken the room for it.
        """

    @abstractmethod
    def upload(self, local: Path, path: str) -> None:
        """Copies a local file here, as `write` would."""

    @abstractmethod
    def upload_resumable(self, local: Path, path: str) -> None:
        """As `upload`, but sends nothing of what is here already with these bytes.

        That is the whole file, or the parts that an earlier try has left; one that fails leaves its own (`unfinished`).
        """

    @abstractmethod
    def unfinished(self) -> list[Unfinished]:
        """What uploads that were killed or failed have left under here."""

    @abstractmethod
    def abort(self, upload: Unfinished) -> None:
        """Removes what an upload has left."""

    @abstractmethod
    def delete(self, paths: Iterable[str]) -> None:
        """Removes files; one that is gone already is no fault."""

    def stop(self) -> None:
        """Lets what is under way in other threads fail soon, and whatever is begun later. For good."""
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
        """The bytes of every file under here, by path, sorted. FileNotFoundError where a local folder is missing."""


class UnreadableError(UserError):
    """A file that is there, and cannot be read."""


class LocalStore(Store):
    """A folder on a file system. `links`: whether its files may be links out of it, as a person's own pictures are.

    Of a prepared set they may not: its manifest comes from other people, and would lead anywhere.
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
            # What is not there takes no memory.
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
        """FileNotFoundError where it is missing; UnreadableError."""
        with self._told(path):
            file = open_regular(self.root / path)
        if not self._links:
            # By the file that is open: a link may change meanwhile.
            there = str(Path(f"/proc/self/fd/{file.fileno()}").readlink())
            if not there.startswith(self._whole_root):
                file.close()
                raise UnreadableError(f"cannot read {self.url}/{path}: it is a link out of this folder")
        return file

    @cached_property
    def _whole_root(self) -> str:
        """Ends with a slash."""
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
    """UnreadableError for a file of more than `MOST_WHOLE` bytes."""
    if size > MOST_WHOLE:
        raise UnreadableError(f"cannot read {url}: it has {size:,} bytes, and {MOST_WHOLE:,} are the most")


def over(local: Path) -> BinaryIO:
    """A file to write from its start on, which keeps what lies behind until it is cut."""
    return os.fdopen(os.open(local, os.O_WRONLY | os.O_CREAT, 0o666), "wb")
