"""What a device can do at most, and how much memory a process has taken on it."""

from __future__ import annotations

import time
from pathlib import Path

import torch

# Dense bf16 products with fp32 sums, FLOP/s, from NVIDIA's data sheets (which print twice as much, "with sparsity").
# A GPU of another form factor has another clock: only names that are certain.
PEAKS_BF16 = {
    "A10": 125e12,
    "A100": 312e12,
    "A40": 149.7e12,
    "B200": 2250e12,
    "H100": 989.4e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H200": 989.4e12,
    "L4": 121e12,
    "L40S": 362e12,
}
FORMS = ("NVL", "PCIe")
# Of A100 and A40 all forms have one peak.
ONE_PEAK = ("A100", "A40")


def known_peak(name: str) -> float | None:
    """bf16 FLOP/s of a GPU by the name that CUDA gives, None for one that is not in the table."""
    words = name.removeprefix("NVIDIA ").replace("-", " ").split()
    model = words[0] if words else ""
    form = next((word for word in words[1:] if word in FORMS), None)
    return PEAKS_BF16.get(model if form is None or model in ONE_PEAK else f"{model} {form}")


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """FLOP/s that count as 100 %, and where the figure is from: a data sheet, or a product measured here."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        known = known_peak(torch.cuda.get_device_name(device))
        if known is not None:
            return known, "data sheet, dense bf16"
    side = 8192 if device.type == "cuda" else 2048
    return _measured_peak(
        device, dtype, side
    ), f"measured: best product of {side}² in {str(dtype).removeprefix('torch.')}"


def _measured_peak(device: torch.device, dtype: torch.dtype, side: int) -> float:
    """By the fastest of some tries: what others do on the machine at the same time is no bound of it."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(10):
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


def peak_bytes(device: torch.device) -> int:
    """Highest memory so far: of the allocator on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Not ru_maxrss: that one survives exec and would tell of the parent.
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024
