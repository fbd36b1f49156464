"""An engine's state on disk: fp32 weights and the optimizer's moments in each rank's pieces. Any layout can read them.

Not DeepSpeed's own checkpoints (0.19.8): those are pickles, so loading them may run code, and they fit only one number
of ranks and one ZeRO stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ibq_scale.checkpoint.files import TensorFile
from ibq_scale.checkpoint.pieces import WEIGHTS, Piece, PieceReader, piece_file
from ibq_scale.distributed.world import World
from ibq_scale.models.optimizers import moments, restored_state
from ibq_scale.zero.master_weights import Fragment, fragments, held, shapes


def engine_file(engine: Any, folder: str, world: World) -> TensorFile:
    """This rank's share, and on rank 0 the buffers (each rank has its own: BatchNorm's running means)."""
    share = fragments(engine, world)
    steps = _steps(engine, world)
    state = _weights(share)
    if steps:
        state += _moments(engine, share)
    if world.is_main:
        state += _buffers(engine)
    facts = {
        "steps": steps,
        "shapes": shapes(engine),
        "buffers": {name: list(buffer.shape) for name, buffer in engine.module.named_buffers()},
    }
    return piece_file(folder, world.rank, state, facts)


def load_engine(engine: Any, folder: Path, world: World) -> None:
    """Restores the files of `engine_file` on any number of ranks and any ZeRO stage. UserError if they do not fit."""
    reader = PieceReader(folder)
    mine = held(engine, world)
    reader.read_all(_weights(mine))
    steps = reader.facts["steps"]
    if steps:
        for fragment in mine:
            restored_state(inner_optimizer(engine), fragment.flat, steps)
        reader.read_all(_moments(engine, mine))
    reader.read_all(_buffers(engine))
    _refresh(engine)


def restore_weights(engine: Any, weights: Mapping[str, Tensor], world: World) -> None:
    """Sets the fp32 weights by parameter names, since under bf16 DeepSpeed makes them of rounded ones. Collective."""
    for fragment in held(engine, world):
        part = weights[fragment.name].flatten()[fragment.start : fragment.start + fragment.length]
        fragment.of(fragment.flat).copy_(part)
    _refresh(engine)


def _weights(share: list[Fragment]) -> list[Piece]:
    return [piece._replace(name=f"{WEIGHTS}{piece.name}") for piece in (fragment.piece() for fragment in share)]


def _moments(engine: Any, share: list[Fragment]) -> list[Piece]:
    optimizer = inner_optimizer(engine)
    return [
        Piece(f"{moment}/{fragment.name}", fragment.start, fragment.of(optimizer.state[fragment.flat][moment]))
        for fragment in share
        for moment in moments(optimizer, fragment.flat)
    ]


def _buffers(engine: Any) -> Iterator[Piece]:
    for name, buffer in engine.module.named_buffers():
        yield Piece(f"buffers/{name}", 0, buffer.detach().view(-1))


def inner_optimizer(engine: Any) -> torch.optim.Optimizer:
    inner: torch.optim.Optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return inner


def _steps(engine: Any, world: World) -> float:
    """The optimizer's step count, the same for all parameters. 0 before the first step."""
    for fragment in held(engine, world):
        return float(inner_optimizer(engine).state.get(fragment.flat, {}).get("step", 0))
    return 0.0


def _refresh(engine: Any) -> None:
    """Sets the model's own weights from the fp32 ones. Collective."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()
    elif engine.zero_optimization_stage() == 3:
        optimizer._partition_all_parameters()
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
