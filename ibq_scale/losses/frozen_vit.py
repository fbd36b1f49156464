"""Frozen ViTs with published, random or tiny random weights, and the feature loss's target."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ibq_scale.config.models import AutoencoderConfig, DiscriminatorConfig
from ibq_scale.config.run import TokenizerLossConfig
from ibq_scale.losses.weights import damaged, verified
from ibq_scale.models.initial import Normal, Uninitialized, drawn, fill
from ibq_scale.models.vit import ViT, ViTSizes

Family = Literal["dino", "dinov2"]
Weights = Literal["published", "random", "tiny"]
PUBLISHED: dict[Family, ViTSizes] = {
    "dino": ViTSizes(patch=16, width=384, depth=12, heads=6, side=224),
    "dinov2": ViTSizes(patch=14, width=384, depth=12, heads=6, side=518, layer_scale=True),
}
# DINOv2's files hold the token of masked patches, for its own training.
UNUSED = {"mask_token"}


def sizes_of(family: Family, weights: Weights) -> ViTSizes:
    """Sizes of a backbone. ``tiny``: 4 blocks of width 32 on two patches a side."""
    sizes = PUBLISHED[family]
    return sizes._replace(width=32, depth=4, heads=2, side=2 * sizes.patch) if weights == "tiny" else sizes


def frozen_vit(family: Family, weights: Weights, device: torch.device, dtype: torch.dtype) -> ViT:
    """A frozen ViT on `device` with its layers in `dtype`. UserError if the published file is absent or damaged.

    On the meta device it needs no file.
    """
    sizes = sizes_of(family, weights)
    if device.type != "meta" and weights == "published":
        state = read(verified(family), sizes)
    with Uninitialized():
        vit = ViT(sizes)
    if device.type != "meta":
        vit.load_state_dict(state) if weights == "published" else _draw(vit)
    return vit.freeze(device, dtype)


def backbone_of(config: DiscriminatorConfig, device: torch.device, dtype: torch.dtype) -> ViT | None:
    """The discriminator's backbone, None for ``kind=patch``. UserError as for `frozen_vit`."""
    return frozen_vit("dino", config.backbone, device, dtype) if config.kind == "dino" else None


def read(path: Path, sizes: ViTSizes) -> dict[str, Tensor]:
    """The tensors of a published file. UserError if names or shapes differ from the network's."""
    with torch.device("meta"):
        wanted = {name: tensor.shape for name, tensor in ViT(sizes).state_dict().items()}
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = {name: tensor for name, tensor in state.items() if name not in UNUSED}
        same = {name: tensor.shape for name, tensor in state.items()} == wanted
    except Exception:  # foreign bytes give errors of any type
        raise damaged(path) from None
    if not same:
        raise damaged(path)
    return state


def _draw(vit: ViT) -> None:
    """Matrices N(0, 1/inputs), tokens and positions N(0, 0.02²), all from a fixed seed. Norms are 1, biases 0."""
    for name, parameter in vit.named_parameters():
        if name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "gamma")):
            nn.init.ones_(parameter)
        elif parameter.ndim == 1:
            nn.init.zeros_(parameter)
        else:
            inputs = parameter[0].numel() if name.endswith(".weight") else 2500
            recipe = {name: Normal(parameter.numel(), 1.0 / math.sqrt(inputs))}
            fill(parameter.detach().view(-1), drawn(recipe, 0), name)


class FrozenFeatures:
    """Normed patch features of a frozen DINOv2, one for each token of the tokenizer."""

    def __init__(self, weights: Weights, downsampling: int, device: torch.device, dtype: torch.dtype) -> None:
        self.vit = frozen_vit("dinov2", weights, device, dtype)
        self.downsampling = downsampling
        self.width = self.vit.sizes.width

    @staticmethod
    def of(
        losses: TokenizerLossConfig, model: AutoencoderConfig, device: torch.device, dtype: torch.dtype
    ) -> FrozenFeatures | None:
        """Of a run, None for ``loss.features=none``. UserError as for `frozen_vit`."""
        choice = losses.features
        if choice == "none":
            return None
        return FrozenFeatures("published" if choice == "dinov2" else choice, model.downsampling, device, dtype)

    @torch.no_grad()
    def __call__(self, images_BCHW: Tensor) -> Tensor:
        """Images in [-1, 1] → (B, W, h, w) for h × w tokens. Images are resized to one patch a token."""
        h, w = (side // self.downsampling for side in images_BCHW.shape[-2:])
        patch = self.vit.sizes.patch
        resized = F.interpolate(images_BCHW, size=(h * patch, w * patch), mode="bilinear", align_corners=False)
        features_BTW = self.vit.patch_features(resized)
        return features_BTW.transpose(1, 2).reshape(len(features_BTW), -1, h, w)
