"""One verified file over HTTP: for login nodes, since nothing downloads inside a job."""

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
# Answers that another try may change: time-outs, too many requests, the server's own troubles.
PASSING = {408, 425, 429, 500, 502, 503, 504}

Watch = Callable[[int, int | None], None]
"""Called with the bytes so far and, where the server says so, of the whole file."""


class NoNetworkError(UserError):
    """The server cannot be reached at all from here."""


def download(url: str, to: Path, sha256_prefix: str, watch: Watch) -> None:
    """Fetches `url` to `to`, which appears whole and verified (the sha256 begins with `sha256_prefix`) or not at all.

    A connection that breaks is taken up where it broke, with a pause that grows. Redirects are followed, and the
    environment's proxies used. UserError (`NoNetworkError` where no server answers) says why there is no file.
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
    """Of all bytes of an open file, hex."""
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
            # The same again would be no better: a page of a proxy, or another file under this name.
            break
        f.truncate(0)
    raise UserError(f"cannot fetch {url}: {trouble}")


def _go_on(url: str, f: BufferedIOBase, watch: Watch, first: bool) -> str | None:
    """Reads on from the end of `f`. None when the server has no more, else what broke it off."""
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
        # Later the network was there before and may come back.
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
    """Whether the server gave what was asked for, and not the whole file."""
    return answer.status == http.HTTPStatus.PARTIAL_CONTENT and answer.headers.get("Content-Range", "").startswith(
        f"bytes {have}-"
    )


def _reason(e: BaseException) -> str:
    inner = e.reason if isinstance(e, urllib.error.URLError) else e
    if isinstance(inner, OSError) and inner.strerror:
        return inner.strerror
    return str(inner) or type(inner).__name__
