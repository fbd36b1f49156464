"""Peak rates of a device."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from ibq_scale.train.utilization import sheet_peak

TRIES_SECONDS = 2.0


@dataclass(frozen=True)
class Reference:
    """FLOP/s of one device for comparison. `sheet`: from its data sheet, None if unknown.

    `product`: of the best square product measured here, with `side` and `dtype`.
    """

    sheet: float | None
    product: float
    side: int
    dtype: str


def reference(device: torch.device, dtype: torch.dtype) -> Reference:
    """Looks up the device and measures a product on it."""
    sheet = sheet_peak(device, dtype)
    side = 8192 if device.type == "cuda" else 1024
    return Reference(sheet, _best_product(device, dtype, side), side, str(dtype).removeprefix("torch."))


def _best_product(device: torch.device, dtype: torch.dtype, side: int) -> float:
    """FLOP/s of the fastest of several tries, so that other load on the machine matters little.

    CPUs without bf16 in hardware take a hundred times as long as in fp32, so the tries are limited by time.
    """
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    seconds: list[float] = []
    while len(seconds) < 10 and sum(seconds) < TRIES_SECONDS:
        wait(device)
        begin = time.perf_counter()
        a @ b
        wait(device)
        seconds.append(time.perf_counter() - begin)
    return 2.0 * side**3 / min(seconds)


def shown(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
