"""Adam by torch's fused kernel: decay groups, and its state for restored checkpoints.

The fused kernel reads and writes each value once. The other kernels allocate temporaries as large as the parameters: on
a CPU they took eight times the CPU seconds and 8 bytes a parameter.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ibq_scale.config.run import OptimizerConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


def adam(
    parameters: Iterable[nn.Parameter], settings: OptimizerConfig, frozen: Iterable[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """Adam without decay, as for the published tokenizer. `frozen`: some of the parameters, for a rate of 0.

    The frozen ones keep their bits, and have moments and places in checkpoints as the others.
    """
    still = {id(parameter) for parameter in frozen}
    every = list(parameters)
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in every if id(parameter) not in still]},
        {"params": [parameter for parameter in every if id(parameter) in still], "frozen": True, "lr": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.Adam(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)


def decay_groups(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Parameters with decay, which are matrices, and without: norms, biases and embeddings."""
    embeddings = {id(p) for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for parameter in module.parameters():
        # Under ZeRO-3 a rank's partition is flat.
        ndim = len(getattr(parameter, "ds_shape", parameter.shape))
        (free if ndim < 2 or id(parameter) in embeddings else decayed).append(parameter)
    return decayed, free


def adamw(module: nn.Module, settings: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW with decay of matrices only: none for norms, biases and embeddings, in schedules too."""
    decayed, free = decay_groups(module)
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)


def restored_state(optimizer: torch.optim.Optimizer, parameter: Tensor, steps: float) -> dict[str, Tensor]:
    """The optimizer's state of `parameter` after `steps` steps, for the caller to fill in the moments (new ones are 0).

    The step count is a tensor on the parameter's device, as the fused kernel requires.
    """
    state: dict[str, Tensor] = optimizer.state[parameter]
    for moment in MOMENTS:
        if moment not in state:
            state[moment] = torch.zeros_like(parameter, requires_grad=False)
    state["step"] = torch.tensor(steps, dtype=torch.float32, device=parameter.device)
    return state
