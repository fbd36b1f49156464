"""A few random kills of each stage; `make chaos` does fifty of each by the same code."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.campaign import Campaign
from tests.chaos.scenario import SCENARIOS

# Seeds that aim at different instants and victims: a data worker within a step and the launcher within a save; one rank
# within a step and all of them between a checkpoint's rename and its pointer.
SEEDS = {"tokenizer": 36, "ar": 55}


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("task", list(SCENARIOS))
def test_killed_runs_end_in_the_bits_of_the_unkilled_one(task: str, tmp_path: Path) -> None:
    result = Campaign(SCENARIOS[task], tmp_path / task, kills=2, seed=SEEDS[task], tell=print).run()
    assert not result.faults, "\n".join(result.summary())
    assert len(result.kills) == 2
    assert result.tensors > 100
