"""Fréchet distance between Inception features, gathered in float64 sums that ranks simply add."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ibq_scale.weights import damaged, weight_file

INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
FEATURES = 2048


class Inception:
    """torch-fidelity's port of the Inception v3 that FID is defined with.

    UserError where its weights are absent, damaged or would run code.
    """

    def __init__(self, device: torch.device) -> None:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        path = weight_file(INCEPTION)
        try:
            # torch-fidelity unpickles without care, so only what can be read with care gets there.
            torch.load(path, map_location="cpu", weights_only=True)
            network: Any = FeatureExtractorInceptionV3(
                "inception-v3-compat", [str(FEATURES)], feature_extractor_weights_path=str(path)
            )
        except Exception:  # foreign bytes give errors of any type
            raise damaged(path) from None
        self._network = network.to(device)

    @torch.inference_mode()
    def __call__(self, images_u8: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) → features float32 (B, 2048)."""
        features: Tensor = self._network(images_u8)[0]
        return features


class FeatureStatistics:
    """Count, sum and sum of outer products of feature vectors, float64."""

    def __init__(self, width: int = FEATURES, device: torch.device | str = "cpu") -> None:
        self.sums = torch.zeros(1 + width + width * width, dtype=torch.float64, device=device)
        self.width = width

    def update(self, features_BF: Tensor, weights_B: Tensor) -> None:
        """Adds features, each `weights` (0 or 1) times."""
        weights_B = weights_B.to(features_BF.device).double()
        x_BF = features_BF.double() * weights_B[:, None]
        self.sums += torch.cat([weights_B.sum().view(1), x_BF.sum(0), (x_BF.T @ x_BF).flatten()])

    def reduce(self) -> None:
        """Adds all ranks' sums, in place. Call it once, before reading."""
        dist.all_reduce(self.sums)

    def mean_and_covariance(self) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float64]]]:
        """``mu`` (F,) and the unbiased ``sigma`` (F, F), as torch-fidelity names them."""
        sums = self.sums.cpu().numpy()
        count, total = sums[0], sums[1 : 1 + self.width]
        mu = total / count
        outer = sums[1 + self.width :].reshape(self.width, self.width)
        return {"mu": mu, "sigma": (outer - count * np.outer(mu, mu)) / (count - 1)}


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """FID of two feature sets, by torch-fidelity's formula."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    result = fid_statistics_to_metric(a.mean_and_covariance(), b.mean_and_covariance(), verbose=False)
    return float(result[KEY_METRIC_FID])
