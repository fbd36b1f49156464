"""Muon for the matrices of a transformer's blocks and AdamW for the rest, as one optimizer.

Muon keeps one moment M ← μM + (1 − μ)G. It steps by the orthogonal matrix nearest to the look-ahead (1 − μ)G + μM,
found by five Newton–Schulz iterations in bf16 (torch.optim.Muon, from kellerjordan.github.io/posts/muon, 2024). The
step of an (m, n) matrix is scaled by 0.2·√max(m, n) to the root mean square of AdamW's steps (arXiv 2502.16982), so one
learning rate and one decay serve both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim._muon import DEFAULT_A, DEFAULT_B, DEFAULT_C, DEFAULT_NS_STEPS, EPS

# Private names. A test compares the steps with torch.optim.Muon's.
from torch.optim._muon import _adjust_lr as adjust_lr
from torch.optim._muon import _zeropower_via_newtonschulz as newton_schulz

from ibq_scale.config.optimizer import OptimizerConfig
from ibq_scale.models.transformer import Attention, FeedForward

MOMENTUM = "momentum_buffer"


class Part(NamedTuple):
    """Elements start … start + length − 1 of a flat matrix of `shape`, at `offset` of the optimizer's parameter."""

    shape: torch.Size
    start: int
    length: int
    offset: int

    @property
    def is_cut(self) -> bool:
        """Whether other ranks hold the rest of the matrix."""
        return self.length < self.shape.numel()

    def of(self, whole: Tensor) -> Tensor:
        """This part (length,) of the parameter, or of a tensor of its size."""
        return whole.view(-1)[self.offset : self.offset + self.length]


Gather = Callable[[Tensor, Part, Tensor], Callable[[], Tensor]]
"""(the optimizer's parameter, a cut part, the part's bf16 values) → a function that returns the whole matrix, flat."""


class Muon(torch.optim.AdamW):
    """Groups with a key ``momentum`` step by Muon, the others by the fused AdamW.

    Muon's parameters are matrices, or vectors with their matrices in `parts`. `gather` then completes cut ones.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], settings: OptimizerConfig) -> None:
        super().__init__(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)
        self.parts: dict[Tensor, list[Part]] = {}
        self.gather: Gather

    def takes(self, parameter: Tensor) -> bool:
        """Whether Muon steps this parameter, and not AdamW."""
        return any(parameter is p for group in self.param_groups if "momentum" in group for p in group["params"])

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step. With `parts` it is collective."""
        assert closure is None
        groups = self.param_groups
        for group in groups:
            if "momentum" in group:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._step_matrices(parameter, group)
        self.param_groups = [group for group in groups if "momentum" not in group]
        try:
            super().step()
        finally:
            self.param_groups = groups

    def _step_matrices(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, grad, momentum = self.state[parameter], parameter.grad, group["momentum"]
        assert grad is not None
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state[MOMENTUM] = torch.zeros_like(parameter)
        state["step"] += 1
        state[MOMENTUM].lerp_(grad, 1 - momentum)

        def ahead(part: Part) -> Tensor:
            # Newton–Schulz begins with this cast, so that gathered matrices have the bits of whole ones.
            return part.of(grad).lerp(part.of(state[MOMENTUM]), momentum).bfloat16()

        parts = self.parts.get(parameter) or [Part(parameter.shape, 0, parameter.numel(), 0)]
        waits = {part: self.gather(parameter, part, ahead(part)) for part in parts if part.is_cut}
        # Cut matrices come last: their pieces travel meanwhile.
        for part in sorted(parts, key=lambda part: part.is_cut):
            piece = _direction(part, waits.pop(part)() if part.is_cut else ahead(part))
            weights, lr = part.of(parameter), group["lr"]
            weights.mul_(1 - lr * group["weight_decay"])
            weights.add_(piece, alpha=-adjust_lr(lr, "match_rms_adamw", part.shape))
            del piece


def _direction(part: Part, values: Tensor) -> Tensor:
    """The part (length,) of the orthogonal matrix. `values`: all elements of the matrix, bf16, overwritten."""
    coefficients = (DEFAULT_A, DEFAULT_B, DEFAULT_C)
    direction = newton_schulz(values.view(part.shape), coefficients, DEFAULT_NS_STEPS, EPS)
    return direction.reshape(-1)[part.start : part.start + part.length]


def matrices(module: nn.Module) -> list[nn.Parameter]:
    """Muon's parameters: the projections of attention and feed-forward. AdaLN's maps read one class a sample."""
    blocks = (m for m in module.modules() if isinstance(m, Attention | FeedForward))
    return [parameter for block in blocks for parameter in block.parameters() if parameter.ndim == 2]


def newton_schulz_flops(m: int, n: int) -> int:
    """FLOPs of an (m, n) matrix's iterations: of s = min(m, n) rows, 4·s²·max(m, n) + 2·s³ each."""
    small, large = sorted((m, n))
    return DEFAULT_NS_STEPS * (4 * small**2 * large + 2 * small**3)
