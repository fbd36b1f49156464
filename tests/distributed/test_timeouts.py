"""No process group of a training gives up before its watchdog has named who is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.train.runs import each_rank, told_by

TELLS = """
import torch
from torch.distributed import distributed_c10d as c10d
from ibq_scale.train.trainer import Trainer
def run(self, *_, real=Trainer.run):
    groups = list(c10d._world.pg_map)
    seconds = {group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups}
    print("groups", len(groups), "seconds", *sorted(seconds), flush=True)
    return real(self, *_)
Trainer.run = run
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_every_group_waits_longer_than_the_watchdog(dataset: str, tmp_path: Path) -> None:
    more = ("train.steps=1", "data.workers=0", "train.hang_timeout=100", "deepspeed.config=zero2")
    with each_rank(dataset, tmp_path / "run", *more, before=TELLS) as ranks:
        said = told_by(ranks, "groups")
    assert len(said) == 2
    for line in said:
        words = line.split()
        assert int(words[1]) > 1, "those of the engines and of the codebook too"
        # Three times as long before the first step is over, and half as long again.
        assert words[3:] == ["450.0"]
