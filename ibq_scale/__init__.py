"""IBQ image tokenizers with huge codebooks, and autoregressive models on their codes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "load_ar", "load_tokenizer"]

if TYPE_CHECKING:
    from ibq_scale.pretrained.loading import load_ar, load_tokenizer


def __getattr__(name: str) -> Any:
    """Imports torch on first use of a model."""
    if name in ("load_ar", "load_tokenizer"):
        from ibq_scale.pretrained import loading

        return getattr(loading, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
