"""The open data sets of a run: manifests, stores, caches, and the order over all of them."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from mmap import mmap
from pathlib import Path

import numpy as np

from ibq_scale.config.run import DataConfig
from ibq_scale.data.buckets import Buckets
from ibq_scale.data.cache import ShardCache, bytes_held, default_folder
from ibq_scale.data.folder import Store
from ibq_scale.data.geometry import Extent, Layout, layout, require_fit
from ibq_scale.data.manifest import Kind, Manifest, ShardInfo, load_manifest
from ibq_scale.data.order import Int64s, Mixture, quotas
from ibq_scale.data.store import open_store
from ibq_scale.errors import UserError


@dataclass(frozen=True)
class DataSet:
    """One prepared data set. Without a `cache`, shards are read by ranges."""

    manifest: Manifest
    store: Store
    cache: ShardCache | None = None

    def map(self, shard: int) -> bytes | mmap:
        """A whole shard, in memory shared by all workers if it is a local file. UserError if it cannot be read."""
        info = self.manifest.shards[shard]
        with self._named(info):
            return self.store.map(info.name) if self.cache is None else self.cache.map(info)

    def read_range(self, shard: int, start: int, stop: int) -> bytes:
        """Bytes start … stop − 1 of a shard. UserError as `map`."""
        info = self.manifest.shards[shard]
        with self._named(info):
            if self.cache is None:
                return self.store.read_range(info.name, start, stop)
            return self.cache.read_range(info, start, stop)

    def read_singly(self, shard: int, start: int, stop: int) -> bytes:
        """As `read_range`, from the store and without caching."""
        info = self.manifest.shards[shard]
        with self._named(info):
            return self.store.read_range(info.name, start, stop)

    @contextmanager
    def _named(self, info: ShardInfo) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise UserError(f"{self.store.url}/{info.name} is missing, though the manifest names it") from None


@dataclass(frozen=True)
class DataSets:
    """All sources of a run, in the config's order, and their config.

    `batch`: the global batch, which the order by `aspects` depends on.
    """

    parts: tuple[DataSet, ...]
    config: DataConfig
    batch: int = 0

    @property
    def samples(self) -> int:
        return sum(part.manifest.samples for part in self.parts)

    @cached_property
    def hash(self) -> str:
        """sha256 (hex) over the manifests' hashes. It determines the meaning of a position."""
        return hashlib.sha256(" ".join(part.manifest.hash for part in self.parts).encode()).hexdigest()

    def name(self, source: int, shard: int, row: int) -> str:
        """A sample's name for messages: its shard's address and its row there."""
        part = self.parts[source]
        return f"{part.store.url}/{part.manifest.shards[shard].name}, sample {row}"

    @cached_property
    def extents(self) -> tuple[Extent, ...]:
        """The parts with lanes of their own: with weights each source, with aspects each bucket, else all together."""
        if self.config.aspects:
            return tuple(extent for extent in self.by_aspect if extent.shards)
        each = [part.manifest.extent for part in self.parts]
        return tuple(each) if self.config.weights else (Extent(*(sum(column) for column in zip(*each, strict=True))),)

    @cached_property
    def bucket_of(self) -> tuple[Int64s, ...]:
        """For each part the number in `config.aspects` of each shard."""
        infos = [part.manifest.aspects for part in self.parts]
        return tuple(np.array(info.of_shard, dtype=np.int64) for info in infos if info is not None)

    @property
    def by_aspect(self) -> tuple[Extent, ...]:
        """What each of `config.aspects` has, of all parts."""
        tables = [part.manifest.shards for part in self.parts]
        bucket, samples, size = (
            np.concatenate(column)
            for column in (self.bucket_of, [t.samples for t in tables], [t.bytes for t in tables])
        )
        masks = [bucket == number for number in range(len(self.config.aspects))]
        return tuple(Extent(int(m.sum()), int(samples[m].sum()), int(size[m].sum())) for m in masks)

    @cached_property
    def layout(self) -> Layout:
        """The order's version, lanes and window."""
        return layout(self.config, self.extents)

    @property
    def shards_in_use(self) -> int:
        """Maximum of shards read by a rank at once: each lane's window, and the next window."""
        return self.layout.lanes * (self.layout.window + 2) * len(self.extents)

    @property
    def cache_limit(self) -> int | None:
        """Bytes of this node's cache. None without a cache."""
        return min((part.cache.limit for part in self.parts if part.cache is not None), default=None)

    def is_here(self, source: int, shard: int) -> bool:
        """Whether the shard needs no fetch. Marks it as used, for eviction."""
        part = self.parts[source]
        return part.cache is None or part.cache.touch(part.manifest.shards[shard])

    def fetch(self, source: int, shard: int) -> None:
        """Brings a shard into the cache, if there is one."""
        part = self.parts[source]
        if part.cache is not None:
            part.cache.fetch(part.manifest.shards[shard])

    def require_fit(self, nodes: int) -> None:
        """UserError if this node's cache is too small for the shards in use by a run on `nodes` nodes."""
        if self.cache_limit is not None:
            require_fit(self.extents, self.layout, self.cache_limit, nodes)

    def order(self, seed: int) -> Mixture:
        """The map from positions to samples for a run with this seed."""
        sizes = [part.manifest.shard_sizes for part in self.parts]
        order, lanes, window = self.layout
        if self.config.aspects:
            return Buckets(sizes, self.bucket_of, self.batch, seed, lanes, window, order)
        return Mixture(sizes, self.config.weights, seed, lanes, window, order)


def open_sets(data: DataConfig, kind: Kind, batch: int = 0, manifests: Sequence[Manifest] = ()) -> DataSets:
    """Opens every source. UserError if one is unusable, or its weight gives it no position.

    `batch`: the global batch of a training. With ``data.aspects`` it must be given. `manifests`: those of the sources,
    if another rank has read them.
    """
    parts = []
    for number, url in enumerate(data.sources):
        store = open_store(url)
        manifest = manifests[number] if manifests else load_manifest(store, kind)
        parts.append(DataSet(manifest, store, _cache(data, store)))
    for url, quota in zip(data.sources, quotas(data.weights) if data.weights else (), strict=False):
        if not quota:
            raise UserError(f"data.weights: the weight of {url} is below 1/8192 of their sum and would never come up")
    sets = DataSets(tuple(parts), data, batch)
    if data.aspects:
        _require_aspects(sets)
    return sets


def _require_aspects(sets: DataSets) -> None:
    """UserError if a source was not prepared in these aspects, or a bucket has less than a batch."""
    wanted = sets.config.aspects
    for part in sets.parts:
        found = part.manifest.aspects
        if found is None or found.names != wanted:
            prepared = "without aspects" if found is None else f"in the aspects {', '.join(found.names)}"
            raise UserError(
                f"{part.store.url} was prepared {prepared}, data.aspects has {', '.join(wanted)}: write it with "
                f"'ibq-scale prepare images --aspects {','.join(wanted)}', or change data.aspects"
            )
    for name, extent in zip(wanted, sets.by_aspect, strict=True):
        if 0 < extent.samples < sets.batch:
            raise UserError(
                f"only {extent.samples} images have the aspect {name}, a batch of {sets.batch} would repeat them: "
                f"prepare without it, or lower train.global_batch"
            )


def _cache(data: DataConfig, store: Store) -> ShardCache | None:
    if data.cache_dir is None or (data.cache_dir == "auto" and store.local):
        return None
    if data.cache_dir != "auto":
        return ShardCache(Path(data.cache_dir), data.cache_bytes, store)
    folder = default_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        mine = folder.stat().st_uid == os.getuid()
        # This folder is a default, so the cache leaves a fifth of the disk's free space to other uses.
        limit = min(data.cache_bytes, (shutil.disk_usage(folder).free + bytes_held(folder)) * 4 // 5)
    except OSError as e:
        raise UserError(
            f"cannot keep shards in {folder} ({e.strerror}): set data.cache_dir to a local folder"
        ) from None
    if not mine:
        # The owner could replace shards.
        raise UserError(f"{folder} belongs to another user: set data.cache_dir to a local folder of your own")
    return ShardCache(folder, limit, store)
