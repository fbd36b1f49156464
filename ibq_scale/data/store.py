"""Access to files on a local disk or in object storage. Data code uses s3fs only through this module.

S3 is configured by the usual AWS variables:

- `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_SESSION_TOKEN`, or else `AWS_PROFILE`, a profile in the files
  `AWS_SHARED_CREDENTIALS_FILE` and `AWS_CONFIG_FILE`
- `AWS_ENDPOINT_URL`, `AWS_DEFAULT_REGION`
- `when_required` in `AWS_REQUEST_CHECKSUM_CALCULATION` and `AWS_RESPONSE_CHECKSUM_VALIDATION`, for stores without
  checksums

`IBQ_SCALE_S3_ANONYMOUS=1` is our own. It sends unsigned requests, for public buckets.

Transient failures are retried with jittered backoff until a deadline, only here: s3fs's retries around botocore's would
turn one request into 25. After the deadline a StoreUnavailableError is raised, and its exit code restarts a job. A
user's mistakes (a missing bucket, wrong credentials) raise a UserError at once. Rejected credentials are first read
again, since they may have been replaced. An unreachable endpoint without any earlier answer is a mistake for a command,
but transient for a rank: when a thousand ranks start, some connections are refused.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ibq_scale import extensions
from ibq_scale.config.secrets import refuse_credentials
from ibq_scale.data.folder import DOWNLOAD_CHUNK, LocalStore, Store, Unfinished, over, require_fit, too_short
from ibq_scale.data.multipart import Content, parallel, send_parts
from ibq_scale.data.s3_errors import (
    ANONYMOUS,
    PastEndError,
    ShortReadError,
    cannot_connect,
    denied,
    fault,
    first_line,
    status_of,
    unreachable,
)
from ibq_scale.data.s3_get import Head, PlainReader, Sink
from ibq_scale.errors import StoreUnavailableError, UserError
from ibq_scale.names import expand_home

T = TypeVar("T")
# Without this lock each thread of a batch would create its own client of 17 MB.
_MAKING = threading.Lock()
# Limit for one request with its retries, from the first try on.
DEADLINE_SECONDS = 120.0
# The pause before the second try. It doubles with each try, up to the longest, with a jitter of ± half.
PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.2, 15.0
CONNECT_TIMEOUT_SECONDS = 5.0
# Limit for a time without a byte.
READ_TIMEOUT_SECONDS = 20.0
# Limit for one response's body, at most DOWNLOAD_CHUNK bytes. Doubled with each try: a trickling connection is dropped,
# but a slow link still succeeds.
BODY_SECONDS = 20.0
# S3 requires parts of at least 5 MiB, and at most 10,000 parts.
UPLOAD_PART, MOST_PARTS = 16 << 20, 10_000


class _Part(NamedTuple):
    data: bytes
    etag: str
    total: int
    """Bytes of the whole object."""


_Getter = Callable[[Any, str, int, int, float, Sink], Head]


class S3Store(Store):
    """A prefix in a bucket. Endpoint, region and credentials come from the environment (see the module's docstring)."""

    def __init__(self, url: str) -> None:
        self.prefix = url.removeprefix("s3://").strip("/")
        self.url = f"s3://{self.prefix}"
        self.bucket, _, self._folder = self.prefix.partition("/")
        if not self.bucket:
            raise UserError(f"'{url}' names no bucket: write s3://bucket/prefix")
        _require_endpoint()
        self._client: Any = None
        self._client_pid = -1
        self._plain: PlainReader | None = None
        self._answered = False

    @property
    def _fs(self) -> Any:
        """The client of this process: s3fs's event loop does not survive a fork."""
        with _MAKING:
            client = self._client
            if client is None or self._client_pid != os.getpid():
                client = self._client = _new_client()
                self._client_pid = os.getpid()
            return client

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_client": None, "_client_pid": -1, "_plain": None}

    def read(self, path: str) -> bytes:
        parts: dict[int, bytes] = {}

        def get(start: int, stop: int) -> _Part:
            # By s3fs, which checks the store's checksums: documents have no hash of ours.
            part = self._get(path, start, stop, self._get_by_client)
            parts[start] = part.data
            return part

        self._transfer(path, get, whole=True)
        return b"".join(parts[start] for start in sorted(parts))

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        try:
            part = self._get(path, start, stop, self._get_plain)
        except PastEndError:
            raise too_short(f"{self.url}/{path}", stop) from None
        if part.total < stop:
            raise too_short(f"{self.url}/{path}", stop)
        return part.data

    def write(self, path: str, data: bytes) -> None:
        self._put(path, _content(len(data), lambda start, stop: data[start:stop]))

    def size(self, path: str) -> int:
        return int(self._ask(path, "head_object")["ContentLength"])

    def download(self, path: str, local: Path) -> None:
        with over(local) as f:

            def put(at: int, piece: bytes) -> None:
                os.pwrite(f.fileno(), piece, at)

            total = self._transfer(path, lambda start, stop: self._get(path, start, stop, self._get_plain, put))
            f.truncate(total)
            os.fsync(f.fileno())

    def upload(self, local: Path, path: str) -> None:
        with local.open("rb") as f:
            size = os.fstat(f.fileno()).st_size
            self._put(path, _content(size, lambda start, stop: os.pread(f.fileno(), stop - start, start)))

    def upload_resumable(self, local: Path, path: str) -> None:
        with local.open("rb") as f:
            size = os.fstat(f.fileno()).st_size
            content = _content(size, lambda start, stop: os.pread(f.fileno(), stop - start, start))
            if self._holds(path, content):
                return
            left: list[str] = []
            if size > UPLOAD_PART:
                # If the store refuses to list uploads, the whole file is sent.
                with suppress(UserError):
                    left = [upload.id for upload in self._unfinished(path) if upload.path == path]
            self._put(path, content, left, keep=True)

    def _holds(self, path: str, content: Content) -> bool:
        try:
            head = self._ask(path, "head_object")
        except FileNotFoundError:
            return False
        return int(head["ContentLength"]) == content.size and str(head.get("ETag", "")).strip('"') == content.etag

    def unfinished(self) -> list[Unfinished]:
        return self._unfinished("")

    def _unfinished(self, prefix: str) -> list[Unfinished]:
        """Unfinished uploads for paths with this prefix."""
        found: list[Unfinished] = []
        folder = f"{self._folder}/" if self._folder else ""
        marker: dict[str, str] = {}
        while True:
            name = {"Bucket": self.bucket, "Prefix": folder + prefix} | marker
            page = self._request("list_multipart_uploads", name)
            for upload in page.get("Uploads", []):
                found.append(Unfinished(upload["Key"].removeprefix(folder), upload["UploadId"]))
            if not page.get("IsTruncated") or not page.get("NextKeyMarker"):
                return found
            marker = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page.get("NextUploadIdMarker", "")}

    def abort(self, upload: Unfinished) -> None:
        with suppress(FileNotFoundError):
            self._ask(upload.path, "abort_multipart_upload", UploadId=upload.id)

    def delete(self, paths: Iterable[str]) -> None:
        parallel(lambda path: self._ask(path, "delete_object"), list(paths))

    def _name(self, path: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": f"{self._folder}/{path}" if self._folder else path}

    def _transfer(self, path: str, get: Callable[[int, int], _Part], *, whole: bool = False) -> int:
        """Reads a whole object by ranges, each by `get`, from threads. A broken connection costs one range.

        Returns its size. `whole`: the object is kept in memory, so an UnreadableError is raised as in `read`.
        """
        try:
            first = get(0, DOWNLOAD_CHUNK)
        except PastEndError:
            return 0  # No range fits an empty object.
        if whole:
            require_fit(f"{self.url}/{path}", first.total)

        def move(start: int) -> None:
            try:
                part = get(start, min(start + DOWNLOAD_CHUNK, first.total))
            except PastEndError:
                part = None
            if part is None or (part.etag, part.total) != (first.etag, first.total):
                raise UserError(f"{self.url}/{path} changed while it was read: nothing may write to data in use")

        parallel(move, range(DOWNLOAD_CHUNK, first.total, DOWNLOAD_CHUNK))
        return first.total

    def _get(self, path: str, start: int, stop: int, by: _Getter, sink: Sink | None = None) -> _Part:
        """Bytes start … stop − 1, or fewer at the object's end. PastEndError if `start` is not before its end.

        They go to `sink` in pieces, if there is one, and again from `start` on after a failure.
        """
        seconds = BODY_SECONDS / 2

        def get(fs: Any) -> _Part:
            nonlocal seconds
            seconds *= 2
            pieces: list[bytes] = []
            head = by(fs, path, start, stop, seconds, sink or (lambda at, piece: pieces.append(piece)))
            if head.read != min(stop, head.total) - start:
                raise ShortReadError(f"{self.url}/{path}: {head.read} bytes of {start} … {stop - 1}")
            return _Part(b"".join(pieces), head.etag, head.total)

        return self._call(get, f"get_object {path}")

    def _get_plain(self, fs: Any, path: str, start: int, stop: int, seconds: float, sink: Sink) -> Head:
        reader = self._plain
        if reader is None or reader.fs is not fs:
            reader = self._plain = PlainReader(fs, CONNECT_TIMEOUT_SECONDS, READ_TIMEOUT_SECONDS)
        head = reader.get("/".join(self._name(path).values()), start, stop, seconds, sink)
        return head or self._get_by_client(fs, path, start, stop, seconds, sink)

    def _get_by_client(self, fs: Any, path: str, start: int, stop: int, seconds: float, sink: Sink) -> Head:
        from fsspec.asyn import sync

        response = fs.call_s3("get_object", **self._name(path), Range=f"bytes={start}-{stop - 1}")
        data: bytes = sync(fs.loop, _body, response, seconds)
        sink(start, data)
        # A server may answer a range of the whole object without a Content-Range.
        total = int(response.get("ContentRange", "").rpartition("/")[2] or response["ContentLength"])
        return Head(response.get("ETag", ""), total, len(data))

    def _ask(self, path: str, method: str, **arguments: Any) -> Any:
        """One request on an object."""
        return self._request(method, self._name(path) | arguments, writing=method != "head_object")

    def _request(self, method: str, arguments: dict[str, Any], *, writing: bool = False) -> Any:
        what = f"{method} {arguments.get('Key', '')}".rstrip()
        return self._call(lambda fs: fs.call_s3(method, **arguments), what, writing=writing)

    def _put(self, path: str, content: Content, left: Sequence[str] = (), *, keep: bool = False) -> None:
        if content.size <= UPLOAD_PART:
            self._ask(path, "put_object", Body=content.cut(0, content.size))
            return
        try:
            send_parts(lambda method, **arguments: self._ask(path, method, **arguments), content, left, keep=keep)
        except UserError as e:
            raise e if self.url in str(e) else UserError(f"{self.url}/{path}: {e}") from None

    def files(self) -> dict[str, int]:
        found = self._call(lambda fs: fs.find(self.prefix, detail=True), "listing")
        # An object named like the prefix is not a file under it.
        names = ((name.removeprefix(f"{self.prefix}/"), int(info["size"])) for name, info in found.items())
        return dict(sorted((name, size) for name, size in names if name != self.prefix))

    def _call(self, action: Callable[[Any], T], what: str, *, writing: bool = False) -> T:
        """Runs one request, and retries transient failures until the deadline.

        `what`: the operation and the object, for errors. StoreUnavailableError after the deadline.
        """
        began = time.monotonic()
        pause = PAUSE_SECONDS
        renewed = False
        tries = 0
        while True:
            tries += 1
            if self._stopped:
                raise UserError(f"{self.url}: stopped")
            client = self._fs
            try:
                result = action(client)
                self._answered = True
                return result
            except Exception as e:
                if denied(e) and not renewed:
                    # A new client reads the environment and the credentials files again.
                    renewed = True
                    if self._client is client:
                        self._client = None
                    continue
                final = fault(e, self.url, writing=writing, patient=self._answered or "RANK" in os.environ)
                if final is not None:
                    raise final from None
                spent = time.monotonic() - began
                if spent + pause > DEADLINE_SECONDS:
                    reason = cannot_connect(e) if unreachable(e) else f"{first_line(e)}{status_of(e)}"
                    raise StoreUnavailableError(
                        f"{self.url}: {what} failed {tries} time{'s' * (tries > 1)} in {spent:.0f} s: {reason}"
                    ) from e
            time.sleep(pause * random.uniform(0.5, 1.5))
            pause = min(pause * 2, LONGEST_PAUSE_SECONDS)


def _new_client() -> Any:
    import s3fs

    anonymous = os.environ.get(ANONYMOUS, "0")
    if anonymous not in ("0", "1"):
        raise UserError(f"{ANONYMOUS}={anonymous}: write 1 for unsigned requests, 0 for signed ones")
    client = s3fs.S3FileSystem(
        anon=anonymous == "1",
        # s3fs caches directory listings forever, so new files of other ranks would stay invisible.
        use_listings_cache=False,
        skip_instance_cache=True,
        config_kwargs={
            "retries": {"total_max_attempts": 1},
            "connect_timeout": CONNECT_TIMEOUT_SECONDS,
            "read_timeout": READ_TIMEOUT_SECONDS,
            # Presigned addresses would have version 2 by default, refused by newer buckets.
            "signature_version": "s3v4",
        },
    )
    client.retries = 1
    return client


def _require_endpoint() -> None:
    """UserError for an AWS_ENDPOINT_URL with a password, or malformed: botocore would raise errors of any type."""
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        endpoint = os.environ.get(name, "")
        refuse_credentials(endpoint)
        if endpoint and not re.fullmatch(r"https?://[\w.:\[\]-]+(/\S*)?", endpoint):
            raise UserError(f"{name} is '{endpoint}': write it with its scheme, as http://minio:9000")


async def _body(response: dict[str, Any], seconds: float) -> Any:
    """The whole body. TimeoutError, a transient failure, after `seconds`."""

    async def read() -> Any:
        async with response["Body"] as body:
            return await body.read()

    return await asyncio.wait_for(read(), seconds)


def _content(size: int, cut: Callable[[int, int], bytes]) -> Content:
    return Content(size, cut, max(UPLOAD_PART, -(-size // MOST_PARTS)))


def open_store(url: str, *, links: bool = False) -> Store:
    """The store at a plain path, ``file://`` path or ``s3://bucket/prefix``. Nothing is read yet.

    Other schemes are entry points (docs/extending.md). They are never import paths, since a URL may come from others.
    `links`: whether files of a local folder may be links to the outside.
    """
    refuse_credentials(url)
    if url.startswith("s3://"):
        return S3Store(url)
    scheme, separator, rest = url.partition("://")
    if separator and scheme != "file":
        if scheme.isidentifier() and extensions.installed(extensions.STORAGES, scheme):
            store: Store = extensions.load(extensions.STORAGES, scheme)(url)
            return store
        raise UserError(f"'{url}': unknown scheme '{scheme}': write a path, file:// or s3://bucket/prefix")
    return LocalStore(expand_home(rest if separator else url), links=links)
