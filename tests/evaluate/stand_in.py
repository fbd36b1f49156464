"""An extractor that is quick: what sums and shares it meets does not depend on what it sees in an image."""

from __future__ import annotations

import torch
from torch import Tensor

from ibq_scale.evaluate.fid import Seen


class QuickInception:
    """48 features, 20 logits and 30 spatial features of an image, by a fixed projection of 4 × 4 means."""

    width = 48
    spatial_width = 30
    sha256 = "e" * 64

    def __init__(self, device: torch.device) -> None:
        g = torch.Generator().manual_seed(5)
        self.projection = torch.randn(48, 98, generator=g)

    def __call__(self, inputs: Tensor) -> Seen:
        means = torch.nn.functional.adaptive_avg_pool2d(2 + 2 * inputs, 4).flatten(1)
        return Seen(*(means @ self.projection).relu().split([48, 20, 30], dim=1))
