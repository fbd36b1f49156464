"""What a device can do at most."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from ibq_scale.train.utilization import sheet_peak

TRIES_SECONDS = 2.0


@dataclass(frozen=True)
class Reference:
    """FLOP/s of one device to hold a rate against. `sheet`: of its data sheet, None where there is none to trust.

    `product`: of the best square product measured here, of `side` and `dtype`.
    """

    sheet: float | None
    product: float
    side: int
    dtype: str

    def mfu(self, flops_per_s: float) -> float | None:
        """Model FLOPs utilisation: only against a data sheet, since a measured peak flatters whatever is slow."""
        return None if self.sheet is None else flops_per_s / self.sheet


def reference(device: torch.device, dtype: torch.dtype) -> Reference:
    """Looks the device up, and measures a product on it."""
    sheet = sheet_peak(device, dtype)
    side = 8192 if device.type == "cuda" else 1024
    return Reference(sheet, _best_product(device, dtype, side), side, str(dtype).removeprefix("torch."))


def _best_product(device: torch.device, dtype: torch.dtype, side: int) -> float:
    """FLOP/s by the fastest of some tries: what others do on the machine at the same time is no bound of it.

    CPUs without bf16 in hardware take a hundred times as long as for fp32, so time is what limits the tries.
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


def wait(device: torch.device) -> None:
    """Until the device has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
