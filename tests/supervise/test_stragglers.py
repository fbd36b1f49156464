"""Who holds up the others is told by the time that each rank spends on its own."""

from __future__ import annotations

import re
import time

import pytest
import torch
import torch.distributed as dist

from ibq_scale.distributed.waiting import collective_in_progress
from ibq_scale.distributed.world import World
from ibq_scale.supervise.stragglers import Stragglers
from tests.ranks import run_ranks

HOSTS = ["node0", "node1", "node2"]


def _three_ranks(rank: int, size: int) -> tuple[list[dict[str, float]], list[str]]:
    """Rank 1 takes three times as long as the others before the collective, in which these wait for it."""
    stragglers = Stragglers(World(rank, size, rank, torch.device("cpu")), HOSTS)
    values, told = [], []
    for _ in range(4):
        for _ in range(5):
            with stragglers.step():
                time.sleep(0.3 if rank == 1 else 0.1)
                dist.all_reduce(torch.ones(1))
        line, lines = stragglers.compare(data_seconds=0.5 if rank == 1 else 0.0)
        values.append(line)
        told.append("; ".join(lines))
    stragglers.close()
    return values, told


@pytest.mark.slow
@pytest.mark.distributed
def test_the_rank_that_the_others_wait_for_is_named_once_after_three_lines() -> None:
    found = run_ranks(_three_ranks, 3)
    assert found[0] == found[1] == found[2], "all ranks come to the same"
    values, told = found[0]
    for line in values:
        assert 0.05 < line["own_step_s_p50"] <= line["own_step_s_p95"] <= line["own_step_s_max"]
        assert line["own_step_s_p50"] < line["own_step_s_max"] > 0.2
    assert [bool(line) for line in told] == [False, False, True, False]
    # Its 0.3 s, to the clock's looks, 20 a second.
    said = re.match(r"rank 1 on node1 holds up the others: for 3 lines ([0-9.]+) s a step of its own", told[2])
    assert said is not None
    assert float(said[1]) > 0.2
    assert "0.1 s of it waiting for data" in told[2]


@pytest.fixture
def stragglers() -> Stragglers:
    stragglers = Stragglers(World(0, 3, 0, torch.device("cpu")), HOSTS)
    stragglers.close()
    return stragglers


def test_a_slow_device_is_told_by_its_product(stragglers: Stragglers) -> None:
    """Where collectives run beside the host, own times are equal."""
    lines = [stragglers.slow_ranks([0.5] * 3, [0.0] * 3, [0.001, 0.001, 0.002]) for _ in range(3)]
    assert lines == [[], [], [lines[2][0]]]
    assert lines[2][0].startswith(
        "rank 2 on node2 holds up the others: for 3 lines 0.002 s for a product on its device"
    )


def test_now_and_then_is_no_straggler_and_a_few_milliseconds_are_none(stragglers: Stragglers) -> None:
    none = [0.0] * 3
    for _ in range(5):
        assert stragglers.slow_ranks([1.0, 1.0, 2.0], none, none) == []
        assert stragglers.slow_ranks([1.0, 1.0, 2.0], none, none) == []
        assert stragglers.slow_ranks([1.0, 1.0, 1.4], none, none) == []
    for _ in range(5):
        assert stragglers.slow_ranks([0.001, 0.001, 0.009], none, none) == []


def test_outside_of_collectives_none_is_in_progress() -> None:
    assert collective_in_progress() is None
