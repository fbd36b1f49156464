"""Shards on their way to a node before its batches need them.

A batch is handed out whether its shards have come or not: samples of a shard that has not are read singly (images.py).
So the first batch needs its own bytes only. Single reads are bounded to a share of all: beyond it a batch waits for its
shards, lest a store that is too slow for the run serve the same bytes twice.
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
# Shards that a rank downloads at once; the store gives each up to four requests.
FETCH_THREADS = 4
# Samples that may be read singly at first (each rank's), and of all that follow.
SINGLY_AT_FIRST, SINGLY_SHARE = 4096, 0.02

# A node fetches the shards of which it reads at least this part, and of others its samples singly.
MOST_OF = 0.5

Shard = tuple[int, int]
"""Source, and number in it."""


class Fetcher(Protocol):
    """Where shards come to."""

    def is_here(self, source: int, shard: int) -> bool:
        """Whether nothing needs to be fetched; if so, the shard is now the last to be evicted."""
        ...

    def fetch(self, source: int, shard: int) -> None:
        """Brings a shard here."""
        ...


class FetchingSampler(Sampler[list[Request]]):
    """Hands out batches of requests in order, while threads fetch the shards of those ahead.

    `first`: batches that are handed out before any shard is fetched, so that nothing else takes the store's time; 0
    where samples cannot be read singly, and every batch waits for its shards. `whole`: whether this node fetches the
    shard of a sample; if not, another node does, and reads more of it.
    """

    def __init__(
        self, requests: Iterator[list[Request]], fetcher: Fetcher, first: int, whole: Callable[[Request], bool]
    ) -> None:
        self._requests = requests
        self._fetcher = fetcher
        self._first = first
        self._whole = whole
        self._number = 0
        # The batch by which a shard was last asked for, and those that have not come.
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
            # Whoever stops here, for a dead store perhaps, does not wait for what nobody will read.
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
        """The batch, its shards here but for what may be read singly. Raises what a fetch has met."""
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
