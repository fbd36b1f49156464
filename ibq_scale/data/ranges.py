"""A store's file as a seekable file object for tarfile and pyarrow, with few requests and little memory."""

from __future__ import annotations

import hashlib
import io
from collections import OrderedDict

from ibq_scale.data.folder import Store

BLOCK = 4 << 20
# Parquet columns and a sample's members are read in turns. A single block would be fetched repeatedly.
BLOCKS_IN_MEMORY = 4


class RangeReader(io.RawIOBase):
    """Reads `name` of `size` bytes by ranges of `block` bytes (default 4 MiB). The last four stay in memory."""

    def __init__(self, store: Store, name: str, size: int, block: int | None = None) -> None:
        self.size = size
        self._block_size = block or BLOCK
        self._store = store
        self._name = name
        self._position = 0
        self._blocks: OrderedDict[int, bytes] = OrderedDict()

    def read(self, size: int | None = -1) -> bytes:
        """Up to `size` bytes, fewer only at the end."""
        stop = self.size if size is None or size < 0 else min(self._position + size, self.size)
        parts = []
        while self._position < stop:
            number, start = divmod(self._position, self._block_size)
            part = self._block(number)[start : start + stop - self._position]
            parts.append(part)
            self._position += len(part)
        return b"".join(parts)

    def read_at(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on, fewer only at the end."""
        self.seek(offset)
        return self.read(size)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        if position < 0:
            raise ValueError(f"position {position} is before the beginning")
        self._position = position
        return position

    def tell(self) -> int:
        return self._position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def _block(self, number: int) -> bytes:
        if number not in self._blocks:
            self._blocks[number] = self._load(number)
            if len(self._blocks) > BLOCKS_IN_MEMORY:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end(number)
        return self._blocks[number]

    def _load(self, number: int) -> bytes:
        start = number * self._block_size
        return self._store.read_range(self._name, start, min(start + self._block_size, self.size))


class HashingReader(RangeReader):
    """A `RangeReader` with a running hash: one pass over the file gives its content and its sha256."""

    def __init__(self, store: Store, name: str, size: int) -> None:
        super().__init__(store, name, size)
        self._digest = hashlib.sha256()
        self._hashed = 0

    def sha256(self) -> str:
        """The hash (hex) of the whole file. Reads the rest of it."""
        self._hash_before(-(-self.size // self._block_size))
        return self._digest.hexdigest()

    def _load(self, number: int) -> bytes:
        self._hash_before(number)
        block = super()._load(number)
        if number == self._hashed:
            self._digest.update(block)
            self._hashed += 1
        return block

    def _hash_before(self, number: int) -> None:
        while self._hashed < number:
            self._digest.update(super()._load(self._hashed))
            self._hashed += 1
