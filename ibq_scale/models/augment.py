"""DiffAugment (arXiv 2006.10738): random changes of images before a discriminator, differentiable.

Random numbers come from torch's generator of the images' device, seeded for each micro-batch by its first position
(`train.determinism`). No call waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Published ratios of the image's side: the largest shift, and the square that is cut out.
SHIFT, HOLE = 0.125, 0.5


def augment(x_BCHW: Tensor, kinds: Sequence[str]) -> Tensor:
    """Images in [-1, 1], each changed by random numbers of its own. `kinds` of `KINDS`, in their order."""
    for kind in kinds:
        x_BCHW = KINDS[kind](x_BCHW)
    return x_BCHW


def _uniform(x_BCHW: Tensor) -> Tensor:
    return torch.rand(len(x_BCHW), 1, 1, 1, device=x_BCHW.device, dtype=x_BCHW.dtype)


def _integers(x_BCHW: Tensor, low: int, high: int) -> Tensor:
    """low … high − 1 for each image, (B, 1, 1, 1)."""
    return torch.randint(low, high, (len(x_BCHW), 1, 1, 1), device=x_BCHW.device)


def _color(x_BCHW: Tensor) -> Tensor:
    """Brightness ± 0.5, then saturation × 0 … 2, then contrast × 0.5 … 1.5."""
    x_BCHW = x_BCHW + (_uniform(x_BCHW) - 0.5)
    grey_B1HW = x_BCHW.mean(dim=1, keepdim=True)
    x_BCHW = (x_BCHW - grey_B1HW) * (2.0 * _uniform(x_BCHW)) + grey_B1HW
    mean_B111 = x_BCHW.mean(dim=(1, 2, 3), keepdim=True)
    return (x_BCHW - mean_B111) * (_uniform(x_BCHW) + 0.5) + mean_B111


def _translation(x_BCHW: Tensor) -> Tensor:
    """A shift by up to an eighth of each side. Zeros come in."""
    for dim in (2, 3):
        side = x_BCHW.shape[dim]
        most = int(side * SHIFT + 0.5)
        places = _places(x_BCHW, dim) + _integers(x_BCHW, -most, most + 1)
        inside = (places >= 0) & (places < side)
        # Each place inside is read once, so the backward pass adds nothing but zeros to a number.
        x_BCHW = x_BCHW.gather(dim, places.clamp(0, side - 1).expand_as(x_BCHW)) * inside
    return x_BCHW


def _cutout(x_BCHW: Tensor) -> Tensor:
    """A square of half of the side becomes 0. Parts of it may lie outside."""
    inside: Tensor | None = None
    for dim in (2, 3):
        side = x_BCHW.shape[dim]
        size = int(side * HOLE + 0.5)
        start = _integers(x_BCHW, 0, side + 1 - size % 2) - size // 2
        places = _places(x_BCHW, dim)
        here = (places >= start) & (places < start + size)
        inside = here if inside is None else inside & here
    assert inside is not None
    return x_BCHW * ~inside


def _places(x_BCHW: Tensor, dim: int) -> Tensor:
    """0 … side − 1 along `dim`, with 1 elsewhere."""
    return torch.arange(x_BCHW.shape[dim], device=x_BCHW.device).view([-1 if d == dim else 1 for d in range(4)])


KINDS: dict[str, Callable[[Tensor], Tensor]] = {"color": _color, "translation": _translation, "cutout": _cutout}
