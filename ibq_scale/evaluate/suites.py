"""Statistics of one set of images for several conventions at once, and the rows of results from two such sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ibq_scale.evaluate.conventions import Convention, ConventionResult
from ibq_scale.evaluate.fid import FeatureStatistics, Inception, Moments, Seen, moments_distance

# Key of the spatial statistics in a reference file, as in ADM's.
SPATIAL = "_s"
FIGURES = ("fid", "sfid", "inception_score", "inception_score_std", "precision", "recall")


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
        found = None
        for key, prepare in self.prepare.items():
            seen = self.inception(prepare(images))
            self.statistics[key].update(seen.features_BF, weights_B)
            if key == "":
                found = seen
        if found is not None and SPATIAL in self.statistics:
            self.statistics[SPATIAL].update(found.spatial_BS, weights_B)
        return found

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
    origin: Mapping[str, Any],
    scores: Mapping[str, float] = MappingProxyType({}),
    faults: Mapping[str, str] = MappingProxyType({}),
) -> ConventionResult:
    """One convention's figures: distances of the moments, and `scores` by name.

    `pixels`: the pictures' quantisation in words. `origin`: the other fields. `faults`: reasons for missing scores.
    """
    figures: dict[str, Any] = dict.fromkeys(FIGURES) | dict(scores)
    found = dict(faults)
    for name, key in (("fid", convention.key), *((("sfid", SPATIAL),) if convention.spatial else ())):
        if key in real:
            figures[name] = moments_distance(fake[key], real[key])
        else:
            found[name] = (
                "the reference holds no such statistics: give images, or a file of 'evaluate reference "
                f"--conventions {convention.name}'"
            )
    return ConventionResult(
        convention=convention.name,
        resize=convention.resize,
        quantisation=f"{pixels} pictures, {convention.quantisation}",
        extractor=convention.extractor,
        **origin,
        **figures,
        not_measured=found,
    )
