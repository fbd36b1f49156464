"""Code shards: one safetensors file for each image shard, stamped with its tokenizer."""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from mmap import mmap
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save
from torch import Tensor

from ibq_scale.data.folder import Store
from ibq_scale.data.images import REQUESTS_AT_ONCE, Request, draws
from ibq_scale.data.manifest import CodesInfo, Manifest, ShardInfo, save_manifest
from ibq_scale.data.sets import DataSets
from ibq_scale.documents import DocumentError, parse_json
from ibq_scale.errors import UserError

# safetensors: 8 bytes of length, then a JSON header. Its __metadata__ has the stamp.
STAMP = "ibq_scale_stamp"
DTYPES = {"U16": "<u2", "U32": "<u4", "I32": "<i4", "F16": "<f2"}
# Names of the tensors of a condition.
VECTORS, SPANS = "condition", "condition_spans"
# Bytes of a shard that contain its header.
HEAD = 4096
# Single samples of shards above these bytes are read by ranges until a shard has come. A small one comes as soon.
LARGE = 8 << 20


class CodeShard(NamedTuple):
    """Codes (n, crops, h, w) and labels (n,) of one shard, stored as uint16 or uint32 and as int32.

    With a condition: vectors (m, C), stored as float16, and the first row and number of rows of each sample, (n, 2),
    stored as uint32. Samples may share rows.
    """

    codes: NDArray[np.integer[Any]]
    labels: NDArray[np.integer[Any]]
    vectors: NDArray[np.floating[Any]] | None = None
    spans: NDArray[np.integer[Any]] | None = None


class CodeSample(NamedTuple):
    codes: Tensor
    """int64 (T,), raster order."""
    label: int
    request: Request
    vectors: Tensor | None = None
    """float16 (L, C), if conditions are read. L is the manifest's."""
    length: int = 0
    """Vectors that count."""


def code_shard_name(image_shard: str) -> str:
    """The code shard of an image shard."""
    return image_shard.replace("images-", "codes-").removesuffix(".tar") + ".safetensors"


def write_code_shard(store: Store, name: str, shard: CodeShard, info: CodesInfo) -> ShardInfo:
    """Writes codes as uint16 (uint32 above 65,536 codes), labels as int32 and vectors as float16."""
    dtype = np.uint16 if info.codebook_size <= 2**16 else np.uint32
    tensors: dict[str, NDArray[Any]] = {"codes": shard.codes.astype(dtype), "labels": shard.labels.astype(np.int32)}
    if shard.vectors is not None and shard.spans is not None:
        if not (abs(shard.vectors) <= np.finfo(np.float16).max).all():
            raise UserError(f"{name}: vectors of the text encoder do not fit float16: take another encoder")
        tensors |= {VECTORS: shard.vectors.astype(np.float16), SPANS: shard.spans.astype(np.uint32)}
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


def read_code_shard(data: bytes | mmap, name: str) -> CodeShard:
    """A shard's arrays, as views of its bytes. UserError if they are damaged."""
    with _told_of_damage(name):
        begin, header = _header(data)
        codes, labels = (_array(data, begin, header[key]) for key in ("codes", "labels"))
        if codes.ndim != 4 or labels.shape != codes.shape[:1]:
            raise ValueError(f"codes of shape {codes.shape}, labels of shape {labels.shape}")
        if VECTORS not in header:
            return CodeShard(codes, labels)
        vectors, spans = (_array(data, begin, header[key]) for key in (VECTORS, SPANS))
        if vectors.ndim != 2 or spans.shape != (len(codes), 2) or (spans.astype(int).sum(axis=1) > len(vectors)).any():
            raise ValueError(f"vectors of shape {vectors.shape}, and their spans beyond them")
        return CodeShard(codes, labels, vectors, spans)


def read_code_row(read: Callable[[int, int], bytes], name: str, row: int, info: CodesInfo) -> CodeShard:
    """One sample of a shard, as a shard of its own. `read` returns bytes start … stop − 1 of the file.

    UserError if they are damaged. The shard's hash does not cover a part, so codes beyond the codebook are refused.
    """
    with _told_of_damage(name):
        begin, header = _header(read(0, HEAD))

        def rows(key: str, first: int, count: int) -> NDArray[Any]:
            whole, *shape = header[key]["shape"]
            size = math.prod(shape) * np.dtype(DTYPES[header[key]["dtype"]]).itemsize
            start = begin + header[key]["data_offsets"][0] + first * size
            if min(first, count) < 0 or first + count > whole or start < begin:
                raise ValueError(f"{key} has no rows {first} … {first + count - 1}")
            place = {"dtype": header[key]["dtype"], "shape": [count, *shape], "data_offsets": [0, count * size]}
            return _array(read(start, start + count * size) if count else b"", 0, place)

        codes, labels = (rows(key, row, 1) for key in ("codes", "labels"))
        if codes.max() >= info.codebook_size:
            raise ValueError(f"sample {row} has codes beyond {info.codebook_size - 1}")
        if VECTORS not in header:
            return CodeShard(codes, labels)
        vectors = rows(VECTORS, *rows(SPANS, row, 1)[0].tolist())
        return CodeShard(codes, labels, vectors, np.array([[0, len(vectors)]]))


@contextmanager
def _told_of_damage(name: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except (DocumentError, ValueError, KeyError, TypeError, OverflowError) as e:
        raise UserError(f"code shard {name} is damaged: {e}") from None


def _header(data: bytes | mmap) -> tuple[int, Any]:
    """The first byte of a safetensors file's data section, and the entries of its tensors."""
    begin = 8 + int.from_bytes(data[:8], "little")
    return begin, parse_json(data[8:begin])


def _array(data: bytes | mmap, begin: int, entry: dict[str, Any]) -> NDArray[Any]:
    """A tensor of a safetensors file with its data section at byte `begin`."""
    dtype, shape, (start, stop) = np.dtype(DTYPES[entry["dtype"]]), entry["shape"], entry["data_offsets"]
    if min(start, *shape, 0) < 0 or stop - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{entry} do not fit together")
    return np.frombuffer(data, dtype, math.prod(shape), begin + start).reshape(shape)


class CodeDataset(torch.utils.data.Dataset[CodeSample]):
    """Samples by `Request`. The lanes' current shards stay in memory.

    One of an image's crops is drawn by (seed, epoch, sample). `conditions`: read the stored vectors too. `training`: a
    fetcher brings the shards, and samples of missing large ones are read by ranges.
    """

    def __init__(
        self, sets: DataSets, *, seed: int, shards_in_memory: int, conditions: bool = False, training: bool = False
    ) -> None:
        self.sets = sets
        self.conditions = conditions
        self.training = training
        self.seed = seed
        self.shards_in_memory = shards_in_memory
        self._shards: OrderedDict[tuple[int, int], CodeShard] = OrderedDict()

    def __getitems__(self, requests: Sequence[Request]) -> list[CodeSample]:
        """A batch's samples, in order."""
        away = [request for request in requests if self._is_away(request)]
        if not away:
            return [self[request] for request in requests]
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
            singly = dict(zip(away, pool.map(self._read_singly, away), strict=True))
        return [singly[request] if request in singly else self[request] for request in requests]

    def __getitem__(self, request: Request) -> CodeSample:
        return self._sample(self._shard(request.source, request.shard), request.row, request)

    def _is_away(self, request: Request) -> bool:
        part = self.sets.parts[request.source]
        if not self.training or part.cache is None or (request.source, request.shard) in self._shards:
            return False
        info = part.manifest.shards[request.shard]
        return info.bytes > LARGE and not part.cache.has(info)

    def _read_singly(self, request: Request) -> CodeSample:
        part = self.sets.parts[request.source]
        assert part.manifest.codes is not None
        name = part.manifest.shards[request.shard].name
        row = read_code_row(partial(part.read_singly, request.shard), name, request.row, part.manifest.codes)
        return self._sample(row, 0, request)

    def _sample(self, shard: CodeShard, row: int, request: Request) -> CodeSample:
        crops = shard.codes.shape[1]
        crop = int(draws(self.seed, request)[0] % np.uint64(crops)) if crops > 1 else 0
        codes_T = torch.from_numpy(shard.codes[row, crop].astype(np.int64).reshape(-1))
        return CodeSample(codes_T, int(shard.labels[row]), request, *self._condition(shard, row, request))

    def _condition(self, shard: CodeShard, row: int, request: Request) -> tuple[Tensor | None, int]:
        if not self.conditions:
            return None, 0
        codes = self.sets.parts[request.source].manifest.codes
        if codes is None or codes.condition is None or shard.vectors is None or shard.spans is None:
            name = self.sets.name(request.source, request.shard, request.row)
            raise UserError(f"{name} holds no condition, though its set does")
        first, rows = shard.spans[row].tolist()
        vectors_LC = np.zeros((codes.condition.tokens, codes.condition.width), np.float16)
        vectors_LC[:rows] = shard.vectors[first : first + rows]
        return torch.from_numpy(vectors_LC), rows

    def _shard(self, source: int, number: int) -> CodeShard:
        key = (source, number)
        if key not in self._shards:
            part = self.sets.parts[source]
            info = part.manifest.shards[number]
            data = part.map(number)
            if hashlib.sha256(data).hexdigest() != info.sha256:
                raise UserError(f"{part.store.url}/{info.name} is not what the manifest says (sha256 differs)")
            self._shards[key] = read_code_shard(data, info.name)
            if len(self._shards) > self.shards_in_memory:
                self._shards.popitem(last=False)
        self._shards.move_to_end(key)
        return self._shards[key]


def _info(name: str, data: bytes, samples: int) -> ShardInfo:
    return ShardInfo(name=name, samples=samples, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
