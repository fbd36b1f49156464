"""What rank 0 finds, or its refusal, is every rank's; and each rank gets all values in order."""

from __future__ import annotations

import pytest
import torch

from ibq_scale.distributed.agree import by_rank_0, of_all_ranks
from ibq_scale.distributed.world import World
from ibq_scale.errors import StoreUnavailableError, UserError
from tests.ranks import run_ranks


def _refuse() -> int:
    raise StoreUnavailableError("away")


def _ask(rank: int, world_size: int) -> tuple[object, object, str]:
    world = World(rank, world_size, rank, torch.device("cpu"))
    found = by_rank_0(world, lambda: {"rank": rank})
    try:
        by_rank_0(world, _refuse)
    except UserError as e:
        said = f"{type(e).__name__} {e} {e.exit_code}"
    return found, of_all_ranks(world, rank * 10), said


@pytest.mark.slow
@pytest.mark.distributed
def test_all_ranks_have_the_same() -> None:
    assert run_ranks(_ask, 3) == [({"rank": 0}, [0, 10, 20], "StoreUnavailableError away 69")] * 3
