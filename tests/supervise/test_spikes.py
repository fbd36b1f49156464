"""Spikes are judged by the whole run's values, alike on every rank, and a lasting change of level is accepted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ibq_scale.checkpoint.files import write_all
from ibq_scale.distributed.world import World
from ibq_scale.supervise.spikes import LEAST, MOST_IN_A_ROW, WINDOW, Spikes
from tests.ranks import run_ranks


def _judge(rank: int, size: int, folder: Path) -> list[str]:
    world = World(rank, size, rank, torch.device("cpu"))
    spikes = Spikes(6.0, world)
    noise = torch.Generator().manual_seed(0)

    def step(loss: float, norm: float) -> bool:
        return bool(spikes.refuses(torch.tensor(loss), torch.tensor(norm)))

    def usual() -> tuple[float, float]:
        return 5.0 + 0.1 * float(torch.randn((), generator=noise)), 1.0 + 0.05 * float(torch.randn((), generator=noise))

    assert not any(step(1000.0, 1000.0) for _ in range(2)), "nothing is known yet"
    spikes.forget()
    assert not any(step(*usual()) for _ in range(WINDOW))
    found = []
    # Rank 1's loss makes the mean one of 6.5, nine deviations above.
    assert step(8.0 if rank else 5.0, 1.0)
    found.append(spikes.found())
    assert step(5.0, 3.0)
    found.append(spikes.found())
    # Of the whole run, not of a rank.
    assert not step(6.0 if rank else 4.0, 1.0)
    assert spikes.found() is None
    # A falling loss is no spike, and what is not finite has another cause and is not remembered.
    assert not step(0.1, 0.01)
    for _ in range(WINDOW):
        spikes.refuses(torch.tensor(torch.nan), torch.tensor(torch.nan))
    assert spikes.found() is None
    assert step(8.0, 1.0)

    write_all(spikes.state(), folder)
    dist.barrier()
    resumed = Spikes(6.0, world)
    resumed.load(folder)
    assert step(8.0, 1.0)
    assert bool(resumed.refuses(torch.tensor(8.0), torch.tensor(1.0)))
    assert torch.equal(resumed._memory_N2, spikes._memory_N2)
    spikes.refuses(torch.tensor(5.0), torch.tensor(1.0))
    assert [step(7.0, 1.0) for _ in range(6)] == [True] * MOST_IN_A_ROW + [False] * 3
    return [f"{spike.text}; {spike.here}" for spike in found if spike is not None]


@pytest.mark.distributed
def test_a_spike_is_an_outlier_of_the_last_steps(tmp_path: Path) -> None:
    first, second = run_ranks(_judge, 2, tmp_path)
    assert first[0].startswith("loss 6.5 (limit 5.")
    assert (first[0].endswith("; False"), second[0].endswith("; True")) == (True, True)
    assert first[1] == second[1]
    assert first[1].startswith("gradient norm 3 (limit 1.")
    assert LEAST < WINDOW
