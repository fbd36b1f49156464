"""The kinds of discriminators. PatchGAN's names are those of the published checkpoints (``main.N``)."""

from __future__ import annotations

from torch import Tensor, nn

from ibq_scale.config.models import DiscriminatorConfig
from ibq_scale.models.dino_discriminator import DinoDiscriminator
from ibq_scale.models.layout import convolution_layout
from ibq_scale.models.norm import BatchNorm
from ibq_scale.models.vit import ViT


def make_discriminator(config: DiscriminatorConfig, backbone: ViT | None) -> nn.Module:
    """The discriminator of a config: images (B, 3, H, W) in [-1, 1] → logits (B, …). `backbone`: of ``kind=dino``."""
    if config.kind == "patch":
        return PatchDiscriminator(config)
    assert backbone is not None
    return DinoDiscriminator(config, backbone)


class PatchDiscriminator(nn.Module):
    """One logit per patch: 4×4 convolutions, `layers` of them with stride 2, BatchNorm and LeakyReLU(0.2) between."""

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        width = config.channels
        stack: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i in range(1, config.layers + 1):
            wider = config.channels * min(2**i, 8)
            stride = 2 if i < config.layers else 1
            # BatchNorm adds a shift, so the convolution before it has no bias.
            stack += [nn.Conv2d(width, wider, 4, stride=stride, padding=1, bias=False), BatchNorm(wider)]
            stack += [nn.LeakyReLU(0.2)]
            width = wider
        stack.append(nn.Conv2d(width, 1, 4, stride=1, padding=1))
        self.main = nn.Sequential(*stack)
        self.apply(_initialize)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Images in [-1, 1] → logits (B, 1, h, w) in the parameters' dtype."""
        logits: Tensor = self.main(convolution_layout(x_BCHW, next(self.parameters()).dtype))
        return logits


def _initialize(module: nn.Module) -> None:
    """N(0, 0.02²) for convolutions, N(1, 0.02²) for BatchNorm's scale, as in pix2pix."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
