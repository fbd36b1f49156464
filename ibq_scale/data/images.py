"""One image sample from its shard: read, checked, decoded, cropped. A pure function of the sample and the seed."""

from __future__ import annotations

import io
import json
import os
import zlib
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ibq_scale.data.cache import ShardCache
from ibq_scale.data.index import ShardIndex, index_name
from ibq_scale.data.manifest import Manifest
from ibq_scale.data.store import Store
from ibq_scale.errors import UserError


class Request(NamedTuple):
    """A sample, and what augments it."""

    position: int
    epoch: int
    shard: int
    row: int


class ImageSample(NamedTuple):
    image_u8: Tensor
    """uint8 (3, H, W)."""
    label: int
    position: int


class CorruptSampleError(RuntimeError):
    """A sample's bytes are not those that were prepared."""


class ImageDataset(torch.utils.data.Dataset[ImageSample]):
    """Samples by `Request`. With a cache it reads local files only and never makes a store's client."""

    def __init__(
        self,
        manifest: Manifest,
        store: Store,
        cache: ShardCache | None,
        *,
        resolution: int,
        random_crop: bool,
        flip: bool,
        seed: int,
    ) -> None:
        self.manifest = manifest
        self.store = store
        self.cache = cache
        self.resolution = resolution
        self.random_crop = random_crop
        self.flip = flip
        self.seed = seed
        self._indices: dict[int, ShardIndex] = {}

    def __getitem__(self, request: Request) -> ImageSample:
        member = self._index(request.shard).members[request.row]
        data = self._bytes(request.shard, member.offset, member.size)
        if zlib.crc32(data) != member.crc:
            name = self.manifest.shards[request.shard].name
            raise CorruptSampleError(f"{self.store.url}/{name}: sample {member.key} is not what was prepared (crc)")
        with Image.open(io.BytesIO(data)) as image:
            # Decodes a JPEG at a fraction of its size where that still covers the crop.
            image.draft("RGB", (self.resolution, self.resolution))
            pixels = self._crop(image.convert("RGB"), request)
        return ImageSample(torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), member.label, request.position)

    def _crop(self, image: Image.Image, request: Request) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        """Shortest side to the resolution, then a square: random and seeded by (seed, epoch, sample), or the centre."""
        side = self.resolution
        scale = side / min(image.size)
        size = (max(side, round(image.width * scale)), max(side, round(image.height * scale)))
        if size != image.size:
            image = image.resize(size, Image.Resampling.BICUBIC)
        free = (image.width - side, image.height - side)
        left, top, mirror = free[0] // 2, free[1] // 2, False
        if self.random_crop or self.flip:
            draws = _draws(self.seed, request)
            if self.random_crop:
                left, top = (int(draws[i] % np.uint64(free[i] + 1)) for i in (0, 1))
            mirror = self.flip and bool(draws[2] >> np.uint64(63))
        square = image.crop((left, top, left + side, top + side))
        if mirror:
            square = square.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.array(square)

    def _bytes(self, shard: int, offset: int, size: int) -> bytes:
        info = self.manifest.shards[shard]
        if self.cache is None:
            return self.store.read_range(info.name, offset, offset + size)
        return _pread(self.cache.path(info), offset, size)

    def _index(self, shard: int) -> ShardIndex:
        if shard not in self._indices:
            self._indices[shard] = self.index(shard)
        return self._indices[shard]

    def index(self, shard: int) -> ShardIndex:
        """The shard's index: beside the cached shard where there is a cache. UserError where it does not fit."""
        info = self.manifest.shards[shard]
        try:
            if self.cache is None:
                index = ShardIndex.from_json(self.store.read(index_name(info.name)).decode())
            else:
                index = ShardIndex.from_json(_index_path(self.cache, info.sha256).read_text())
        except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
            raise UserError(f"{self.store.url}/{index_name(info.name)} is missing or damaged: prepare again") from None
        if index.sha256 != info.sha256 or len(index.members) != info.samples:
            raise UserError(f"{self.store.url}/{index_name(info.name)} belongs to another shard than the manifest's")
        return index

    def fetch(self, shard: int) -> None:
        """Brings a shard and its index into the cache (in the process that holds the store's client)."""
        if self.cache is None:
            return
        info = self.manifest.shards[shard]
        self.cache.fetch(info)
        path = _index_path(self.cache, info.sha256)
        if not path.is_file():
            partial = path.with_suffix(".partial")
            partial.write_bytes(self.store.read(index_name(info.name)))
            partial.replace(path)


def _index_path(cache: ShardCache, sha256: str) -> Path:
    return cache.folder / f"{sha256}.index"


@lru_cache(maxsize=64)
def _open(path: Path) -> io.BufferedReader:
    return path.open("rb")


def _pread(path: Path, offset: int, size: int) -> bytes:
    try:
        return os.pread(_open(path).fileno(), size, offset)
    except FileNotFoundError:
        raise UserError(f"{path} was evicted before it was read: raise data.cache_bytes") from None


def _draws(seed: int, request: Request) -> np.ndarray[tuple[int, ...], np.dtype[np.uint64]]:
    """Three raw 64-bit numbers of this sample in this epoch."""
    key = (seed & 0xFFFFFFFFFFFFFFFF) | (1 << 127)
    counter = (request.epoch << 192) | (request.shard << 128) | (request.row << 64)
    draws: np.ndarray[tuple[int, ...], np.dtype[np.uint64]] = np.random.Philox(key=key, counter=counter).random_raw(3)
    return draws
