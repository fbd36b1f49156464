"""The order of samples where every step is of one aspect, a pure function of the position as in `data.order`.

The shards of each aspect form a bucket with an order and epochs of its own. A step of `batch` positions takes the next
`batch` samples of one bucket. The bucket of N_b samples takes its j-th step at the time (j + ½) / N_b, and steps come
in the order of their times. So buckets take turns in proportion to their samples. No sample is left out: a batch at the
end of a bucket's epoch goes on with its next one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import lru_cache, partial

import numpy as np
from numpy.typing import NDArray

from ibq_scale.data.order import VERSIONS, Int64s, Mixture, Pass, Place


class Buckets(Mixture):
    """`sizes`: samples of each source's shards. `bucket_of`: the shards' buckets. `batch`: positions of a step."""

    def __init__(
        self,
        sizes: Sequence[Sequence[int]],
        bucket_of: Sequence[Int64s],
        batch: int,
        seed: int,
        lanes: int,
        window: int,
        version: int = max(VERSIONS),
    ) -> None:
        assert batch > 0, "the order of buckets depends on the global batch"
        self._batch = batch
        self._bucket_of = bucket_of
        owner = np.concatenate([np.full(len(part), source) for source, part in enumerate(sizes)])
        number = np.concatenate([np.arange(len(part)) for part in sizes])
        buckets, rows = np.concatenate(bucket_of), np.concatenate([np.asarray(part) for part in sizes])
        self._present = np.unique(buckets)
        mine = [np.flatnonzero(buckets == bucket) for bucket in self._present]
        # (source, shard) of each bucket's shards, and each shard's place among them.
        self._shards = [np.stack([owner[places], number[places]], axis=1) for places in mine]
        self._place_of = [np.zeros(len(part), dtype=np.int64) for part in sizes]
        for shards in self._shards:
            for place, (source, shard) in enumerate(shards):
                self._place_of[source][shard] = place
        order = VERSIONS[version]
        self._orders = [
            order(rows[places].tolist(), seed + int(bucket), lanes, window)
            for bucket, places in zip(self._present, mine, strict=True)
        ]
        self._turn = lru_cache(maxsize=64)(self._find_turn)

    def locate(self, position: int) -> Place:
        step, within = divmod(position, self._batch)
        bucket, turn = self._turn(step)
        return self._located(bucket, turn * self._batch + within)

    def alone(self) -> list[tuple[int, Callable[[int], Place]]]:
        """Of each bucket its samples, and the map of its own positions."""
        return [(len(order), partial(self._located, bucket)) for bucket, order in enumerate(self._orders)]

    def _located(self, bucket: int, position: int) -> Place:
        epoch, shard, row = self._orders[bucket].locate(position)
        source, number = self._shards[bucket][shard].tolist()
        return Place(source, epoch, number, row)

    def part(self, place: Place, begin: float, end: float) -> float:
        bucket = int(np.searchsorted(self._present, self._bucket_of[place.source][place.shard]))
        shard = int(self._place_of[place.source][place.shard])
        return self._orders[bucket].part(place.epoch, shard, begin, end)

    def passes(self, position: int) -> list[Pass]:
        step, within = divmod(position, self._batch)
        turns, current = self._turns(step), self._turn(step)[0]
        return [
            Pass(
                tuple(np.unique(shards[:, 0]).tolist()),
                len(order),
                turns[bucket] * self._batch + within * (bucket == current),
            )
            for bucket, (shards, order) in enumerate(zip(self._shards, self._orders, strict=True))
        ]

    def set_of(self, source: int, shards: Int64s) -> Int64s:
        return np.searchsorted(self._present, self._bucket_of[source][shards])

    def _places(self, positions: Int64s) -> NDArray[np.float64]:
        """The positions are of one step, since a step is a number of all ranks' micro-batches."""
        step = int(positions[0]) // self._batch
        assert int(positions[-1]) // self._batch == step, "a micro-batch crosses two steps"
        bucket, turn = self._turn(step)
        return self._orders[bucket].places(positions - (step - turn) * self._batch)

    def _find_turn(self, step: int) -> tuple[int, int]:
        """A step's bucket, and its number among the bucket's steps."""
        turns = self._turns(step)
        bucket = min(range(len(turns)), key=lambda b: self._time(b, turns[b]))
        return bucket, turns[bucket]

    def _turns(self, step: int) -> list[int]:
        """Each bucket's steps among the first `step`."""
        sizes = [len(order) for order in self._orders]
        total = sum(sizes)
        # All steps up to the time step / total. They are `step` but for half of the number of buckets.
        turns = [(2 * step * size + total) // (2 * total) for size in sizes]
        while sum(turns) < step:
            turns[min(range(len(turns)), key=lambda b: self._time(b, turns[b]))] += 1
        while sum(turns) > step:
            turns[max(range(len(turns)), key=lambda b: self._time(b, turns[b] - 1))] -= 1
        return turns

    def _time(self, bucket: int, turn: int) -> tuple[Fraction, int]:
        return Fraction(2 * turn + 1, len(self._orders[bucket])), bucket
