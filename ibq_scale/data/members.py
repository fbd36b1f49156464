"""Lists a tar's members with their places in the file, also in concatenated tars and for links in a tar."""

from __future__ import annotations

import posixpath
import tarfile
from collections.abc import Generator, Iterator
from dataclasses import dataclass

from ibq_scale.data.ranges import RangeReader
from ibq_scale.errors import UserError

COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK": "zip"}
_ZEROS = bytes(1 << 16)


@dataclass(frozen=True)
class Place:
    """The place of a member's bytes in its tar."""

    offset: int
    size: int


@dataclass(frozen=True)
class Named:
    """A member: its name, the start of its first header, and the place of its bytes."""

    name: str
    start: int
    place: Place


class CutTarError(Exception):
    """A tar has no proper end."""


class MoreThanTarError(CutTarError):
    """A whole tar is followed by other bytes."""


def members(reader: RangeReader, start: int = 0) -> Iterator[Named]:
    """Yields regular members from the header at byte `start` on, and links with their targets' bytes.

    CutTarError, after the whole members, if the tar breaks off.
    """
    targets: dict[str, Place] | None = None
    for info in _headers(reader, start):
        place = Place(info.offset_data, info.size)
        if info.islnk() or info.issym():
            if targets is None:
                # Read from the tar's beginning: a link points to an earlier member.
                targets = {i.name: Place(i.offset_data, i.size) for i in _headers(reader, 0, tell=False) if i.isreg()}
            folder = posixpath.dirname(info.name) if info.issym() else ""
            target = targets.get(posixpath.normpath(posixpath.join(folder, info.linkname)), targets.get(info.linkname))
            # A dangling link has no bytes. Its sample is rejected on reading.
            place = target or Place(info.offset_data, 0)
        elif not info.isreg():
            continue
        yield Named(info.name, info.offset, place)


def _headers(reader: RangeReader, start: int, *, tell: bool = True) -> Iterator[tarfile.TarInfo]:
    """Yields all headers. If the tar breaks off: CutTarError with `tell`, else the end."""
    try:
        while True:
            end = yield from _one_tar(reader, start)
            following = _after_zeros(reader, end)
            if following is None:
                return
            start = following
    except CutTarError:
        if tell:
            raise


def _one_tar(reader: RangeReader, start: int) -> Generator[tarfile.TarInfo, None, int]:
    """Yields one tar's headers. Returns the position of its end mark."""
    reader.seek(start)
    try:
        # ":" and not "|": positions must be the file's own.
        with tarfile.open(fileobj=reader, mode="r:") as tar:
            while (info := tar.next()) is not None:
                # Otherwise tarfile keeps every member in memory.
                tar.members.clear()  # type: ignore[attr-defined]
                if info.size < 0 or info.offset_data + (info.size if info.isreg() else 0) > reader.size:
                    raise CutTarError(f"breaks off in {info.name}")
                yield info
            end: int = tar.offset
    except UserError:
        raise
    except (tarfile.TarError, ValueError, OSError, ArithmeticError, LookupError) as e:
        # tarfile raises any of these for odd numbers in a header.
        raise CutTarError(f"is no whole tar ({_why(reader, e)})") from None
    if end == start and start:
        raise MoreThanTarError(f"goes on after its end mark, at byte {start}, with what is no tar")
    if reader.read_at(end, tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        # The last sample may lack its label.
        raise CutTarError(f"breaks off at byte {end}: there is no end-of-archive mark")
    return end


def _why(reader: RangeReader, error: Exception) -> str:
    head = reader.read_at(0, 8)
    kind = next((kind for magic, kind in COMPRESSED.items() if head.startswith(magic)), None)
    return f"it is compressed by {kind}: unpack it" if kind else str(error)


def _after_zeros(reader: RangeReader, position: int) -> int | None:
    """The position of the next block not of zeros: a tar appended by ``cat``. None if there is none."""
    while block := reader.read_at(position, len(_ZEROS)):
        if block != _ZEROS[: len(block)]:
            first = len(block) - len(block.lstrip(b"\0"))
            return position + first // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
        position += len(block)
    return None
