"""Walks the training order over a data set of given size, without data, and counts reads and downloads of nodes.

Each sample of a node's epoch is located and led through a model of the cache with the same eviction. At most `MOST`
samples are walked, on as many nodes as they allow. Rates are over these.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ibq_scale.config.run import DataConfig
from ibq_scale.data.fetching import MOST_OF
from ibq_scale.data.geometry import INDEX_BYTES, Extent, Stream
from ibq_scale.data.order import Mixture
from ibq_scale.errors import UserError

# Samples that are walked, over all nodes: some seconds.
MOST = 1_000_000


@dataclass(frozen=True)
class Walk:
    """`stream` is computed. The rest is counted on `nodes` of all nodes, over `samples` samples of an epoch.

    `in_use`: maximum over time of the bytes of shards between first and last use, on one node. `singly`: share of
    samples read one by one because another node fetches the shard. `again`: repeated fetches of a shard. `served`:
    bytes served by the store over bytes read. `first_batch`: bytes read by a node before its first batch.
    """

    stream: Stream
    nodes: int
    samples: int
    in_use: int
    singly: float
    again: int
    served: float
    first_batch: int


def parse(text: str) -> Extent:
    """``551-shards,141e9-bytes,1281167-samples``, in any order. UserError."""
    counts = {name: number for number, name in re.findall(r"([\d.e+]+)-(shards|bytes|samples)(?:,|$)", text)}
    try:
        values = Extent(*(int(float(counts[name])) for name in ("shards", "samples", "bytes")))
        if min(values) < 1 or values.samples < values.shards:
            raise ValueError
    except (KeyError, ValueError, OverflowError):
        raise UserError(f"--simulate {text}: write it as 551-shards,141e9-bytes,1281167-samples") from None
    return values


def walk(extent: Extent, data: DataConfig, *, nodes: int, batch: int, seed: int = 0) -> Walk:
    """`batch`: samples of a node's micro-batches together."""
    stream = Stream.of([extent], data, data.cache_bytes, batch, nodes)
    rows = np.full(extent.shards, extent.samples // extent.shards)
    rows[: extent.samples % extent.shards] += 1
    order, lanes, window = stream.layout
    mixture = Mixture([rows.tolist()], (), seed, lanes, window, order)
    steps = min(extent.samples // (batch * nodes), MOST // batch)
    walked = min(nodes, max(1, MOST // (steps * batch)))
    found = []
    for number in (place * nodes // walked for place in range(walked)):
        node = _Node(mixture, number / nodes, (number + 1) / nodes, data.cache_bytes * extent.shards // extent.bytes)
        for step in range(steps):
            node.read(mixture.share(step * batch * nodes, number, nodes, batch))
        found.append(node)
    samples = sum(node.read_samples for node in found)
    # A walk stops within shards: these are not counted, since their rest is unread.
    open_rows = batch if steps * batch * nodes + batch * nodes > extent.samples else 2 * rows[0] * lanes * (window + 1)
    fetched, read = (sum(part) for part in zip(*(node.served(rows, open_rows // nodes) for node in found), strict=True))
    return Walk(
        stream,
        walked,
        samples,
        max(node.in_use() for node in found) * extent.bytes // extent.shards,
        sum(node.singly for node in found) / samples,
        sum(node.again for node in found),
        fetched / read if read else stream.traffic,
        batch * extent.bytes // extent.samples + max(n.first_shards for n in found) * INDEX_BYTES * int(rows[0]),
    )


@dataclass
class _Use:
    """Of a shard by a node: by its own count of samples."""

    whole: bool
    first: int
    last: int = 0
    read: int = 0
    fetched: int = 0


class _Node:
    """Its cache holds `most` shards."""

    def __init__(self, order: Mixture, begin: float, end: float, most: int) -> None:
        self.read_samples = self.singly = self.again = self.first_shards = 0
        self._order, self._begin, self._end, self._most = order, begin, end, most
        self._kept: OrderedDict[int, None] = OrderedDict()
        self._uses: dict[int, _Use] = {}

    def read(self, positions: list[int]) -> None:
        for position in positions:
            place = self._order.locate(position)
            use = self._uses.get(place.shard)
            if use is None:
                whole = self._order.part(place, self._begin, self._end) >= MOST_OF
                use = self._uses[place.shard] = _Use(whole, self.read_samples)
            use.last, use.read = self.read_samples, use.read + 1
            self.read_samples += 1
            if use.whole:
                self._fetch(place.shard, use)
            else:
                self.singly += 1
        self.first_shards = self.first_shards or len(self._uses)

    def _fetch(self, shard: int, use: _Use) -> None:
        if shard not in self._kept:
            use.fetched += 1
            self.again += use.fetched > 1
        self._kept[shard] = None
        self._kept.move_to_end(shard)
        if len(self._kept) > self._most:
            self._kept.popitem(last=False)

    def served(self, rows: NDArray[np.int64], still_open: int) -> tuple[int, int]:
        """Samples served by the store and samples read, of shards without a use in the last `still_open` samples."""
        done = [(shard, u) for shard, u in self._uses.items() if u.last < self.read_samples - still_open]
        return sum(u.fetched * int(rows[s]) if u.whole else u.read for s, u in done), sum(u.read for _, u in done)

    def in_use(self) -> int:
        """Maximum over time of the fetched shards between first and last use."""
        uses = [use for use in self._uses.values() if use.whole]
        times = np.array([use.first for use in uses] + [use.last + 1 for use in uses])
        changes = np.repeat([1, -1], len(uses))
        return int(np.cumsum(changes[np.argsort(times, kind="stable")]).max(initial=0))
