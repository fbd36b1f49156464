"""Inception features, and the Fréchet distance between two sets of images from sums over ranks."""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from ibq_scale.checkpoint.reading import file_sha256
from ibq_scale.losses.weights import damaged, weight_file

INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
FEATURES = 2048
# Seven channels of 17 × 17.
SPATIAL = 2023
# Sums are integer multiples of COARSE, up to 10^13, and of FINE for the rest of each batch.
COARSE, FINE = 2.0**-20, 2.0**-60

Moments = dict[str, NDArray[np.float64]]
"""``mu`` (F,) and ``sigma`` (F, F), as named by torch-fidelity and the usual reference files."""


class Seen(NamedTuple):
    """The extractor's outputs for a batch, float32."""

    features_BF: Tensor
    """(B, 2048), after the last pooling."""
    logits_BC: Tensor
    """(B, 1008), without the bias."""
    spatial_BS: Tensor
    """(B, 2023), for sFID: seven channels of the third 17 × 17 block's first branch, channels last as in TensorFlow."""


class Inception:
    """torch-fidelity's port of the Inception v3 in the definitions of FID, IS, precision and recall.

    UserError if its weights are absent, damaged or contain code.
    """

    width = FEATURES
    spatial_width = SPATIAL

    def __init__(self, device: torch.device) -> None:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        self.path = weight_file(INCEPTION)
        try:
            # torch-fidelity unpickles any code, so the file is first read with weights_only.
            torch.load(self.path, map_location="cpu", weights_only=True)
            network: Any = FeatureExtractorInceptionV3(
                "inception-v3-compat", [str(FEATURES), "logits_unbiased"], feature_extractor_weights_path=str(self.path)
            )
        except Exception:  # foreign bytes give errors of any type
            raise damaged(self.path) from None
        self._network = network.to(device)

    @cached_property
    def sha256(self) -> str:
        """sha256 of the weight file, hex."""
        return file_sha256(self.path)

    @torch.inference_mode()
    def __call__(self, inputs: Tensor) -> Seen:
        """float32 (B, 3, 299, 299), a result of `Convention.prepare`.

        torch-fidelity resizes 8-bit images itself. Other inputs enter behind its resize, through a hook.
        """
        spatial: list[Tensor] = []
        with (
            self._network.Conv2d_1a_3x3.register_forward_pre_hook(lambda module, given: (inputs,)),
            self._network.Mixed_6d.branch1x1.register_forward_hook(lambda module, given, out: spatial.append(out)),
        ):
            features_BF, logits_BC = self._network(torch.zeros_like(inputs, dtype=torch.uint8))
        return Seen(features_BF, logits_BC, spatial[0][:, :7].permute(0, 2, 3, 1).flatten(1))


class FeatureStatistics:
    """Count, sum and sum of outer products of feature vectors.

    The sums of a batch are float64. Sums over batches and ranks are integers, with the same bits in any order. A
    distance takes roots of possibly singular covariances, and with these sums does not depend on the ranks.
    """

    def __init__(self, width: int = FEATURES, device: torch.device | str = "cpu") -> None:
        self.sums = torch.zeros(2, 1 + width + width * width, dtype=torch.int64, device=device)
        self.squares = torch.zeros((), dtype=torch.float64, device=device)
        self.width = width

    def update(self, features_BF: Tensor, weights_B: Tensor) -> None:
        """Adds features, each `weights` (0 or 1) times."""
        weights_B = weights_B.to(features_BF.device).double()
        x_BF = features_BF.double() * weights_B[:, None]
        sums = torch.cat([weights_B.sum().view(1), x_BF.sum(0), (x_BF.T @ x_BF).flatten()])
        coarse = (sums / COARSE).round_()
        self.sums[0] += coarse.long()
        self.sums[1] += (sums - coarse * COARSE).div_(FINE).round_().long()
        self.squares += x_BF.square().sum()

    def reduce(self) -> None:
        """Adds all ranks' sums, in place. Call it once, before reading."""
        dist.all_reduce(self.sums)
        dist.all_reduce(self.squares)

    def mean_and_covariance(self) -> Moments:
        """``mu`` (F,) and the unbiased ``sigma`` (F, F). OverflowError for features not finite or too large."""
        coarse, fine = self.sums.cpu().numpy()
        sums = coarse * COARSE + fine * FINE
        count, total = sums[0], sums[1 : 1 + self.width]
        mu = total / count
        outer = sums[1 + self.width :].reshape(self.width, self.width)
        squares = float(self.squares)
        if not abs(np.trace(outer) - squares) <= 1e-3 * (1 + squares):
            raise OverflowError(f"features whose squares sum to {squares:.3g} cannot be added")
        return {"mu": mu, "sigma": (outer - count * np.outer(mu, mu)) / (count - 1)}


def moments_distance(a: Moments, b: Moments) -> float:
    """Fréchet distance of two Gaussians, by torch-fidelity's formula."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    return float(fid_statistics_to_metric(a, b, verbose=False)[KEY_METRIC_FID])
