"""Batches are handed out in order, their shards fetched before or read singly, and faults are told at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import islice

import pytest

from ibq_scale.data import fetching
from ibq_scale.data.fetching import FETCH_THREADS, FetchingSampler
from ibq_scale.data.images import Request, Wanted, touching
from ibq_scale.errors import UserError
from tests.nursery import PATIENCE


class _Fetcher:
    """Shards come when they may."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.here: set[int] = set()
        self.may_come = threading.Event()

    def is_here(self, source: int, shard: int) -> bool:
        return shard in self.here

    def fetch(self, source: int, shard: int) -> None:
        self.asked.append(shard)
        assert self.may_come.wait(PATIENCE)
        self.here.add(shard)


def _batches(shards: int, size: int = 2) -> Iterator[list[Request]]:
    """Each of one shard."""
    for number in range(shards):
        yield [Request(number * size + row, 0, 0, number, row) for row in range(size)]


def _every(request: Request) -> bool:
    return True


def test_first_batches_are_handed_out_before_anything_is_fetched() -> None:
    fetcher = _Fetcher()
    batches = iter(FetchingSampler(_batches(10_000), fetcher, 3, _every))
    assert [batch[0].shard for batch in islice(batches, 3)] == [0, 1, 2]
    assert not fetcher.asked
    # The next does not wait for its shard either.
    assert next(batches)[0].shard == 3
    fetcher.may_come.set()


def test_single_reads_end_where_the_store_does_not_keep_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "SINGLY_AT_FIRST", 20)
    fetcher = _Fetcher()
    batches = iter(FetchingSampler(_batches(10_000), fetcher, 1, _every))
    given = []
    waits = threading.Event()

    def pull() -> None:
        for _ in range(16):
            given.append(next(batches)[0].shard)
        waits.set()

    puller = threading.Thread(target=pull)
    puller.start()
    while len(given) < 11:
        assert puller.is_alive()
    # 20 samples of late shards: ten batches after the first. Only as many shards are asked for as there are threads.
    assert not waits.wait(0.1)
    assert given == list(range(11))
    assert len(fetcher.asked) == FETCH_THREADS
    fetcher.may_come.set()
    puller.join(PATIENCE)
    assert given == list(range(16))


def test_what_cannot_be_read_singly_is_waited_for() -> None:
    fetcher = _Fetcher()
    fetcher.may_come.set()
    for batch in islice(FetchingSampler(_batches(10_000), fetcher, 0, _every), 50):
        assert batch[0].shard in fetcher.here


def test_shards_that_another_node_reads_more_of_are_left_to_it() -> None:
    fetcher = _Fetcher()
    fetcher.may_come.set()
    for _ in islice(FetchingSampler(_batches(10_000), fetcher, 0, lambda request: request.shard % 2 == 0), 50):
        pass
    assert all(shard % 2 == 0 for shard in fetcher.asked)


def test_a_failed_fetch_is_told_at_once_and_not_after_those_behind_it() -> None:
    told = threading.Event()
    waited_for = []

    class Dead(_Fetcher):
        def fetch(self, source: int, shard: int) -> None:
            if shard == 0:
                raise UserError("the store is dead")
            waited_for.append(not told.wait(PATIENCE))

    with pytest.raises(UserError, match="the store is dead"):
        for _ in FetchingSampler(_batches(10_000), Dead(), 0, _every):
            pass
    told.set()
    assert not any(waited_for)


def test_samples_side_by_side_come_by_one_request() -> None:
    def wanted(shard: int, start: int) -> Wanted:
        return Wanted(Request(start, 0, 0, shard, start), start, start + 1000)

    spans = touching([wanted(1, 0), wanted(0, 5000), wanted(0, 2000), wanted(0, 0), wanted(0, 90_000)])
    assert [[(w.request.shard, w.start) for w in span] for span in spans] == [
        [(0, 0), (0, 2000), (0, 5000)],
        [(0, 90_000)],
        [(1, 0)],
    ]
