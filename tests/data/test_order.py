"""The order is an exact permutation of every epoch, the same whatever asks for it, and known by heart."""

from __future__ import annotations

import math
import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ibq_scale.data.order import BLOCK, Mixture, SampleOrder, quotas
from ibq_scale.data.stream import rank_positions

SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None)
@given(
    sizes=SIZES, seed=st.integers(0, 2**63), lanes=st.integers(1, 20), window=st.integers(1, 5), epoch=st.integers(0, 3)
)
def test_each_sample_occurs_once_an_epoch(sizes: list[int], seed: int, lanes: int, window: int, epoch: int) -> None:
    order = SampleOrder(sizes, seed, lanes, window)
    n = len(order)
    seen = Counter(order.locate(epoch * n + p) for p in range(n))
    assert seen == Counter((epoch, shard, row) for shard, size in enumerate(sizes) for row in range(size))


def test_epochs_and_seeds_differ_and_repeat() -> None:
    def epoch(seed: int, number: int) -> list[tuple[int, int]]:
        order = SampleOrder([7] * 10, seed, 4, 2)
        return [order.locate(number * 70 + p)[1:] for p in range(70)]

    assert epoch(0, 0) == epoch(0, 0)
    assert epoch(0, 0) != epoch(0, 1)
    assert epoch(0, 0) != epoch(1, 0)


def test_the_order_of_a_release_stays_the_order_of_the_next() -> None:
    """A change of these numbers would resume old runs in another order: raise the checkpoint format with it."""
    order = SampleOrder([3, 5, 2, 4], seed=42, lanes=3, window=2)
    assert [order.locate(p)[1:] for p in range(14)] == GOLDEN


def test_a_far_position_is_as_fast_as_a_near_one() -> None:
    order = SampleOrder([1000] * 1300, seed=1, lanes=64, window=4)
    begin = time.thread_time()
    for position in range(10**9, 10**9 + 64):
        order.locate(position)
    assert time.thread_time() - begin < 2.0


GOLDEN = [
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


@settings(max_examples=60, deadline=None)
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
@settings(max_examples=30, deadline=None)
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
        alone = SampleOrder(part, seed + source, 3, 2)
        expected = [tuple(alone.locate(2 * shares[source] + i)) for i in range(shares[source])]
        assert [tuple(p[1:]) for p in places if p.source == source] == expected


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(st.tuples(st.integers(1, 16), st.integers(1, 4), st.integers(0, 5)), min_size=1, max_size=4),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    lanes=st.integers(1, 8),
)
def test_a_run_killed_and_resumed_on_other_ranks_sees_each_position_once_in_order(
    parts: list[tuple[int, int, int]], sizes: list[int], lanes: int
) -> None:
    """Each part of the run has its world, micro-batch and number of steps; then it is killed and the next resumes."""
    order = SampleOrder(sizes, 3, lanes, 2)
    done, seen = 0, []
    # A global batch that every part's world and micro-batch divide.
    batch = math.lcm(*(world * micro for world, micro, _ in parts))
    for world, micro, steps in parts:
        streams = [rank_positions(done, rank, world, micro) for rank in range(world)]
        for _ in range(steps):
            for _ in range(batch // (world * micro)):
                seen += [p for stream in streams for p in next(stream)]
        # What workers had prefetched is lost with them.
        for stream in streams:
            next(stream)
        done += steps * batch
    assert seen == list(range(done))
    for epoch in range(done // len(order)):
        places = [order.locate(epoch * len(order) + p) for p in range(len(order))]
        assert Counter(p[1:] for p in places) == Counter((s, r) for s, n in enumerate(sizes) for r in range(n))


def test_a_run_of_billions_of_samples_resumes_at_once() -> None:
    begin = time.thread_time()
    order = SampleOrder([10_000] * 20_000, seed=0, lanes=64, window=4)
    places = {order.locate(10**9 + p) for p in range(256)}
    assert time.thread_time() - begin < 2.0
    assert len(places) == 256
