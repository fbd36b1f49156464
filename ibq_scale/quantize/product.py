"""Matrix products of fp32 operands in a chosen precision, results and sums in fp32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

Precision = Literal["fp32", "tf32", "bf16"]


def product_into(out: Tensor, a: Tensor, b: Tensor, precision: Precision, *, accumulate: bool = False) -> None:
    """out ← a b, or out += a b. Only GPUs have tf32 and fast bf16: elsewhere, and for fp64, as the dtype is.

    Operands may be rounded to bf16 already.
    """
    if out.dtype != torch.float32 or not a.is_cuda:
        _multiply(out, a, b, accumulate)
    elif precision == "bf16":
        made = torch.mm(a.bfloat16(), b.bfloat16(), out_dtype=torch.float32)
        if accumulate:
            out.add_(made)
        else:
            out.copy_(made)
    else:
        with cuda_precision("tf32" if precision == "tf32" else "ieee"):
            _multiply(out, a, b, accumulate)


def _multiply(out: Tensor, a: Tensor, b: Tensor, accumulate: bool) -> None:
    if accumulate:
        out.addmm_(a, b)
    else:
        torch.mm(a, b, out=out)


@contextmanager
def cuda_precision(name: str) -> Iterator[None]:
    """Sets torch's global switch for fp32 products, and restores it also after an error."""
    backend = torch.backends.cuda.matmul
    before = backend.fp32_precision
    backend.fp32_precision = name
    try:
        yield
    finally:
        backend.fp32_precision = before
