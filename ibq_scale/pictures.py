"""Tensors as pictures: grids and PNG files."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SHOWN = 8


def to_uint8(images: Tensor) -> Tensor:
    """Float images in [-1, 1] → uint8, rounded and clamped, the same shape. uint8 stays unchanged."""
    if images.dtype == torch.uint8:
        return images
    return images.detach().float().add(1.0).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def image_grid(images_BCHW: Tensor, columns: int, gap: int = 2) -> Tensor:
    """Images (B, 3, H, W), float or uint8, row by row on white → uint8 (3, H', W') on the CPU."""
    images = to_uint8(images_BCHW).cpu()
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    grid = torch.full((channels, rows * (height + gap) - gap, columns * (width + gap) - gap), 255, dtype=torch.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        grid[:, top : top + height, left : left + width] = image
    return grid


def to_png(image_CHW: Tensor) -> bytes:
    """One image (3, H, W), float in [-1, 1] or uint8, as a PNG file's bytes."""
    pixels = np.ascontiguousarray(to_uint8(image_CHW).cpu().permute(1, 2, 0).numpy())
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def reconstruction_grid(originals_BCHW: Tensor, reconstructions_BCHW: Tensor) -> Tensor:
    """Up to eight originals above their reconstructions, uint8 (3, H', W')."""
    both = torch.cat([to_uint8(originals_BCHW[:SHOWN]), to_uint8(reconstructions_BCHW[:SHOWN])])
    return image_grid(both, columns=len(both) // 2)


def save_png(path: Path, image_CHW: Tensor) -> None:
    """Writes one image (3, H, W), and makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(to_png(image_CHW))
