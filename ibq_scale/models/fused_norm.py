"""GroupNorm, with or without SiLU, of channels-last images as one operator on GPUs, by Triton (`norm_kernels`).

The forward pass reads x twice and writes y. The backward pass reads x and ∂L/∂y twice and writes ∂L/∂x. Only x and each
group's mean and rstd are kept for it. torch.compile takes the operator whole. No gradient of the gradient is defined.

How the pixels are split follows from the shape alone, so sums have the same order on every GPU.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

# Programs of a launch: eight for each multiprocessor of a large GPU.
PROGRAMS = 1024
# Elements of a program's tile, its most channels side by side (256 bytes in bf16), and its warps and
# stages of loads.
TILE, CHANNELS, WARPS, STAGES = 4096, 128, 4, 3
# Parts that are added at once.
PARTS = 64
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

library: Any = torch.library.Library("ibq_scale", "FRAGMENT")  # type: ignore[no-untyped-call]
library.define(
    "group_norm_forward(Tensor x, Tensor weight, Tensor bias, int groups, float eps, bool silu) "
    "-> (Tensor, Tensor, Tensor)"
)
library.define(
    "group_norm_backward(Tensor grad, Tensor x, Tensor mean, Tensor rstd, Tensor weight, Tensor bias, bool silu) "
    "-> (Tensor, Tensor, Tensor)"
)


def group_norm(x_BCHW: Tensor, weight_C: Tensor, bias_C: Tensor, groups: int, eps: float, *, silu: bool) -> Tensor:
    """The normed images, in x's dtype and channels-last order. Statistics and arithmetic are fp32.

    x: `DTYPES`, on a device with Triton. weight, bias: any float dtype.
    """
    y: Tensor = torch.ops.ibq_scale.group_norm_forward(x_BCHW, weight_C, bias_C, groups, eps, silu)[0]
    return y


class _Split(NamedTuple):
    """The pixels of a shape (B, C, H, W) in `parts` of `rows`, and the programs of all tiles side by side."""

    parts: int
    rows: int
    grid: tuple[int, int, int]

    @staticmethod
    def of(shape: torch.Size) -> _Split:
        B, C, size = shape[0], shape[1], shape[2] * shape[3]
        pixels, channels = tile(C)
        blocks = C // channels
        most = max(1, PROGRAMS // (B * blocks))
        rows = -(-size // (most * pixels)) * pixels
        parts = -(-size // rows)
        return _Split(parts, rows, (parts, blocks, B))


def tile(channels: int) -> tuple[int, int]:
    """Pixels × channels of a program's step. The latter is a power of two and divides all channels."""
    side_by_side = min(CHANNELS, channels & -channels)
    return TILE // side_by_side, side_by_side


def function(kernel: str) -> Any:
    """Triton's function of a kernel."""
    from ibq_scale.models import norm_kernels

    return getattr(norm_kernels, f"_{kernel}_kernel")


def constants(kernel: str, channels: int, groups: int, *, silu: bool) -> dict[str, Any]:
    """The compile-time arguments of a kernel."""
    pixels, side_by_side = tile(channels)
    values = {"SILU": silu, "BP": pixels, "BC": side_by_side}
    values |= {"BQ": PARTS, "BG": 1 << (channels // groups - 1).bit_length()}
    return {name: value for name, value in values.items() if name in function(kernel).arg_names}


def kind(name: str, dtype: str) -> str:
    """Triton's type of a kernel's argument, for images and weights of ``bf16`` or ``fp32``."""
    if name in ("x", "y", "grad", "grad_x", "weight", "bias"):
        return f"*{dtype}"
    integers = ("HW", "C", "CG", "P", "rows_a_part")
    return "i32" if name in integers else "fp32" if name == "eps" else "*fp32"


def build(kernel: str, arch: str, dtype: str, channels: int, groups: int = 32) -> Any:
    """Triton's compiled kernel for any chip (`compiled.build_function`), with SiLU."""
    from ibq_scale.quantize.compiled import build_function

    fixed = constants(kernel, channels, groups, silu=True)
    types = {name: kind(name, dtype) for name in function(kernel).arg_names if name not in fixed}
    return build_function(function(kernel), arch, types, fixed, WARPS, STAGES, odd=("CG", "P"))


def launch(kernel: str, grid: tuple[int, ...], channels: int, groups: int, silu: bool, *arguments: Any) -> None:
    """Runs a kernel on the device of its first argument."""
    fixed = constants(kernel, channels, groups, silu=silu)
    with torch.cuda.device_of(arguments[0]):  # type: ignore[no-untyped-call]
        function(kernel)[grid](*arguments, **fixed, num_warps=WARPS, num_stages=STAGES)


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    x = x.contiguous(memory_format=torch.channels_last)
    (B, C, H, W), split = x.shape, _Split.of(x.shape)
    sizes, how = (H * W, C, C // groups), (C, groups, silu)
    part_mean, part_square = _floats(x, 2, B, split.parts, C)
    # Outputs of an operator may not share memory.
    mean, rstd = (x.new_empty((B, groups), dtype=torch.float32) for _ in range(2))
    y = torch.empty_like(x)
    launch("norm_parts", split.grid, *how, x, part_mean, part_square, *sizes[:2], split.rows)
    launch("norm_statistics", (B * groups,), *how,
        part_mean, part_square, mean, rstd, *sizes, split.parts, split.rows, eps)  # fmt: skip
    launch("norm_apply", split.grid, *how, x, mean, rstd, weight, bias, y, *sizes, split.rows)
    return y, mean, rstd


def _backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grad, x = (t.contiguous(memory_format=torch.channels_last) for t in (grad, x))
    (B, C, H, W), groups, split = x.shape, mean.shape[1], _Split.of(x.shape)
    sizes, how = (H * W, C, C // groups), (C, groups, silu)
    part_bias, part_weight = _floats(x, 2, B, split.parts, C)
    sums_2BC = x.new_empty((2, B, C), dtype=torch.float32)
    mean_slope, mean_product = _floats(x, 2, B, groups)
    grad_x = torch.empty_like(x)
    launch("norm_grad_parts", split.grid, *how,
        grad, x, mean, rstd, weight, bias, part_bias, part_weight, *sizes, split.rows)  # fmt: skip
    launch("norm_grad_sums", (B * groups,), *how,
        part_bias, part_weight, weight, *sums_2BC, mean_slope, mean_product, *sizes, split.parts)  # fmt: skip
    launch("norm_grad_apply", split.grid, *how,
        grad, x, mean, rstd, weight, bias, mean_slope, mean_product, grad_x, *sizes, split.rows)  # fmt: skip
    grad_bias, grad_weight = (sums_BC.sum(dim=0) for sums_BC in sums_2BC)
    return grad_x, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)


def _floats(like: Tensor, number: int, *shape: int) -> tuple[Tensor, ...]:
    return like.new_empty((number, *shape), dtype=torch.float32).unbind()


def _fake_forward(x: Tensor, weight: Tensor, bias: Tensor, groups: int, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    statistics = (x.new_empty((x.shape[0], groups), dtype=torch.float32) for _ in range(2))
    return torch.empty_like(x, memory_format=torch.channels_last), *statistics  # type: ignore[return-value]


def _fake_backward(grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, _: bool) -> Any:
    grad_x = torch.empty_like(x, memory_format=torch.channels_last)
    return grad_x, torch.empty_like(weight), torch.empty_like(bias)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, _, _, ctx.silu = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, *output[1:], weight, bias)


def _call_backward(ctx: Any, grad: Tensor, *_: None) -> tuple[Any, ...]:
    grads = torch.ops.ibq_scale.group_norm_backward(grad, *ctx.saved_tensors, ctx.silu)
    return *grads, None, None, None


library.impl("group_norm_forward", _forward, "CompositeExplicitAutograd")
library.impl("group_norm_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("ibq_scale::group_norm_forward", _fake_forward, lib=library)
torch.library.register_fake("ibq_scale::group_norm_backward", _fake_backward, lib=library)
torch.library.register_autograd("ibq_scale::group_norm_forward", _call_backward, setup_context=_setup, lib=library)
