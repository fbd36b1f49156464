"""Triton kernels of GroupNorm with or without SiLU for images in channels-last order, forward and backward.

x, y and their gradients are (B, HW, C) in memory. They, weight and bias (C,) may be of any float dtype. The rest is
fp32.
x̂ = (x − mean) · rstd, u = x̂ · weight + bias, y = u or silu(u). n = HW · C/G elements of a group.

An image's pixels are split into P parts of `rows_a_part`. Each program writes its own part of a sum, and one program
per group adds the parts in a fixed order, without atomics. Tiles are BP pixels × BC channels, and BC divides C.
Squares are of differences to a mean, merged as in Chan, Golub & LeVeque (1983): a large mean loses no digits.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load(x, image, row, last, HW, C, channel):  # type: ignore[no-untyped-def]
    """A tile in fp32, zeros from the pixel `last` on. Addresses have 64 bits."""
    places = x + (image.to(tl.int64) * HW + row)[:, None] * C + channel[None, :]
    return tl.load(places, mask=(row < last)[:, None], other=0.0).to(tl.float32)


@triton.jit
def _store(y, value, image, row, last, HW, C, channel):  # type: ignore[no-untyped-def]
    places = y + (image.to(tl.int64) * HW + row)[:, None] * C + channel[None, :]
    tl.store(places, value.to(y.dtype.element_ty), mask=(row < last)[:, None])


@triton.jit
def _of_channels(values, image, channel, C, CG):  # type: ignore[no-untyped-def]
    """A value of each channel's group, from (B, G)."""
    return tl.load(values + image * (C // CG) + channel // CG)


@triton.jit  # type: ignore[untyped-decorator]
def _slope(grad, x_hat, weight, bias, SILU: tl.constexpr):  # type: ignore[no-untyped-def]
    """∂L/∂u from ∂L/∂y."""
    if SILU:
        u = x_hat * weight[None, :] + bias[None, :]
        share = tl.sigmoid(u)
        grad = grad * share * (1.0 + u * (1.0 - share))
    return grad


@triton.jit  # type: ignore[untyped-decorator]
def _norm_parts_kernel(  # type: ignore[no-untyped-def]
    x, part_mean, part_square, HW, C, rows_a_part, BP: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    """Mean of a part of the pixels, and Σ (x − mean)², of each channel: (B, P, C)."""
    part, image = tl.program_id(0), tl.program_id(2)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    first = part * rows_a_part
    last = tl.minimum(first + rows_a_part, HW)
    mean = tl.zeros((BC,), tl.float32)
    square = tl.zeros((BC,), tl.float32)
    for start in range(first, last, BP):
        row = start + tl.arange(0, BP)
        values = _load(x, image, row, last, HW, C, channel)
        before = (start - first).to(tl.float32)
        count = tl.minimum(last - start, BP).to(tl.float32)
        here = tl.sum(values, axis=0) / count
        off = tl.where((row < last)[:, None], values - here[None, :], 0.0)
        delta = here - mean
        mean += delta * (count / (before + count))
        square += tl.sum(off * off, axis=0) + delta * delta * (before * count / (before + count))
    at = (image * tl.num_programs(0) + part) * C + channel
    tl.store(part_mean + at, mean)
    tl.store(part_square + at, square)


@triton.jit  # type: ignore[untyped-decorator]
def _norm_statistics_kernel(  # type: ignore[no-untyped-def]
    part_mean, part_square, mean, rstd, HW, C, CG, P, rows_a_part, eps, BQ: tl.constexpr, BG: tl.constexpr
):  # fmt: skip
    """mean and rstd (B, G) of one group from its parts."""
    image, group = tl.program_id(0) // (C // CG), tl.program_id(0) % (C // CG)
    of_group = tl.arange(0, BG)
    channel = group * CG + of_group
    # Measured from a mean nearby, sums keep their digits.
    near = tl.load(part_mean + image * P * C + group * CG)
    total = tl.zeros((BG,), tl.float32)
    for start in range(0, P, BQ):
        part = start + tl.arange(0, BQ)
        live = (part < P)[:, None] & (of_group < CG)[None, :]
        count = tl.minimum(HW - part * rows_a_part, rows_a_part).to(tl.float32)
        found = tl.load(part_mean + (image * P + part)[:, None] * C + channel[None, :], mask=live, other=0.0)
        total += tl.sum(tl.where(live, (found - near) * count[:, None], 0.0), axis=0)
    size = (HW * CG).to(tl.float32)
    middle = near + tl.sum(total, axis=0) / size
    squares = tl.zeros((BG,), tl.float32)
    for start in range(0, P, BQ):
        part = start + tl.arange(0, BQ)
        live = (part < P)[:, None] & (of_group < CG)[None, :]
        count = tl.minimum(HW - part * rows_a_part, rows_a_part).to(tl.float32)
        places = (image * P + part)[:, None] * C + channel[None, :]
        off = tl.load(part_mean + places, mask=live, other=0.0) - middle
        square = tl.load(part_square + places, mask=live, other=0.0)
        squares += tl.sum(tl.where(live, square + off * off * count[:, None], 0.0), axis=0)
    tl.store(mean + tl.program_id(0), middle)
    tl.store(rstd + tl.program_id(0), 1.0 / tl.sqrt_rn(tl.sum(squares, axis=0) / size + eps))


@triton.jit  # type: ignore[untyped-decorator]
def _norm_apply_kernel(  # type: ignore[no-untyped-def]
    x, mean, rstd, weight, bias, y, HW, C, CG, rows_a_part,
    SILU: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """y of a part of the pixels."""
    part, image = tl.program_id(0), tl.program_id(2)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    middle, scale = _of_channels(mean, image, channel, C, CG), _of_channels(rstd, image, channel, C, CG)
    scale *= tl.load(weight + channel).to(tl.float32)
    offset = tl.load(bias + channel).to(tl.float32)
    first = part * rows_a_part
    last = tl.minimum(first + rows_a_part, HW)
    for start in range(first, last, BP):
        row = start + tl.arange(0, BP)
        u = (_load(x, image, row, last, HW, C, channel) - middle[None, :]) * scale[None, :] + offset[None, :]
        if SILU:
            u = u * tl.sigmoid(u)
        _store(y, u, image, row, last, HW, C, channel)


@triton.jit  # type: ignore[untyped-decorator]
def _norm_grad_parts_kernel(  # type: ignore[no-untyped-def]
    grad, x, mean, rstd, weight, bias, part_bias, part_weight, HW, C, CG, rows_a_part,
    SILU: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Σ ∂L/∂u and Σ ∂L/∂u x̂ of a part of the pixels, of each channel: (B, P, C)."""
    part, image = tl.program_id(0), tl.program_id(2)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    middle, scale = _of_channels(mean, image, channel, C, CG), _of_channels(rstd, image, channel, C, CG)
    factor, offset = tl.load(weight + channel).to(tl.float32), tl.load(bias + channel).to(tl.float32)
    sum_bias = tl.zeros((BC,), tl.float32)
    sum_weight = tl.zeros((BC,), tl.float32)
    first = part * rows_a_part
    last = tl.minimum(first + rows_a_part, HW)
    for start in range(first, last, BP):
        row = start + tl.arange(0, BP)
        x_hat = (_load(x, image, row, last, HW, C, channel) - middle[None, :]) * scale[None, :]
        slope = _slope(_load(grad, image, row, last, HW, C, channel), x_hat, factor, offset, SILU)
        sum_bias += tl.sum(slope, axis=0)
        sum_weight += tl.sum(slope * x_hat, axis=0)
    at = (image * tl.num_programs(0) + part) * C + channel
    tl.store(part_bias + at, sum_bias)
    tl.store(part_weight + at, sum_weight)


@triton.jit  # type: ignore[untyped-decorator]
def _norm_grad_sums_kernel(  # type: ignore[no-untyped-def]
    part_bias, part_weight, weight, image_bias, image_weight, mean_slope, mean_product, HW, C, CG, P,
    BQ: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """An image's sums of one group's channels (B, C), and the means of weight ∂L/∂u and weight ∂L/∂u x̂ (B, G)."""
    image, group = tl.program_id(0) // (C // CG), tl.program_id(0) % (C // CG)
    of_group = tl.arange(0, BG)
    channel = group * CG + of_group
    sum_bias = tl.zeros((BG,), tl.float32)
    sum_weight = tl.zeros((BG,), tl.float32)
    for start in range(0, P, BQ):
        part = start + tl.arange(0, BQ)
        live = (part < P)[:, None] & (of_group < CG)[None, :]
        places = (image * P + part)[:, None] * C + channel[None, :]
        sum_bias += tl.sum(tl.load(part_bias + places, mask=live, other=0.0), axis=0)
        sum_weight += tl.sum(tl.load(part_weight + places, mask=live, other=0.0), axis=0)
    inside = of_group < CG
    tl.store(image_bias + image * C + channel, sum_bias, mask=inside)
    tl.store(image_weight + image * C + channel, sum_weight, mask=inside)
    factor = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    size = (HW * CG).to(tl.float32)
    tl.store(mean_slope + tl.program_id(0), tl.sum(factor * sum_bias, axis=0) / size)
    tl.store(mean_product + tl.program_id(0), tl.sum(factor * sum_weight, axis=0) / size)


@triton.jit  # type: ignore[untyped-decorator]
def _norm_grad_apply_kernel(  # type: ignore[no-untyped-def]
    grad, x, mean, rstd, weight, bias, mean_slope, mean_product, grad_x, HW, C, CG, rows_a_part,
    SILU: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """∂L/∂x = rstd (weight ∂L/∂u − mean_slope − x̂ mean_product) of a part of the pixels."""
    part, image = tl.program_id(0), tl.program_id(2)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    middle, scale = _of_channels(mean, image, channel, C, CG), _of_channels(rstd, image, channel, C, CG)
    factor, offset = tl.load(weight + channel).to(tl.float32), tl.load(bias + channel).to(tl.float32)
    level = _of_channels(mean_slope, image, channel, C, CG)
    tilt = _of_channels(mean_product, image, channel, C, CG)
    first = part * rows_a_part
    last = tl.minimum(first + rows_a_part, HW)
    for start in range(first, last, BP):
        row = start + tl.arange(0, BP)
        x_hat = (_load(x, image, row, last, HW, C, channel) - middle[None, :]) * scale[None, :]
        slope = _slope(_load(grad, image, row, last, HW, C, channel), x_hat, factor, offset, SILU)
        found = scale[None, :] * (factor[None, :] * slope - level[None, :] - x_hat * tilt[None, :])
        _store(grad_x, found, image, row, last, HW, C, channel)
