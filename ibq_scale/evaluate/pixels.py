"""PSNR and SSIM of images with pixels 0 … 255, one number per image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PEAK = 255.0
# Wang et al. 2004: an 11 × 11 Gaussian window of sigma 1.5, and constants relative to the peak.
WINDOW, SIGMA = 11, 1.5
C1, C2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, float64 (B,), of images (B, 3, H, W). Infinite for equal ones."""
    mse_B = (a.double() - b.double()).square().flatten(1).mean(dim=1)
    return 10.0 * torch.log10(PEAK**2 / mse_B)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity, float64 (B,), of images (B, 3, H, W): mean over channels and all whole windows.

    Equal to ``skimage.metrics.structural_similarity(…, gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False, data_range=255, channel_axis=…)``. ValueError below 11 × 11 pixels.
    """
    if min(a.shape[-2:]) < WINDOW:
        raise ValueError(f"SSIM needs images of at least {WINDOW} × {WINDOW} pixels, got {tuple(a.shape[-2:])}")
    a, b = a.double(), b.double()
    mean_a, mean_b, mean_aa, mean_bb, mean_ab = _blur(torch.cat([a, b, a * a, b * b, a * b])).chunk(5)
    var_a, var_b = mean_aa - mean_a * mean_a, mean_bb - mean_b * mean_b
    covariance = mean_ab - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + C1) / (mean_a**2 + mean_b**2 + C1)
    structure = (2 * covariance + C2) / (var_a + var_b + C2)
    return (luminance * structure).flatten(1).mean(dim=1)


def _blur(x: Tensor) -> Tensor:
    """Means under the Gaussian window at all positions inside the image, rows then columns."""
    offsets = torch.arange(WINDOW, dtype=torch.float64, device=x.device) - WINDOW // 2
    weights = torch.exp(-0.5 * (offsets / SIGMA) ** 2)
    weights = weights / weights.sum()
    channels = x.shape[1]
    x = F.conv2d(x, weights.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
    return F.conv2d(x, weights.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)
