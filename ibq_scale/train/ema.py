"""An EMA of an engine's fp32 weights, spread over the ranks as the weights are: each rank averages what it updates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ibq_scale.distributed.environment import World
from ibq_scale.errors import UserError
from ibq_scale.models.ema import EMA
from ibq_scale.train.master import Fragment, fragments, gather, shapes


class ShardedEMA:
    """`decay` 0 keeps no shadow: the live weights are then what is exported."""

    def __init__(self, engine: Any, decay: float, world: World) -> None:
        self.engine = engine
        self.world = world
        self.enabled = decay > 0
        pieces = fragments(engine, world) if self.enabled else []
        self._starts = {piece.name: piece.start for piece in pieces}
        self.shadow = EMA({piece.name: piece.values for piece in pieces}, decay)

    def update(self) -> None:
        """Moves the average towards the weights, after a step."""
        if self.enabled:
            self.shadow.update({piece.name: piece.values for piece in fragments(self.engine, self.world)})

    def gather(self) -> dict[str, Tensor] | None:
        """The averaged (or live) weights, fp32 on rank 0's CPU, None elsewhere. Collective."""
        pieces = self._pieces() if self.enabled else fragments(self.engine, self.world)
        return gather(pieces, shapes(self.engine), self.world)

    def save(self, directory: Path) -> None:
        """One file a rank: its pieces, and in the metadata where each begins in its flattened parameter."""
        if self.enabled:
            directory.mkdir(exist_ok=True)
            tensors = {name: values.cpu().contiguous() for name, values in self.shadow.state_dict().items()}
            starts = {name: str(start) for name, start in self._starts.items()}
            save_file(tensors, directory / f"ema-rank-{self.world.rank:05d}.safetensors", starts)

    def load(self, directory: Path) -> None:
        """Reads this rank's pieces out of the files of any number of ranks. UserError where some are missing."""
        missing = {name: len(values) for name, values in self.shadow.state_dict().items()}
        for path in sorted(directory.glob("ema-rank-*.safetensors")) if self.enabled else ():
            with safe_open(path, framework="pt") as f:
                starts = f.metadata() or {}
                for name in missing.keys() & starts.keys():
                    missing[name] -= self._take(name, int(starts[name]), f.get_tensor(name))
        if any(missing.values()):
            raise UserError(f"{directory}: the averaged weights are not all there")

    def _take(self, name: str, start: int, values: Tensor) -> int:
        """Copies what overlaps; returns how much that is."""
        mine, offset = self.shadow.state_dict()[name], self._starts[name]
        first, last = max(start, offset), min(start + len(values), offset + len(mine))
        if first < last:
            mine[first - offset : last - offset] = values[first - start : last - start]
        return max(0, last - first)

    def _pieces(self) -> list[Fragment]:
        return [Fragment(name, self._starts[name], values) for name, values in self.shadow.state_dict().items()]
