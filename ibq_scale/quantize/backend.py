"""Which passes compute: Triton kernels on CUDA where they fit, plain torch elsewhere, or what the config says."""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from typing import Literal, cast

import torch
from torch import Tensor

from ibq_scale.errors import UserError
from ibq_scale.quantize.passes import Passes
from ibq_scale.quantize.product import Precision
from ibq_scale.quantize.tiled import TiledPasses

Backend = Literal["tiled", "triton"]
# A program keeps two tiles of this width in shared memory and one in registers.
WIDEST = 256


def choose(backend: str, device: torch.device, dtype: torch.dtype, dim: int) -> Backend:
    """What ``auto`` means here. UserError where ``triton`` is asked for and cannot be had."""
    if backend == "tiled" or (backend == "auto" and device.type != "cuda"):
        return "tiled"
    obstacle = _obstacle(device, dtype, dim)
    if obstacle is None:
        return "triton"
    if backend == "triton":
        raise UserError(f"quantizer.backend=triton {obstacle}: use auto or tiled")
    return "tiled"


def _obstacle(device: torch.device, dtype: torch.dtype, dim: int) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "needs the triton package"
    if dtype != torch.float32:
        return f"computes in fp32, not {dtype}"
    if dim > WIDEST:
        return f"takes codes of at most {WIDEST} dimensions, not {dim}"
    from ibq_scale.quantize.kernels import interpreted

    if device.type != "cuda" and not interpreted():
        return "needs a CUDA device (or TRITON_INTERPRET=1, for tests)"
    return None


def passes_for(z_ND: Tensor, backend: str, precision: str, temperature: float, tile_bytes: int | None) -> Passes:
    """The passes for tensors like z (N, D)."""
    chosen = choose(backend, z_ND.device, z_ND.dtype, z_ND.shape[1])
    return _made(chosen, cast(Precision, precision), temperature, tile_bytes)


@lru_cache(maxsize=64)
def _made(backend: Backend, precision: Precision, temperature: float, tile_bytes: int | None) -> Passes:
    if backend == "triton":
        from ibq_scale.quantize.kernels import TritonPasses

        return TritonPasses(temperature, precision)
    return TiledPasses(temperature, precision, tile_bytes)
