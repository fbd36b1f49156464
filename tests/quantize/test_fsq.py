"""FSQ against the formulas of arXiv 2309.15505, written out once more number by number."""

from __future__ import annotations

import math

import pytest
import torch

from ibq_scale.config.models import QuantizerConfig
from ibq_scale.quantize.fsq import fsq, grid, grid_index

LEVELS = (8, 5, 4, 3, 2)
SETTINGS = QuantizerConfig(kind="fsq", dim=len(LEVELS), codebook_size=math.prod(LEVELS), levels=LEVELS)


def _rounded(z: float, levels: int) -> int:
    half = (levels - 1) * 1.001 / 2
    offset = 0.5 if levels % 2 == 0 else 0.0
    return round(math.tanh(z + math.atanh(offset / half)) * half - offset)


def test_each_number_is_rounded_by_itself() -> None:
    z_ND = 2 * torch.randn(50, len(LEVELS), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = [[_rounded(z, n) / (n // 2) for z, n in zip(row, LEVELS, strict=True)] for row in z_ND.tolist()]
    assert torch.allclose(fsq(z_ND, SETTINGS).z_q_ND, torch.tensor(expected, dtype=torch.float64))


def test_every_code_has_its_own_index() -> None:
    grid_KD = grid(LEVELS, 0, SETTINGS.codebook_size)
    assert len({tuple(row) for row in grid_KD.tolist()}) == SETTINGS.codebook_size
    assert torch.equal(grid_KD[100:130], grid(LEVELS, 100, 130))
    # The middle of each cell is found again: tanh reaches all levels.
    for number, n in enumerate(LEVELS):
        values = torch.linspace(-8, 8, 4001)
        z_ND = torch.zeros(len(values), len(LEVELS))
        z_ND[:, number] = values
        assert len(grid_index(z_ND, LEVELS).unique()) == n


def test_the_gradient_passes_the_rounding() -> None:
    z_ND = torch.zeros(1, len(LEVELS), dtype=torch.float64, requires_grad=True)
    fsq(z_ND, SETTINGS).z_q_ND.sum().backward()
    assert z_ND.grad is not None
    slopes = [(n - 1) * 1.001 / 2 * (1 - math.tanh(_shift(n)) ** 2) / (n // 2) for n in LEVELS]
    assert z_ND.grad[0].tolist() == pytest.approx(slopes)


def _shift(levels: int) -> float:
    return math.atanh((0.5 if levels % 2 == 0 else 0.0) / ((levels - 1) * 1.001 / 2))
