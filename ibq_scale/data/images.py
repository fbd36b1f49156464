"""Reads one image sample from its shard, checks, decodes and crops it. A pure function of the sample and the seed."""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ibq_scale.data.convert import Pixels, bicubic, decode, mirrored
from ibq_scale.data.index import (
    PICTURE,
    ShardIndex,
    Table,
    UnfitIndexError,
    index_name,
    index_of,
    read_table,
    table_of,
)
from ibq_scale.data.pixel_rules import OLD_RULES, PixelRules
from ibq_scale.data.sets import DataSet, DataSets
from ibq_scale.errors import UserError

# A batch's concurrent reads from a remote store. Their time is latency, not work.
REQUESTS_AT_ONCE = 32
# Most bytes between two samples of one request (a tar's headers, labels), and of the whole request.
BETWEEN, MOST_SPAN = 4096, 16 << 20
# Above these pixels only the crop of a resized picture is computed: a whole thin one would take gigabytes.
MOST_RESIZED = 1 << 22


class Request(NamedTuple):
    """A sample and the inputs of its augmentation."""

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
    """Fault of the sample replaced by this one. Usually empty."""


class BadSampleError(RuntimeError):
    """A sample's bytes have changed since preparation, or are no picture."""


class ImageDataset(torch.utils.data.Dataset[ImageSample]):
    """Samples by `Request`. With caches it reads local files. Samples of missing shards are read from the store by
    range, all of a batch at once.

    In `training` a damaged sample is replaced by the next good one of its shard, the same in every run, with its
    `fault`. A large JPEG is decoded at the smallest fraction of its size to cover the crop. With `resolution` None
    pictures keep their size, but for a centre crop to sides divisible by `multiple`. `crops`: width and height of the
    crops of each aspect, instead of squares.
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
        shards_in_memory: int = 256,
        multiple: int = 1,
        crops: Sequence[tuple[int, int]] = (),
    ) -> None:
        self.sets = sets
        self.crops = crops
        self.resolution = resolution
        self.multiple = multiple
        self.random_crop = random_crop
        self.flip = flip
        self.seed = seed
        self.training = training
        self.shards_in_memory = shards_in_memory
        self._tables: OrderedDict[tuple[int, int], Table] = OrderedDict()

    def __getitems__(self, requests: Sequence[Request]) -> list[ImageSample]:
        """A batch's samples, in order."""
        singly = self._read_singly(requests)
        return [self._sample(request, singly) for request in requests]

    def __getitem__(self, request: Request) -> ImageSample:
        return self._sample(request, {})

    def _read_singly(self, requests: Sequence[Request]) -> dict[Request, bytes]:
        """Bytes of the samples in missing shards, read by ranges. Neighbours share a request."""
        away = {shard for shard in {(r.source, r.shard) for r in requests} if self._is_away(*shard)}
        if not away:
            return {}
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
            tables = dict(zip(away, pool.map(lambda shard: self._table(*shard), away), strict=True))
            wanted = [
                Wanted(r, int(row["offset"]), int(row["offset"]) + int(row["size"]))
                for r in requests
                if (table := tables.get((r.source, r.shard))) is not None
                for row in (table[r.row],)
            ]
            return {r: data for found in pool.map(self._read_span, touching(wanted)) for r, data in found}

    def _is_away(self, source: int, shard: int) -> bool:
        part = self.sets.parts[source]
        if part.cache is None:
            return not part.store.local
        # Evaluation has no fetcher: a read downloads the shard, and it stays for the next evaluation.
        return self.training and not part.cache.has(part.manifest.shards[shard])

    def _read_span(self, span: Sequence[Wanted]) -> list[tuple[Request, bytes]]:
        first = span[0]
        part = self.sets.parts[first.request.source]
        data = part.read_singly(first.request.shard, first.start, max(w.stop for w in span))
        return [(w.request, data[w.start - first.start : w.stop - first.start]) for w in span]

    def _sample(self, request: Request, singly: Mapping[Request, bytes]) -> ImageSample:
        part = self.sets.parts[request.source]
        table = self._table(request.source, request.shard)
        rows = len(table)
        fault = ""
        for step in range(rows):
            row = (request.row + step) % rows
            try:
                data = None if step else singly.get(request)
                pixels = self._pixels(part, request._replace(row=row), table[row], data)
            except BadSampleError as e:
                if not self.training:
                    raise
                fault = fault or str(e)
                continue
            return ImageSample(pixels, int(table["label"][row]), request, fault)
        raise BadSampleError(f"no sample of the shard is good; the first: {fault}")

    def _pixels(self, part: DataSet, request: Request, place: np.void, data: bytes | None) -> Pixels:
        """The cropped picture. A wrong CRC is confirmed by a second read, since the transfer may be at fault.

        `data`: its bytes, if they have been read.
        """

        def name() -> str:
            return self.sets.name(request.source, request.shard, request.row)

        offset, size, crc = int(place["offset"]), int(place["size"]), int(place["crc"])
        read = partial(part.read_range, request.shard, offset, offset + size)
        if data is None:
            data = read()
        if zlib.crc32(data) != crc and zlib.crc32(data := read()) != crc:
            raise BadSampleError(f"{name()} is not what was prepared (crc)")
        rules = part.manifest.pixels or OLD_RULES
        crop = self._crop_size(request)
        try:
            pixels = decode(data, max(crop) if crop and self.training else None, rules)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
            raise BadSampleError(f"{name()} is no picture: {e}") from None
        if crop is None:
            return self._native(pixels, name())
        return self._crop(pixels, request, crop, rules)

    def _crop_size(self, request: Request) -> tuple[int, int] | None:
        """Width and height. None for the picture's own."""
        if self.crops:
            return self.crops[int(self.sets.bucket_of[request.source][request.shard])]
        return None if self.resolution is None else (self.resolution, self.resolution)

    def _native(self, pixels: Pixels, name: str) -> Pixels:
        """The largest centre crop with sides divisible by `multiple`."""
        sides = [side // self.multiple * self.multiple for side in pixels.shape[:2]]
        if not all(sides):
            raise UserError(
                f"{name} has {pixels.shape[1]} x {pixels.shape[0]} pixels, {self.multiple} are the least: "
                "prepare the data with --where on width and height"
            )
        top, left = ((whole - side) // 2 for whole, side in zip(pixels.shape[:2], sides, strict=True))
        return pixels[top : top + sides[0], left : left + sides[1]]

    def _crop(self, pixels: Pixels, request: Request, crop: tuple[int, int], rules: PixelRules) -> Pixels:
        """Resizes to the least size that covers `crop`, then crops: random by (seed, epoch, sample), or the centre."""
        height, width = pixels.shape[:2]
        scale = max(crop[0] / width, crop[1] / height)
        size = (max(crop[0], round(width * scale)), max(crop[1], round(height * scale)))
        free = (size[0] - crop[0], size[1] - crop[1])
        left, top, mirror = free[0] // 2, free[1] // 2, False
        if self.random_crop or self.flip:
            bits = draws(self.seed, request)
            if self.random_crop:
                left, top = (int(bits[i] % np.uint64(free[i] + 1)) for i in (0, 1))
            mirror = self.flip and bool(bits[2] >> np.uint64(63))
        cropped = resized(pixels, size, (left, top), crop, rules)
        return mirrored(cropped) if mirror else cropped

    def _table(self, source: int, shard: int) -> Table:
        key = (source, shard)
        # Several threads may read one index at once. Each operation on the dict is atomic.
        table = self._tables.pop(key, None)
        if table is None:
            table = picture_table(self.sets.parts[source], shard)
        self._tables[key] = table
        while len(self._tables) > self.shards_in_memory:
            self._tables.popitem(last=False)
        return table

    def is_here(self, source: int, shard: int) -> bool:
        return self.sets.is_here(source, shard)

    def fetch(self, source: int, shard: int) -> None:
        """Brings a shard and its index into the cache."""
        self.sets.fetch(source, shard)
        part = self.sets.parts[source]
        if part.cache is not None:
            picture_table(part, shard)


class Wanted(NamedTuple):
    """A sample's bytes in its shard."""

    request: Request
    start: int
    stop: int


def touching(wanted: Iterable[Wanted]) -> list[list[Wanted]]:
    """Groups of neighbouring samples of a shard, for one request each."""
    spans: list[list[Wanted]] = []
    for one in sorted(wanted, key=lambda w: (w.request.source, w.request.shard, w.start)):
        if spans and _touches(spans[-1], one):
            spans[-1].append(one)
        else:
            spans.append([one])
    return spans


def _touches(span: Sequence[Wanted], one: Wanted) -> bool:
    first, last = span[0], span[-1]
    same = (last.request.source, last.request.shard) == (one.request.source, one.request.shard)
    return same and one.start - last.stop <= BETWEEN and one.stop - first.start <= MOST_SPAN


def picture_table(part: DataSet, shard: int) -> Table:
    """The places of the shard's pictures: `PICTURE` rows. With a cache, mapped from it and shared."""
    info = part.manifest.shards[shard]

    def rows() -> bytes:
        return read_table(part.store, info) or table_of(shard_index(part, shard)).tobytes()

    return np.frombuffer(rows() if part.cache is None else part.cache.table(info, rows), PICTURE)


def resized(
    pixels: Pixels, size: tuple[int, int], corner: tuple[int, int], crop: tuple[int, int], rules: PixelRules
) -> Pixels:
    """Resizes to `size`, bicubic, and returns the part of size `crop` at `corner` (left, top). Sizes: width, height."""
    height, width = pixels.shape[:2]
    (left, top), (right, bottom) = corner, (corner[0] + crop[0], corner[1] + crop[1])
    if size == (width, height):
        return pixels[top:bottom, left:right]
    if size[0] * size[1] > MOST_RESIZED:
        # Pillow resamples a box with the same weights as the whole, including neighbours outside of it.
        across, down = width / size[0], height / size[1]
        box = (left * across, top * down, right * across, bottom * down)
        return np.asarray(Image.fromarray(pixels).resize(crop, Image.Resampling.BICUBIC, box))
    if not rules.version:
        whole = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
    else:
        whole = bicubic(pixels, size)
    return whole[top:bottom, left:right]


def shard_index(part: DataSet, shard: int) -> ShardIndex:
    """The shard's index, from the store. UserError if it is missing or does not fit."""
    info = part.manifest.shards[shard]
    name = index_name(info.name)
    try:
        return index_of(part.store.read(name), info)
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
