"""Figures that others published, for a report's tables. Only what their paper states; where it states nothing: None."""

from __future__ import annotations

from typing import NamedTuple

from ibq_scale.generate.published import PUBLISHED

SOURCE = "arXiv 2412.02692: ImageNet, 256 × 256 pixels, 16 × 16 codes"


class PublishedTokenizer(NamedTuple):
    """`usage`: share of the codes, 0 to 1."""

    name: str
    codes: int
    rfid: float
    lpips: float | None
    usage: float


class PublishedTransformer(NamedTuple):
    name: str
    guidance: float
    temperature: float
    fid: float
    inception_score: float


TOKENIZERS = (
    PublishedTokenizer("IBQ", 1024, 2.24, 0.2580, 0.99),
    PublishedTokenizer("IBQ", 8192, 1.87, 0.2437, 0.98),
    PublishedTokenizer("IBQ", 16384, 1.37, 0.2235, 0.96),
    PublishedTokenizer("IBQ", 262144, 1.00, 0.2030, 0.84),
    PublishedTokenizer("VQGAN", 1024, 7.94, None, 0.44),
    PublishedTokenizer("VQGAN", 16384, 4.98, None, 0.059),
)
FIGURES = {"b": (2.88, 254.7), "l": (2.45, 267.5), "xl": (2.14, 279.0), "xxl": (2.05, 286.7)}
TRANSFORMERS = tuple(
    PublishedTransformer(f"IBQ-{size.upper()}", *PUBLISHED[size][2:], *figures) for size, figures in FIGURES.items()
)
