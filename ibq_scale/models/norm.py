"""Norms with fp32 statistics for input and parameters of any dtype, as under torch's autocast."""

from __future__ import annotations

import importlib.util
import os
import shutil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ibq_scale.models.fused_norm import DTYPES, group_norm

# Triton builds its launchers in C.
_COMPILER = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
_TRITON = importlib.util.find_spec("triton") is not None and _COMPILER is not None


class GroupNorm(nn.GroupNorm):
    """torch's own rounds mean and 1/σ of bf16 input to bf16. The error of a large mean affects all outputs.

    Channels-last images on GPUs take the kernels of `fused_norm` where Triton and a C compiler are there, and stay
    channels last. They have no second derivative.
    """

    silu = False

    def forward(self, x: Tensor) -> Tensor:
        if runs_fused(x):
            return group_norm(x, self.weight, self.bias, self.num_groups, self.eps, silu=self.silu)
        if torch.finfo(x.dtype).bits >= 32:
            normed = F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        else:
            normed = _NarrowGroupNorm.apply(x, self.weight, self.bias, self.num_groups, self.eps)
        return F.silu(normed) if self.silu else normed


class GroupNormSiLU(GroupNorm):
    """The norm and then SiLU, in one module so that one kernel can do both."""

    silu = True


def runs_fused(x: Tensor) -> bool:
    """Whether the fused kernels take this input of a norm. Else torch's norm does."""
    return x.is_cuda and _TRITON and fusible(x) and x.is_contiguous(memory_format=torch.channels_last)


def fusible(x: Tensor) -> bool:
    """Whether they would, if it were on a GPU with Triton and channels last."""
    return x.dim() == 4 and x.dtype in DTYPES


class _NarrowGroupNorm(torch.autograd.Function):
    """Computes in fp32 and keeps the narrow input for the backward pass. Autograd alone would keep the fp32 one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        # Before torch 2.14 the operator requires this layout on CUDA.
        normed, mean, rstd = torch.native_group_norm(
            x.float().contiguous(), weight.float(), bias.float(), len(x), x.shape[1], x[0, 0].numel(), groups, eps
        )
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.groups = groups
        return normed.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_group_norm_backward(
            grads[0].float().contiguous(),
            x.float().contiguous(),
            mean,
            rstd,
            weight.float(),
            len(x),
            x.shape[1],
            x[0, 0].numel(),
            ctx.groups,
            [True, True, True],
        )
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), grad_bias.to(weight.dtype), None, None


class BatchNorm(nn.BatchNorm2d):
    """Computes in fp32. DeepSpeed casts parameters but not buffers, and torch refuses that mixture on CPUs."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        normed = F.batch_norm(
            x_BCHW.float(),
            self.running_mean,
            self.running_var,
            self.weight.float(),
            self.bias.float(),
            self.training,
            self.momentum or 0.0,
            self.eps,
        )
        return normed.to(x_BCHW.dtype)
