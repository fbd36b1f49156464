"""``NAME.index.json``: the places of a shard's samples. A shard of pictures is only read by its index.

``NAME.table`` has the same places in binary: sha256 of the index file, sha256 of the rows, and the rows (`PICTURE`).
The stream reads it where it belongs to the manifest's index, else the index, as in sets of earlier versions.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ibq_scale.data.folder import Store
from ibq_scale.data.manifest import ShardInfo
from ibq_scale.documents import parse_json
from ibq_scale.errors import StoreUnavailableError, UserError

Table = NDArray[np.void]

INDEX_VERSION = 1
# Where a shard's pictures are, by row.
PICTURE = np.dtype([("offset", "<i8"), ("size", "<i4"), ("crc", "<u4"), ("label", "<i4")])
_DIGESTS = 64
# Prefix of the plan in an adopted tar's index. It distinguishes adopted from prepared shards.
ADOPTED = "adopted-1-"


@dataclass(frozen=True)
class Reject:
    """An unusable picture, and the reason."""

    path: str
    reason: str


@dataclass(frozen=True)
class Member:
    """One sample of a shard, with the place of its picture's bytes in the tar."""

    key: str
    offset: int
    size: int
    crc: int
    label: int
    source: str


@dataclass(frozen=True)
class ShardIndex:
    """A shard's samples. `plan` identifies its inputs and options, so a re-run can reuse it."""

    version: int
    plan: str
    bytes: int
    sha256: str
    members: tuple[Member, ...]
    rejects: tuple[Reject, ...]
    filtered: int = 0
    """Samples left out by a condition."""
    after: tuple[int, int] | None = None
    """(unit, position) at the start of the job's next shard. None in the last one."""
    met: dict[str, Any] | None = None
    """Formats, modes and sizes of the pictures."""

    def to_json(self) -> str:
        # `asdict` copies every value of every member.
        plain = {name: [vars(entry) for entry in getattr(self, name)] for name in ("members", "rejects")}
        values = vars(self) | plain
        # These keys are newer than version 1: empty ones are not written.
        if not self.filtered:
            del values["filtered"]
        if self.after is None:
            del values["after"]
        if self.met is None:
            del values["met"]
        return json.dumps(values, separators=(",", ":")) + "\n"

    @staticmethod
    def from_json(text: str) -> ShardIndex:
        values = parse_json(text)
        if not isinstance(values, dict):
            raise ValueError("it is no JSON object")
        if values.get("version") != INDEX_VERSION:
            raise UserError(f"a shard index has version {values.get('version')}, this program reads {INDEX_VERSION}")
        values["members"] = tuple(_member(m) for m in values["members"])
        values["rejects"] = tuple(Reject(**r) for r in values["rejects"])
        if values.get("after") is not None:
            values["after"] = tuple(values["after"])
        return ShardIndex(**values)


def _member(values: dict[str, Any]) -> Member:
    """Checks a member. ValueError or TypeError for values impossible in a tar."""
    member = Member(**values)
    if not (_is_within(member.offset, 0, 1 << 62) and _is_within(member.size, 0, 1 << 31)):
        raise ValueError(f"a member has offset {member.offset!r:.30} and size {member.size!r:.30}")
    if not (_is_within(member.crc, 0, 1 << 32) and _is_within(member.label, -1, 1 << 31)):
        raise ValueError(f"a member has crc {member.crc!r:.30} and label {member.label!r:.30}")
    if not (isinstance(member.key, str) and isinstance(member.source, str)):
        raise ValueError("a member's key and source are text")
    return member


def _is_within(number: object, first: int, stop: int) -> bool:
    return type(number) is int and first <= number < stop


def index_name(shard: str) -> str:
    """The name of a shard's index file."""
    return f"{shard}.index.json"


def table_name(shard: str) -> str:
    """The name of a shard's table."""
    return f"{shard}.table"


def table_of(index: ShardIndex) -> Table:
    """The places of the shard's pictures."""
    return np.array([(m.offset, m.size, m.crc, m.label) for m in index.members], dtype=PICTURE)


def write_index(store: Store, shard: str, index: ShardIndex) -> None:
    """Writes a shard's table and then its index."""
    data = index.to_json().encode()
    rows = table_of(index).tobytes()
    store.write(table_name(shard), hashlib.sha256(data).digest() + hashlib.sha256(rows).digest() + rows)
    store.write(index_name(shard), data)


def read_table(store: Store, shard: ShardInfo) -> bytes | None:
    """The rows of a shard's table. None if there is none for the manifest's index, or it is damaged."""
    if shard.index_sha256 is None:
        return None
    try:
        data = store.read_range(table_name(shard.name), 0, _DIGESTS + shard.samples * PICTURE.itemsize)
    except FileNotFoundError:
        return None
    except UserError as e:
        if isinstance(e, StoreUnavailableError):
            raise
        return None
    rows = data[_DIGESTS:]
    digests = bytes.fromhex(shard.index_sha256) + hashlib.sha256(rows).digest()
    table = np.frombuffer(rows, PICTURE)
    least = min(int(table[name].min()) for name in ("offset", "size"))
    fits = least >= 0 and int(table["offset"].max()) < 1 << 62 and int(table["label"].min()) >= -1
    return rows if fits and data[:_DIGESTS] == digests else None


class UnfitIndexError(ValueError):
    """An index cannot be read, or is not the manifest's."""


def index_of(data: bytes, shard: ShardInfo) -> ShardIndex:
    """Parses a shard's index file. UnfitIndexError with a short reason if it does not fit."""
    try:
        index = ShardIndex.from_json(data.decode())
    except (ValueError, KeyError, TypeError) as e:
        raise UnfitIndexError(f"damaged ({e})") from None
    if index.sha256 != shard.sha256 or len(index.members) != shard.samples:
        raise UnfitIndexError("belongs to another shard than the manifest's")
    if shard.index_sha256 not in (None, hashlib.sha256(data).hexdigest()):
        raise UnfitIndexError("is not the one that the manifest means (sha256 differs)")
    return index
