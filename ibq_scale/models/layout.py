"""The dtype of a run's networks, and the memory layout of images for convolutions."""

from __future__ import annotations

import torch
from torch import Tensor

from ibq_scale.config.run import RunConfig


def compute_dtype(run: RunConfig) -> torch.dtype:
    """dtype of weights and activations."""
    return torch.bfloat16 if run.train.precision == "bf16" else torch.float32


def order_on(device: torch.device) -> torch.memory_format:
    """Channels last on GPUs, channels first on CPUs.

    On CPUs a channels-last input makes each convolution copy its weight, and the weight's gradient, to this order.
    """
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


def convolution_layout(x_BCHW: Tensor, dtype: torch.dtype) -> Tensor:
    """`x_BCHW` in this dtype and the device's order, copied only if one of them differs.

    Convolutions and the norms of `norm.py` keep the order, so one call at a network's input is enough.
    """
    return x_BCHW.to(dtype, memory_format=order_on(x_BCHW.device))
