"""Chooses lanes and window for a data set, and computes the cache and the store traffic of a node.

The choice depends on the manifests and `data.cache_bytes` only, never on the machine, so a run has the same order
wherever it starts. A checkpoint keeps the numbers and a resumed run goes on under them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, NamedTuple

from ibq_scale.config.run import DataConfig
from ibq_scale.console import gigabytes
from ibq_scale.data.order import VERSIONS
from ibq_scale.errors import UserError

NEWEST = max(VERSIONS)
# Lanes and window of version 1, for runs that name neither.
OLD = 64, 4
# Up to one node a lane, each shard is read once. More lanes and wider windows mix better and keep more shards in use.
LANES, WINDOWS = (128, 64, 32, 16, 8), (4, 3, 2, 1)
# The cache holds twice the shards in use, so read-ahead evicts none of them.
CACHE_SHARE = 2
# Default of `prepare`.
SHARD_BYTES = 64 << 20
# Of a sample, in a shard's table.
INDEX_BYTES = 20


class Extent(NamedTuple):
    """A set of shards with its own lanes: one source of a mixture, or all sources of a union."""

    shards: int
    samples: int
    bytes: int


class Layout(NamedTuple):
    """The order's version, lanes and window: `DataConfig` as numbers."""

    order: int
    lanes: int
    window: int


@dataclass(frozen=True)
class Stream:
    """A layout and its cost for each node, in bytes: shards in use at once, cache, reads before the first batch.

    `cache` is None without one. `traffic`: bytes served by the store to all nodes in an epoch, over the set's bytes.
    """

    layout: Layout
    working_set: int
    cache: int | None
    first_batch: int
    traffic: float
    bytes: int

    @staticmethod
    def of(extents: Sequence[Extent], data: DataConfig, cache: int | None, batch: int, nodes: int) -> Stream:
        """`batch`: samples of all micro-batches of a node."""
        found = layout(data, extents)
        shards, samples, total = (sum(column) for column in zip(*extents, strict=True))
        touched = min(shards, batch, working_shards(found, nodes) * len(extents))
        first = batch * total // samples + touched * INDEX_BYTES * samples // shards
        if found.order == 1:
            # Every node takes part in every lane and reads from nearly all shards.
            traffic = float(nodes)
        else:
            # Two neighbours share the shard at their border: one fetches it, the other reads its part by ranges.
            # With more nodes than lanes, several share a lane: each fetches its share and reads the rest by ranges.
            traffic = 1 + 0.25 * (nodes - 1) / shards + max(0.0, 1 - found.lanes / nodes)
        return Stream(found, working_set(extents, found, nodes), cache, first, traffic, total)

    def __str__(self) -> str:
        order, lanes, window = self.layout
        text = f"order {order}: {lanes} lanes, windows of {window} shard{'s' * (window > 1)}"
        if self.cache is None:
            return f"{text}; no cache"
        often = "once" if self.bytes <= self.cache else "an epoch"
        return (
            f"{text}; {gigabytes(self.working_set)} in use a node, {gigabytes(self.cache)} of cache; "
            f"{gigabytes(self.first_batch)} before the first batch, the store serves "
            f"{gigabytes(self.traffic * self.bytes)} {often}"
        )


def working_set(extents: Sequence[Extent], layout: Layout, nodes: int = 1) -> int:
    """Bytes of shards in use by the lanes of one node. A window of w shards touches w + 1 of them."""
    shards = working_shards(layout, nodes)
    return sum(min(e.bytes, shards * e.bytes // e.shards) for e in extents)


def working_shards(layout: Layout, nodes: int = 1) -> int:
    """As `working_set`, in shards of one source."""
    return ceil(layout.lanes / (nodes if layout.order > 1 else 1)) * (layout.window + 1)


def chosen(
    extents: Sequence[Extent], cache_bytes: int, lanes_of: Sequence[int] = LANES, windows: Sequence[int] = WINDOWS
) -> tuple[int, int]:
    """The most lanes, then the widest window, with the shards in use within half of the cache. Else the least."""
    fits = (
        (lanes, window)
        for lanes in lanes_of
        for window in windows
        if working_set(extents, Layout(NEWEST, lanes, window)) * CACHE_SHARE <= cache_bytes
    )
    return next(fits, (lanes_of[-1], windows[-1]))


def layout(data: DataConfig, extents: Sequence[Extent]) -> Layout:
    """The config's own numbers. Null ones are chosen."""
    order = data.order or NEWEST
    if order == 1:
        return Layout(order, data.lanes or OLD[0], data.window or OLD[1])
    lanes = (data.lanes,) if data.lanes else LANES
    windows = (data.window,) if data.window else WINDOWS
    return Layout(order, *chosen(extents, data.cache_bytes, lanes, windows))


def continued(data: DataConfig, saved: dict[str, Any]) -> DataConfig:
    """The config under the layout of a checkpoint's config. Without an `order` there, it was version 1."""
    kept = Layout(saved.get("order", 1), saved["lanes"], saved["window"])
    return data.model_copy(update=kept._asdict())


def require_fit(extents: Sequence[Extent], layout: Layout, limit: int, nodes: int) -> None:
    """UserError if a node's cache of `limit` bytes does not hold the shards in use. It names numbers to fit.

    Version 1 is let through, so old runs go on. They read single samples when a shard is missing.
    """
    needed = working_set(extents, layout, nodes)
    if layout.order == 1 or needed <= limit:
        return
    less = Layout(NEWEST, *chosen(extents, limit))
    shard_mb = limit // (CACHE_SHARE * working_shards(less)) >> 20
    smaller = (
        f"or start anew with data.lanes={less.lanes} data.window={less.window}"
        if working_set(extents, less, nodes) <= limit
        else f"or prepare the data in shards of {shard_mb} MB"
    )
    raise UserError(
        f"{gigabytes(needed)} of shards are in use at once (data.lanes={layout.lanes} data.window={layout.window}, "
        f"{nodes} node{'s' * (nodes > 1)}), and the cache holds {gigabytes(limit)}: give it data.cache_bytes="
        f"{needed * CACHE_SHARE} on a disk that has them (data.cache_dir), {smaller}"
    )
