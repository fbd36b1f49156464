"""Damaged samples: counted over ranks and restarts, and a run stops on all ranks together past its budget."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ibq_scale.checkpoint.files import write_all
from ibq_scale.distributed.world import World
from ibq_scale.supervise.budgets import BadSamples, SkippedSteps, TooManyBadSamplesError, TooManySkippedStepsError
from tests.ranks import run_ranks


def _two_ranks(rank: int, size: int, folder: Path) -> list[float]:
    world = World(rank, size, rank, torch.device("cpu"))
    bad = BadSamples(3, world)
    counts = [bad.log()["bad_samples"]]
    bad.note(("shard 1, sample 5: crc",) if rank else ("a", "b"))
    counts.append(bad.log()["bad_samples"])
    write_all(bad.state(), folder)
    dist.barrier()
    resumed = BadSamples(3, world)
    resumed.load(folder)
    counts.append(resumed.log()["bad_samples"])
    if rank == 0:
        resumed.note(("one more",))
    with pytest.raises(TooManyBadSamplesError, match=r"4 damaged samples so far, data.bad_samples allows 3"):
        resumed.log()
    return counts


@pytest.mark.distributed
def test_the_budget_is_the_runs_and_not_a_ranks(tmp_path: Path) -> None:
    assert run_ranks(_two_ranks, 2, tmp_path) == [[0.0, 3.0, 3.0]] * 2


def _skip_on_two_ranks(rank: int, size: int, folder: Path) -> str:
    world = World(rank, size, rank, torch.device("cpu"))
    skipped = SkippedSteps(2, world)
    skipped.note(7, [])
    skipped.note(8, ["shard 3, sample 4"] if rank else [])
    write_all(skipped.state(), folder)
    dist.barrier()
    resumed = SkippedSteps(2, world)
    resumed.load(folder)
    # The two before are more than a thousand steps ago.
    resumed.note(1009, [])
    resumed.note(1010, [])
    with pytest.raises(TooManySkippedStepsError) as told:
        resumed.note(1011, ["a", "b"] if rank else [])
    return str(told.value)


@pytest.mark.distributed
def test_skipped_steps_are_counted_over_a_period_and_their_samples_named(tmp_path: Path) -> None:
    first, second = run_ranks(_skip_on_two_ranks, 2, tmp_path)
    assert first == second
    assert first.startswith("step 1011 was skipped on all ranks: not finite: losses of rank 1: a, b. That makes 3 of")
