"""The order is an exact permutation of every epoch, the same whatever asks for it, and known by heart."""

from __future__ import annotations

import time
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from ibq_scale.data.order import SampleOrder

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
    begin = time.perf_counter()
    for position in range(10**9, 10**9 + 64):
        order.locate(position)
    assert time.perf_counter() - begin < 2.0


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
