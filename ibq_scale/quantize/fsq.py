"""Finite scalar quantization (arXiv 2309.15505): each of D numbers is rounded to one of `levels[d]` values.

The codebook is the grid of all combinations, K = Π levels, the first number the fastest. Nothing of it learns, and no
loss term comes with it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ibq_scale.config.models import QuantizerConfig
from ibq_scale.quantize.quantized import Quantized

# Above 1: tanh then reaches the outer levels.
MARGIN = 1.0 + 1e-3


def grid(levels: Sequence[int], start: int, stop: int) -> Tensor:
    """Codes start … stop − 1, fp32 (stop − start, D), each number in [−1, 1]."""
    index_K = torch.arange(start, stop)
    levels_D = torch.tensor(levels)
    digits_KD = index_K[:, None] // _strides(levels) % levels_D
    return (digits_KD - levels_D // 2) / (levels_D // 2)


def grid_index(z_ND: Tensor, levels: Sequence[int]) -> Tensor:
    """The code of each token, int64 (N,)."""
    digits_ND = _bounded(z_ND, levels).round().long() + torch.tensor(levels, device=z_ND.device) // 2
    return (digits_ND * _strides(levels).to(z_ND.device)).sum(dim=1)


def fsq(z_ND: Tensor, settings: QuantizerConfig) -> Quantized:
    """Quantizes z (N, D), straight through the rounding (section 3.1)."""
    bounded_ND = _bounded(z_ND, settings.levels)
    half_D = torch.tensor(settings.levels, device=z_ND.device) // 2
    hard_ND = bounded_ND.round()
    rounded_ND = bounded_ND + (hard_ND - bounded_ND).detach() if settings.straight_through else hard_ND
    nothing = z_ND.new_zeros(())
    return Quantized(
        z_q_ND=rounded_ND / half_D,
        indices_N=grid_index(z_ND.detach(), settings.levels),
        quantization_loss=nothing,
        entropy_loss=nothing,
        sample_entropy=nothing,
        batch_entropy=nothing,
    )


def _bounded(z_ND: Tensor, levels: Sequence[int]) -> Tensor:
    """Each number between its outer levels. An even number of levels has no level at 0, hence the shift."""
    levels_D = torch.tensor(levels, dtype=z_ND.dtype, device=z_ND.device)
    half_D = (levels_D - 1) * MARGIN / 2
    offset_D = torch.where(levels_D % 2 == 0, 0.5, 0.0)
    return torch.tanh(z_ND + torch.atanh(offset_D / half_D)) * half_D - offset_D


def _strides(levels: Sequence[int]) -> Tensor:
    return torch.cumprod(torch.tensor([1, *levels[:-1]]), dim=0)
