"""LPIPS by the lpips package, its backbone read from a local file."""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from torch import Tensor, nn

from ibq_scale.weights import weight_file

Net = Literal["vgg", "alex", "random"]
BACKBONES = {"vgg": "vgg16-397923af.pth", "alex": "alexnet-owt-7be5be79.pth"}


class Perceptual(nn.Module):
    """Frozen LPIPS. `net` ``random`` is a VGG with seeded random weights: for tests and dry runs, no metric."""

    def __init__(self, net: Net, device: torch.device) -> None:
        super().__init__()
        import lpips

        path = None if net == "random" else weight_file(BACKBONES[net])
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # lpips 0.1.4 calls torchvision by an argument that it has renamed.
            warnings.simplefilter("ignore", UserWarning)
            torch.manual_seed(0)
            # pnet_rand keeps lpips from downloading the backbone; its own five linear layers come in its wheel.
            self.metric = lpips.LPIPS(net="vgg" if net == "random" else net, pnet_rand=True, verbose=False)
        if path is not None:
            _fill(self.metric.net, torch.load(path, map_location="cpu", weights_only=True))
        self.requires_grad_(False).eval().to(device)

    def forward(self, a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
        """Distance (B,) fp32 of images in [-1, 1]."""
        distance: Tensor = self.metric(a_BCHW.float(), b_BCHW.float())
        return distance.flatten()


def _fill(slices: nn.Module, weights: dict[str, Tensor]) -> None:
    """torchvision's ``features.N.*`` into lpips' ``sliceM.N.*`` (the same numbers N)."""
    wanted = slices.state_dict()
    found = {name: weights["features." + name.split(".", 1)[1]] for name in wanted if name.startswith("slice")}
    slices.load_state_dict(found, strict=True)
