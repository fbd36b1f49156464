"""How a run falls apart over ranks: global batch = micro × accumulation × world size, and groups share a codebook."""

from __future__ import annotations

from ibq_scale.config.run import TokenizerRun, TrainConfig
from ibq_scale.errors import UserError


def accumulation_steps(train: TrainConfig, world_size: int) -> int:
    """Micro-batches that each rank adds up before an optimizer step. UserError where the sizes do not divide."""
    together = train.micro_batch * world_size
    if train.global_batch % together:
        fitting = [m for m in range(train.micro_batch, 0, -1) if train.global_batch % (m * world_size) == 0]
        hint = (
            f"train.micro_batch={fitting[0]} would"
            if fitting
            else f"a train.global_batch that is a multiple of {world_size} would"
        )
        raise UserError(
            f"train.global_batch={train.global_batch} is no multiple of micro_batch × ranks = "
            f"{train.micro_batch} × {world_size} = {together}: {hint} fit"
        )
    return train.global_batch // together


def codebook_group_size(run: TokenizerRun, world_size: int) -> int:
    """Ranks that share one codebook. UserError where they do not divide the world."""
    size = run.codebook_group or world_size
    if world_size % size:
        raise UserError(
            f"codebook_group={size} does not divide the {world_size} ranks: "
            f"take a divisor of {world_size}, or 0 for all of them"
        )
    return size
