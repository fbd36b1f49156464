"""Hinge loss for the discriminator, non-saturating loss for the generator, LeCAM regularisation."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor


def discriminator_hinge(real: Tensor, fake: Tensor) -> Tensor:
    """½ (mean relu(1 − real) + mean relu(1 + fake)) of logits of any shape."""
    return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())


def generator_non_saturating(fake: Tensor) -> Tensor:
    """mean softplus(−x̄) with x̄ an image's mean logit; `fake` is (B, …)."""
    return F.softplus(-fake.flatten(1).mean(dim=1)).mean()


class LeCAM:
    """Keeps the discriminator's logits near the moving averages of the other side (arXiv 2104.03310).

    The averages are part of a run's state: updated once an optimizer step with means over the global batch, saved
    in the checkpoint, never touched by evaluation.
    """

    def __init__(self, decay: float, device: torch.device | str = "cpu") -> None:
        self.decay = decay
        self.real = torch.zeros((), device=device)
        self.fake = torch.zeros((), device=device)

    def update(self, real_mean: Tensor, fake_mean: Tensor) -> None:
        """Moves the averages towards the step's mean logits."""
        self.real.lerp_(real_mean.detach(), 1.0 - self.decay)
        self.fake.lerp_(fake_mean.detach(), 1.0 - self.decay)

    def penalty(self, real: Tensor, fake: Tensor) -> Tensor:
        """mean relu(real − EMA fake)² + mean relu(EMA real − fake)²."""
        return F.relu(real - self.fake).square().mean() + F.relu(self.real - fake).square().mean()

    def state_dict(self) -> dict[str, Tensor]:
        return {"real": self.real, "fake": self.fake}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.real.copy_(state["real"])
        self.fake.copy_(state["fake"])
