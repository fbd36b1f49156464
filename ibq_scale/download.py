"""Downloads one verified file over HTTP. For login nodes, since jobs never download."""

from __future__ import annotations

import hashlib
import http.client
import os
import secrets
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from io import BufferedIOBase
from pathlib import Path

from ibq_scale.errors import UserError

ATTEMPTS = 6
TIMEOUT_S = 30.0
FIRST_PAUSE_S = 1.0
CHUNK = 1 << 20
# Status codes worth another try: time-outs, too many requests, server errors.
PASSING = {408, 425, 429, 500, 502, 503, 504}

Watch = Callable[[int, int | None], None]
"""Called with the bytes so far and the size of the file, if the server sends it."""


class NoNetworkError(UserError):
    """The server is unreachable from this node."""


def download(url: str, to: Path, sha256_prefix: str, watch: Watch) -> None:
    """Downloads `url` to `to`, atomically and verified (its sha256 begins with `sha256_prefix`).

    A broken connection is resumed after a growing pause. Redirects are followed, and the environment's proxies used.
    UserError with the reason of a failure (`NoNetworkError` if no server answers).
    """
    partial = to.with_name(f".{to.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("xb+") as f:
            _fetch(url, f, sha256_prefix, watch)
            os.fsync(f.fileno())
        partial.replace(to)
    except OSError as e:
        raise UserError(f"cannot write {to}: {e.strerror or e}") from None
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def sha256_of(f: BufferedIOBase) -> str:
    """sha256 of an open file's bytes, hex."""
    f.seek(0)
    return hashlib.file_digest(f, "sha256").hexdigest()


def _fetch(url: str, f: BufferedIOBase, sha256_prefix: str, watch: Watch) -> None:
    trouble = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(FIRST_PAUSE_S * 2 ** (attempt - 1))
        resumed = f.seek(0, os.SEEK_END) > 0
        trouble = _go_on(url, f, watch, first=attempt == 0) or ""
        if trouble:
            continue
        found = sha256_of(f)
        if found.startswith(sha256_prefix):
            return
        trouble = f"what came is not the published file: its sha256 begins with {found[:8]}, not {sha256_prefix}"
        if not resumed:
            # Another try would not help: a proxy's page, or another file under this name.
            break
        f.truncate(0)
    raise UserError(f"cannot fetch {url}: {trouble}")


def _go_on(url: str, f: BufferedIOBase, watch: Watch, first: bool) -> str | None:
    """Resumes at the end of `f`. None at the end of the file, else the interrupting error."""
    have = f.seek(0, os.SEEK_END)
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        answer = urllib.request.urlopen(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as e:
        e.close()
        if e.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and have:
            return None
        if e.code not in PASSING:
            raise UserError(f"{url} is answered with {e.code} {e.reason}") from None
        return f"{e.code} {e.reason}"
    except urllib.error.URLError as e:
        # After a first success the network may come back.
        if first:
            host = urllib.parse.urlsplit(url).netloc
            raise NoNetworkError(f"cannot reach {host} ({_reason(e)}): no internet here?") from None
        return _reason(e)
    except (OSError, http.client.HTTPException) as e:
        return _reason(e)
    with answer:
        if have and not _continues(answer, have):
            f.truncate(0)
            have = f.seek(0)
        return _pour(answer, f, have, watch)


def _pour(answer: http.client.HTTPResponse, f: BufferedIOBase, have: int, watch: Watch) -> str | None:
    length = answer.headers.get("Content-Length")
    whole = have + int(length) if length and length.isdigit() else None
    while True:
        try:
            chunk = answer.read(CHUNK)
        except (OSError, http.client.HTTPException) as e:
            return _reason(e)
        if not chunk:
            break
        f.write(chunk)
        have += len(chunk)
        watch(have, whole)
    f.flush()
    return f"cut off after {have:,} of {whole:,} bytes" if whole is not None and have < whole else None


def _continues(answer: http.client.HTTPResponse, have: int) -> bool:
    """Whether the server sent the requested range, and not the whole file."""
    return answer.status == http.HTTPStatus.PARTIAL_CONTENT and answer.headers.get("Content-Range", "").startswith(
        f"bytes {have}-"
    )


def _reason(e: BaseException) -> str:
    inner = e.reason if isinstance(e, urllib.error.URLError) else e
    if isinstance(inner, OSError) and inner.strerror:
        return inner.strerror
    return str(inner) or type(inner).__name__
