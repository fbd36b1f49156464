"""The compute precision of a run's networks."""

from __future__ import annotations

import torch

from ibq_scale.config.run import RunConfig


def compute_dtype(run: RunConfig) -> torch.dtype:
    """dtype of weights and activations."""
    return torch.bfloat16 if run.train.precision == "bf16" else torch.float32
