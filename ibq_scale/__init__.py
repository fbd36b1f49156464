"""IBQ image tokenizers with huge codebooks, and autoregressive models on their codes."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ibq_scale.pretrained.loading import load_ar, load_tokenizer
    from ibq_scale.pretrained.models import ARModel, Tokenizer
    from ibq_scale.quantize.modules import FSQ, IBQ, LFQ, VQ, SimVQ
    from ibq_scale.quantize.recipes import (
        clip_grad_norm_,
        keep_shards_from_ddp,
        own_parameters,
        param_groups,
        whole_state_dict,
    )
    from ibq_scale.quantize.residual import ProductQuantizer, ResidualQuantizer

# The names of each module: torch is imported on first use of one.
_PLACES = {
    "ibq_scale.pretrained.loading": ("load_ar", "load_tokenizer"),
    "ibq_scale.pretrained.models": ("ARModel", "Tokenizer"),
    "ibq_scale.quantize.modules": ("FSQ", "IBQ", "LFQ", "VQ", "SimVQ"),
    "ibq_scale.quantize.residual": ("ProductQuantizer", "ResidualQuantizer"),
    "ibq_scale.quantize.recipes": (
        "clip_grad_norm_",
        "keep_shards_from_ddp",
        "own_parameters",
        "param_groups",
        "whole_state_dict",
    ),
}
__all__ = [
    "FSQ",
    "IBQ",
    "LFQ",
    "VQ",
    "ARModel",
    "ProductQuantizer",
    "ResidualQuantizer",
    "SimVQ",
    "Tokenizer",
    "__version__",
    "clip_grad_norm_",
    "keep_shards_from_ddp",
    "load_ar",
    "load_tokenizer",
    "own_parameters",
    "param_groups",
    "whole_state_dict",
]


def __getattr__(name: str) -> Any:
    for place, names in _PLACES.items():
        if name in names:
            return getattr(import_module(place), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
