"""A picture's bytes on their way into a shard: decoded whole, measured, and re-encoded where asked."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence

from PIL import Image, UnidentifiedImageError

from ibq_scale.data.filters import Condition, picture_holds

JPEG_QUALITY = 95
# Formats that the stream decodes as they are. MPO is a phone's JPEG with more pictures behind it.
KEPT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}


class UnusableError(Exception):
    """What is no whole picture, or has no usable label; the message is the same in every run."""


class UnwantedError(Exception):
    """What the conditions leave out."""


def encode_picture(data: bytes, size: int | None, conditions: Sequence[Condition]) -> tuple[bytes, str]:
    """The bytes to write and their extension: the same bytes, or JPEG where `size` (pixels) or the format asks for it.

    UnusableError where they do not decode to the end; UnwantedError where a condition on the picture fails.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            if not picture_holds(conditions, image.width, image.height):
                raise UnwantedError
            kind = image.format or ""
            # A cut file opens well and fails only at its end.
            image.load()
            if size is None and kind in KEPT:
                return data, KEPT[kind]
            rgb = image.convert("RGB")
    except UnwantedError:
        raise
    except UnidentifiedImageError:
        raise UnusableError("no picture in a known format") from None
    except Exception as e:
        # Decoders meet arbitrary bytes here, and raise what they like.
        raise UnusableError(_reason(e)) from None
    return _jpeg(rgb if size is None else shortest_side(rgb, size)), "jpg"


def shortest_side(rgb: Image.Image, size: int) -> Image.Image:
    """The picture with its shortest side `size` pixels long, by bicubic interpolation."""
    scale = size / min(rgb.size)
    sides = (max(size, round(rgb.width * scale)), max(size, round(rgb.height * scale)))
    return rgb.resize(sides, Image.Resampling.BICUBIC)


def _jpeg(rgb: Image.Image) -> bytes:
    out = io.BytesIO()
    rgb.save(out, "JPEG", quality=JPEG_QUALITY)
    return out.getvalue()


def _reason(error: Exception) -> str:
    """Without memory addresses, which differ from run to run."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(error)) or type(error).__name__
