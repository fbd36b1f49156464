"""The data sets that a run reads, opened: manifests, stores, caches, and the order over all of them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ibq_scale.config.run import DataConfig
from ibq_scale.data.cache import ShardCache
from ibq_scale.data.manifest import Kind, Manifest, load_manifest
from ibq_scale.data.order import Mixture, quotas
from ibq_scale.data.store import Store, open_store
from ibq_scale.errors import UserError


@dataclass(frozen=True)
class DataSet:
    """One prepared data set. `cache` is None where shards are read by ranges."""

    manifest: Manifest
    store: Store
    cache: ShardCache | None = None


@dataclass(frozen=True)
class DataSets:
    """All sources of a run, in the config's order."""

    parts: tuple[DataSet, ...]

    @property
    def samples(self) -> int:
        return sum(part.manifest.samples for part in self.parts)

    @cached_property
    def hash(self) -> str:
        """sha256 (hex) over the manifests' hashes: what a position means depends on it."""
        return hashlib.sha256(" ".join(part.manifest.hash for part in self.parts).encode()).hexdigest()

    def order(self, data: DataConfig, seed: int) -> Mixture:
        """Positions of this run to samples."""
        sizes = [part.manifest.shard_sizes for part in self.parts]
        return Mixture(sizes, data.weights, seed, data.lanes, data.window)


def open_sets(data: DataConfig, kind: Kind) -> DataSets:
    """Opens every source. UserError where one cannot be used, or has too small a weight to ever come up."""
    parts = []
    for url in data.sources:
        store = open_store(url)
        cache = ShardCache(Path(data.cache_dir), data.cache_bytes, store) if data.cache_dir else None
        parts.append(DataSet(load_manifest(store, kind), store, cache))
    for url, quota in zip(data.sources, quotas(data.weights) if data.weights else (), strict=False):
        if not quota:
            raise UserError(f"data.weights: the weight of {url} is below 1/8192 of their sum and would never come up")
    return DataSets(tuple(parts))
