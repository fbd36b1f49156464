"""Pictures become pixels."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from ibq_scale.data.convert import decode, mirrored


@pytest.mark.parametrize("least", [None, 20])
def test_decoders_agree(least: int | None) -> None:
    """simplejpeg decodes what Pillow does; a scaled picture still covers what was asked for."""
    smooth = np.linspace(0, 255, 48 * 64 * 3).reshape(48, 64, 3).astype(np.uint8)
    for mode in ("RGB", "L", "CMYK"):
        data = io.BytesIO()
        Image.fromarray(smooth).convert(mode).save(data, "JPEG", quality=95)
        pixels = decode(data.getvalue(), least)
        assert pixels.dtype == np.uint8
        assert min(pixels.shape[:2]) >= (least or 48)
        if least is None:
            expected = np.asarray(Image.open(data).convert("RGB"))
            assert pixels.shape == expected.shape
            assert int(np.abs(pixels.astype(int) - expected).max()) <= 2, mode
    with pytest.raises((OSError, ValueError)):
        decode(b"\xff\xd8 no picture", least)


def test_mirrored_exchanges_left_and_right_also_of_read_only_pixels() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 9, 3), np.uint8)
    for part in (pixels, pixels[:, 2:7]):
        part.flags.writeable = False
        assert np.array_equal(mirrored(part), part[:, ::-1])
