"""One way to files, local or in object storage. The only module that knows s3fs.

S3's settings are those that every AWS tool reads: `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_SESSION_TOKEN`, or
else `AWS_PROFILE` of the files `AWS_SHARED_CREDENTIALS_FILE` and `AWS_CONFIG_FILE`; `AWS_ENDPOINT_URL`;
`AWS_DEFAULT_REGION`; and, for stores that know no checksums, `when_required` in `AWS_REQUEST_CHECKSUM_CALCULATION` and
`AWS_RESPONSE_CHECKSUM_VALIDATION`. One is our own: `IBQ_SCALE_S3_ANONYMOUS=1` sends unsigned requests, for public
buckets.

Transient failures are retried with jittered backoff until a deadline, in this one place: s3fs's loop around botocore's
would make 25 requests of one. What a user can mend (a missing bucket, wrong credentials, an unreachable endpoint) is a
UserError at once; but credentials that stopped working are read anew first, since others may have replaced them.
"""

from __future__ import annotations

import os
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from ibq_scale.errors import UserError

T = TypeVar("T")
U = TypeVar("U")
ANONYMOUS = "IBQ_SCALE_S3_ANONYMOUS"
# For one request with its repetitions, from the first try on.
DEADLINE_SECONDS = 120.0
# Before the second try; doubled before each further one up to the longest, and each jittered by half.
PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.2, 15.0
CONNECT_TIMEOUT_SECONDS = 5.0
# Without a byte.
READ_TIMEOUT_SECONDS = 20.0
DOWNLOAD_CHUNK = 16 << 20
# S3 wants 5 MiB or more, and at most 10,000 of them.
UPLOAD_PART, MOST_PARTS = 16 << 20, 10_000
# Ranges or parts of one file under way at once.
CONNECTIONS = 4


class Store(ABC):
    """A folder of files named by relative paths with ``/``."""

    url: str
    local = False
    """Whether this is a file system's folder, where a read costs no request."""

    @abstractmethod
    def read(self, path: str) -> bytes:
        """The whole file. FileNotFoundError where there is none."""

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

    def exists(self, path: str) -> bool:
        try:
            self.size(path)
        except FileNotFoundError:
            return False
        return True

    @abstractmethod
    def files(self) -> dict[str, int]:
        """The bytes of every file under here, by path, sorted. FileNotFoundError where a local folder is missing."""


class LocalStore(Store):
    """A folder on a file system."""

    local = True

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = str(root)

    def read(self, path: str) -> bytes:
        return (self.root / path).read_bytes()

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        with (self.root / path).open("rb") as f:
            data = os.pread(f.fileno(), stop - start, start)
        if len(data) != stop - start:
            raise _too_short(f"{self.url}/{path}", stop)
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

    def download(self, path: str, local: Path) -> None:
        with (self.root / path).open("rb") as source, _over(local) as f:
            while chunk := source.read(DOWNLOAD_CHUNK):
                f.write(chunk)
            f.truncate()
            f.flush()
            os.fsync(f.fileno())

    def upload(self, local: Path, path: str) -> None:
        self.write(path, local.read_bytes())

    def files(self) -> dict[str, int]:
        if not self.root.is_dir():
            raise FileNotFoundError(self.root)
        # Class folders are often links. Dangling ones, and sockets, are no files.
        paths = (Path(base, name) for base, _, names in os.walk(self.root, followlinks=True) for name in names)
        return dict(sorted((p.relative_to(self.root).as_posix(), p.stat().st_size) for p in paths if p.is_file()))


class _Part(NamedTuple):
    data: bytes
    etag: str
    total: int
    """Bytes of the whole object."""


class S3Store(Store):
    """A prefix in a bucket. Endpoint, region and credentials come from the environment: see this module."""

    def __init__(self, url: str) -> None:
        self.prefix = url.removeprefix("s3://").strip("/")
        self.url = f"s3://{self.prefix}"
        self.bucket, _, self._folder = self.prefix.partition("/")
        if not self.bucket:
            raise UserError(f"'{url}' names no bucket: write s3://bucket/prefix")
        self._client: Any = None
        self._client_pid = -1
        self._answered = False

    @property
    def _fs(self) -> Any:
        """A client of this very process: s3fs's event loop does not survive a fork."""
        client = self._client
        if client is None or self._client_pid != os.getpid():
            client = self._client = _new_client()
            self._client_pid = os.getpid()
        return client

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_client": None, "_client_pid": -1}

    def read(self, path: str) -> bytes:
        parts: dict[int, bytes] = {}
        self._transfer(path, parts.__setitem__)
        return b"".join(parts[start] for start in sorted(parts))

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        try:
            part = self._get(path, start, stop)
        except _PastEndError:
            raise _too_short(f"{self.url}/{path}", stop) from None
        if part.total < stop:
            raise _too_short(f"{self.url}/{path}", stop)
        return part.data

    def write(self, path: str, data: bytes) -> None:
        self._put(path, len(data), lambda start, stop: data[start:stop])

    def size(self, path: str) -> int:
        return int(self._call(lambda fs: fs.call_s3("head_object", **self._name(path)))["ContentLength"])

    def download(self, path: str, local: Path) -> None:
        with _over(local) as f:
            total = self._transfer(path, lambda start, data: os.pwrite(f.fileno(), data, start))
            f.truncate(total)
            os.fsync(f.fileno())

    def upload(self, local: Path, path: str) -> None:
        with local.open("rb") as f:
            size = os.fstat(f.fileno()).st_size
            self._put(path, size, lambda start, stop: os.pread(f.fileno(), stop - start, start))

    def _name(self, path: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": f"{self._folder}/{path}" if self._folder else path}

    def _transfer(self, path: str, place: Callable[[int, bytes], object]) -> int:
        """Gives a whole object to `place` (from threads) by ranges, so that a broken connection costs one range.

        Returns its size.
        """
        try:
            first = self._get(path, 0, DOWNLOAD_CHUNK)
        except _PastEndError:
            return 0  # No range fits an empty object.
        place(0, first.data)

        def move(start: int) -> None:
            try:
                part = self._get(path, start, min(start + DOWNLOAD_CHUNK, first.total))
            except _PastEndError:
                part = None
            if part is None or (part.etag, part.total) != (first.etag, first.total):
                raise UserError(f"{self.url}/{path} changed while it was read: nothing may write to data in use")
            place(start, part.data)

        _parallel(move, range(DOWNLOAD_CHUNK, first.total, DOWNLOAD_CHUNK))
        return first.total

    def _get(self, path: str, start: int, stop: int) -> _Part:
        """Bytes start … stop − 1, or fewer where the object ends before. _PastEndError where it ends before `start`."""

        def get(fs: Any) -> _Part:
            from fsspec.asyn import sync

            response = fs.call_s3("get_object", **self._name(path), Range=f"bytes={start}-{stop - 1}")
            data: bytes = sync(fs.loop, _body, response, timeout=DEADLINE_SECONDS)
            # A server may answer a range that is the whole object without saying that it is a range.
            total = int(response.get("ContentRange", "").rpartition("/")[2] or response["ContentLength"])
            if len(data) != min(stop, total) - start:
                raise ShortReadError(f"{self.url}/{path}: {len(data)} bytes of {start} … {stop - 1}")
            return _Part(data, response.get("ETag", ""), total)

        return self._call(get)

    def _put(self, path: str, size: int, part: Callable[[int, int], bytes]) -> None:
        """Writes an object of `size` bytes, which `part` cuts out; in parts, each retried alone, where it is large."""
        name = self._name(path)

        def call(method: str, **arguments: Any) -> Any:
            return self._call(lambda fs: fs.call_s3(method, **name, **arguments), writing=True)

        if size <= UPLOAD_PART:
            call("put_object", Body=part(0, size))
            return
        step = max(UPLOAD_PART, -(-size // MOST_PARTS))
        upload = call("create_multipart_upload")["UploadId"]

        def move(start: int) -> dict[str, Any]:
            number = start // step + 1
            body = part(start, min(start + step, size))
            return {
                "PartNumber": number,
                "ETag": call("upload_part", UploadId=upload, PartNumber=number, Body=body)["ETag"],
            }

        try:
            parts = _parallel(move, range(0, size, step))
            call("complete_multipart_upload", UploadId=upload, MultipartUpload={"Parts": parts})
        except FileNotFoundError:
            # The first try may have succeeded with its answer lost; the upload is then no longer known.
            if self.size(path) != size:
                raise UserError(f"{self.url}/{path}: the upload was aborted by someone else: start it again") from None
        except BaseException:
            # What is not aborted is kept, and paid for, without being seen.
            with suppress(Exception):
                call("abort_multipart_upload", UploadId=upload)
            raise

    def files(self) -> dict[str, int]:
        found = self._call(lambda fs: fs.find(self.prefix, detail=True))
        # An object of the prefix's own name is no file under it.
        names = ((name.removeprefix(f"{self.prefix}/"), int(info["size"])) for name, info in found.items())
        return dict(sorted((name, size) for name, size in names if name != self.prefix))

    def _call(self, action: Callable[[Any], T], *, writing: bool = False) -> T:
        """Runs one request, again and again through transient failures until the deadline."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        pause = PAUSE_SECONDS
        renewed = False
        while True:
            client = self._fs
            try:
                result = action(client)
                self._answered = True
                return result
            except Exception as e:
                if _denied(e) and not renewed:
                    # A new client reads the environment and the credentials files again.
                    renewed = True
                    if self._client is client:
                        self._client = None
                    continue
                fault = self._fault(e, writing)
                if fault is not None:
                    raise fault from None
                if time.monotonic() + pause > deadline:
                    raise UserError(f"{self.url}: gave up after {DEADLINE_SECONDS:.0f} s: {_first_line(e)}") from e
            time.sleep(pause * random.uniform(0.5, 1.5))
            pause = min(pause * 2, LONGEST_PAUSE_SECONDS)

    def _fault(self, error: Exception, writing: bool) -> Exception | None:
        """The error to raise for what no retry mends; None for what may pass."""
        from botocore import exceptions as boto
        from botocore.parsers import ResponseParserError

        if isinstance(error, UserError):
            return error
        if _status(error):
            return self._refusal(error, writing)
        if isinstance(error, (boto.NoCredentialsError, boto.PartialCredentialsError)):
            return UserError(
                f"{self.url}: no S3 credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, "
                f"or {ANONYMOUS}=1 for a public bucket"
            )
        # An endpoint that has answered once may come back.
        unreachable = (boto.EndpointConnectionError, boto.SSLError, boto.ProxyConnectionError)
        if isinstance(error, unreachable) and not self._answered:
            endpoint = os.environ.get("AWS_ENDPOINT_URL", "the S3 endpoint")
            reason = f"{endpoint} ({_first_line(error)})"
            return UserError(f"{self.url}: cannot connect to {reason}: check AWS_ENDPOINT_URL and the network")
        transient = (boto.HTTPClientError, boto.ConnectionError, boto.IncompleteReadError, ResponseParserError)
        damaged = (boto.FlexibleChecksumError, boto.MetadataRetrievalError, boto.CredentialRetrievalError)
        # Not imported: it is aiobotocore's, which may come with another.
        http = any(base.__module__.startswith("aiohttp") for base in type(error).__mro__)
        if http or isinstance(error, (OSError, *transient, *damaged)):
            return None
        if isinstance(error, boto.BotoCoreError):
            return UserError(f"{self.url}: {_first_line(error)}")
        return error

    def _refusal(self, error: Exception, writing: bool) -> Exception | None:
        """As `_fault`, for an answer of the server."""
        code, status, reason = _code(error), _status(error), _first_line(error)
        if code == "NoSuchBucket" or (writing and status == 404 and code != "NoSuchUpload"):
            return UserError(f"bucket '{self.bucket}' does not exist: create it or correct {self.url}")
        if status == 404:
            return error if isinstance(error, FileNotFoundError) else FileNotFoundError(reason)
        if status == 416:
            return _PastEndError(reason)
        if code in _EXPIRED_CODES:
            return UserError(f"{self.url}: the credentials have expired ({code}: {reason}): renew them")
        if _denied(error):
            return UserError(f"{self.url}: access denied ({code}: {reason}): check the credentials")
        if status in _TRANSIENT_STATUS or (status >= 500 and status != 501) or code in _TRANSIENT_CODES:
            return None
        hint = ""
        if status == 301 or code in ("AuthorizationHeaderMalformed", "IllegalLocationConstraintException"):
            hint = ": is AWS_DEFAULT_REGION the bucket's?"
        elif writing:
            hint = ": a store without checksums needs AWS_REQUEST_CHECKSUM_CALCULATION=when_required"
        return UserError(f"{self.url}: the store refused ({code}: {reason}){hint}")


# 200 is an error inside a body that began well.
_TRANSIENT_STATUS = {200, 408, 409, 425, 429}
_TRANSIENT_CODES = {
    "BadDigest",
    "IncompleteBody",
    "RequestTimeout",
    "SlowDown",
    "Throttling",
    "XAmzContentSHA256Mismatch",
}
_EXPIRED_CODES = {"ExpiredToken", "ExpiredTokenException", "InvalidToken", "RequestExpired", "TokenRefreshRequired"}


class ShortReadError(OSError):
    """A store delivered fewer bytes than were asked for and are there."""


class _PastEndError(Exception):
    """A range begins where the object ends or later."""


def _new_client() -> Any:
    import s3fs

    anonymous = os.environ.get(ANONYMOUS, "0")
    if anonymous not in ("0", "1"):
        raise UserError(f"{ANONYMOUS}={anonymous}: write 1 for unsigned requests, 0 for signed ones")
    client = s3fs.S3FileSystem(
        anon=anonymous == "1",
        # Directory listings are cached by s3fs for ever; another rank's new files would stay unseen.
        use_listings_cache=False,
        skip_instance_cache=True,
        config_kwargs={
            "retries": {"total_max_attempts": 1},
            "connect_timeout": CONNECT_TIMEOUT_SECONDS,
            "read_timeout": READ_TIMEOUT_SECONDS,
        },
    )
    client.retries = 1
    return client


def _over(local: Path) -> BinaryIO:
    return os.fdopen(os.open(local, os.O_WRONLY | os.O_CREAT, 0o666), "wb")


async def _body(response: dict[str, Any]) -> Any:
    async with response["Body"] as body:
        return await body.read()


def _response(error: Exception) -> dict[str, Any]:
    """The server's answer that s3fs's or botocore's error stands for; empty where none came."""
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    return response if isinstance(response, dict) else {}


def _status(error: Exception) -> int:
    return int(_response(error).get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _code(error: Exception) -> str:
    return str(_response(error).get("Error", {}).get("Code", ""))


def _denied(error: Exception) -> bool:
    """The answer to HEAD has no body, so an expired token (status 400 at AWS) shows there by its number alone."""
    code = _code(error)
    return _status(error) in (401, 403) or code in _EXPIRED_CODES or code == "400"


def _parallel(work: Callable[[U], T], items: Sequence[U]) -> list[T]:
    """Results in order; after the first failure nothing further is begun."""
    if not items:
        return []
    with ThreadPoolExecutor(min(CONNECTIONS, len(items))) as pool:
        futures = [pool.submit(work, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _too_short(name: str, stop: int) -> UserError:
    return UserError(f"{name} ends before byte {stop}, where its index has more: it changed after it was prepared")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0] or type(error).__name__


def open_store(url: str) -> Store:
    """The store at a plain path, ``file://`` path or ``s3://bucket/prefix``. Nothing is read yet."""
    if url.startswith("s3://"):
        return S3Store(url)
    scheme, separator, rest = url.partition("://")
    if separator and scheme != "file":
        raise UserError(f"'{url}': unknown scheme '{scheme}': write a path, file:// or s3://bucket/prefix")
    return LocalStore(Path(rest if separator else url))
