"""Selective activation checkpointing: keeps the outputs of products and attention, and recomputes the rest."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    _CachedTorchDispatchMode,
    create_selective_checkpoint_contexts,
)

PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten._scaled_mm.default}
# torch's kernels by name, since not every build has all. The flash-attn packages by their namespaces.
ATTENTION = {
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
}
PACKAGES = {"flash_attn", "flash_attn_3"}


def keeping_products() -> Any:
    """The `context_fn` for torch's checkpoint."""
    contexts: Any = create_selective_checkpoint_contexts
    first, again = contexts(_policy)
    again.__class__ = _Again
    return first, again


class _Again(_CachedTorchDispatchMode):
    """Torch's mode of the second pass, for kept operators only. All others are computed again.

    Torch 2.14 wants the same operators in both passes. Under ZeRO-3 a block also gathers weights, and the second pass
    gathers others: those released since the first, and those of the block before instead of the block after.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not _is_kept(func):
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)  # type: ignore[no-untyped-call]


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if _is_kept(operator) else CheckpointPolicy.PREFER_RECOMPUTE


def _is_kept(operator: Any) -> bool:
    named = str(operator.name()).split(".")[0]
    return operator in PRODUCTS or named in ATTENTION or operator.namespace in PACKAGES
