"""Uploads large objects in parts: several at a time, each retried alone, resumable after a kill.

An upload and its parts stay in the store until it is completed or aborted. A part counts as sent if its size is right
and its ETag is the MD5 of the local bytes. With encryption by the store, an ETag is no MD5, and every part is sent
again: slower, never wrong.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import suppress
from threading import Event
from typing import Any, NamedTuple, TypeVar

from ibq_scale.errors import UserError

T = TypeVar("T")
U = TypeVar("U")
# Concurrent ranges or parts of one file.
CONNECTIONS = 4
_MD5 = re.compile(r"[0-9a-f]{32}")

Ask = Callable[..., Any]
"""Makes one request about one object, by its method's name and arguments. Retries transient failures.

FileNotFoundError if the upload is unknown, UserError for permanent failures.
"""


class Content(NamedTuple):
    """An object's content, and its division into parts."""

    size: int
    cut: Callable[[int, int], bytes]
    """Returns the bytes start … stop − 1. Called from threads."""
    step: int
    """Bytes of every part but the last."""

    def part(self, number: int) -> bytes:
        """A part's bytes. Numbers begin at 1."""
        return self.cut((number - 1) * self.step, min(number * self.step, self.size))

    @property
    def numbers(self) -> range:
        return range(1, -(-self.size // self.step) + 1)

    @property
    def etag(self) -> str:
        """The ETag of an object sent in these parts, or whole if there is one part. Reads everything."""
        if self.size <= self.step:
            return _md5(self.cut(0, self.size))
        return _whole_etag([_md5(self.part(number)) for number in self.numbers])


def send_parts(ask: Ask, content: Content, left: Sequence[str] = (), *, keep: bool = False) -> None:
    """Writes an object in parts. Resumes the fullest of the uploads `left` and aborts the others.

    On failure its own upload is aborted too, or left for the next try with `keep`.
    """
    upload, parts = _fullest(ask, content, left)
    for attempt in range(2):
        # An upload ended by someone else meanwhile is restarted, once.
        upload, parts = (upload, parts) if upload and attempt == 0 else (_begin(ask), {})
        if _complete(ask, content, upload, parts, keep=keep):
            return
    raise UserError("the upload was aborted by someone else, twice: start it again")


def _begin(ask: Ask) -> str:
    return str(ask("create_multipart_upload")["UploadId"])


def _complete(ask: Ask, content: Content, upload: str, there: dict[int, str], *, keep: bool) -> bool:
    """Sends the parts not `there` and completes the object. False if the store no longer knows the upload."""
    sent: list[dict[str, Any]] = []
    try:
        sent = parallel(lambda number: _send_part(ask, content, upload, number, there), content.numbers)
        ask("complete_multipart_upload", UploadId=upload, MultipartUpload={"Parts": sent})
    except FileNotFoundError:
        # The first request to complete it may have succeeded, with its response lost.
        etags = [str(part["ETag"]).strip('"') for part in sent]
        return bool(etags) and _etag(ask) == _whole_etag(etags)
    except BaseException:
        if not keep:
            # The store keeps and bills the parts of an open upload, invisible in listings.
            with suppress(Exception):
                ask("abort_multipart_upload", UploadId=upload)
        raise
    return True


def _send_part(ask: Ask, content: Content, upload: str, number: int, there: dict[int, str]) -> dict[str, Any]:
    body = content.part(number)
    etag = there.get(number)
    if etag is None or etag.strip('"') != _md5(body):
        etag = ask("upload_part", UploadId=upload, PartNumber=number, Body=body)["ETag"]
    return {"PartNumber": number, "ETag": etag}


def _fullest(ask: Ask, content: Content, left: Sequence[str]) -> tuple[str, dict[int, str]]:
    """The upload with the most parts of the right size, and their ETags by number. "" if there is none."""
    found = ("", dict[int, str]())
    for upload in left:
        parts = _parts(ask, content, upload)
        other, found = (found[0], (upload, parts)) if not found[0] or len(parts) > len(found[1]) else (upload, found)
        if other:
            with suppress(FileNotFoundError, UserError):
                ask("abort_multipart_upload", UploadId=other)
    return found


def _parts(ask: Ask, content: Content, upload: str) -> dict[int, str]:
    parts: dict[int, str] = {}
    marker: dict[str, Any] = {}
    while True:
        try:
            page = ask("list_parts", UploadId=upload, **marker)
        except FileNotFoundError:
            return {}
        for part in page.get("Parts", []):
            number = int(part["PartNumber"])
            if number in content.numbers and int(part["Size"]) == min(
                content.step, content.size - (number - 1) * content.step
            ):
                parts[number] = str(part["ETag"])
        if not page.get("IsTruncated") or not page.get("NextPartNumberMarker"):
            return parts
        marker = {"PartNumberMarker": int(page["NextPartNumberMarker"])}


def _etag(ask: Ask) -> str:
    """The object's ETag, "" if there is none."""
    try:
        return str(ask("head_object").get("ETag", "")).strip('"')
    except FileNotFoundError:
        return ""


def _whole_etag(parts: Sequence[str]) -> str:
    """The ETag of an object of parts with these ETags. If these are not MD5s, it equals no object's."""
    if not all(_MD5.fullmatch(part) for part in parts):
        return "not comparable"
    return f"{_md5(b''.join(bytes.fromhex(part) for part in parts))}-{len(parts)}"


def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def parallel(work: Callable[[U], T], items: Sequence[U]) -> list[T]:
    """Results in order. After the first failure no further item is begun."""
    if not items:
        return []
    failed = Event()

    def guarded(item: U) -> T:
        if failed.is_set():
            # Never raised to the caller: items begin in order, so the failure comes first.
            raise CancelledError
        try:
            return work(item)
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(min(CONNECTIONS, len(items))) as pool:
        futures = [pool.submit(guarded, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            failed.set()
            raise
