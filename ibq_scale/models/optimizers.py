"""Adam by torch's fused kernel, or Muon: decay groups, and the state for restored checkpoints.

The fused kernel reads and writes each value once. The other kernels allocate temporaries as large as the parameters: on
a CPU they took eight times the CPU seconds and 8 bytes a parameter.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ibq_scale.config.optimizer import OptimizerConfig
from ibq_scale.models.muon import MOMENTUM, Muon, matrices

MOMENTS = ("exp_avg", "exp_avg_sq")


def adam(
    parameters: Iterable[nn.Parameter], settings: OptimizerConfig, frozen: Iterable[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """Adam without decay, as for the published tokenizer. `frozen`: some of the parameters, for a rate of 0.

    The frozen ones keep their bits, and have moments and places in checkpoints as the others.
    """
    still = {id(parameter) for parameter in frozen}
    learning: dict[str, Any] = {"params": []}
    resting: dict[str, Any] = {"params": [], "frozen": True, "lr": 0.0}
    for parameter in parameters:
        (resting if id(parameter) in still else learning)["params"].append(parameter)
    groups = [group for group in (learning, resting) if group["params"]]
    return torch.optim.Adam(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)


def parameter_groups(module: nn.Module, kind: str) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """A transformer's parameters by what steps them: `matrices`, with ``kind=muon``, the other matrices, with decay,
    and norms, biases and embeddings, without. Each list may be empty.
    """
    embeddings = {id(p) for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    by_muon = matrices(module) if kind == "muon" else []
    ids = {id(parameter) for parameter in by_muon}
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for parameter in module.parameters():
        if id(parameter) not in ids:
            # Under ZeRO-3 a rank's partition is flat.
            ndim = len(getattr(parameter, "ds_shape", parameter.shape))
            (free if ndim < 2 or id(parameter) in embeddings else decayed).append(parameter)
    return by_muon, decayed, free


def adamw(module: nn.Module, settings: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW with decay of matrices only: none for norms, biases and embeddings, in schedules too.

    With ``kind=muon``, Muon steps `matrices`.
    """
    by_muon, decayed, free = parameter_groups(module, settings.kind)
    groups: list[dict[str, Any]] = [
        {"params": by_muon, "weight_decay": settings.weight_decay, "momentum": settings.momentum},
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if by_muon:
        return Muon(groups, settings)
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)


def clipped_step(optimizer: torch.optim.Optimizer, gradient: Tensor, norm: Tensor, largest: float, lr: float) -> bool:
    """One step at the rate `lr`, with the gradient scaled in place to the norm `largest` at most (0: as it is).

    `gradient`: the memory of all parameters' gradients. They are dropped afterwards. False for a `norm` that is not
    finite: then nothing changes.
    """
    if not bool(norm.isfinite()):
        return False
    if largest > 0:
        gradient.mul_((largest / (norm + 1e-6)).clamp(max=1.0))
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return True


def moments(optimizer: torch.optim.Optimizer, parameter: Tensor) -> tuple[str, ...]:
    """Names of the parameter's moments in the optimizer's state."""
    return (MOMENTUM,) if isinstance(optimizer, Muon) and optimizer.takes(parameter) else MOMENTS


def restored_state(optimizer: torch.optim.Optimizer, parameter: Tensor, steps: float) -> dict[str, Tensor]:
    """The optimizer's state of `parameter` after `steps` steps, for the caller to fill in the moments (new ones are 0).

    The step count is a tensor on the parameter's device, as the fused kernel requires.
    """
    state: dict[str, Tensor] = optimizer.state[parameter]
    for moment in moments(optimizer, parameter):
        if moment not in state:
            state[moment] = torch.zeros_like(parameter, requires_grad=False)
    state["step"] = torch.tensor(steps, dtype=torch.float32, device=parameter.device)
    return state
