"""Bytes that GroupNorm and SiLU move on a GPU: ``python -m tests.tools.norm_bytes [B C H W]``, without one.

Of the eager form, each operator reads its inputs and writes its outputs, and torch's group norm reads a second time:
for the statistics, and in the backward pass for their gradients. Of the kernels, a formula gives loads and stores. A
test holds it against what Triton's interpreter does.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ibq_scale.models.fused_norm import Split
from ibq_scale.models.norm import GroupNormSiLU
from ibq_scale.scaling.allocations import NORMS, NormShapes

Shape = tuple[int, int, int, int]
GROUPS = 32


class _Moved(TorchDispatchMode):
    """Bytes of operators' inputs and outputs. Views move nothing."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given, made = ([x for x in tree_leaves(tensors) if isinstance(x, Tensor)] for tensors in (args, out))
        if not {x.untyped_storage()._cdata for x in given} & {x.untyped_storage()._cdata for x in made}:
            again = [x for x in given if x.dim() == 4 and func in NORMS]
            self.bytes += sum(x.numel() * x.element_size() for x in (*given, *made, *again))
        return out


def eager(shape: Shape, dtype: torch.dtype) -> tuple[int, int]:
    """Forward and backward, of a channels-last input."""
    x, upstream = (
        torch.zeros(shape, device="meta", dtype=dtype).contiguous(memory_format=torch.channels_last) for _ in range(2)
    )
    norm = GroupNormSiLU(GROUPS, shape[1], device="meta", dtype=dtype)
    with NormShapes(), _Moved() as moved:
        y = norm(x.requires_grad_())
        forward = moved.bytes
        torch.autograd.backward(y, upstream)
    return forward, moved.bytes - forward


def fused(shape: Shape, dtype: torch.dtype) -> tuple[int, int]:
    """Loads and stores of the kernels: the image as often as it must be, and small sums of each part's channels."""
    B, C, H, W = shape
    image, size = B * C * H * W * dtype.itemsize, dtype.itemsize
    of_parts = Split.of(torch.Size(shape)).parts * B * C
    forward = 3 * image + of_parts * (28 + 2 * size) + 12 * B * GROUPS
    backward = 5 * image + of_parts * (40 + 4 * size) + B * C * (8 + size) + 8 * B * GROUPS
    return forward, backward


if __name__ == "__main__":
    sides: Any = tuple(int(word) for word in sys.argv[1:]) or (4, 128, 256, 256)
    print("| dtype | forward: eager, fused | backward: eager, fused |\n|---|---|---|")
    for dtype in (torch.bfloat16, torch.float32):
        before, after = eager(sides, dtype), fused(sides, dtype)
        cells = [f"{a / 1e6:,.0f} MB, {b / 1e6:,.0f} MB" for a, b in zip(before, after, strict=True)]
        print(f"| {str(dtype).removeprefix('torch.')} | {' | '.join(cells)} |", flush=True)
