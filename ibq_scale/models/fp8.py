"""Linear layers with products in fp8, through torchao. The weights keep their dtype.

Every product, forward and backward, casts its operands with one scale per tensor, from the largest entry. Parameters,
their names, the optimizer and the checkpoints do not change.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ibq_scale.config.run import ARRun
from ibq_scale.errors import UserError
from ibq_scale.models.transformer import Attention, FeedForward, Transformer

LEAST_CAPABILITY = (8, 9)
# The GPU's fp8 units need sides of this multiple.
MULTIPLE = 16
EAGER = "model.fp8 without model.compile=true is slower than bf16: each cast is then a kernel of its own"


def check_fp8(run: ARRun, device: torch.device) -> None:
    """UserError if this run cannot multiply in fp8 on this device, or torchao is missing."""
    if device.type != "cuda":
        raise UserError(f"model.fp8=true needs a CUDA device, this is {device.type}: set model.fp8=false")
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        raise UserError(
            f"model.fp8=true needs a GPU of compute capability 8.9 or more, {torch.cuda.get_device_name(device)} has "
            f"{'.'.join(map(str, capability))}: set model.fp8=false"
        )
    check_fp8_sizes(run)
    _torchao()


def check_fp8_sizes(run: ARRun) -> None:
    """UserError if this run cannot multiply in fp8 on any device."""
    if run.train.precision != "bf16":
        raise UserError(f"model.fp8=true is for train.precision=bf16, this is {run.train.precision}")
    odd = {name: getattr(run.model, name) for name in ("width", "tokens") if getattr(run.model, name) % MULTIPLE}
    if odd or run.model.kv_groups * run.model.head_dim % MULTIPLE:
        name, value = next(iter(odd.items()), ("kv_heads · head_dim", run.model.kv_groups * run.model.head_dim))
        raise UserError(f"model.fp8=true needs multiples of {MULTIPLE}: model.{name} is {value}")


def use_fp8(model: Transformer, *, emulate: bool = False) -> None:
    """Switches the projections and feed-forward layers of all blocks to fp8 products, in place.

    The head is excluded, since its loss runs in chunks, and so is AdaLN, since it runs once an image. `emulate`
    computes the same numbers on any device: slow, for tests.
    """
    torchao = _torchao()
    parts = {id(m) for part in model.modules() if isinstance(part, Attention | FeedForward) for m in part.children()}
    torchao.convert_to_float8_training(
        model,
        module_filter_fn=lambda module, name: isinstance(module, nn.Linear) and id(module) in parts,
        config=torchao.Float8LinearConfig(emulate=emulate),
    )


def _torchao() -> Any:
    try:
        import torchao.float8
    except (ImportError, OSError) as e:
        raise UserError(
            f"model.fp8=true needs torchao ({e}): pip install 'ibq-scale[fp8]', or model.fp8=false"
        ) from None
    return torchao.float8
