"""The codebook's use over a run: ages, revival, and the checkpoint between."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ibq_scale.checkpoint.files import write_all
from ibq_scale.distributed.world import World
from ibq_scale.train.usage import UsageTracker
from tests.ranks import run_ranks


def _two_ranks(rank: int, size: int, folder: Path) -> list[dict[str, float]]:
    world = World(rank, size, rank, torch.device("cpu"))
    tracker = UsageTracker(4, 3, world)
    logs = []
    for step, chosen in enumerate(([[0], [1]], [[0], [1]], [[2], [2]], [[0], [0]]), start=1):
        tracker.update(torch.tensor(chosen[rank]))
        tracker.end_step()
        if step == 2:
            logs.append(tracker.log())
        if step == 3:
            dead = tracker.due_for_revival(step)
            assert dead is not None
            assert dead.tolist() == [False, False, False, True]
        else:
            assert tracker.due_for_revival(step) is None
    write_all(tracker.state(), folder)
    dist.barrier()
    resumed = UsageTracker(4, 3, world)
    resumed.load(folder)
    logs += [tracker.log(), resumed.log()]
    assert [t.age_K.tolist() for t in (tracker, resumed)] == [[0, 2, 0, 4]] * 2
    return logs


@pytest.mark.distributed
def test_counts_are_summed_over_ranks_and_ages_survive_a_checkpoint(tmp_path: Path) -> None:
    first, second, resumed = run_ranks(_two_ranks, 2, tmp_path)[0]
    assert first == {"usage": 0.5, "perplexity": pytest.approx(2.0), "dead": 0.0, "code_age": 2.0}
    assert second["usage"] == 0.5
    assert second["code_age"] == 4.0
    assert resumed == second
