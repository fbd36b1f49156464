"""How images lie in memory, where convolutions read them."""

from __future__ import annotations

import torch
from torch import Tensor


def convolution_layout(x_BCHW: Tensor, dtype: torch.dtype) -> Tensor:
    """`x_BCHW` in this dtype, channels last on GPUs, channels first on CPUs.

    On CPUs a channels-last input makes each convolution copy its weight and the weight's gradient into that order.
    Nothing is copied where nothing changes. Convolutions and norms keep the order, so one call at a network's entrance
    is enough.
    """
    layout = torch.channels_last if x_BCHW.is_cuda else torch.contiguous_format
    return x_BCHW.to(dtype, memory_format=layout)
