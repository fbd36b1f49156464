"""PSNR and SSIM are those of scikit-image."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ibq_scale.evaluate.pixels import psnr, ssim


@pytest.fixture(scope="module", params=[0.02, 0.2, 1.0])
def pair(request: pytest.FixtureRequest) -> tuple[torch.Tensor, torch.Tensor]:
    """Smooth images and versions of them with more and more noise."""
    g = torch.Generator().manual_seed(0)
    smooth = torch.nn.functional.interpolate(torch.rand(3, 3, 6, 5, generator=g), (48, 40), mode="bicubic")
    noisy = smooth + request.param * torch.randn(smooth.shape, generator=g)
    return tuple(x.mul(255).round().clamp(0, 255).to(torch.uint8) for x in (smooth, noisy))


@pytest.mark.slow
def test_psnr(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    from skimage.metrics import peak_signal_noise_ratio

    a, b = pair
    expected = [peak_signal_noise_ratio(x.numpy(), y.numpy(), data_range=255) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(psnr(a, b).numpy(), expected, rtol=1e-12)


@pytest.mark.slow
def test_ssim(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    from skimage.metrics import structural_similarity

    a, b = pair
    expected = [
        structural_similarity(
            x.numpy(),
            y.numpy(),
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=255,
            channel_axis=0,
        )
        for x, y in zip(a, b, strict=True)
    ]
    np.testing.assert_allclose(ssim(a, b).numpy(), expected, rtol=1e-9)


def test_equal_images(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    a, _ = pair
    assert torch.isinf(psnr(a, a)).all()
    torch.testing.assert_close(ssim(a, a), torch.ones(3, dtype=torch.float64))


def test_too_small_images_are_refused() -> None:
    small = torch.zeros(1, 3, 10, 64, dtype=torch.uint8)
    with pytest.raises(ValueError, match="at least 11 × 11"):
        ssim(small, small)
