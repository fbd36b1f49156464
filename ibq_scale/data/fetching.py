"""Fetches shards into the node's cache ahead of use.

A batch does not wait for its shards: samples of a missing shard are read by range (images.py). So the first batch costs
its own bytes only. Single reads are limited to a share of all samples. Beyond it a batch waits for its shards.
Otherwise a slow store would serve the same bytes twice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from torch.utils.data import Sampler

from ibq_scale.data.images import Request

# Batches whose shards are fetched ahead of use, but at least so many samples of them.
FETCH_AHEAD = 16
SAMPLES_AHEAD = 4096
# Concurrent shard downloads of a rank. Each makes up to four requests.
FETCH_THREADS = 4
# Single reads allowed to each rank: samples at the start, and a share of all later samples.
SINGLY_AT_FIRST, SINGLY_SHARE = 1024, 0.02

# A node fetches a shard if it reads at least this part of it. Otherwise it reads its samples singly.
MOST_OF = 0.5

Shard = tuple[int, int]
"""Source, and number in it."""


class Fetcher(Protocol):
    """Brings shards to this node."""

    def is_here(self, source: int, shard: int) -> bool:
        """Whether the shard needs no fetch. Marks it as used, for eviction."""
        ...

    def fetch(self, source: int, shard: int) -> None:
        """Brings a shard here."""
        ...


class FetchingSampler(Sampler[list[Request]]):
    """Yields batches of requests in order while threads fetch the shards of later ones.

    `first`: number of batches to yield before any fetch, so the store serves these alone. 0 if samples cannot be read
    singly: every batch then waits for its shards. `whole`: whether this node, and no other, fetches a sample's shard.
    """

    def __init__(
        self, requests: Iterator[list[Request]], fetcher: Fetcher, first: int, whole: Callable[[Request], bool]
    ) -> None:
        self._requests = requests
        self._fetcher = fetcher
        self._first = first
        self._whole = whole
        self._number = 0
        # The last batch to ask for a shard, and the downloads under way.
        self._asked: dict[Shard, int] = {}
        self._coming: dict[Shard, Future[None]] = {}
        self._singly = float(SINGLY_AT_FIRST if first else 0)

    def __iter__(self) -> Iterator[list[Request]]:
        for _ in range(self._first):
            yield next(self._requests)
        waiting: deque[list[Request]] = deque()
        pool = ThreadPoolExecutor(FETCH_THREADS)
        try:
            while True:
                while len(waiting) < FETCH_AHEAD or len(waiting) * len(waiting[0]) < SAMPLES_AHEAD:
                    waiting.append(next(self._requests))
                    self._ask(waiting[-1], pool)
                yield self._arrived(waiting.popleft())
        finally:
            # On an error, downloads under way are not waited for.
            pool.shutdown(wait=False, cancel_futures=True)

    def _ask(self, batch: list[Request], pool: ThreadPoolExecutor) -> None:
        self._number += 1
        for request in batch:
            shard = (request.source, request.shard)
            # Often enough to keep it from eviction.
            if self._number - self._asked.get(shard, -FETCH_AHEAD) < FETCH_AHEAD:
                continue
            self._asked[shard] = self._number
            if shard not in self._coming and not self._fetcher.is_here(*shard) and self._whole(request):
                self._coming[shard] = pool.submit(self._fetcher.fetch, *shard)
        if self._number % SAMPLES_AHEAD == 0:
            self._asked = {shard: n for shard, n in self._asked.items() if self._number - n < FETCH_AHEAD}

    def _arrived(self, batch: list[Request]) -> list[Request]:
        """Returns the batch once its shards have arrived, or while single reads are allowed. Raises a fetch's error."""
        for shard, future in list(self._coming.items()):
            if future.done():
                future.result()
                del self._coming[shard]
        late = [self._coming[shard] for r in batch if (shard := (r.source, r.shard)) in self._coming]
        if self._first:
            self._singly += SINGLY_SHARE * len(batch)
        if len(late) <= self._singly:
            self._singly -= len(late)
        else:
            for future in late:
                future.result()
        return batch
