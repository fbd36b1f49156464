"""One way to files, local or in object storage. The only module that knows s3fs.

Transient failures are retried with jittered backoff until a deadline; what a user can mend (a missing bucket, wrong
credentials, an unreachable endpoint) is a UserError at once.
"""

from __future__ import annotations

import os
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ibq_scale.errors import UserError

T = TypeVar("T")
DEADLINE_SECONDS = 120.0
DOWNLOAD_CHUNK = 16 << 20


class Store(ABC):
    """A folder of files named by relative paths with ``/``."""

    url: str

    @abstractmethod
    def files(self) -> dict[str, int]:
        """The bytes of every file under here, by path, sorted. FileNotFoundError where a local folder is missing."""

    @abstractmethod
    def read(self, path: str) -> bytes:
        """The whole file. FileNotFoundError where there is none."""

    @abstractmethod
    def read_range(self, path: str, start: int, stop: int) -> bytes:
        """Bytes start … stop − 1, exactly that many. FileNotFoundError where there is no file."""

    @abstractmethod
    def write(self, path: str, data: bytes) -> None:
        """Creates or replaces a file; readers see the old or the new one, never a part."""

    @abstractmethod
    def size(self, path: str) -> int:
        """Bytes. FileNotFoundError where there is no file."""

    def exists(self, path: str) -> bool:
        try:
            self.size(path)
        except FileNotFoundError:
            return False
        return True

    def download(self, path: str, local: Path) -> None:
        """Copies a file to `local` by ranges, so that a broken connection costs one range."""
        total = self.size(path)
        with local.open("wb") as f:
            for start in range(0, total, DOWNLOAD_CHUNK):
                f.write(self.read_range(path, start, min(start + DOWNLOAD_CHUNK, total)))
            f.flush()
            os.fsync(f.fileno())

    def upload(self, local: Path, path: str) -> None:
        """Copies a local file here."""
        self.write(path, local.read_bytes())


class LocalStore(Store):
    """A folder on a file system."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = str(root)

    def files(self) -> dict[str, int]:
        if not self.root.is_dir():
            raise FileNotFoundError(self.root)
        # Class folders are often links. Dangling ones, and sockets, are no files.
        paths = (Path(base, name) for base, _, names in os.walk(self.root, followlinks=True) for name in names)
        return dict(sorted((p.relative_to(self.root).as_posix(), p.stat().st_size) for p in paths if p.is_file()))

    def read(self, path: str) -> bytes:
        return (self.root / path).read_bytes()

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        with (self.root / path).open("rb") as f:
            data = os.pread(f.fileno(), stop - start, start)
        _check_length(data, start, stop, f"{self.url}/{path}")
        return data

    def write(self, path: str, data: bytes) -> None:
        target = self.root / path
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            partial.replace(target)
        except OSError as e:
            partial.unlink(missing_ok=True)
            raise UserError(f"cannot write {target}: {e.strerror}") from None

    def size(self, path: str) -> int:
        return (self.root / path).stat().st_size


class S3Store(Store):
    """A prefix in a bucket. Endpoint, region and credentials come from the environment (AWS_ENDPOINT_URL, …)."""

    def __init__(self, url: str) -> None:
        self.prefix = url.removeprefix("s3://").strip("/")
        self.url = f"s3://{self.prefix}"
        self.bucket = self.prefix.partition("/")[0]
        if not self.bucket:
            raise UserError(f"'{url}' names no bucket: write s3://bucket/prefix")
        self._client: Any = None
        self._client_pid = -1

    @property
    def _fs(self) -> Any:
        """A client of this very process: s3fs's event loop does not survive a fork."""
        if self._client is None or self._client_pid != os.getpid():
            import s3fs

            # Directory listings are cached by s3fs for ever; another rank's new files would stay unseen.
            self._client = s3fs.S3FileSystem(use_listings_cache=False, skip_instance_cache=True)
            self._client_pid = os.getpid()
        return self._client

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_client": None, "_client_pid": -1}

    def files(self) -> dict[str, int]:
        found = self._call(lambda fs: fs.find(self.prefix, detail=True))
        # An object of the prefix's own name is no file under it.
        names = ((name.removeprefix(f"{self.prefix}/"), int(info["size"])) for name, info in found.items())
        return dict(sorted((name, size) for name, size in names if name != self.prefix))

    def read(self, path: str) -> bytes:
        data: bytes = self._call(lambda fs: fs.cat_file(f"{self.prefix}/{path}"))
        return data

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        def fetch(fs: Any) -> bytes:
            data: bytes = fs.cat_file(f"{self.prefix}/{path}", start=start, end=stop)
            _check_length(data, start, stop, f"{self.url}/{path}")
            return data

        return self._call(fetch)

    def write(self, path: str, data: bytes) -> None:
        self._call(lambda fs: fs.pipe_file(f"{self.prefix}/{path}", data), writing=True)

    def size(self, path: str) -> int:
        return int(self._call(lambda fs: fs.info(f"{self.prefix}/{path}"))["size"])

    def _call(self, action: Callable[[Any], T], *, writing: bool = False) -> T:
        """Runs one request, again and again through transient failures until the deadline."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        pause = 0.2
        while True:
            try:
                return action(self._fs)
            except FileNotFoundError as e:
                # s3fs has one error for a missing key and a missing bucket; only the second is the user's typing.
                if writing or "bucket" in str(e).lower():
                    raise UserError(f"bucket '{self.bucket}' does not exist: create it or correct {self.url}") from None
                raise
            except PermissionError as e:
                raise UserError(f"{self.url}: access denied ({_first_line(e)}): check the credentials") from None
            except Exception as e:
                fault = self._fault(e)
                if fault is not None:
                    raise fault from None
                if time.monotonic() + pause > deadline:
                    raise UserError(f"{self.url}: gave up after {DEADLINE_SECONDS:.0f} s: {_first_line(e)}") from e
            time.sleep(pause * random.uniform(0.5, 1.5))
            pause = min(pause * 2, 15.0)

    def _fault(self, error: Exception) -> Exception | None:
        """The error to raise for what no retry mends; None for what may pass."""
        name = type(error).__name__
        if name in ("NoCredentialsError", "PartialCredentialsError"):
            return UserError(f"{self.url}: no S3 credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
        if name == "EndpointConnectionError":
            endpoint = os.environ.get("AWS_ENDPOINT_URL", "the S3 endpoint")
            return UserError(f"{self.url}: cannot connect to {endpoint}: check AWS_ENDPOINT_URL and the network")
        if isinstance(error, (OSError, TimeoutError)) or name.endswith(("Timeout", "TimeoutError", "ClientError")):
            return None
        return error


class ShortReadError(OSError):
    """A store delivered fewer bytes than were asked for."""


def _check_length(data: bytes, start: int, stop: int, name: str) -> None:
    if len(data) != stop - start:
        raise ShortReadError(f"{name}: {len(data)} bytes instead of {stop - start} from {start} on")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def open_store(url: str) -> Store:
    """The store at a plain path, ``file://`` path or ``s3://bucket/prefix``. Nothing is read yet."""
    if url.startswith("s3://"):
        return S3Store(url)
    scheme, separator, rest = url.partition("://")
    if separator and scheme != "file":
        raise UserError(f"'{url}': unknown scheme '{scheme}': write a path, file:// or s3://bucket/prefix")
    return LocalStore(Path(rest if separator else url))
