"""From two looks at all heartbeats: who is missing."""

from __future__ import annotations

from typing import Any

from ibq_scale.distributed.heartbeats import judge

HOSTS = [f"node{i}" for i in range(1000)]


def _beat(step: int, phase: str = "step", collective: str | None = "all_reduce", beat: int = 1) -> dict[str, Any]:
    return {"step": step, "phase": phase, "collective": collective, "beat": beat}


def _next(beats: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [beat | {"beat": beat["beat"] + 1} for beat in beats]


def test_a_silent_rank_goes_before_one_that_is_behind() -> None:
    before = [_beat(7), _beat(6), _beat(7)]
    after = [*_next(before)[:2], before[2]]
    found = judge(before, after, HOSTS)
    assert (found.ranks, found.silent) == ([2], True)
    assert found.why.startswith("rank 2 on node2: no sign of life")
    assert judge([*before, None], [*_next(before), None], HOSTS).ranks == [3]


def test_a_rank_behind_and_one_outside_of_the_collective_are_named_with_what_they_do() -> None:
    behind = [_beat(7), _beat(6, "save", "barrier"), _beat(7)]
    found = judge(behind, _next(behind), HOSTS)
    assert (found.ranks, found.silent) == ([1], False)
    assert "rank 1 on node1: alive, in save after step 6" in found.why
    outside = [_beat(7), _beat(7, "waiting for data", None), _beat(7)]
    found = judge(outside, _next(outside), HOSTS)
    assert found.ranks == [1]
    assert found.why.endswith("in waiting for data after step 7; the other 2 are in all_reduce after step 7")


def test_where_nothing_tells_ranks_apart_nobody_is_accused() -> None:
    for collective in ("all_reduce", None):
        same = [_beat(7, collective=collective)] * 3
        found = judge(same, _next(same), HOSTS)
        assert (found.ranks, found.silent) == ([], False)
        assert "every rank is alive" in found.why


def test_a_line_about_a_thousand_ranks_stays_a_line() -> None:
    before = [_beat(7)] * 1000
    found = judge(before, [*before[:999], _beat(7, beat=2)], HOSTS)
    assert len(found.ranks) == 999
    assert "and 983 more" in found.why
    assert len(found.why) < 600
