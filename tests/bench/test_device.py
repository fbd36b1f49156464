"""Peaks by name, never by likeness."""

from __future__ import annotations

import pytest
import torch

from ibq_scale.bench.device import known_peak, peak_flops


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("NVIDIA L40S", 362e12),
    ],
)
def test_known(name: str, peak: float) -> None:
    assert known_peak(name) == peak


@pytest.mark.parametrize("name", ["NVIDIA A10G", "NVIDIA H200 NVL", "NVIDIA GeForce RTX 4090", "AMD MI300X", ""])
def test_unknown(name: str) -> None:
    assert known_peak(name) is None


def test_a_cpus_peak_is_measured_and_said_to_be() -> None:
    peak, source = peak_flops(torch.device("cpu"), torch.float32)
    assert peak > 1e8
    assert source == "measured: best product of 2048² in float32"
