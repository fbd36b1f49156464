"""Code shards: one safetensors file for each image shard, stamped with the tokenizer that wrote it."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from ibq_scale.data.folder import Store
from ibq_scale.data.images import Request, draws
from ibq_scale.data.manifest import CodesInfo, Manifest, ShardInfo, save_manifest
from ibq_scale.data.sets import DataSets
from ibq_scale.errors import UserError

# safetensors: 8 bytes of length, then a JSON header whose __metadata__ carries the stamp.
STAMP = "ibq_scale_stamp"


@dataclass(frozen=True)
class CodeShard:
    """Codes int64 (n, crops, h, w) and labels int64 (n,) of one shard."""

    codes: Tensor
    labels: Tensor


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
    """The shard as an earlier, stopped run of the same tokenizer on the same images wrote it, or None."""
    try:
        data = store.read(name)
    except FileNotFoundError:
        return None
    if stamp(info).encode() not in data[:4096]:
        return None
    return _info(name, data, samples)


def stamp(info: CodesInfo) -> str:
    """Identifies what a code shard depends on."""
    return hashlib.sha256(info.model_dump_json().encode()).hexdigest()


def finish_codes(store: Store, shards: list[ShardInfo], classes: tuple[str, ...], info: CodesInfo) -> Manifest:
    """Writes the manifest, last."""
    manifest = Manifest(kind="codes", shards=tuple(shards), classes=classes, codes=info)
    save_manifest(store, manifest)
    return manifest


def read_code_shard(data: bytes, name: str) -> CodeShard:
    """Decodes a shard's bytes. UserError where they are damaged."""
    try:
        tensors = load(data)
        # uint16 and uint32 tensors support little else than widening.
        return CodeShard(tensors["codes"].to(torch.int64), tensors["labels"].to(torch.int64))
    except Exception as e:
        raise UserError(f"code shard {name} is damaged: {e}") from None


class CodeDataset(torch.utils.data.Dataset[CodeSample]):
    """Samples by `Request`; the shards that lanes read at once stay in memory.

    Of an image with several crops one is drawn by (seed, epoch, sample).
    """

    def __init__(self, sets: DataSets, *, seed: int, shards_in_memory: int) -> None:
        self.sets = sets
        self.seed = seed
        self.shards_in_memory = shards_in_memory
        self._shards: OrderedDict[tuple[int, int], CodeShard] = OrderedDict()

    def __getitems__(self, requests: Sequence[Request]) -> list[CodeSample]:
        """A batch's samples, in order."""
        return [self[request] for request in requests]

    def __getitem__(self, request: Request) -> CodeSample:
        shard = self._shard(request.source, request.shard)
        crops = shard.codes.shape[1]
        crop = int(draws(self.seed, request)[0] % np.uint64(crops)) if crops > 1 else 0
        return CodeSample(shard.codes[request.row, crop].flatten(), int(shard.labels[request.row]), request)

    def fetch(self, source: int, shard: int) -> None:
        """Brings a shard into the cache (in the process that holds the store's client)."""
        part = self.sets.parts[source]
        if part.cache is not None:
            part.cache.fetch(part.manifest.shards[shard])

    def _shard(self, source: int, number: int) -> CodeShard:
        key = (source, number)
        if key not in self._shards:
            part = self.sets.parts[source]
            info = part.manifest.shards[number]
            data = part.read(number)
            if hashlib.sha256(data).hexdigest() != info.sha256:
                raise UserError(f"{part.store.url}/{info.name} is not what the manifest says (sha256 differs)")
            self._shards[key] = read_code_shard(data, info.name)
            if len(self._shards) > self.shards_in_memory:
                self._shards.popitem(last=False)
        self._shards.move_to_end(key)
        return self._shards[key]


def _info(name: str, data: bytes, samples: int) -> ShardInfo:
    return ShardInfo(name=name, samples=samples, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
