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

from ibq_scale.data.order import VERSIONS, Int64s, Mixture, Place


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
        super().__init__(sizes, (), seed, lanes, window, version, bucket_of)
        self._batch = batch
        self._turn = lru_cache(maxsize=64)(self._find_turn)

    def alone(self) -> list[tuple[int, Callable[[int], Place]]]:
        """Of each bucket its samples, and the map of its own positions."""
        return [(len(order), partial(self._located, bucket)) for bucket, order in enumerate(self._orders)]

    def _own(self, position: int) -> tuple[int, int]:
        step, within = divmod(position, self._batch)
        bucket, turn = self._turn(step)
        return bucket, turn * self._batch + within

    def _read(self, position: int) -> list[int]:
        step, within = divmod(position, self._batch)
        read = [turn * self._batch for turn in self._turns(step)]
        read[self._turn(step)[0]] += within
        return read

    def _places(self, positions: Int64s) -> NDArray[np.float64]:
        """The positions are of one step, since a step is a number of all ranks' micro-batches."""
        bucket, first = self._own(int(positions[0]))
        assert self._own(int(positions[-1])) == (bucket, first + len(positions) - 1), "a micro-batch crosses two steps"
        return self._orders[bucket].places(first + np.arange(len(positions)))

    def _find_turn(self, step: int) -> tuple[int, int]:
        """A step's bucket, and its number among the bucket's steps."""
        turns = self._turns(step)
        bucket = self._next(turns)
        return bucket, turns[bucket]

    def _turns(self, step: int) -> list[int]:
        """Each bucket's steps among the first `step`."""
        sizes = [len(order) for order in self._orders]
        # All steps up to a time when fewer than `step` are over, since a bucket is at most half a step ahead.
        time = Fraction(max(0, step - len(sizes)), sum(sizes))
        turns = [int(time * size + Fraction(1, 2)) for size in sizes]
        while sum(turns) < step:
            turns[self._next(turns)] += 1
        return turns

    def _next(self, turns: Sequence[int]) -> int:
        """The bucket of the step after these, the first of equal ones."""
        return min(range(len(turns)), key=lambda bucket: Fraction(2 * turns[bucket] + 1, len(self._orders[bucket])))
