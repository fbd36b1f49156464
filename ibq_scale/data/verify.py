"""Reads a whole data set. Compares every shard with the manifest, and every sample with its index."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from threading import Lock

from ibq_scale.data.folder import Store
from ibq_scale.data.index import ShardIndex, UnfitIndexError, index_name, index_of, read_table, table_name, table_of
from ibq_scale.data.manifest import NAME, Kind, Manifest, ShardInfo, load_manifest
from ibq_scale.data.progress import Progress
from ibq_scale.data.ranges import HashingReader
from ibq_scale.data.store import open_store
from ibq_scale.documents import parse_json
from ibq_scale.errors import UserError


@dataclass(frozen=True)
class Verified:
    """The amounts read, and one line per fault."""

    url: str
    shards: int
    samples: int
    bytes: int
    faults: tuple[str, ...]


def verify(url: str, *, workers: int = 4) -> Verified:
    """Checks all shards' sha256 and all indexed samples' CRC, on `workers` threads. UserError without a data set."""
    store = open_store(url)
    manifest = load_any_manifest(store)
    progress = Progress("verify", manifest.bytes)
    totals = [0, 0]
    lock = Lock()

    def count(samples: int, size: int) -> None:
        with lock:
            totals[0] += samples
            totals[1] += size
            progress.show(totals[0], totals[1], 0)

    check = _check_images if manifest.kind == "images" else _check_codes
    # Threads suffice: sha256, crc32 and requests release the GIL.
    with ThreadPoolExecutor(workers) as pool:
        faults = [f for found in pool.map(lambda shard: check(store, shard, count), manifest.shards) for f in found]
    progress.close()
    return Verified(store.url, len(manifest.shards), totals[0], totals[1], tuple(faults))


def load_any_manifest(store: Store) -> Manifest:
    """A data set's manifest, of either kind. UserError as `load_manifest`."""
    try:
        kind: Kind = "codes" if parse_json(store.read(NAME)).get("kind") == "codes" else "images"
    except (FileNotFoundError, NotADirectoryError, UserError, ValueError, AttributeError):
        kind = "images"
    return load_manifest(store, kind)


def load_index(store: Store, shard: ShardInfo) -> ShardIndex:
    """A shard's index. UserError if it is missing, damaged or another shard's."""
    name = index_name(shard.name)
    try:
        return index_of(store.read(name), shard)
    except FileNotFoundError:
        raise UserError(f"{name}: missing") from None
    except UnfitIndexError as e:
        raise UserError(f"{name}: {e}") from None


def _check_codes(store: Store, shard: ShardInfo, count: Callable[[int, int], None]) -> list[str]:
    faults = _check(store, shard, None)
    count(shard.samples, shard.bytes)
    return faults


def _check_images(store: Store, shard: ShardInfo, count: Callable[[int, int], None]) -> list[str]:
    try:
        index = load_index(store, shard)
        faults = _check(store, shard, index)
    except UserError as e:
        faults = [str(e), *_check(store, shard, None)]
    count(shard.samples, shard.bytes)
    return faults


def _check(store: Store, shard: ShardInfo, index: ShardIndex | None) -> list[str]:
    """Reads the shard once and returns its faults."""
    try:
        size = store.size(shard.name)
    except FileNotFoundError:
        return [f"{shard.name}: missing"]
    if size != shard.bytes:
        return [f"{shard.name}: {size} bytes instead of {shard.bytes}"]
    reader = HashingReader(store, shard.name, size)
    faults = []
    members = sorted(index.members, key=lambda member: member.offset) if index else []
    for before, after in pairwise(members):
        # Links in a tar share the bytes of their target.
        if before.offset + before.size > after.offset and (before.offset, before.size) != (after.offset, after.size):
            faults.append(f"{index_name(shard.name)}: samples {before.key} and {after.key} overlap")
    for member in members:
        if zlib.crc32(reader.read_at(member.offset, member.size)) != member.crc:
            faults.append(f"{shard.name}: sample {member.key} changed (crc differs)")
    # The stream ignores a damaged table and another index's.
    if index is not None and read_table(store, shard) not in (None, table_of(index).tobytes()):
        faults.append(f"{table_name(shard.name)}: does not have the places of its index: prepare again")
    if reader.sha256() != shard.sha256:
        faults.insert(0, f"{shard.name}: content changed (sha256 differs)")
    return faults
