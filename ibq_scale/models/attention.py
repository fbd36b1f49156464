"""Attention behind one function: a flash-attn package if installed and supported, else torch's kernels."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ibq_scale.config.models import AttentionKind
from ibq_scale.errors import UserError


class Package(NamedTuple):
    """A flash-attn package: the module of `flash_attn_func`, and its supported GPUs and head sizes."""

    module: str
    name: str
    capabilities: tuple[int, ...]
    """Major compute capabilities of the supported GPUs."""
    largest_head: int


# In the order of preference on GPUs with several packages.
PACKAGES: dict[AttentionKind, Package] = {
    "flash3": Package("flash_attn_interface", "flash-attn 3", (9,), 256),
    "flash4": Package("flash_attn.cute", "flash-attn-4", (9, 10), 128),
    "flash2": Package("flash_attn.flash_attn_interface", "flash-attn", (8, 9, 10, 12), 256),
}
BACKENDS: dict[AttentionKind, SDPBackend] = {
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa_math": SDPBackend.MATH,
}
# The kernels of ``sdpa`` on a GPU, in order of preference.
ORDER = list(BACKENDS.values())
CPU_KINDS = ("sdpa", "sdpa_flash", "sdpa_math")
HALVES = (torch.bfloat16, torch.float16)
# `flash_attn_func` by module, None after a failed import. torch.compile traces no import, hence this table.
_LOADED: dict[str, Callable[..., Any] | None] = {}


def choose(
    kind: AttentionKind, device: torch.device, dtype: torch.dtype, head_dim: int, *, masked: bool = False
) -> AttentionKind:
    """`kind`, or the choice of ``auto`` for such queries. UserError if the requested kind is not available.

    `masked`: for masked keys. Flash kernels have no masks, so ``sdpa`` replaces them.
    """
    if kind == "auto":
        kind = next((k for k in PACKAGES if _hindrance(k, device, dtype, head_dim) is None), "sdpa")
    elif (hindrance := _hindrance(kind, device, dtype, head_dim)) is not None:
        raise UserError(f"model.attention={kind} {hindrance}: take auto, or sdpa")
    return "sdpa" if masked and (kind in PACKAGES or kind in ("sdpa_flash", "sdpa_cudnn")) else kind


def describe(kind: AttentionKind, device: torch.device) -> str:
    if kind in PACKAGES:
        return f"{kind} ({PACKAGES[kind].name})"
    if kind == "sdpa" and device.type == "cuda":
        return "sdpa (torch: the first that can of cuDNN, flash, efficient, math)"
    return f"{kind} (torch)"


def attention(
    q_BTHd: Tensor,
    k_BSGd: Tensor,
    v_BSGd: Tensor,
    *,
    causal: bool,
    kind: AttentionKind,
    visible_BTS: Tensor | None = None,
) -> Tensor:
    """softmax(q kᵀ/√d) v, (B, T, H, d). Query head h reads head ⌊h·G/H⌋ of keys and values.

    `kind` comes from `choose`. `visible_BTS`: bool (1 or B, 1 or T, S), True for visible keys. `causal` needs T = S:
    kernels differ in the alignment of a mask with more keys than queries, and one query against a cache needs none.
    ``sdpa_math`` is torch's plain reference.
    """
    assert not causal or q_BTHd.shape[1] == k_BSGd.shape[1]
    if kind in PACKAGES:
        function = _LOADED[PACKAGES[kind].module]
        assert function is not None
        # Torch's own kernels read the switch themselves.
        fixed = {"deterministic": True} if torch.are_deterministic_algorithms_enabled() else {}
        out = function(q_BTHd, k_BSGd, v_BSGd, causal=causal, **fixed)
        # Some releases of 3 and 4 also return the softmaxes' normalizers.
        mixed: Tensor = out[0] if isinstance(out, tuple) else out
        return mixed
    q, k, v = (t.transpose(1, 2) for t in (q_BTHd, k_BSGd, v_BSGd))
    mask = None if visible_BTS is None else visible_BTS[:, None].expand(len(q), 1, q.shape[2], -1)
    if kind == "sdpa" and not q.is_cuda:
        return _sdpa(q, k, v, causal, mask).transpose(1, 2)
    # cuDNN plans a new graph for each length, and the length of a cache changes with every step.
    backends = ORDER[q.shape[2] == 1 :] if kind == "sdpa" else [BACKENDS[kind]]
    if k.shape[1] != q.shape[1] and kind in ("sdpa", "sdpa_cudnn", "sdpa_efficient"):
        # Not all of these support grouped heads.
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    with sdpa_kernel(backends, set_priority=True):
        return _sdpa(q, k, v, causal, mask).transpose(1, 2)


def _sdpa(q_BHTd: Tensor, k_BGSd: Tensor, v_BGSd: Tensor, causal: bool, mask: Tensor | None) -> Tensor:
    grouped = k_BGSd.shape[1] != q_BHTd.shape[1]
    return F.scaled_dot_product_attention(q_BHTd, k_BGSd, v_BGSd, attn_mask=mask, is_causal=causal, enable_gqa=grouped)


def _hindrance(kind: AttentionKind, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """The reason against this kind as the end of a sentence, None if it is available."""
    if kind not in PACKAGES:
        needs_cuda = device.type != "cuda" and kind not in CPU_KINDS
        return f"needs a CUDA device, this is {device.type}" if needs_cuda else None
    package = PACKAGES[kind]
    if device.type != "cuda":
        return f"needs a CUDA device, this is {device.type}"
    if dtype not in HALVES:
        return f"computes in bf16 only (train.precision), this is {str(dtype).removeprefix('torch.')}"
    if head_dim % 8 or head_dim > package.largest_head:
        return f"takes heads of multiples of 8 up to {package.largest_head}, these have {head_dim}"
    if kind == "flash4" and torch.are_deterministic_algorithms_enabled():
        return "has no order of sums to keep to (train.deterministic)"
    if torch.cuda.get_device_capability(device)[0] not in package.capabilities:
        return f"does not support {torch.cuda.get_device_name(device)}"
    return None if _importable(package.module) else f"needs the package {package.name}, which cannot be imported"


def _importable(module: str) -> bool:
    """Imports the package's `flash_attn_func`, once. False if that fails, also for a missing dependency."""
    if module not in _LOADED:
        try:
            _LOADED[module] = importlib.import_module(module).flash_attn_func
        except (ImportError, AttributeError, OSError):
            _LOADED[module] = None
    return _LOADED[module] is not None
