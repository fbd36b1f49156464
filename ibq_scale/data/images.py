"""One image sample from its shard: read, checked, decoded, cropped. A pure function of the sample and the seed."""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ibq_scale.data.convert import Pixels, bicubic, decode
from ibq_scale.data.index import ShardIndex, UnfitIndexError, index_name, index_of
from ibq_scale.data.pixel_rules import OLD_RULES, PixelRules
from ibq_scale.data.sets import DataSet, DataSets
from ibq_scale.errors import UserError

# Samples of a batch that are read at once where each is a request to a remote store: waiting, not work, fills the time.
REQUESTS_AT_ONCE = 32
# Beyond this a resized picture is made only where it is cropped: of a thin one the whole would be gigabytes.
MOST_RESIZED = 1 << 22


class Request(NamedTuple):
    """A sample, and what augments it."""

    position: int
    source: int
    epoch: int
    shard: int
    row: int


class ImageSample(NamedTuple):
    pixels: Pixels
    """uint8 (H, W, 3), a view of the decoded picture."""
    label: int
    request: Request
    fault: str
    """What was wrong with the sample that this one stands in for; empty as a rule."""


class BadSampleError(RuntimeError):
    """A sample's bytes are not those that were prepared, or are no picture."""


@dataclass(frozen=True)
class PictureIndex:
    """Where a shard's pictures are, by row: 20 bytes a sample, since a worker holds hundreds of shards'."""

    offset_R: NDArray[np.int64]
    size_R: NDArray[np.int32]
    crc_R: NDArray[np.uint32]
    label_R: NDArray[np.int32]

    @staticmethod
    def of(index: ShardIndex) -> PictureIndex:
        members = index.members
        return PictureIndex(
            np.array([m.offset for m in members], dtype=np.int64),
            np.array([m.size for m in members], dtype=np.int32),
            np.array([m.crc for m in members], dtype=np.uint32),
            np.array([m.label for m in members], dtype=np.int32),
        )


class ImageDataset(torch.utils.data.Dataset[ImageSample]):
    """Samples by `Request`. With caches it reads local files; only what was evicted too soon comes from the store.

    In `training` a damaged sample is replaced by the next good one of its shard, the same on every run, and says so;
    and a large JPEG is decoded at the least fraction of its size that covers the crop. With `resolution` None pictures
    keep their size, but for a centre crop to sides that `multiple` divides.
    """

    def __init__(
        self,
        sets: DataSets,
        *,
        resolution: int | None,
        random_crop: bool,
        flip: bool,
        seed: int,
        training: bool,
        indices_in_memory: int = 256,
        multiple: int = 1,
    ) -> None:
        self.sets = sets
        self.resolution = resolution
        self.multiple = multiple
        self.random_crop = random_crop
        self.flip = flip
        self.seed = seed
        self.training = training
        self.indices_in_memory = indices_in_memory
        self._indices: OrderedDict[tuple[int, int], PictureIndex] = OrderedDict()
        self._waits = any(part.cache is None and not part.store.local for part in sets.parts)

    def __getitems__(self, requests: Sequence[Request]) -> list[ImageSample]:
        """A batch's samples, in order."""
        if not self._waits:
            return [self[request] for request in requests]
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
            # The indices first, each by one thread: samples of one shard would all read it.
            list(pool.map(lambda shard: self._index(*shard), {(r.source, r.shard) for r in requests}))
            return list(pool.map(self.__getitem__, requests))

    def __getitem__(self, request: Request) -> ImageSample:
        part = self.sets.parts[request.source]
        index = self._index(request.source, request.shard)
        rows = len(index.offset_R)
        fault = ""
        for step in range(rows):
            row = (request.row + step) % rows
            try:
                pixels = self._pixels(part, request._replace(row=row), index)
            except BadSampleError as e:
                if not self.training:
                    raise
                fault = fault or str(e)
                continue
            return ImageSample(pixels, int(index.label_R[row]), request, fault)
        raise BadSampleError(f"no sample of the shard is good; the first: {fault}")

    def _pixels(self, part: DataSet, request: Request, index: PictureIndex) -> Pixels:
        """The cropped picture; read twice before it counts as damaged, since a cable may be at fault."""
        name = self.sets.name(request.source, request.shard, request.row)
        offset, size = int(index.offset_R[request.row]), int(index.size_R[request.row])
        for attempt in (1, 2):
            data = part.read_range(request.shard, offset, offset + size)
            if zlib.crc32(data) == index.crc_R[request.row]:
                break
            if attempt == 2:
                raise BadSampleError(f"{name} is not what was prepared (crc)")
        rules = part.manifest.pixels or OLD_RULES
        try:
            pixels = decode(data, self.resolution if self.training else None, rules)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
            raise BadSampleError(f"{name} is no picture: {e}") from None
        if self.resolution is None:
            return self._native(pixels, name)
        return self._crop(pixels, request, self.resolution, rules)

    def _native(self, pixels: Pixels, name: str) -> Pixels:
        """The middle of a picture, as much of it as `multiple` divides."""
        sides = [side // self.multiple * self.multiple for side in pixels.shape[:2]]
        if not all(sides):
            raise UserError(
                f"{name} has {pixels.shape[1]} x {pixels.shape[0]} pixels, {self.multiple} are the least: "
                "prepare the data with --where on width and height"
            )
        top, left = ((whole - side) // 2 for whole, side in zip(pixels.shape[:2], sides, strict=True))
        return pixels[top : top + sides[0], left : left + sides[1]]

    def _crop(self, pixels: Pixels, request: Request, side: int, rules: PixelRules) -> Pixels:
        """Shortest side to `side`, then a square: random and seeded by (seed, epoch, sample), or the centre."""
        height, width = pixels.shape[:2]
        scale = side / min(height, width)
        size = (max(side, round(width * scale)), max(side, round(height * scale)))
        free = (size[0] - side, size[1] - side)
        left, top, mirror = free[0] // 2, free[1] // 2, False
        if self.random_crop or self.flip:
            bits = draws(self.seed, request)
            if self.random_crop:
                left, top = (int(bits[i] % np.uint64(free[i] + 1)) for i in (0, 1))
            mirror = self.flip and bool(bits[2] >> np.uint64(63))
        square = resized(pixels, size, (left, top), side, rules)
        return square[:, ::-1] if mirror else square

    def _index(self, source: int, shard: int) -> PictureIndex:
        key = (source, shard)
        # Several threads may read one index at once; each step on the dict is whole by itself.
        index = self._indices.pop(key, None) or PictureIndex.of(shard_index(self.sets.parts[source], shard))
        self._indices[key] = index
        while len(self._indices) > self.indices_in_memory:
            self._indices.popitem(last=False)
        return index

    def fetch(self, source: int, shard: int) -> None:
        """Brings a shard and its index into the cache (in the process that holds the store's client)."""
        part = self.sets.parts[source]
        if part.cache is None:
            return
        info = part.manifest.shards[shard]
        part.cache.fetch(info, index_name(info.name))


def resized(pixels: Pixels, size: tuple[int, int], corner: tuple[int, int], side: int, rules: PixelRules) -> Pixels:
    """The square of `side` at `corner` (left, top) of the picture as resized to `size` (width, height), bicubic."""
    height, width = pixels.shape[:2]
    left, top = corner
    if size == (width, height):
        return pixels[top : top + side, left : left + side]
    if size[0] * size[1] > MOST_RESIZED:
        # Pillow resamples a box by the same weights as the whole, neighbours outside of it included.
        across, down = width / size[0], height / size[1]
        box = (left * across, top * down, (left + side) * across, (top + side) * down)
        return np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC, box))
    if not rules.version:
        whole = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
    else:
        whole = bicubic(pixels, size)
    return whole[top : top + side, left : left + side]


def shard_index(part: DataSet, shard: int) -> ShardIndex:
    """The shard's index: beside the cached shard where there is a cache. UserError where it does not fit."""
    info = part.manifest.shards[shard]
    name = index_name(info.name)
    try:
        data = part.store.read(name) if part.cache is None else part.cache.read_index(info, name)
        return index_of(data, info)
    except FileNotFoundError:
        raise UserError(f"{part.store.url}/{name} is missing: prepare again") from None
    except UnfitIndexError as e:
        raise UserError(f"{part.store.url}/{name}: {e}: prepare again") from None


def draws(seed: int, request: Request) -> NDArray[np.uint64]:
    """Three raw 64-bit numbers of this sample in this epoch."""
    key = (seed & 0xFFFFFFFFFFFFFFFF) | (1 << 127) | (request.source << 64)
    counter = (request.epoch << 192) | (request.shard << 128) | (request.row << 64)
    bits: NDArray[np.uint64] = np.random.Philox(key=key, counter=counter).random_raw(3)
    return bits
