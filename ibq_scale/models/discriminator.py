"""The kinds of discriminators: PatchGAN (names of the published checkpoints, ``main.N``), and heads on a frozen DINO.

The latter is StyleGAN-T's (arXiv 2301.09515) in the form of RAE (arXiv 2510.11690). Images are augmented and resized,
and a frozen ViT gives the tokens of five depths. A light head for each depth gives a logit for each patch. Only the
heads are trained.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ibq_scale.config.models import DiscriminatorConfig
from ibq_scale.models.augment import augment
from ibq_scale.models.layout import convolution_layout
from ibq_scale.models.norm import BatchNorm, GroupNorm
from ibq_scale.models.vit import EPS, ViT

KERNEL = 9
# Power iterations at the start, as in torch's own spectral norm.
FIRST_ITERATIONS = 15


class SpectralConv(nn.Conv1d):
    """A convolution with its weight divided by its largest singular value σ (arXiv 1802.05957).

    σ = uᵀ W v. A power iteration moves u and v once per optimizer step (`iterate_spectral_norms`), and not in every
    forward pass as usual. The objective then does not depend on the number of ranks and micro-batches.
    """

    u: Tensor
    v: Tensor

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__(inputs, outputs, kernel, padding=kernel // 2, padding_mode="circular")
        self.register_buffer("u", F.normalize(torch.randn(outputs), dim=0))
        self.register_buffer("v", F.normalize(torch.randn(inputs * kernel), dim=0))
        # The meta device, on which steps are planned, has no values to improve.
        for _ in range(0 if self.weight.is_meta else FIRST_ITERATIONS):
            self.iterate()

    @torch.no_grad()
    def iterate(self) -> None:
        """One power iteration with the present weight."""
        matrix = self.weight.to(self.u.dtype).flatten(1)
        self.v.copy_(F.normalize(matrix.T.mv(self.u), dim=0))
        self.u.copy_(F.normalize(matrix.mv(self.v), dim=0))

    def forward(self, x_BCT: Tensor) -> Tensor:
        wide = self.weight.to(self.u.dtype)
        sigma = self.u.dot(wide.flatten(1).mv(self.v))
        out: Tensor = self._conv_forward(x_BCT, (wide / sigma).to(x_BCT.dtype), self.bias)
        return out


class Head(nn.Module):
    """Tokens of one depth (B, W, T) → logits (B, 1, T).

    The norm is over the tokens of each image and channel, RAE's choice. StyleGAN-T's, over 8 images, would make an
    image's logits depend on its micro-batch.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = (
            nn.Sequential(SpectralConv(width, width, kernel), GroupNorm(width, width, eps=EPS), nn.LeakyReLU(0.2))
            for kernel in (1, KERNEL)
        )
        self.last = SpectralConv(width, 1, 1)

    def forward(self, x_BWT: Tensor) -> Tensor:
        h_BWT = self.first(x_BWT)
        logits: Tensor = self.last((self.second(h_BWT) + h_BWT) / math.sqrt(2.0))
        return logits


class DinoDiscriminator(nn.Module):
    """`backbone` is frozen and no submodule: engines neither train, shard, cast nor save it. It is shared, not copied.

    Images are augmented in training mode only.
    """

    def __init__(self, config: DiscriminatorConfig, backbone: ViT) -> None:
        super().__init__()
        self.config = config
        self._backbone = (backbone,)
        depth = backbone.sizes.depth
        # Of 12 blocks the published 2, 5, 8 and 11, counted from 0.
        self.taps = tuple((i + 1) * depth // 4 - 1 for i in range(4))
        self.heads = nn.ModuleList(Head(backbone.sizes.width) for _ in range(1 + len(self.taps)))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Images in [-1, 1] → logits (B, 5, T) of T patches at five depths, in the heads' dtype."""
        if self.training:
            x_BCHW = augment(x_BCHW, self.config.augment)
        side = self.config.input_side
        if x_BCHW.shape[-2:] != (side, side):
            x_BCHW = F.interpolate(x_BCHW, size=(side, side), mode="bilinear", align_corners=False)
        (backbone,) = self._backbone
        dtype = next(self.parameters()).dtype
        # The class token is added to every patch, as in StyleGAN-T.
        features = [(t_BTW[:, 1:] + t_BTW[:, :1]).transpose(1, 2).to(dtype) for t_BTW in backbone(x_BCHW, self.taps)]
        return torch.cat([head(f_BWT) for head, f_BWT in zip(self.heads, features, strict=True)], dim=1)


def iterate_spectral_norms(module: nn.Module) -> None:
    """One power iteration of every `SpectralConv`, after an optimizer step. The same on every rank."""
    for part in module.modules():
        if isinstance(part, SpectralConv):
            part.iterate()


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
