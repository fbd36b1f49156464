"""Code shards: one safetensors file for each image shard, stamped with its tokenizer."""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from mmap import mmap
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor

from ibq_scale.data.folder import Store
from ibq_scale.data.images import Request, draws
from ibq_scale.data.manifest import CodesInfo, Manifest, ShardInfo, save_manifest
from ibq_scale.data.sets import DataSets
from ibq_scale.documents import DocumentError, parse_json
from ibq_scale.errors import UserError

# safetensors: 8 bytes of length, then a JSON header. Its __metadata__ has the stamp.
STAMP = "ibq_scale_stamp"
DTYPES = {"U16": "<u2", "U32": "<u4", "I32": "<i4"}


@dataclass(frozen=True)
class CodeShard:
    """Codes int64 (n, crops, h, w) and labels int64 (n,) of one shard."""

    codes: Tensor
    labels: Tensor


class StoredCodes(NamedTuple):
    """A shard as it is stored: codes uint16 or uint32 (n, crops, h, w), labels int32 (n,)."""

    codes: NDArray[np.unsignedinteger[Any]]
    labels: NDArray[np.int32]


class CodeSample(NamedTuple):
    codes: Tensor
    """int64 (T,), raster order."""
    label: int
    request: Request


def code_shard_name(image_shard: str) -> str:
    """The code shard of an image shard."""
    return image_shard.replace("images-", "codes-").removesuffix(".tar") + ".safetensors"


def write_code_shard(store: Store, name: str, shard: CodeShard, info: CodesInfo) -> ShardInfo:
    """Writes codes as uint16 (uint32 above 65,536 codes) with labels int32."""
    dtype = torch.uint16 if info.codebook_size <= 2**16 else torch.uint32
    tensors = {"codes": shard.codes.to(dtype).contiguous(), "labels": shard.labels.to(torch.int32).contiguous()}
    data = save(tensors, metadata={STAMP: stamp(info)})
    store.write(name, data)
    return _info(name, data, len(shard.codes))


def find_code_shard(store: Store, name: str, info: CodesInfo, samples: int) -> ShardInfo | None:
    """The shard written by an earlier, stopped run of the same tokenizer on the same images, or None."""
    try:
        data = store.read(name)
    except FileNotFoundError:
        return None
    if stamp(info).encode() not in data[:4096]:
        return None
    return _info(name, data, samples)


def stamp(info: CodesInfo) -> str:
    """sha256 (hex) of all inputs of a code shard."""
    return hashlib.sha256(info.model_dump_json().encode()).hexdigest()


def finish_codes(store: Store, shards: list[ShardInfo], classes: tuple[str, ...], info: CodesInfo) -> Manifest:
    """Writes the manifest, last."""
    manifest = Manifest(kind="codes", shards=tuple(shards), classes=classes, codes=info)
    save_manifest(store, manifest)
    return manifest


def read_code_shard(data: bytes, name: str) -> CodeShard:
    """Decodes a shard's bytes. UserError if they are damaged."""
    stored = stored_codes(data, name)
    return CodeShard(*(torch.from_numpy(values.astype(np.int64)) for values in stored))


def stored_codes(data: bytes | mmap, name: str) -> StoredCodes:
    """A shard's arrays, as views of its bytes. UserError if they are damaged."""
    try:
        begin = 8 + int.from_bytes(data[:8], "little")
        header = parse_json(data[8:begin])
        codes, labels = (_array(data, begin, header[key]) for key in ("codes", "labels"))
        if codes.ndim != 4 or labels.shape != codes.shape[:1]:
            raise ValueError(f"codes of shape {codes.shape}, labels of shape {labels.shape}")
        return StoredCodes(codes, labels)
    except (DocumentError, ValueError, KeyError, TypeError, OverflowError) as e:
        raise UserError(f"code shard {name} is damaged: {e}") from None


def _array(data: bytes | mmap, begin: int, entry: dict[str, Any]) -> NDArray[Any]:
    """A tensor of a safetensors file with its data section at byte `begin`."""
    dtype, shape, (start, stop) = np.dtype(DTYPES[entry["dtype"]]), entry["shape"], entry["data_offsets"]
    if min(start, *shape, 0) < 0 or stop - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{entry} do not fit together")
    return np.frombuffer(data, dtype, math.prod(shape), begin + start).reshape(shape)


class CodeDataset(torch.utils.data.Dataset[CodeSample]):
    """Samples by `Request`. The lanes' current shards stay in memory.

    One of an image's crops is drawn by (seed, epoch, sample).
    """

    def __init__(self, sets: DataSets, *, seed: int, shards_in_memory: int) -> None:
        self.sets = sets
        self.seed = seed
        self.shards_in_memory = shards_in_memory
        self._shards: OrderedDict[tuple[int, int], StoredCodes] = OrderedDict()

    def __getitems__(self, requests: Sequence[Request]) -> list[CodeSample]:
        """A batch's samples, in order."""
        return [self[request] for request in requests]

    def __getitem__(self, request: Request) -> CodeSample:
        shard = self._shard(request.source, request.shard)
        crops = shard.codes.shape[1]
        crop = int(draws(self.seed, request)[0] % np.uint64(crops)) if crops > 1 else 0
        codes_T = torch.from_numpy(shard.codes[request.row, crop].astype(np.int64).reshape(-1))
        return CodeSample(codes_T, int(shard.labels[request.row]), request)

    def is_here(self, source: int, shard: int) -> bool:
        """Whether the shard needs no fetch. Marks it as used, for eviction."""
        part = self.sets.parts[source]
        return part.cache is None or part.cache.touch(part.manifest.shards[shard])

    def fetch(self, source: int, shard: int) -> None:
        """Brings a shard into the cache."""
        part = self.sets.parts[source]
        if part.cache is not None:
            part.cache.fetch(part.manifest.shards[shard])

    def _shard(self, source: int, number: int) -> StoredCodes:
        key = (source, number)
        if key not in self._shards:
            part = self.sets.parts[source]
            info = part.manifest.shards[number]
            data = part.map(number)
            if hashlib.sha256(data).hexdigest() != info.sha256:
                raise UserError(f"{part.store.url}/{info.name} is not what the manifest says (sha256 differs)")
            self._shards[key] = stored_codes(data, info.name)
            if len(self._shards) > self.shards_in_memory:
                self._shards.popitem(last=False)
        self._shards.move_to_end(key)
        return self._shards[key]


def _info(name: str, data: bytes, samples: int) -> ShardInfo:
    return ShardInfo(name=name, samples=samples, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
