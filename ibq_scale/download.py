"""One verified file over HTTP, for login nodes: jobs download nothing."""

from __future__ import annotations

import socket
import sys
import time
import urllib.error
import urllib.parse
from http.client import HTTPException
from pathlib import Path

from ibq_scale.errors import UserError

ATTEMPTS = 4
TIMEOUT_S = 30.0
FIRST_PAUSE_S = 1.0
# Answers that may change on another try: time-outs, too many requests, errors of the server.
PASSING = {408, 425, 429, 500, 502, 503, 504}


class NoNetworkError(UserError):
    """The server cannot be reached from here."""


def download(url: str, to: Path, sha256_prefix: str) -> None:
    """Fetches `url` to `to`. The file appears whole, with a sha256 of this prefix, or not at all.

    A broken download starts again, up to `ATTEMPTS` times, after a growing pause. UserError gives the last fault,
    NoNetworkError an unreachable server.
    """
    from torch.hub import download_url_to_file

    # urlopen takes the time limit of a socket from here.
    before, trouble = socket.getdefaulttimeout(), ""
    socket.setdefaulttimeout(TIMEOUT_S)
    try:
        for attempt in range(ATTEMPTS):
            time.sleep(FIRST_PAUSE_S * 2 ** (attempt - 1) if attempt else 0)
            try:
                return download_url_to_file(url, str(to), sha256_prefix, progress=sys.stderr.isatty())
            except urllib.error.HTTPError as e:
                e.close()
                trouble = f"{e.code} {e.reason}"
                if e.code not in PASSING:
                    raise UserError(f"{url} is answered with {trouble}") from None
            except urllib.error.URLError as e:
                trouble = _reason(e.reason)
                if not attempt:
                    host = urllib.parse.urlsplit(url).netloc
                    raise NoNetworkError(f"cannot reach {host} ({trouble}): no internet here?") from None
            except RuntimeError as e:
                trouble = f"not the whole published file: {e}"
            except (HTTPException, ConnectionError, TimeoutError) as e:
                trouble = _reason(e)
            except OSError as e:
                raise UserError(f"cannot write {to}: {e.strerror or e}") from None
    finally:
        socket.setdefaulttimeout(before)
    raise UserError(f"cannot fetch {url}: {trouble}")


def _reason(e: object) -> str:
    return (isinstance(e, OSError) and e.strerror) or str(e) or type(e).__name__
