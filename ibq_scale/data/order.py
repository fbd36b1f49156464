"""The order of samples, a pure function of (version, shard sizes, seed, lanes, window, position).

Epoch e is a permutation of all samples: shards are permuted, their rows laid end to end, the line cut into `lanes`
lanes of equal length (± 1), and rows shuffled inside windows of `window` shards' worth of a lane. Consecutive positions
take the lanes in turn, so they read `lanes` places of the set at once. World size and workers do not change the order.

Version 1 (`SampleOrder`) gives rank r the r-th micro-batch. Version 2 (`PlannedOrder`) gives each rank the lanes of its
own part of the line. A node then reads few shards, and each shard is read by about one node. A checkpoint keeps the
version, so old runs go on under version 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Int64s = NDArray[np.int64]


# Positions in a block of the mixture. Each block has every source's share, shuffled by the block's number.
BLOCK = 4096
# The stream of random bits for the mixture. The lanes' streams count up from 1, the shards' stream is 0.
MIXTURE_STREAM = (1 << 64) - 1


class Location(NamedTuple):
    """A position's sample, and its epoch."""

    epoch: int
    shard: int
    row: int


class Place(NamedTuple):
    """A `Location` in one of several sources."""

    source: int
    epoch: int
    shard: int
    row: int


class Pass(NamedTuple):
    """Sources of one data set, the samples of its epoch, and the samples read since the run's start."""

    sources: tuple[int, ...]
    samples: int
    read: int


class SampleOrder:
    """`locate` maps an absolute position, counted from the run's first sample, to a sample.

    Version 1: position p of an epoch is row p // lanes of lane p mod lanes, and lanes lie on the line in this order.
    """

    def __init__(self, shard_sizes: Sequence[int], seed: int, lanes: int, window: int) -> None:
        assert min(shard_sizes, default=0) > 0, "every shard holds samples"
        self._sizes = np.asarray(shard_sizes, dtype=np.int64)
        self._total = int(self._sizes.sum())
        self._lanes = min(lanes, self._total)
        self._seed = seed
        # A window is `window` shards of mean size. A lane holds few of them, so shuffling stays local.
        self._window_rows = max(1, window * self._total // len(self._sizes))
        # Per object, so that a released order releases its permutations.
        self._epoch_shards = lru_cache(maxsize=2)(self._permute_shards)
        self._shuffled = lru_cache(maxsize=4 * self._lanes)(self._shuffle_window)

    def __len__(self) -> int:
        """Samples per epoch."""
        return self._total

    def locate(self, position: int) -> Location:
        """The sample at an absolute position ≥ 0."""
        epoch = position // self._total
        flat = self._flat(epoch, position)
        shards, ends = self._epoch_shards(epoch)
        place = int(np.searchsorted(ends, flat, side="right"))
        start = int(ends[place - 1]) if place else 0
        return Location(epoch, int(shards[place]), flat - start)

    def places(self, positions: Int64s) -> NDArray[np.float64]:
        """Place on the line (0 … 1) of each position's lane. It decides each position's rank. All 0 in version 1."""
        return np.zeros(len(positions))

    def part(self, epoch: int, shard: int, begin: float, end: float) -> float:
        """Overlap of a shard with the line from `begin` to `end`, divided by the shorter of both. 1 in version 1."""
        return 1.0

    def _flat(self, epoch: int, position: int) -> int:
        """The place on the epoch's line, in rows."""
        within = position - epoch * self._total
        lane, row = within % self._lanes, within // self._lanes
        window, offset = divmod(row, self._window_rows)
        return self._lane_start(lane) + window * self._window_rows + int(self._shuffled(epoch, lane, window)[offset])

    def _lane_start(self, lane: int) -> int:
        """If `lanes` does not divide the samples, the first lanes are one row longer, as p mod lanes needs."""
        length, longer = divmod(self._total, self._lanes)
        return lane * length + min(lane, longer)

    def _permute_shards(self, epoch: int) -> tuple[Int64s, Int64s]:
        shards = _permutation(len(self._sizes), self._seed, epoch, 0, 0)
        return shards, np.cumsum(self._sizes[shards])

    def _shuffle_window(self, epoch: int, lane: int, window: int) -> Int64s:
        lane_rows = self._lane_start(lane + 1) - self._lane_start(lane)
        rows = min(self._window_rows, lane_rows - window * self._window_rows)
        return _permutation(rows, self._seed, epoch, lane + 1, window)


class PlannedOrder(SampleOrder):
    """Version 2: position P, counted over all epochs, belongs to lane P mod lanes. Consecutive lanes lie apart.

    - Lanes lie in the order of their bit-reversed numbers, so any run of positions covers the line evenly. Ranks share
      a step's positions by `places`, and each reads the same part of the line in every step.
    - Lanes run forwards and backwards by turns. Two lanes with a shard in common read it at the same time.
    - Windows begin at a different row in each lane, so lanes start new shards one by one and not all at once.
    """

    def __init__(self, shard_sizes: Sequence[int], seed: int, lanes: int, window: int) -> None:
        super().__init__(shard_sizes, seed, lanes, window)
        self._places = _bit_reversed(self._lanes)
        self._epoch_starts = lru_cache(maxsize=2)(self._cut_line)
        self._epoch_places = lru_cache(maxsize=2)(lambda epoch: np.argsort(self._epoch_shards(epoch)[0]))

    def places(self, positions: Int64s) -> NDArray[np.float64]:
        return self._places[positions % self._lanes] / self._lanes

    def part(self, epoch: int, shard: int, begin: float, end: float) -> float:
        stop = int(self._epoch_shards(epoch)[1][self._epoch_places(epoch)[shard]])
        size = int(self._sizes[shard])
        both = min(stop, end * self._total) - max(stop - size, begin * self._total)
        return max(0.0, both / min(size, (end - begin) * self._total))

    def _flat(self, epoch: int, position: int) -> int:
        lane = position % self._lanes
        start, rows, shift = self._lane(epoch, lane)
        first = epoch * self._total
        row = (position - first - (lane - first) % self._lanes) // self._lanes
        window = (row + shift) // self._window_rows
        begin = max(0, window * self._window_rows - shift)
        row = begin + int(self._shuffled(epoch, lane, window)[row - begin])
        return start + (row if self._places[lane] % 2 == 0 else rows - 1 - row)

    def _lane(self, epoch: int, lane: int) -> tuple[int, int, int]:
        """A lane's start on the line, its rows, and the rows missing from its first window."""
        starts, place = self._epoch_starts(epoch), int(self._places[lane])
        start = int(starts[place])
        return start, int(starts[place + 1]) - start, lane * self._window_rows // self._lanes

    def _cut_line(self, epoch: int) -> Int64s:
        """The lanes' starts by their places, and the line's end. A lane has a row per position of it in the epoch."""
        length, longer = divmod(self._total, self._lanes)
        first = epoch * self._total % self._lanes
        rows = np.empty(self._lanes, dtype=np.int64)
        rows[self._places] = length + ((np.arange(self._lanes) - first) % self._lanes < longer)
        return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(rows)])

    def _shuffle_window(self, epoch: int, lane: int, window: int) -> Int64s:
        _, rows, shift = self._lane(epoch, lane)
        begin = max(0, window * self._window_rows - shift)
        end = min(rows, (window + 1) * self._window_rows - shift)
        return _permutation(end - begin, self._seed, epoch, lane + 1, window)


VERSIONS = {1: SampleOrder, 2: PlannedOrder}


class Mixture:
    """The order of several sources: one data set of all shards, or, with weights, a share of positions for each source.

    With weights, a block of `BLOCK` positions holds round(weight · BLOCK) of each source, shuffled. A data set's own
    positions count up over the blocks, so it has the same order and epochs as alone (with a seed of its own). The order
    is still a pure function of the position. `set_of`: for each source other numbers of its shards' data sets.
    """

    def __init__(
        self,
        sizes: Sequence[Sequence[int]],
        weights: Sequence[float],
        seed: int,
        lanes: int,
        window: int,
        version: int = max(VERSIONS),
        set_of: Sequence[Int64s] = (),
    ) -> None:
        self._seed = seed
        self._quotas = quotas(weights or (1.0,))
        self._block = lru_cache(maxsize=4)(self._mix_block)
        set_of = set_of or [np.full(len(part), source if weights else 0) for source, part in enumerate(sizes)]
        rows, numbers = (np.concatenate([np.asarray(part) for part in parts]) for parts in (sizes, set_of))
        # Shards are counted over all sources.
        self._source = np.repeat(np.arange(len(sizes)), [len(part) for part in sizes])
        self._first = np.searchsorted(self._source, np.arange(len(sizes)))
        present, self._set_of = np.unique(numbers, return_inverse=True)
        self._shards = [np.flatnonzero(numbers == number) for number in present]
        self._orders = [
            VERSIONS[version](rows[shards].tolist(), seed + number, lanes, window)
            for number, shards in zip(present.tolist(), self._shards, strict=True)
        ]

    def locate(self, position: int) -> Place:
        """The sample at an absolute position ≥ 0."""
        return self._located(*self._own(position))

    def _located(self, number: int, position: int) -> Place:
        """The sample at a data set's own position."""
        epoch, place, row = self._orders[number].locate(position)
        shard = int(self._shards[number][place])
        source = int(self._source[shard])
        return Place(source, epoch, shard - int(self._first[source]), row)

    def share(self, first: int, rank: int, world_size: int, size: int) -> list[int]:
        """A rank's `size` positions, in its part of the line, of the `world_size` · `size` from `first` on."""
        positions = np.arange(first, first + world_size * size)
        by_place = np.argsort(self._places(positions), kind="stable")
        return sorted(positions[by_place[rank * size : (rank + 1) * size]].tolist())

    def part(self, place: Place, begin: float, end: float) -> float:
        """`SampleOrder.part` for the shard at a place."""
        shard = int(self._first[place.source]) + place.shard
        number = int(self._set_of[shard])
        own = int(np.searchsorted(self._shards[number], shard))
        return self._orders[number].part(place.epoch, own, begin, end)

    def passes(self, position: int) -> list[Pass]:
        """For each data set with its own epochs: the samples read when the run has read `position`."""
        return [
            Pass(tuple(np.unique(self._source[shards]).tolist()), len(order), read)
            for shards, order, read in zip(self._shards, self._orders, self._read(position), strict=True)
        ]

    def set_of(self, source: int, shards: Int64s) -> Int64s:
        """For each shard (n,) of a source its data set's number in `passes`."""
        numbers: Int64s = self._set_of[self._first[source] + shards]
        return numbers

    def _own(self, position: int) -> tuple[int, int]:
        """The number of the position's data set, and the position there."""
        if len(self._orders) == 1:
            return 0, position
        block, within = divmod(position, BLOCK)
        numbers, own = self._block(block)
        return int(numbers[within]), int(own[within])

    def _read(self, position: int) -> list[int]:
        """Of each data set, its positions before this one."""
        block, within = divmod(position, BLOCK)
        begun = np.bincount(self._block(block)[0][:within], minlength=len(self._quotas))
        return [block * quota + int(count) for quota, count in zip(self._quotas, begun, strict=True)]

    def _places(self, positions: Int64s) -> NDArray[np.float64]:
        """As `SampleOrder.places`, each on its own data set's line. The positions are consecutive."""
        if len(self._orders) == 1:
            return self._orders[0].places(positions)
        first = int(positions[0]) // BLOCK
        blocks = [self._block(block) for block in range(first, int(positions[-1]) // BLOCK + 1)]
        numbers, own = (np.concatenate(values)[positions - first * BLOCK] for values in zip(*blocks, strict=True))
        places = np.empty(len(positions))
        for number, order in enumerate(self._orders):
            places[numbers == number] = order.places(own[numbers == number])
        return places

    def _mix_block(self, block: int) -> tuple[Int64s, Int64s]:
        """Each position's data set, and its position there."""
        numbers = np.repeat(np.arange(len(self._quotas)), self._quotas)
        numbers = numbers[_permutation(BLOCK, self._seed, block, MIXTURE_STREAM, 0)]
        own = np.empty(BLOCK, dtype=np.int64)
        for number, quota in enumerate(self._quotas):
            own[numbers == number] = block * quota + np.arange(quota)
        return numbers, own


def quotas(weights: Sequence[float]) -> tuple[int, ...]:
    """Positions per block for each weight, by largest remainder. Their sum is `BLOCK`. Very small weights get 0."""
    shares = np.asarray(weights, dtype=np.float64) / sum(weights) * BLOCK
    floors = np.floor(shares).astype(int)
    # The largest remainders get the rest. The sort is stable, so the first of equal remainders wins.
    for source in np.argsort(floors - shares, kind="stable")[: BLOCK - int(floors.sum())]:
        floors[source] += 1
    return tuple(int(quota) for quota in floors)


def _bit_reversed(count: int) -> Int64s:
    """Each number's rank among all `count` after reversing its bits (van der Corput's sequence)."""
    bits = max(1, (count - 1).bit_length())
    backwards = [int(f"{number:0{bits}b}"[::-1], 2) for number in range(count)]
    return np.argsort(np.argsort(backwards)).astype(np.int64)


def _permutation(count: int, seed: int, epoch: int, stream: int, part: int) -> Int64s:
    """Sorts by raw Philox bits, because a library's own permutation may change between versions."""
    key = (seed & 0xFFFFFFFFFFFFFFFF) | (epoch << 64)
    bits = np.random.Philox(key=key, counter=(stream << 192) | (part << 128)).random_raw(count)
    order: Int64s = np.argsort(bits, kind="stable").astype(np.int64)
    return order
