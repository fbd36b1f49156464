"""Selective activation checkpointing: keeps the outputs of products and attention, and recomputes the rest."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

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
    return contexts(_policy)


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = operator in PRODUCTS or str(operator.name()).split(".")[0] in ATTENTION or operator.namespace in PACKAGES
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
