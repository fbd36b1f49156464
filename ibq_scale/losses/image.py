"""The losses on images, used by training and by the rehearsal of memory in `scaling`.

A new term is a weight in `TokenizerLossConfig` and a line in `ImageLoss.terms`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ibq_scale.config.run import TokenizerLossConfig
from ibq_scale.losses.adversarial import generator_non_saturating
from ibq_scale.losses.perceptual import Perceptual


class ImageGradient(NamedTuple):
    """`terms`: unweighted means, fp32 scalars. `loss`: their weighted sum. `gradient`: ∂loss/∂reconstruction
    (B, 3, H, W), fp32. All are detached.
    """

    terms: dict[str, Tensor]
    loss: Tensor
    gradient: Tensor


class ImageLoss:
    """Weighted loss terms of a reconstruction, with the discriminator's."""

    def __init__(self, config: TokenizerLossConfig, perceptual: Perceptual | None) -> None:
        self.config = config
        self.perceptual = perceptual

    def terms(self, images: Tensor, fake: Tensor) -> dict[str, tuple[float, Tensor]]:
        """By name, the weight and the mean of each term but the adversarial one."""
        config = self.config
        found = {"l1": (config.l1_weight, (fake - images).abs().mean())}
        if config.l2_weight > 0:
            found["l2"] = (config.l2_weight, (fake - images).square().mean())
        if self.perceptual is not None:
            # With random weights it is a loss but no metric, hence another name.
            name = "perceptual_random" if config.perceptual == "random" else "perceptual"
            found[name] = (config.perceptual_weight, self.perceptual(images, fake).mean())
        return found

    def __call__(
        self,
        images: Tensor,
        reconstruction: Tensor,
        discriminator: nn.Module | None = None,
        balance: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> ImageGradient:
        """The loss at `reconstruction`, (B, 3, H, W), fp32.

        It is computed outside of the engines, so LPIPS' activations are freed before the discriminator and the decoder
        run. `balance`: a factor on the adversarial weight from both gradients (VQGAN's adaptive weight).
        """
        fake = reconstruction.detach().requires_grad_()
        weighted = self.terms(images, fake)
        terms = {name: term.detach() for name, (_, term) in weighted.items()}
        parts = [weight * term for weight, term in weighted.values()]
        loss = sum(parts[1:], parts[0])
        (gradient,) = torch.autograd.grad(loss, fake)
        loss = loss.detach()
        del weighted, parts
        if discriminator is not None:
            discriminator.requires_grad_(False)
            adversarial = generator_non_saturating(discriminator(fake).float())
            (generator_gradient,) = torch.autograd.grad(adversarial, fake)
            discriminator.requires_grad_(True)
            terms["generator"] = adversarial.detach()
            weight = torch.full((), self.config.adversarial_weight, device=fake.device)
            if balance is not None:
                weight = weight * balance(gradient, generator_gradient)
                terms["adversarial_weight"] = weight
            gradient = gradient.addcmul(generator_gradient, weight)
            loss = loss + weight * terms["generator"]
        return ImageGradient(terms, loss, gradient)
