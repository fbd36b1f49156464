"""Which parameters an optimizer takes, and how it decays them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ibq_scale.config.run import OptimizerConfig


def adam(parameters: Iterable[nn.Parameter], settings: OptimizerConfig) -> torch.optim.Optimizer:
    """Adam without decay, as the published tokenizer is trained."""
    return torch.optim.Adam(parameters, lr=settings.lr, betas=settings.betas, eps=settings.eps)


def adamw(module: nn.Module, settings: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW that decays matrices only: norms, biases and embeddings stay out of it, in schedules too."""
    embeddings = {id(p) for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for parameter in module.parameters():
        # Under ZeRO-3 a rank's own part has lost the shape.
        ndim = len(getattr(parameter, "ds_shape", parameter.shape))
        (free if ndim < 2 or id(parameter) in embeddings else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=settings.lr, betas=settings.betas, eps=settings.eps)
