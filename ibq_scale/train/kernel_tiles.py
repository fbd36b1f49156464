"""The run's tiles of the quantizer's kernels. A restart uses the same tiles, so its sums have the same bits."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.distributed as dist

from ibq_scale.config.models import QuantizerConfig
from ibq_scale.data.store import open_store
from ibq_scale.distributed.world import World
from ibq_scale.documents import json_object
from ibq_scale.quantize.backend import choose
from ibq_scale.quantize.kinds import KINDS

NAME = "tiles.json"


def settle_tiles(run_dir: Path, quantizer: QuantizerConfig, world: World) -> None:
    """Uses the tiles of ``RUN/tiles.json``, if kernels run on a GPU. Collective: rank 0 adds missing ones."""
    how = (world.device, torch.float32, quantizer.dim, quantizer.logit_precision)
    if (
        not KINDS[quantizer.kind].reaches_all_codes
        or world.device.type != "cuda"
        or choose(quantizer.backend, *how) != "triton"
    ):
        return
    from ibq_scale.quantize.tiles import settle

    def settled() -> dict[str, list[int]]:
        return settle(json_object(run_dir / NAME), quantizer.logit_precision, quantizer.dim, world.device)

    if world.is_main:
        open_store(str(run_dir)).write(NAME, (json.dumps(settled(), indent=0) + "\n").encode())
    dist.barrier()
    settled()
