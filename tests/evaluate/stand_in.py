"""An extractor that is quick: what sums and shares it meets does not depend on what it sees in an image."""

from __future__ import annotations

import torch
from torch import Tensor


class QuickInception:
    """48 features and 20 logits of an image, by a fixed projection of 4 × 4 means."""

    width = 48
    sha256 = "e" * 64

    def __init__(self, device: torch.device) -> None:
        g = torch.Generator().manual_seed(5)
        self.projection = torch.randn(48, 68, generator=g)

    def __call__(self, images: Tensor) -> Tensor:
        return self.features_and_logits(images)[0]

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        means = torch.nn.functional.adaptive_avg_pool2d(images.float() / 64, 4).flatten(1)
        both = (means @ self.projection).relu()
        return both[:, :48], both[:, 48:]
