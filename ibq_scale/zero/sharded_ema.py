"""An EMA of an engine's fp32 weights, spread over the ranks as the weights are. Each rank averages its own pieces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ibq_scale.checkpoint.files import StateFile
from ibq_scale.checkpoint.pieces import WEIGHTS, Piece, PieceReader, piece_file
from ibq_scale.distributed.world import World
from ibq_scale.models.ema import EMA
from ibq_scale.pretrained.loading import InCheckpoint
from ibq_scale.profiling import part
from ibq_scale.zero.master_weights import pieces, shapes

# Elements gathered at a time, in fp32.
CHUNK = 2**26


class ShardedEMA:
    """`decay` 0 keeps no averages. Exports then use the live weights."""

    def __init__(self, engine: Any, decay: float, world: World) -> None:
        self.engine = engine
        self.world = world
        self.enabled = decay > 0
        live = self._live() if self.enabled else []
        self._starts = {piece.name: piece.start for piece in live}
        self.shadow = EMA({piece.name: piece.values for piece in live}, decay)

    def update(self) -> None:
        if self.enabled:
            with part("average of the weights"):
                self.shadow.update({piece.name: piece.values for piece in self._live()})

    def place(self, folder: str, engine_folder: str, module: str = "") -> InCheckpoint:
        """The place of `module`'s weights for inference in a checkpoint with `state` in `folder`."""
        return InCheckpoint(folder, "", module) if self.enabled else InCheckpoint(engine_folder, WEIGHTS, module)

    def state(self, folder: str) -> list[StateFile]:
        """This rank's pieces."""
        if not self.enabled:
            return []
        return [piece_file(folder, self.world.rank, self.pieces(), {"shapes": shapes(self.engine)})]

    def load(self, folder: Path) -> None:
        """Reads this rank's pieces from the files of any number of ranks. UserError if some are missing."""
        if self.enabled:
            PieceReader(folder).read_all(self.pieces())

    def pieces(self) -> list[Piece]:
        """This rank's averages, or the live weights without averages."""
        if not self.enabled:
            return self._live()
        return [Piece(name, self._starts[name], values) for name, values in self.shadow.state_dict().items()]

    @torch.no_grad()
    def fill(self, network: nn.Module) -> None:
        """Fills a network's parameters by the engine's names, with `pieces` of all ranks. Collective.

        The parameters keep their dtype and memory. The engine is not touched, on any ZeRO stage.
        """
        mine = {piece.name: piece for piece in self.pieces()}
        for name, parameter in network.named_parameters():
            flat = parameter.detach().view(-1)
            for start in range(0, len(flat), CHUNK):
                part = torch.zeros(min(CHUNK, len(flat) - start), device=self.world.device)
                if name in mine:
                    _overlap(mine[name], start, part)
                # Each element is nonzero on one rank at most, so the sum is exact.
                dist.all_reduce(part)
                flat[start : start + len(part)].copy_(part)

    def _live(self) -> list[Piece]:
        return pieces(self.engine, self.world)


def _overlap(piece: Piece, start: int, out: Tensor) -> None:
    """Copies the piece's part of the elements from `start` on into `out`."""
    first, last = max(start, piece.start), min(start + len(out), piece.start + len(piece.values))
    if first < last:
        out[first - start : last - start].copy_(piece.values[first - piece.start : last - piece.start])
