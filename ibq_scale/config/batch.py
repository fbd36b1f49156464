"""How a run is split over ranks: global batch = micro × accumulation × world size, one codebook per group."""

from __future__ import annotations

import math

from ibq_scale.config.base import OPEN
from ibq_scale.config.run import TokenizerRun, TrainConfig
from ibq_scale.errors import UserError


def accumulation_steps(train: TrainConfig, world_size: int) -> int:
    """Micro-batches of a rank per optimizer step. UserError if the sizes do not divide."""
    assert train.micro_batch != OPEN, "scaling.auto.settle comes first"
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
    """Ranks per codebook. UserError if this does not divide the world size.

    0 in the config means gcd(world size, codes), so a run of 262,144 codes may move from 16 ranks to 24 (groups of 8).
    """
    size = max(0, run.codebook_group) or math.gcd(world_size, run.quantizer.codebook_size)
    if world_size % size:
        raise UserError(
            f"codebook_group={size} does not divide the {world_size} ranks: "
            f"take a divisor of {world_size}, or 0 for as many of them as divide the codebook"
        )
    return size


def codebook_words(run: TokenizerRun, world_size: int) -> str:
    """The codebook's layout in words, with the reason for a group smaller than the world."""
    size, codes = codebook_group_size(run, world_size), run.quantizer.codebook_size
    because = (
        "" if run.codebook_group > 0 or size == world_size else f" ({world_size} ranks do not divide {codes:,} codes)"
    )
    return f"groups of {size}{because}"
