"""Which passes compute: Triton kernels on CUDA where they fit, plain torch elsewhere, or what the config says."""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from typing import Literal, cast

import torch
from torch import Tensor

from ibq_scale.errors import UserError
from ibq_scale.quantize.backend_interface import Backend
from ibq_scale.quantize.product import Precision
from ibq_scale.quantize.tiled_backend import TiledBackend

BackendName = Literal["tiled", "triton"]


def choose(
    backend: str, device: torch.device, dtype: torch.dtype, dim: int, precision: str = "bf16", kernel: str = ""
) -> BackendName:
    """What ``auto`` means here, for a step in training or for one kernel. UserError where ``triton`` cannot be had."""
    if backend == "tiled" or (backend == "auto" and device.type != "cuda"):
        return "tiled"
    obstacle = _obstacle(device, dtype, dim, cast(Precision, precision), kernel)
    if obstacle is None:
        return "triton"
    if backend == "triton":
        raise UserError(f"quantizer.backend=triton {obstacle}: use auto or tiled")
    return "tiled"


def describe(backend: str, device: torch.device, dtype: torch.dtype, dim: int, precision: str) -> str:
    """What computes, in words, and why where it is not what a GPU would rather have."""
    chosen = choose(backend, device, dtype, dim, precision)
    if chosen == "triton":
        return f"triton ({precision} products)"
    if device.type != "cuda":
        return chosen
    said = f"tiled ({products_of(chosen, precision)} products)"
    if backend == "tiled":
        return said
    return f"{said}, since triton {_obstacle(device, dtype, dim, cast(Precision, precision), '')}"


def products_of(backend: str, precision: str) -> Precision:
    """What a backend's products on a GPU are in.

    Plain torch takes tf32 for bf16: it has no candidates, and bf16 moves the entropy loss's gradient by a sixth.
    """
    return "tf32" if (backend, precision) == ("tiled", "bf16") else cast(Precision, precision)


@lru_cache(maxsize=64)
def _obstacle(device: torch.device, dtype: torch.dtype, dim: int, precision: Precision, kernel: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "needs the triton package"
    if dtype != torch.float32:
        return f"computes in fp32, not {dtype}"
    from ibq_scale.quantize.tiles import KERNELS, interpreted, without_tile

    if device.type != "cuda":
        return None if interpreted() else "needs a CUDA device (or TRITON_INTERPRET=1, for tests)"
    return without_tile((kernel,) if kernel else tuple(KERNELS), precision, dim, device)


def backend_for(z_ND: Tensor, backend: str, precision: str, temperature: float, tile_bytes: int | None) -> Backend:
    """The passes for tensors like z (N, D)."""
    chosen = choose(backend, z_ND.device, z_ND.dtype, z_ND.shape[1], precision)
    return _cached(chosen, cast(Precision, precision), temperature, tile_bytes)


@lru_cache(maxsize=64)
def _cached(backend: BackendName, precision: Precision, temperature: float, tile_bytes: int | None) -> Backend:
    if backend == "triton":
        from ibq_scale.quantize.triton_backend import TritonBackend

        return TritonBackend(temperature, precision)
    return TiledBackend(temperature, products_of(backend, precision), tile_bytes)
