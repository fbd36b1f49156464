"""A manifest's shards, stored in columns: every rank and data worker holds them, up to about a hundred thousand."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, overload

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from ibq_scale.config.base import Section
from ibq_scale.names import FileName, Sha256

# So that sums over all shards fit into 64 bits.
Count = Annotated[int, Field(ge=1, le=2**48)]
SHA256_BYTES = 32
# `ShardInfo`s kept by a table: several lookups a sample would take a fiftieth of its time.
MOST_KEPT = 4096


class ShardInfo(Section):
    """One shard: its file, number of samples, bytes and sha256 (hex). Image shards have an index NAME.index.json.

    The index has its own hash, because adopted shards may get a new index with other labels or samples for the same
    bytes.
    """

    name: FileName
    samples: Count
    bytes: Count
    sha256: Sha256
    index_sha256: Sha256 | None = None


class ShardTable(Sequence[ShardInfo]):
    """Acts as a tuple of `ShardInfo`, at about 100 bytes per shard. Pickling only copies arrays."""

    def __init__(self, shards: Sequence[ShardInfo]) -> None:
        names = [shard.name.encode() for shard in shards]
        self._names: NDArray[np.bytes_] = np.array(names, dtype=np.bytes_)
        self.samples: NDArray[np.int64] = np.array([shard.samples for shard in shards], dtype=np.int64)
        self.bytes: NDArray[np.int64] = np.array([shard.bytes for shard in shards], dtype=np.int64)
        self.sha256 = _digests(shard.sha256 for shard in shards)
        self._index_sha256 = _digests(shard.index_sha256 or "" for shard in shards)
        self._has_index_sha256: NDArray[np.bool_] = np.array([s.index_sha256 is not None for s in shards], dtype=bool)
        self._kept: dict[int, ShardInfo] = {}

    def __len__(self) -> int:
        return len(self.samples)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": {}}

    @overload
    def __getitem__(self, number: int) -> ShardInfo: ...
    @overload
    def __getitem__(self, number: slice) -> tuple[ShardInfo, ...]: ...
    def __getitem__(self, number: int | slice) -> ShardInfo | tuple[ShardInfo, ...]:
        if isinstance(number, slice):
            return tuple(self._info(place) for place in range(len(self))[number])
        found = self._kept.get(number)
        if found is None:
            if len(self._kept) >= MOST_KEPT:
                self._kept.clear()
            found = self._kept[number] = self._info(number)
        return found

    def _info(self, number: int) -> ShardInfo:
        return ShardInfo.model_construct(
            name=self._names[number].decode(),
            samples=int(self.samples[number]),
            bytes=int(self.bytes[number]),
            sha256=self.sha256[number].tobytes().hex(),
            index_sha256=self._index_sha256[number].tobytes().hex() if self._has_index_sha256[number] else None,
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(ShardInfo.__eq__, self, other))

    __hash__ = None  # type: ignore[assignment]

    def json(self) -> Iterator[str]:
        """Each shard as JSON with sorted keys, for the manifest's hash."""
        hexes = (rows.tobytes().hex() for rows in (self.sha256, self._index_sha256))
        of_shard, of_index = ([text[i : i + 64] for i in range(0, len(text), 64)] for text in hexes)
        columns = (self._names, self.samples, self.bytes, self._has_index_sha256)
        rows = zip(*(column.tolist() for column in columns), of_shard, of_index, strict=True)
        for name, samples, size, indexed, sha256, index_sha256 in rows:
            index = f'"{index_sha256}"' if indexed else "null"
            yield (
                f'{{"bytes":{size},"index_sha256":{index},"name":{json.dumps(name.decode())},"samples":{samples},'
                f'"sha256":"{sha256}"}}'
            )

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(
            cls,
            handler.generate_schema(tuple[ShardInfo, ...]),
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda shards: [shard.model_dump(mode="json") for shard in shards]
            ),
        )


def _digests(hexes: Iterator[str]) -> NDArray[np.uint8]:
    """Digests (n, 32), zeros for an empty text."""
    raw = b"".join(bytes.fromhex(text).rjust(SHA256_BYTES, b"\0") for text in hexes)
    return np.frombuffer(raw, dtype=np.uint8).reshape(-1, SHA256_BYTES)
