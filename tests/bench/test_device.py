"""Peaks by name, never by likeness."""

from __future__ import annotations

import pytest
import torch

from ibq_scale.bench.device import reference
from ibq_scale.scaling.devices import DEVICES, known_bandwidth, known_peak, named


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


@pytest.mark.parametrize("name", ["NVIDIA A10G", "NVIDIA H200 NVL", "NVIDIA GeForce RTX 4080", "AMD MI300X", ""])
def test_unknown(name: str) -> None:
    assert known_peak(name) is None


def test_a_cpu_has_no_mfu_but_a_best_product() -> None:
    found = reference(torch.device("cpu"), torch.float32)
    assert found.sheet is None
    assert found.product > 1e8
    assert (found.side, found.dtype) == (1024, "float32")


def test_names_that_people_type() -> None:
    assert named("h100") == named("NVIDIA H100") == DEVICES["H100"]
    assert named("a100-40gb") == DEVICES["A100 40GB"]
    assert named("mi300x") is None


def test_bandwidths_are_those_of_the_board() -> None:
    boards = ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe")
    assert [known_bandwidth(name) for name in boards] == [1555e9, 2039e9, 3350e9, 2000e9]
    assert known_bandwidth("NVIDIA H100") is known_bandwidth("") is None
