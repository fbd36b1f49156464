"""An EMA of a replicated module, its fp32 shadow spread over the ranks: each rank averages only its share."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ibq_scale.distributed.environment import World
from ibq_scale.models.ema import EMA


class ShardedEMA:
    """`decay` 0 keeps no shadow: the live weights are then what is exported."""

    def __init__(self, module: nn.Module, decay: float, world: World) -> None:
        self.module = module
        self.world = world
        self.enabled = decay > 0
        self.owner = _owners(module, world.size)
        mine = {n: p for n, p in module.named_parameters() if self.owner[n] == world.rank} if self.enabled else {}
        self.shadow = EMA(mine, decay)

    def update(self) -> None:
        """Moves this rank's share towards the module's weights."""
        if self.enabled:
            self.shadow.update({n: p for n, p in self.module.named_parameters() if self.owner[n] == self.world.rank})

    def gather(self) -> dict[str, Tensor] | None:
        """The averaged (or live) weights on rank 0's CPU, None elsewhere. Collective."""
        weights: dict[str, Tensor] = {}
        mine = self.shadow.state_dict()
        for name, parameter in self.module.named_parameters():
            value = parameter.detach().float()
            if self.enabled:
                value = mine[name] if self.owner[name] == self.world.rank else torch.empty_like(value)
                dist.broadcast(value, src=self.owner[name])
            if self.world.is_main:
                weights[name] = value.cpu()
        return weights if self.world.is_main else None

    def save(self, directory: Path) -> None:
        """One file a rank; the names in them say whose share it was."""
        if self.enabled:
            directory.mkdir(exist_ok=True)
            tensors = {n: t.cpu().contiguous() for n, t in self.shadow.state_dict().items()}
            save_file(tensors, directory / f"ema-rank-{self.world.rank:05d}.safetensors")

    def load(self, directory: Path) -> None:
        """Reads this rank's share out of the files of any number of ranks."""
        if self.enabled:
            everything: dict[str, Tensor] = {}
            for path in sorted(directory.glob("ema-rank-*.safetensors")):
                everything |= load_file(path)
            self.shadow.load_state_dict({n: everything[n] for n in self.shadow.state_dict()})


def _owners(module: nn.Module, ranks: int) -> dict[str, int]:
    """Largest parameters first, each to the rank that has least."""
    load = [0] * ranks
    owners = {}
    for name, parameter in sorted(module.named_parameters(), key=lambda item: (-item[1].numel(), item[0])):
        rank = load.index(min(load))
        owners[name] = rank
        load[rank] += parameter.numel()
    return owners
