"""Statistics of one set of images for several conventions at once, and the rows of results from two such sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ibq_scale.evaluate.conventions import Convention, ConventionResult
from ibq_scale.evaluate.fid import FeatureStatistics, Inception, Moments, Seen, moments_distance

# Key of the spatial statistics in a reference file, as in ADM's.
SPATIAL = "_s"
# Figures by name, each a number or the reason for its absence.
Scores = dict[str, float | str]


class Sums:
    """Feature statistics by `Convention.key`. The network runs once for each resize."""

    def __init__(self, conventions: Sequence[Convention], inception: Inception, device: torch.device) -> None:
        self.inception = inception
        self.prepare = {c.key: c.prepare for c in conventions}
        widths = dict.fromkeys(self.prepare, inception.width)
        if any(c.spatial for c in conventions):
            widths[SPATIAL] = inception.spatial_width
        self.statistics = {key: FeatureStatistics(width, device) for key, width in widths.items()}

    def update(self, images: Tensor, weights_B: Tensor) -> Seen | None:
        """Adds images, pixels 0 … 255 (B, 3, H, W), each `weights` (0 or 1) times.

        Returns the network's outputs for TensorFlow's resize, None without a convention of it. Its features serve
        precision and recall.
        """
        seen = {key: self.inception(prepare(images)) for key, prepare in self.prepare.items()}
        for key, found in seen.items():
            self.statistics[key].update(found.features_BF, weights_B)
        if SPATIAL in self.statistics:
            self.statistics[SPATIAL].update(seen[""].spatial_BS, weights_B)
        return seen.get("")

    def moments(self) -> dict[str, Moments]:
        """Moments of all ranks' images by key. Collective. Call it once."""
        for statistics in self.statistics.values():
            statistics.reduce()
        return {key: statistics.mean_and_covariance() for key, statistics in self.statistics.items()}


def result_row(
    convention: Convention,
    fake: Mapping[str, Moments],
    real: Mapping[str, Moments],
    pixels: str,
    scores: Scores,
    **origin: Any,
) -> ConventionResult:
    """One convention's figures: distances of the moments, and `scores`.

    `pixels`: the pictures' quantisation in words. `origin`: the other fields.
    """
    keys = {"fid": convention.key} | ({"sfid": SPATIAL} if convention.spatial else {})
    absent = (
        "the reference holds no such statistics: give images, or a file of 'evaluate reference "
        f"--conventions {convention.name}'"
    )
    figures = {
        **scores,
        **{name: moments_distance(fake[key], real[key]) if key in real else absent for name, key in keys.items()},
    }
    numbers: dict[str, Any] = {name: value for name, value in figures.items() if isinstance(value, float)}
    return ConventionResult(
        convention=convention.name,
        resize=convention.resize,
        quantisation=f"{pixels} pictures, {convention.quantisation}",
        extractor=convention.extractor,
        **origin,
        **numbers,
        not_measured={name: value for name, value in figures.items() if isinstance(value, str)},
    )
