"""An EMA of an engine's fp32 weights, spread over the ranks as the weights are: each rank averages what it updates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from ibq_scale.checkpoint.files import StateFile
from ibq_scale.checkpoint.pieces import Piece, PieceReader, piece_file
from ibq_scale.distributed.environment import World
from ibq_scale.models.ema import EMA
from ibq_scale.train.master import gather, pieces, shapes


class ShardedEMA:
    """`decay` 0 keeps no shadow: the live weights are then what is exported."""

    def __init__(self, engine: Any, decay: float, world: World) -> None:
        self.engine = engine
        self.world = world
        self.enabled = decay > 0
        live = self._live() if self.enabled else []
        self._starts = {piece.name: piece.start for piece in live}
        self.shadow = EMA({piece.name: piece.values for piece in live}, decay)

    def update(self) -> None:
        """Moves the average towards the weights, after a step."""
        if self.enabled:
            self.shadow.update({piece.name: piece.values for piece in self._live()})

    def gather(self) -> dict[str, Tensor] | None:
        """The averaged (or live) weights, fp32 on rank 0's CPU, None elsewhere. Collective."""
        return gather(self._pieces() if self.enabled else self._live(), shapes(self.engine), self.world)

    def state(self, folder: str) -> list[StateFile]:
        """This rank's pieces."""
        return [piece_file(folder, self.world.rank, self._pieces(), {})] if self.enabled else []

    def load(self, folder: Path) -> None:
        """Reads this rank's pieces out of the files of any number of ranks. UserError where some are missing."""
        if self.enabled:
            PieceReader(folder).read_all(self._pieces())

    def _live(self) -> list[Piece]:
        return pieces(self.engine, self.world)

    def _pieces(self) -> list[Piece]:
        return [Piece(name, self._starts[name], values) for name, values in self.shadow.state_dict().items()]
