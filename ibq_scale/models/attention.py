"""Attention behind one function: flash-attn where installed and possible, else torch's own kernels."""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ibq_scale.errors import UserError

Kind = Literal["auto", "flash", "sdpa", "math"]


@cache
def _flash_attn_installed() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


def choose(kind: Kind, device: torch.device, dtype: torch.dtype) -> Kind:
    """What ``auto`` means here. UserError where ``flash`` is asked for and cannot be had."""
    possible = _flash_attn_installed() and device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    if kind == "flash" and not possible:
        raise UserError("model.attention=flash needs the flash-attn package, a CUDA device and bf16: use auto or sdpa")
    if kind == "auto":
        return "flash" if possible else "sdpa"
    return kind


def attention(q_BHTd: Tensor, k_BHSd: Tensor, v_BHSd: Tensor, *, causal: bool, kind: Kind = "auto") -> Tensor:
    """softmax(q kᵀ/√d) v, (B, H, T, d). `causal` is for T = S; one query against a cache needs no mask.

    ``math`` is torch's plain reference, the yardstick of the tests.
    """
    chosen = choose(kind, q_BHTd.device, q_BHTd.dtype)
    if chosen == "flash":
        from flash_attn import flash_attn_func

        q, k, v = (t.transpose(1, 2) for t in (q_BHTd, k_BHSd, v_BHSd))
        out: Tensor = flash_attn_func(q, k, v, causal=causal)
        return out.transpose(1, 2)
    if chosen == "math":
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q_BHTd, k_BHSd, v_BHSd, is_causal=causal)
    return F.scaled_dot_product_attention(q_BHTd, k_BHSd, v_BHSd, is_causal=causal)
