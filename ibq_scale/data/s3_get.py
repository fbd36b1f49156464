"""Reads ranges of S3 objects over plain HTTP connections.

A request is signed once per object, since a signature does not cover the range, and the body goes to its target in
pieces. A small range then takes a third of the CPU time of a request by s3fs, a large one half. Addresses and
credentials are those of s3fs. It takes over whatever the store refuses, as redirections to another region.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple
from urllib.parse import parse_qs, quote

from ibq_scale.data.s3_errors import AnswerError, ShortReadError

# S3 takes signatures of the last 15 minutes.
RENEW_SECONDS = 300.0
# A refused signature below this age means that s3fs has to serve this store. An older one may have outlived its
# credentials.
FRESH_SECONDS = 60.0
MOST_SIGNED = 1024
# More connections than threads, so none is thrown away.
CONNECTIONS = 64
PIECE = 256 << 10
# Redirections, and signatures that are not accepted.
_REFUSED = {301, 302, 307, 308, 400, 401, 403}

Sink = Callable[[int, bytes], object]
"""Takes a piece of an object and its offset."""


class Head(NamedTuple):
    """An object's ETag and bytes, and the bytes read."""

    etag: str
    total: int
    read: int


class _Signed(NamedTuple):
    """A request for a whole object. `at`: when it was signed (monotonic)."""

    at: float
    address: str
    headers: dict[str, str]


class _Signer(NamedTuple):
    """The address of a bucket, and botocore's signer. `at`: when the credentials were read (monotonic)."""

    at: float
    base: str
    auth: Any


class PlainReader:
    """Belongs to one s3fs client and one process. Thread-safe."""

    def __init__(self, fs: Any, connect_seconds: float, silence_seconds: float) -> None:
        self.fs = fs
        self._timeout = (connect_seconds, silence_seconds)
        self._usable = True
        self._session: Any = None
        self._signer: _Signer | None = None
        self._signed: dict[str, _Signed] = {}

    def get(self, name: str, start: int, stop: int, seconds: float, sink: Sink) -> Head | None:
        """Passes bytes start … stop − 1 of the object `name` (bucket/key) to `sink`, in order.

        None if s3fs has to serve this. TimeoutError if the body takes more than `seconds`,
        AnswerError for errors of the store, ShortReadError for a broken connection, else botocore's errors.
        """
        if not self._usable:
            return None
        signed = self._sign(name)
        response = self._send(signed, start, stop)
        if response.status_code in _REFUSED:
            response.raw.close()
            self._signed.clear()
            self._signer = None
            self._usable = time.monotonic() - signed.at > FRESH_SECONDS
            return None
        from urllib3.exceptions import HTTPError

        try:
            if response.status_code not in (200, 206):
                raise _error(response.status_code, response.raw.read(1 << 16))
            read = _pass_on(response.raw, start, seconds, sink)
        except HTTPError as e:
            raise ShortReadError(f"{name}: {e}") from None
        finally:
            # After the whole body this keeps the connection.
            response.raw.release_conn() if response.raw.closed else response.raw.close()
        headers = response.headers
        # A server may answer a range of the whole object without a Content-Range.
        total = headers.get("Content-Range", "").rpartition("/")[2] or headers.get("Content-Length", "")
        return Head(headers.get("ETag", ""), int(total) if total.isdecimal() else read, read)

    def _sign(self, name: str) -> _Signed:
        now = time.monotonic()
        known = self._signed.get(name)
        if known is not None and now - known.at < RENEW_SECONDS:
            return known
        if len(self._signed) >= MOST_SIGNED:
            self._signed.clear()
        from botocore.awsrequest import AWSRequest

        key = quote(name.partition("/")[2], safe="/~")
        if self._signer is None or now - self._signer.at > FRESH_SECONDS:
            self._signer = self._new_signer(name, key)
        request = AWSRequest("GET", f"{self._signer.base}{key}")
        if self._signer.auth is not None:
            self._signer.auth.add_auth(request)
        found = self._signed[name] = _Signed(now, request.url, dict(request.headers))
        return found

    def _new_signer(self, name: str, key: str) -> _Signer:
        from botocore.auth import S3SigV4Auth
        from fsspec.asyn import sync

        # A presigned address contains the endpoint, the way to name the bucket, and the region.
        address, _, query = self.fs.sign(name).partition("?")
        scope = parse_qs(query).get("X-Amz-Credential")
        auth = None
        # Anonymous requests have none.
        if scope is not None:
            _, _, region, service, _ = scope[0].rsplit("/", 4)
            auth = S3SigV4Auth(sync(self.fs.loop, _credentials, self.fs.session), service, region)
        return _Signer(time.monotonic(), address.removesuffix(key), auth)

    def _send(self, signed: _Signed, start: int, stop: int) -> Any:
        from botocore.awsrequest import AWSRequest
        from botocore.httpsession import URLLib3Session
        from botocore.utils import get_environ_proxies

        if self._session is None:
            bundle = self.fs.session.get_config_variable("ca_bundle") or os.environ.get("REQUESTS_CA_BUNDLE")
            # As fsspec's own configuration may set them.
            verify, proxies = self.fs.client_kwargs.get("verify"), self.fs.config_kwargs.get("proxies")
            self._session = URLLib3Session(
                verify=bundle or True if verify is None else verify,
                proxies=proxies or get_environ_proxies(signed.address),
                timeout=self._timeout,
                max_pool_connections=CONNECTIONS,
            )
        headers = signed.headers | {"Range": f"bytes={start}-{stop - 1}"}
        return self._session.send(AWSRequest("GET", signed.address, headers, stream_output=True).prepare())


async def _credentials(session: Any) -> Any:
    return await (await session.get_credentials()).get_frozen_credentials()


def _pass_on(raw: Any, start: int, seconds: float, sink: Sink) -> int:
    """Returns the bytes read."""
    at, end = start, time.monotonic() + seconds
    while piece := raw.read1(PIECE):
        sink(at, piece)
        at += len(piece)
        if time.monotonic() > end:
            raise TimeoutError(f"the body took more than {seconds:.0f} s")
    return at - start


def _error(status: int, body: bytes) -> AnswerError:
    fields = dict(re.findall(r"<(Code|Message)>([^<]*)</", body.decode(errors="replace")))
    return AnswerError(status, fields.get("Code", str(status)), fields.get("Message", ""))
