"""The quantizer's step beside the dense form and beside bare matrix products of the same FLOPs.

Times: medians of all variants by turns in one process, so a busy machine slows them alike. Memory: the peak resident
size (or allocated device memory) of one more step in a process of its own.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import Literal

import psutil
import torch
from torch import Tensor

from ibq_scale.bench.device import shown, wait
from ibq_scale.config.models import QuantizerConfig
from ibq_scale.console import gigabytes
from ibq_scale.distributed.memory import peak_bytes
from ibq_scale.errors import UserError
from ibq_scale.quantize.backend import choose, products_of
from ibq_scale.quantize.ibq import ibq_dense
from ibq_scale.quantize.product import cuda_precision, product_into
from ibq_scale.quantize.quantizer import find, quantize
from ibq_scale.scaling.flops import STEP_PRODUCTS, TRITON_PRODUCTS

Name = Literal["dense", "tiled", "triton", "cublas", "products", "encode", "encode dense"]
# Products of N·K·D: the dense form makes (one-hot + p) C and its gradient beside the five.
DONE: dict[Name, int] = {
    "dense": 6,
    "tiled": STEP_PRODUCTS,
    "triton": TRITON_PRODUCTS,
    "cublas": STEP_PRODUCTS,
    "products": STEP_PRODUCTS,
    "encode": 1,
    "encode dense": 1,
}
# N×K tensors of the dense form's step at their most, in fp32: measured 9 (issue 3's text: 22 bytes a logit are saved).
DENSE_TENSORS = 9


@dataclass(frozen=True)
class Size:
    """N tokens, K codes, D dimensions."""

    tokens: int
    codes: int
    dim: int

    @property
    def product_flops(self) -> float:
        return 2.0 * self.tokens * self.codes * self.dim


@dataclass(frozen=True)
class Measured:
    """`seconds` is the median of a training step (or of one encoding of all tokens), None where it did not fit.

    `flops_per_s` counts the products of N·K·D of the task, `products_needed`. This form does
    `products_done` in `precision`. `peak_bytes` is the whole process's on CPUs, the
    allocator's on a GPU. `base_bytes` is its part before the inputs.
    """

    name: str
    seconds: float | None
    flops_per_s: float | None
    times_dense: float | None
    share_of_products: float | None
    peak_bytes: int | None
    base_bytes: int | None
    precision: str
    products_done: int
    products_needed: int
    note: str = ""


@dataclass(frozen=True)
class QuantizerReport:
    """One size on one device. `rescored` is the share (0 to 1) of tokens decided in fp64 by `encode`."""

    tokens: int
    codes: int
    dim: int
    device: str
    precision: str
    threads: int
    rescored: float
    rows: tuple[Measured, ...]


def bench_quantizer(
    size: Size, *, backend: str = "auto", precision: str = "bf16", device: str = "auto", repeats: int = 5
) -> QuantizerReport:
    """Measures one size. UserError where the backend or the device cannot be had."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device is visible here")
    place = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
    chosen = choose(backend, place, torch.float32, size.dim, precision)
    settings = _settings(size, backend, products_of(chosen, precision))
    names: tuple[Name, ...] = ("products", "dense", chosen, "encode dense", "encode")
    kept = [name for name in names if _fits(name, size, place)]
    work = {name: _work(name, size, settings, place) for name in kept}
    seconds = _by_turns(work, place, repeats)
    work.clear()
    memory = {name: memory_alone(name, size, settings, place) for name in kept}
    # All forms are measured in this form's precision.
    used = products_of(chosen, precision) if place.type == "cuda" else "fp32"
    z_ND, rows_KD, _ = _inputs(size, place)
    rescored = float(find(z_ND.detach(), rows_KD.detach(), settings).rescored) / size.tokens
    rows = tuple(_measured(name, size, seconds, memory, used, settings.search) for name in names)
    threads = torch.get_num_threads()
    return QuantizerReport(size.tokens, size.codes, size.dim, shown(place), used, threads, rescored, rows)


def _measured(
    name: Name, size: Size, seconds: dict[Name, float], memory: dict[Name, tuple[int, int]], precision: str, search: str
) -> Measured:
    encoding = name.startswith("encode")
    # The answer of encode is exact, so its dense counterpart is fp32's argmax.
    coarse = "fp32" if name == "encode dense" or precision == "fp32" else search
    kind = (coarse if encoding else precision, DONE[name], 1 if encoding else STEP_PRODUCTS)
    if name not in seconds:
        need = DENSE_TENSORS * size.tokens * size.codes * 4
        return Measured(name, None, None, None, None, None, None, *kind, f"needs about {gigabytes(need)}: not run")
    dense = seconds.get("encode dense" if encoding else "dense")
    flops = size.product_flops * (1 if encoding else STEP_PRODUCTS)
    products_s = seconds["products"] / (STEP_PRODUCTS if encoding else 1)
    peak, base = memory[name]
    own = seconds[name]
    return Measured(name, own, flops / own, dense / own if dense else None, products_s / own, peak, base, *kind)


def _settings(size: Size, backend: str, precision: str) -> QuantizerConfig:
    return QuantizerConfig.model_validate(
        {"codebook_size": size.codes, "dim": size.dim, "backend": backend, "logit_precision": precision}
    )


def _inputs(size: Size, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """z, codebook and upstream gradient, N(0, 1)."""
    g = torch.Generator().manual_seed(0)
    z_ND, g_ND = (torch.randn(size.tokens, size.dim, generator=g) for _ in range(2))
    rows_KD = torch.randn(size.codes, size.dim, generator=g)
    return z_ND.to(device).requires_grad_(), rows_KD.to(device).requires_grad_(), g_ND.to(device)


def _work(name: Name, size: Size, settings: QuantizerConfig, device: torch.device) -> Callable[[], object]:
    """The timed call. Each variant has inputs of its own."""
    z_ND, rows_KD, g_ND = _inputs(size, device)
    if name == "encode":
        return lambda: find(z_ND.detach(), rows_KD.detach(), settings)
    if name == "encode dense":
        return lambda: (z_ND.detach() @ rows_KD.detach().T).argmax(dim=1)
    if name == "products":
        return _products(z_ND.detach(), rows_KD.detach(), settings)
    form = ibq_dense if name == "dense" else quantize
    as_asked = _dense_products(settings.logit_precision, device) if name == "dense" else nullcontext

    def step() -> None:
        z_ND.grad = rows_KD.grad = None
        with as_asked():
            out = form(z_ND, rows_KD, settings)
            loss: Tensor = (out.z_q_ND * g_ND).sum() + out.quantization_loss + 0.05 * out.entropy_loss
            torch.autograd.backward(loss)

    return step


def _dense_products(precision: str, device: torch.device) -> Callable[[], AbstractContextManager[None]]:
    """A context with torch's own products in the precision of the form under comparison."""
    if device.type != "cuda" or precision == "fp32":
        return nullcontext
    if precision == "tf32":
        return partial(cuda_precision, "tf32")
    return partial(torch.autocast, "cuda", torch.bfloat16)


def _products(z_ND: Tensor, rows_KD: Tensor, settings: QuantizerConfig) -> Callable[[], object]:
    """STEP_PRODUCTS products of N·K·D, in tiles of at most 256 MiB in one buffer."""
    part = min(len(z_ND), max(1, (256 << 20) // (4 * len(rows_KD))))
    S = z_ND.new_empty((len(rows_KD), part))

    def multiply() -> None:
        for _ in range(STEP_PRODUCTS):
            for block in torch.split(z_ND, part):
                product_into(S[:, : len(block)], rows_KD, block.T, settings.logit_precision)

    return multiply


def _by_turns(work: dict[Name, Callable[[], object]], device: torch.device, repeats: int) -> dict[Name, float]:
    """Median seconds of each, after one unmeasured turn."""
    times: dict[Name, list[float]] = {name: [] for name in work}
    for turn in range(repeats + 1):
        for name, call in work.items():
            wait(device)
            begin = time.perf_counter()
            call()
            wait(device)
            if turn:
                times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(found) for name, found in times.items()}


def memory_alone(name: Name, size: Size, settings: QuantizerConfig, device: torch.device) -> tuple[int, int]:
    """Peak and base bytes of one step in a process of its own."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(one_step, (name, size, settings, str(device)))


def one_step(name: Name, size: Size, settings: QuantizerConfig, device_name: str) -> tuple[int, int]:
    device = torch.device(device_name)
    base = peak_bytes(device)
    _work(name, size, settings, device)()
    wait(device)
    return peak_bytes(device), base


def _fits(name: Name, size: Size, device: torch.device) -> bool:
    if not name.endswith("dense"):
        return True
    tensors = DENSE_TENSORS if name == "dense" else 1
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return tensors * size.tokens * size.codes * 4 < 0.8 * free
