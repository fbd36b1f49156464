"""A plain ViT with the tensor names of DINO's (arXiv 2104.14294) and DINOv2's (arXiv 2304.07193) published weights.

It is used frozen: as the discriminator's backbone and as the target of the feature loss.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6
# ImageNet's, as the published weights were trained with. Images here are in [-1, 1].
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Published: added to the grid's sides against rounding errors in the number of interpolated positions.
OFFSET = 0.1


class ViTSizes(NamedTuple):
    """`side`: pixels of the images of the position embedding. `layer_scale`: a factor on each residual (DINOv2)."""

    patch: int
    width: int
    depth: int
    heads: int
    side: int
    layer_scale: bool = False


class Attention(nn.Module):
    def __init__(self, sizes: ViTSizes) -> None:
        super().__init__()
        self.heads = sizes.heads
        self.qkv = nn.Linear(sizes.width, 3 * sizes.width)
        self.proj = nn.Linear(sizes.width, sizes.width)

    def forward(self, x_BTW: Tensor) -> Tensor:
        b, t, w = x_BTW.shape
        q, k, v = self.qkv(x_BTW).view(b, t, 3, self.heads, w // self.heads).permute(2, 0, 3, 1, 4)
        mixed: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, w))
        return mixed


class MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class LayerScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, sizes: ViTSizes) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(sizes.width, eps=EPS)
        self.attn = Attention(sizes)
        self.norm2 = nn.LayerNorm(sizes.width, eps=EPS)
        self.mlp = MLP(sizes.width)
        self.ls1, self.ls2 = (LayerScale(sizes.width) if sizes.layer_scale else nn.Identity() for _ in range(2))

    def forward(self, x_BTW: Tensor) -> Tensor:
        x_BTW = x_BTW + self.ls1(self.attn(self.norm1(x_BTW)))
        out: Tensor = x_BTW + self.ls2(self.mlp(self.norm2(x_BTW)))
        return out


class PatchEmbed(nn.Module):
    def __init__(self, sizes: ViTSizes) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, sizes.width, sizes.patch, stride=sizes.patch)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        out: Tensor = self.proj(x_BCHW)
        return out


class ViT(nn.Module):
    """Images in [-1, 1] whose sides are multiples of the patch, of any other size than `sizes.side` too."""

    scale: Tensor
    shift: Tensor

    def __init__(self, sizes: ViTSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.grid = sizes.side // sizes.patch
        self.cls_token = nn.Parameter(torch.zeros(1, 1, sizes.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid**2, sizes.width))
        self.patch_embed = PatchEmbed(sizes)
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes.depth))
        self.norm = nn.LayerNorm(sizes.width, eps=EPS)
        mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
        self.register_buffer("scale", 0.5 / std, persistent=False)
        self.register_buffer("shift", (0.5 - mean) / std, persistent=False)

    def freeze(self, device: torch.device, dtype: torch.dtype) -> ViT:
        """Moves the network and computes its layers in `dtype`. The position embedding stays fp32."""
        self.requires_grad_(False).eval().to(device)
        for part in self.children():
            part.to(dtype)
        return self

    def forward(self, x_BCHW: Tensor, taps: tuple[int, ...]) -> list[Tensor]:
        """The tokens (B, 1 + h·w, W), class token first: before the first block, and after each block in `taps`.

        Blocks after the last tap do not run. The dtype is that of the layers.
        """
        patches_BWhw = self.patch_embed((x_BCHW * self.scale + self.shift).to(self.norm.weight.dtype))
        positions_1TW = self._positions(*patches_BWhw.shape[-2:])
        tokens_BTW = torch.cat(
            [self.cls_token.expand(len(x_BCHW), -1, -1), patches_BWhw.flatten(2).transpose(1, 2)], dim=1
        )
        x = (tokens_BTW + positions_1TW).to(patches_BWhw.dtype)
        found = [x]
        for number, block in enumerate(self.blocks[: max(taps) + 1]):
            x = block(x)
            if number in taps:
                found.append(x)
        return found

    def patch_features(self, x_BCHW: Tensor) -> Tensor:
        """The last block's normed patch tokens (B, h·w, W), DINOv2's ``x_norm_patchtokens``."""
        features: Tensor = self.norm(self(x_BCHW, (len(self.blocks) - 1,))[-1])[:, 1:]
        return features

    def _positions(self, h: int, w: int) -> Tensor:
        """The position embedding for h × w patches, by bicubic interpolation as published."""
        if h == w == self.grid:
            return self.pos_embed
        grid_1Wgg = self.pos_embed[:, 1:].view(1, self.grid, self.grid, -1).permute(0, 3, 1, 2)
        factors = ((h + OFFSET) / self.grid, (w + OFFSET) / self.grid)
        grid_1Whw = F.interpolate(grid_1Wgg, scale_factor=factors, mode="bicubic")
        assert grid_1Whw.shape[-2:] == (h, w)
        return torch.cat([self.pos_embed[:, :1], grid_1Whw.flatten(2).transpose(1, 2)], dim=1)
