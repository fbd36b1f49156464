"""The image stream beside plain webdataset on the same shards, decoded and cropped alike, with as many workers.

Ours shuffles by position over the whole set, checks every sample and resumes from an integer; plain webdataset reads
each shard from front to back. Both run by turns in one process; rates are medians over the turns.
"""

from __future__ import annotations

import io
import itertools
import statistics
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from torch import Tensor

from ibq_scale.config.run import DataConfig
from ibq_scale.data.sets import DataSets, open_sets
from ibq_scale.data.stream import image_stream


@dataclass(frozen=True)
class Rate:
    """One way of reading. `per_core` is images a CPU second of this process and its workers together."""

    name: str
    images_per_s: float
    mb_per_s: float
    per_core: float


@dataclass(frozen=True)
class DataReport:
    """`mb_per_s` of the rates counts the shards' bytes. `first_batch_s`: from nothing to the first batch of ours.

    `of_plain` and `of_plain_per_core` are our rates over plain webdataset's.
    """

    url: str
    images: int
    resolution: int
    workers: int
    cached: bool
    first_batch_s: float
    rates: tuple[Rate, ...]
    of_plain: float
    of_plain_per_core: float


def bench_data(
    url: str, *, resolution: int, workers: int, batch: int, seconds: float, cache_dir: str | None, turns: int = 3
) -> DataReport:
    """Measures a prepared data set of images. UserError where it cannot be read."""
    config = DataConfig(train=url, workers=workers, cache_dir=cache_dir)
    sets = open_sets(config, "images")
    image_bytes = sum(part.manifest.bytes for part in sets.parts) / sets.samples
    begin = time.perf_counter()
    ours = image_stream(sets, resolution=resolution, seed=0, rank=0, world_size=1, micro_batch=batch, start=0)
    next(ours)
    first_batch = time.perf_counter() - begin
    plain = _plain(sets, url, resolution, workers, batch)
    found: dict[str, list[tuple[float, float]]] = {"ibq-scale": [], "plain webdataset": []}
    for turn in range(turns + 1):
        for values, stream in zip(found.values(), (ours, plain), strict=True):
            measured = _pull(stream, batch, seconds)
            # The first turn fills caches and queues, and is not counted.
            if turn:
                values.append(measured)
    rates = []
    for name, values in found.items():
        images_per_s, per_core = (statistics.median(column) for column in zip(*values, strict=True))
        rates.append(Rate(name, images_per_s, images_per_s * image_bytes / 1e6, per_core))
    return DataReport(
        url,
        sets.samples,
        resolution,
        workers,
        any(part.cache is not None for part in sets.parts),
        first_batch,
        tuple(rates),
        rates[0].images_per_s / rates[1].images_per_s,
        rates[0].per_core / rates[1].per_core,
    )


def _pull(stream: Iterator[Any], batch: int, seconds: float) -> tuple[float, float]:
    """Images a second, and a CPU second, over at least so many seconds."""
    begin, cpu = time.perf_counter(), _cpu_seconds()
    images = 0
    while (spent := time.perf_counter() - begin) < seconds:
        next(stream)
        images += batch
    return images / spent, images / max(1e-9, _cpu_seconds() - cpu)


def _cpu_seconds() -> float:
    """User and system time of this process and of its living descendants: workers have not been waited for yet."""
    own, seconds = psutil.Process(), 0.0
    for process in (own, *own.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            seconds += times.user + times.system
    return seconds


def _plain(sets: DataSets, url: str, resolution: int, workers: int, batch: int) -> Iterator[Any]:
    """What a user of webdataset writes: shards split over workers, Pillow, a centre crop; endless."""
    import webdataset as wds

    names = [f"{url.rstrip('/')}/{shard.name}" for part in sets.parts for shard in part.manifest.shards]
    # Every worker needs a shard, or webdataset refuses.
    names *= -(-max(1, workers) // len(names))
    _know_s3()
    dataset = (
        wds.WebDataset(names, shardshuffle=len(names), empty_check=False)
        .to_tuple("jpg;png;webp;jpeg", "cls")
        .map_tuple(_CentreCrop(resolution), int)
        .batched(batch, partial=False)
    )
    loader = wds.WebLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        persistent_workers=workers > 0,
        multiprocessing_context="forkserver" if workers else None,
        worker_init_fn=_start_worker if workers else None,
    )
    return itertools.chain.from_iterable(itertools.repeat(loader))


def _start_worker(worker: int) -> None:
    torch.set_num_threads(1)
    _know_s3()


def _know_s3() -> None:
    """webdataset has no s3:// of its own; its table of openers is a global of each process."""
    import webdataset as wds

    wds.gopen_schemes["s3"] = _open_s3


def _open_s3(url: str, mode: str, bufsize: int, **_: Any) -> Any:
    import fsspec

    files, path = fsspec.url_to_fs(url)
    return files.open(path, mode, block_size=8 << 20)


class _CentreCrop:
    def __init__(self, resolution: int) -> None:
        self.resolution = resolution

    def __call__(self, data: bytes) -> Tensor:
        side = self.resolution
        with Image.open(io.BytesIO(data)) as opened:
            opened.draft("RGB", (side, side))
            image = opened.convert("RGB")
        scale = side / min(image.size)
        size = (max(side, round(image.width * scale)), max(side, round(image.height * scale)))
        if size != image.size:
            image = image.resize(size, Image.Resampling.BICUBIC)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        return torch.from_numpy(np.array(image.crop((left, top, left + side, top + side)))).permute(2, 0, 1)
