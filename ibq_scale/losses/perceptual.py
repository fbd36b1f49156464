"""LPIPS by the lpips package, with the backbone's weights from a local file."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from ibq_scale.losses.weights import SOURCES, damaged, weight_file
from ibq_scale.models.initial import Uninitialized
from ibq_scale.models.layout import convolution_layout

Net = Literal["vgg", "alex", "random"]
BACKBONES = {net: SOURCES[net].file for net in ("vgg", "alex")}


class Perceptual(nn.Module):
    """Frozen LPIPS. `net` ``random`` is a VGG with seeded random weights, for tests and dry runs. It is no metric.

    The backbone computes in `dtype`: bf16 in training under bf16, as autocast would, fp32 for reported figures.
    Distances between its features are always fp32. UserError if the backbone's file is absent or damaged.
    """

    def __init__(self, net: Net, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        import lpips

        path = None if net == "random" else weight_file(BACKBONES[net])
        with Uninitialized(), warnings.catch_warnings():
            # lpips 0.1.4 calls torchvision with a renamed argument.
            warnings.simplefilter("ignore", UserWarning)
            # pnet_rand prevents a download of the backbone. Its own five linear layers are in its wheel.
            self.metric = lpips.LPIPS(net="vgg" if net == "random" else net, pnet_rand=True, verbose=False)
        if path is None:
            _draw(self.metric.net)
        else:
            _fill(self.metric.net, path)
        self.requires_grad_(False).eval().to(device)
        # Frozen weights are converted to the GPU's layout once.
        layout = torch.channels_last if device.type == "cuda" else torch.preserve_format
        self.metric.net.to(dtype=dtype, memory_format=layout)
        self.dtype = dtype

    def forward(self, a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
        """Distance (B,) fp32 of images in [-1, 1]."""
        import lpips

        distance = a_BCHW.new_zeros(len(a_BCHW), dtype=torch.float32)
        for layer, a, b in zip(self.metric.lins, self._features(a_BCHW), self._features(b_BCHW), strict=True):
            apart = lpips.normalize_tensor(a.float()) - lpips.normalize_tensor(b.float())
            distance = distance + layer(apart.square()).mean(dim=(1, 2, 3))
        return distance

    def _features(self, x_BCHW: Tensor) -> tuple[Tensor, ...]:
        """The backbone's activations at five depths."""
        scaled = self.metric.scaling_layer(x_BCHW.float())
        features: tuple[Tensor, ...] = self.metric.net(convolution_layout(scaled, self.dtype))
        return features


def _draw(slices: nn.Module) -> None:
    """Initializes VGG's convolutions as torchvision does (arXiv 1502.01852), from a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    for layer in slices.modules():
        if isinstance(layer, nn.Conv2d):
            assert layer.bias is not None
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu", generator=generator)
            nn.init.zeros_(layer.bias)


def _fill(slices: nn.Module, path: Path) -> None:
    """torchvision's ``features.N.*`` into lpips' ``sliceM.N.*`` (the same numbers N)."""
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        wanted = [name for name in slices.state_dict() if name.startswith("slice")]
        slices.load_state_dict({name: weights["features." + name.split(".", 1)[1]] for name in wanted}, strict=True)
    except Exception:  # foreign bytes give errors of any type
        raise damaged(path) from None
