"""The same bits again: random numbers by position, GPU sums in a fixed order, the same kernel tiles after a restart."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.utils.deterministic
from torch import Tensor

from ibq_scale.config.models import QuantizerConfig
from ibq_scale.config.run import AnyRun
from ibq_scale.data.store import open_store
from ibq_scale.distributed.world import World
from ibq_scale.documents import json_object
from ibq_scale.quantize.backend import choose
from ibq_scale.quantize.kinds import KINDS

TILES = "tiles.json"


def seed_by_position(seed: int, requests_B5: Tensor) -> None:
    """Seeds torch's generators, on every device, for a micro-batch (`data.stream` defines its requests).

    Dropout is then the same on any number of ranks, with any accumulation, and after any restart. No state is saved.
    """
    digest = hashlib.blake2b(f"{seed} {int(requests_B5[0, 0])}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)


def fix_the_order_of_sums(run: AnyRun) -> None:
    """Sets torch's switches for the rest of the process, if `train.deterministic`. Call it before the first product.

    Covers torch's operators, cuBLAS, cuDNN, flash-attn 2 and 3 (`models.attention` refuses 4) and the compiler's choice
    of kernels. Torch raises RuntimeError at an operator without a deterministic kernel.
    """
    if not run.train.deterministic:
        return
    # Without a fixed workspace cuBLAS may pick another algorithm on each stream.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # A debugging aid of the same switch. It costs a pass over each new tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    if run.model.compile:
        config: Any = importlib.import_module("torch._inductor.config")
        # The compiler otherwise picks kernels by timing. Older releases lack the switch.
        if hasattr(config, "deterministic"):
            config.deterministic = True


def settle_tiles(run_dir: Path, quantizer: QuantizerConfig, world: World) -> None:
    """Uses the tiles of ``RUN/tiles.json``, if kernels run on a GPU. Collective: rank 0 adds missing ones.

    A restart uses the same tiles, so its sums have the same bits.
    """
    how = (world.device, torch.float32, quantizer.dim, quantizer.logit_precision)
    if (
        not KINDS[quantizer.kind].reaches_all_codes
        or world.device.type != "cuda"
        or choose(quantizer.backend, *how) != "triton"
    ):
        return
    from ibq_scale.quantize.tiles import settle

    def settled() -> dict[str, list[int]]:
        return settle(json_object(run_dir / TILES), quantizer.logit_precision, quantizer.dim, world.device)

    if world.is_main:
        open_store(str(run_dir)).write(TILES, (json.dumps(settled(), indent=0) + "\n").encode())
    dist.barrier()
    settled()
