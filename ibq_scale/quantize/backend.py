"""The choice of a backend: the config's, or the fastest that the device can run."""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from typing import Literal, cast

import torch

from ibq_scale.errors import UserError
from ibq_scale.quantize.backend_interface import Backend
from ibq_scale.quantize.product import Precision
from ibq_scale.quantize.tiled_backend import TiledBackend

BackendName = Literal["tiled", "triton", "cublas"]


def choose(
    backend: str, device: torch.device, dtype: torch.dtype, dim: int, precision: str = "bf16", kernel: str = ""
) -> BackendName:
    """The backend for a config's word on this device, for a training step or for one kernel.

    ``auto``: on a CUDA device Triton's product kernels, else cuBLAS with elementwise kernels, else plain torch.
    UserError where ``triton`` or ``cublas`` is asked for and cannot run.
    """
    if backend == "tiled" or (backend == "auto" and device.type != "cuda"):
        return "tiled"
    wanted: tuple[BackendName, ...] = ("triton", "cublas") if backend == "auto" else (cast(BackendName, backend),)
    for name in wanted:
        obstacle = _obstacle(name, device, dtype, dim, cast(Precision, precision), kernel)
        if obstacle is None:
            return name
        if backend != "auto":
            raise UserError(f"quantizer.backend={backend} {obstacle}: use auto or tiled")
    return "tiled"


def describe(backend: str, device: torch.device, dtype: torch.dtype, dim: int, precision: str) -> str:
    """The backend in words, with the reason where a GPU does not run Triton's product kernels."""
    chosen = choose(backend, device, dtype, dim, precision)
    if device.type != "cuda":
        return chosen
    said = f"{chosen} ({products_of(chosen, precision)} products)"
    if chosen == "triton" or backend != "auto":
        return said
    return f"{said}, since triton {_obstacle('triton', device, dtype, dim, cast(Precision, precision), '')}"


def products_of(backend: str, precision: str) -> Precision:
    """The precision of a backend's products on a GPU.

    Backends without candidates take tf32 for bf16: bf16 would move the entropy loss's gradient by a sixth.
    """
    return cast(Precision, precision) if backend == "triton" or precision != "bf16" else "tf32"


@lru_cache(maxsize=64)
def _obstacle(
    backend: BackendName, device: torch.device, dtype: torch.dtype, dim: int, precision: Precision, kernel: str
) -> str | None:
    """Why a backend of Triton kernels cannot run, or None."""
    if importlib.util.find_spec("triton") is None:
        return "needs the triton package"
    if dtype != torch.float32:
        return f"computes in fp32, not {dtype}"
    from ibq_scale.quantize.tiles import KERNELS, interpreted, without_tile

    if device.type != "cuda":
        return None if interpreted() else "needs a CUDA device (or TRITON_INTERPRET=1, for tests)"
    if backend == "cublas":
        return None
    return without_tile((kernel,) if kernel else tuple(KERNELS), precision, dim, device)


@lru_cache(maxsize=64)
def made(backend: BackendName, precision: Precision, temperature: float, tile_bytes: int | None) -> Backend:
    """The backend of this name, made once for each of its settings."""
    if backend == "triton":
        from ibq_scale.quantize.triton_backend import TritonBackend

        return TritonBackend(temperature, precision)
    if backend == "cublas":
        from ibq_scale.quantize.cublas_backend import CublasBackend

        return CublasBackend(temperature, products_of(backend, precision), tile_bytes)
    return TiledBackend(temperature, products_of(backend, precision), tile_bytes)
