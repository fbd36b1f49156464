"""Bytes that GroupNorm and SiLU move on a GPU: ``python -m tests.tools.norm_bytes [B C H W]``, without one.

Of the eager form, each operator reads its inputs and writes its outputs, and torch's group norm reads a second time:
for the statistics, and in the backward pass for their gradients. Of the kernels, Triton's interpreter counts loads and
stores. It takes a minute at the size of the tokenizer's first level.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ibq_scale.models.fused_norm import group_norm
from ibq_scale.models.norm import GroupNormSiLU
from ibq_scale.scaling.allocations import NORMS, NormShapes

Shape = tuple[int, int, int, int]


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
    norm = GroupNormSiLU(32, shape[1], device="meta", dtype=dtype)
    with NormShapes(), _Moved() as moved:
        y = norm(x.requires_grad_())
        forward = moved.bytes
        torch.autograd.backward(y, upstream)
    return forward, moved.bytes - forward


@contextmanager
def _counted(sizes: list[int]) -> Iterator[None]:
    """Adds the bytes of each load and store of an interpreted kernel to a list."""
    from triton.runtime.interpreter import InterpreterBuilder

    def counting(name: str, place_of_mask: int) -> Any:
        real = getattr(InterpreterBuilder, name)

        def count(self: Any, places: Any, *rest: Any) -> Any:
            width = places.get_element_ty().primitive_bitwidth // 8
            sizes.append(int(rest[place_of_mask].data.sum()) * width)
            return real(self, places, *rest)

        return mock.patch.object(InterpreterBuilder, name, count)

    with counting("create_masked_load", 0), counting("create_masked_store", 1):
        yield


def fused(shape: Shape, dtype: torch.dtype) -> tuple[int, int]:
    """The same of the kernels."""
    x, upstream = (torch.zeros(shape, dtype=dtype).contiguous(memory_format=torch.channels_last) for _ in range(2))
    weight, bias = torch.ones(shape[1], dtype=dtype), torch.zeros(shape[1], dtype=dtype)
    sizes: list[int] = []
    with _counted(sizes):
        y = group_norm(x.requires_grad_(), weight, bias, 32, 1e-6, silu=True)
        forward = sum(sizes)
        torch.autograd.backward(y, upstream)
    return forward, sum(sizes) - forward


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"
    sides = tuple(int(word) for word in sys.argv[1:]) or (4, 128, 256, 256)
    print("| dtype | forward: eager, fused | backward: eager, fused |\n|---|---|---|")
    for dtype in (torch.bfloat16, torch.float32):
        before, after = eager(sides, dtype), fused(sides, dtype)
        cells = [f"{a / 1e6:,.0f} MB, {b / 1e6:,.0f} MB" for a, b in zip(before, after, strict=True)]
        print(f"| {str(dtype).removeprefix('torch.')} | {' | '.join(cells)} |", flush=True)
