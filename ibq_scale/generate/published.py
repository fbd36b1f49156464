"""Guidance and temperature in the evaluation of the published sizes (arXiv 2412.02692), 50 images a class."""

from __future__ import annotations

from ibq_scale.config.models import TransformerConfig
from ibq_scale.errors import UserError

# By preset: depth, width, guidance, temperature.
PUBLISHED = {
    "b": (16, 1024, 2.25, 1.10),
    "l": (20, 1280, 2.0, 1.0),
    "xl": (24, 1536, 2.35, 1.15),
    "xxl": (30, 1920, 2.85, 1.20),
}


def published_sampling(config: TransformerConfig) -> tuple[float, float]:
    """Guidance and temperature for a model of this size. UserError if none were published."""
    for depth, width, guidance, temperature in PUBLISHED.values():
        if (config.conditioning, config.depth, config.width) == ("adaln", depth, width):
            return guidance, temperature
    raise UserError(
        f"--published: nothing is published for {config.depth} layers of width {config.width} ({config.conditioning}): "
        "give --guidance and --temperature"
    )
