"""Peak rates and memory of known GPUs. An unknown name is never matched to a similar one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """`peak_bf16`: dense bf16 products with fp32 sums, FLOP/s. `memory`: bytes, as in the data sheet. `bandwidth`: of
    the memory, bytes/s. `link`: bytes/s to the other GPUs of a node, in one direction.
    """

    name: str
    peak_bf16: float
    memory: float
    bandwidth: float
    link: float


# From NVIDIA's data sheets. They print twice these FLOP/s ("with sparsity"), and both directions of a link together.
# Each form factor has its own clock and memory. Links are NVLink, or PCIe for boards without NVLink to all others.
DEVICES = {
    "A10": Device("A10", 125e12, 24e9, 600e9, 32e9),
    "A100": Device("A100", 312e12, 80e9, 2039e9, 300e9),
    "A100 40GB": Device("A100 40GB", 312e12, 40e9, 1555e9, 300e9),
    "A40": Device("A40", 149.7e12, 48e9, 696e9, 32e9),
    "B200": Device("B200", 2250e12, 180e9, 8000e9, 900e9),
    "H100": Device("H100", 989.4e12, 80e9, 3350e9, 450e9),
    "H100 NVL": Device("H100 NVL", 835e12, 94e9, 3900e9, 64e9),
    "H100 PCIe": Device("H100 PCIe", 756e12, 80e9, 2000e9, 64e9),
    "H200": Device("H200", 989.4e12, 141e9, 4800e9, 450e9),
    "L4": Device("L4", 121e12, 24e9, 300e9, 32e9),
    "L40S": Device("L40S", 362e12, 48e9, 864e9, 32e9),
    "RTX 4090": Device("RTX 4090", 165.2e12, 24e9, 1008e9, 32e9),
}
# Of a compute capability below 8.9 (`models.fp8`).
WITHOUT_FP8 = ("A10", "A100", "A100 40GB", "A40")
# By CUDA's device name, if it identifies the board. Boards with the same chip differ in memory.
BOARDS = {
    "NVIDIA A10": "A10",
    "NVIDIA A100-PCIE-40GB": "A100 40GB",
    "NVIDIA A100-SXM4-40GB": "A100 40GB",
    "NVIDIA A100-SXM4-80GB": "A100",
    "NVIDIA A40": "A40",
    "NVIDIA H100 80GB HBM3": "H100",
    "NVIDIA H100 NVL": "H100 NVL",
    "NVIDIA H100 PCIe": "H100 PCIe",
    "NVIDIA H200": "H200",
    "NVIDIA L4": "L4",
    "NVIDIA L40S": "L40S",
    "NVIDIA GeForce RTX 4090": "RTX 4090",
}
BANDWIDTHS = {name: DEVICES[board].bandwidth for name, board in BOARDS.items()} | {"NVIDIA A100 80GB PCIe": 1935e9}
FORMS = ("NVL", "PCIe")
# All forms of A100 and of A40 have one peak.
ONE_PEAK = ("A100", "A40")


def known_peak(name: str) -> float | None:
    """bf16 FLOP/s of a GPU by CUDA's device name, None for an unknown one."""
    if name in BOARDS:
        return DEVICES[BOARDS[name]].peak_bf16
    words = name.removeprefix("NVIDIA ").replace("-", " ").split()
    model = words[0] if words else ""
    form = next((word for word in words[1:] if word in FORMS), None)
    found = DEVICES.get(model if form is None or model in ONE_PEAK else f"{model} {form}")
    return None if found is None else found.peak_bf16


def known_bandwidth(name: str) -> float | None:
    """Bytes/s of a GPU's memory by CUDA's device name, None for an unknown one."""
    return BANDWIDTHS.get(name)


def named(name: str) -> Device | None:
    """A GPU by its short name (``h100``, ``a100-40gb``), None for an unknown one."""
    return {_plain(known): device for known, device in DEVICES.items()}.get(_plain(name))


def _plain(name: str) -> str:
    return name.lower().removeprefix("nvidia").replace("-", "").replace(" ", "").replace("_", "")
