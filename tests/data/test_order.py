"""The order is an exact permutation of every epoch, the same whatever asks for it, and known by heart."""

from __future__ import annotations

import math
import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ibq_scale.data.order import BLOCK, VERSIONS, Mixture, Place, PlannedOrder, SampleOrder, quotas
from ibq_scale.data.stream import rank_positions

SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=12)


@settings(max_examples=100)
@given(
    version=st.sampled_from(sorted(VERSIONS)),
    sizes=SIZES,
    seed=st.integers(0, 2**63),
    lanes=st.integers(1, 20),
    window=st.integers(1, 5),
    epoch=st.integers(0, 3),
)
def test_each_sample_occurs_once_an_epoch(
    version: int, sizes: list[int], seed: int, lanes: int, window: int, epoch: int
) -> None:
    order = VERSIONS[version](sizes, seed, lanes, window)
    n = len(order)
    seen = Counter(order.locate(epoch * n + p) for p in range(n))
    assert seen == Counter((epoch, shard, row) for shard, size in enumerate(sizes) for row in range(size))


@pytest.mark.parametrize("version", VERSIONS)
def test_epochs_and_seeds_differ_and_repeat(version: int) -> None:
    def epoch(seed: int, number: int) -> list[tuple[int, int]]:
        order = VERSIONS[version]([7] * 10, seed, 4, 2)
        return [order.locate(number * 70 + p)[1:] for p in range(70)]

    assert epoch(0, 0) == epoch(0, 0)
    assert epoch(0, 0) != epoch(0, 1)
    assert epoch(0, 0) != epoch(1, 0)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_order_of_a_release_stays_the_order_of_the_next(version: int) -> None:
    """A change of these numbers would resume old runs in another order: add a version instead."""
    order = VERSIONS[version]([3, 5, 2, 4], seed=42, lanes=3, window=2)
    assert [order.locate(p)[1:] for p in range(14)] == GOLDEN[version]


def test_the_ranks_of_a_release_take_what_those_of_the_next_take() -> None:
    """Version 1 by micro-batches, version 2 by lanes."""
    shares = {v: [Mixture([[3, 5, 2, 4]], (), 42, 4, 2, v).share(8, r, 2, 4) for r in range(2)] for v in VERSIONS}
    assert shares == {1: [[8, 9, 10, 11], [12, 13, 14, 15]], 2: [[8, 10, 12, 14], [9, 11, 13, 15]]}


@pytest.mark.parametrize("version", VERSIONS)
def test_a_far_position_is_as_fast_as_a_near_one(version: int) -> None:
    order = VERSIONS[version]([1000] * 1300, seed=1, lanes=64, window=4)
    begin = time.thread_time()
    for position in range(10**9, 10**9 + 64):
        order.locate(position)
    assert time.thread_time() - begin < 2.0


OLD = [
    (1, 0),
    (3, 0),
    (0, 2),
    (1, 2),
    (3, 1),
    (0, 1),
    (1, 3),
    (3, 2),
    (2, 0),
    (1, 4),
    (3, 3),
    (2, 1),
    (1, 1),
    (0, 0),
]
NEW = [
    (1, 0),
    (0, 0),
    (3, 2),
    (1, 2),
    (0, 1),
    (3, 3),
    (1, 3),
    (0, 2),
    (3, 1),
    (1, 4),
    (2, 0),
    (3, 0),
    (1, 1),
    (2, 1),
]
GOLDEN = {1: OLD, 2: NEW}


@settings(max_examples=60)
@given(
    sizes=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=4),
    seed=st.integers(0, 99),
    lanes=st.integers(1, 12),
    window=st.integers(1, 4),
)
def test_several_sources_without_weights_are_one_set(
    sizes: list[list[int]], seed: int, lanes: int, window: int
) -> None:
    mixture = Mixture(sizes, (), seed, lanes, window)
    n = sum(map(sum, sizes))
    seen = Counter(mixture.locate(n + p) for p in range(n))
    samples = [
        (source, 1, s, r) for source, part in enumerate(sizes) for s, size in enumerate(part) for r in range(size)
    ]
    assert seen == Counter(samples)


@pytest.mark.slow
@settings(max_examples=30)
@given(weights=st.lists(st.floats(0.01, 10), min_size=2, max_size=5), seed=st.integers(0, 99))
def test_weights_hold_in_every_block_and_each_source_keeps_its_own_order(weights: list[float], seed: int) -> None:
    sizes = [[5, 3 + i] for i in range(len(weights))]
    mixture = Mixture(sizes, weights, seed, 3, 2)
    shares = quotas(weights)
    assert sum(shares) == BLOCK
    for share, weight in zip(shares, weights, strict=True):
        assert abs(share / BLOCK - weight / sum(weights)) <= 1 / BLOCK
    places = [mixture.locate(2 * BLOCK + p) for p in range(BLOCK)]
    assert [sum(p.source == s for p in places) for s in range(len(weights))] == list(shares)
    for source, part in enumerate(sizes):
        alone = PlannedOrder(part, seed + source, 3, 2)
        expected = [tuple(alone.locate(2 * shares[source] + i)) for i in range(shares[source])]
        assert [tuple(p[1:]) for p in places if p.source == source] == expected


@pytest.mark.slow
@settings(max_examples=60)
@given(
    parts=st.lists(
        st.tuples(st.sampled_from([1, 2, 3, 4, 8, 16]), st.integers(1, 3), st.integers(0, 3)), min_size=1, max_size=4
    ),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    lanes=st.integers(1, 8),
    version=st.sampled_from(sorted(VERSIONS)),
    weights=st.sampled_from([(), (0.7, 0.3)]),
)
def test_a_run_killed_and_resumed_on_other_ranks_sees_each_position_once_in_its_step(
    parts: list[tuple[int, int, int]], sizes: list[int], lanes: int, version: int, weights: tuple[float, ...]
) -> None:
    """Each part of the run has its world, micro-batch and number of steps; then it is killed and the next resumes."""
    order = Mixture([sizes, [4, 2]], weights, 3, lanes, 2, version)
    done = 0
    seen: list[int] = []
    # A global batch that every part's world and micro-batch divide.
    batch = math.lcm(*(world * micro for world, micro, _ in parts))
    for world, micro, steps in parts:
        streams = [rank_positions(order, done, rank, world, micro) for rank in range(world)]
        for _ in range(steps * batch // (world * micro)):
            seen += sorted(p for stream in streams for p in next(stream))
        # What workers had prefetched is lost with them.
        for stream in streams:
            next(stream)
        done += steps * batch
    assert seen == list(range(done))
    for part in order.passes(done):
        for epoch in range(part.read // part.samples):
            here = [p for p in map(order.locate, seen) if p.source in part.sources and p.epoch == epoch]
            assert len({p[2:] + p[:1] for p in here}) == len(here) == part.samples


def test_a_run_of_billions_of_samples_resumes_at_once() -> None:
    begin = time.thread_time()
    order = SampleOrder([10_000] * 20_000, seed=0, lanes=64, window=4)
    places = {order.locate(10**9 + p) for p in range(256)}
    assert time.thread_time() - begin < 2.0
    assert len(places) == 256


@pytest.mark.parametrize("world", [1, 2, 4, 8, 16])
def test_a_rank_reads_one_part_of_the_line_and_no_other_in_every_epoch(world: int) -> None:
    """16 lanes: each shard is read by one rank, or by two neighbours where their parts meet."""
    order = Mixture([[50] * 64], (), 5, 16, 1)
    n, micro = 3200, 64 // world
    for epoch in (0, 1, 5):
        readers: dict[int, set[int]] = {}
        # The steps that lie in this epoch as a whole.
        for first in range(-(-epoch * n // 64) * 64, (epoch + 1) * n - 63, 64):
            for rank in range(world):
                for position in order.share(first, rank, world, micro):
                    place = order.locate(position)
                    readers.setdefault(place.shard, set()).add(rank)
                    assert order.part(place, rank / world, (rank + 1) / world) > 0
        assert sum(map(len, readers.values())) <= 64 + world - 1
        shared = [ranks for ranks in readers.values() if len(ranks) > 1]
        assert all(max(ranks) - min(ranks) == 1 and len(ranks) == 2 for ranks in shared)


def test_the_shards_in_use_are_a_window_for_each_lane_and_each_is_read_in_one_go() -> None:
    lanes, window, shards, rows = 8, 2, 80, 30
    order = PlannedOrder([rows] * shards, 3, lanes, window)
    uses: dict[int, list[int]] = {}
    for position in range(len(order)):
        uses.setdefault(order.locate(position).shard, []).append(position)
    spans = [(min(positions), max(positions)) for positions in uses.values()]
    in_use = [sum(first <= p <= last for first, last in spans) for p in range(0, len(order), 7)]
    assert max(in_use) <= lanes * (window + 1)
    # A window and the shard that it ends in, of all that lane's.
    assert max(last - first for first, last in spans) <= (2 * window + 1) * rows * lanes


def test_shards_are_wanted_one_by_one_and_not_all_lanes_at_once() -> None:
    """Each 400 positions use up four shards of 100 samples."""
    new = {}
    for version, kind in VERSIONS.items():
        order = kind([100] * 160, 3, 32, 1)
        shards = [order.locate(p).shard for p in range(12_800)]
        steps = [set(shards[first : first + 400]) for first in range(0, 12_800, 400)]
        # The start opens a window of each lane.
        new[version] = max(len(step.difference(*steps[:n])) for n, step in enumerate(steps) if n >= 8)
    assert new[2] <= 10
    assert new[1] >= 30


@pytest.mark.parametrize("nodes", [1, 3, 8])
def test_one_node_has_most_of_a_shard(nodes: int) -> None:
    order = Mixture([[7, 30, 11] * 20], (), 5, 16, 1)
    for shard in range(60):
        parts = [order.part(Place(0, 0, shard, 0), node / nodes, (node + 1) / nodes) for node in range(nodes)]
        assert sum(parts) == pytest.approx(1)
        assert sum(part >= 0.5 for part in parts) == 1
