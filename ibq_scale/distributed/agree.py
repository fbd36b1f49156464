"""Small values on all ranks: rank 0's result, or each rank's value. Collectives of the process group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from ibq_scale.distributed.world import World
from ibq_scale.errors import UserError

T = TypeVar("T")


def by_rank_0(world: World, action: Callable[[], T]) -> T:
    """The result of `action` on rank 0, or its UserError, on every rank. Values are pickled."""
    found: list[Any] = [None]
    if world.is_main:
        try:
            found = [action()]
        except UserError as e:
            found = [e]
    dist.broadcast_object_list(found, src=0, device=world.device)
    if isinstance(found[0], UserError):
        raise found[0]
    answer: T = found[0]
    return answer


def of_all_ranks(world: World, mine: T) -> list[T]:
    """Each rank's value, in rank order, on every rank. Values are pickled."""
    gathered: list[Any] = [None] * world.size
    dist.all_gather_object(gathered, mine)
    return gathered
