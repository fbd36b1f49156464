"""Prepares a picture's bytes for a shard: decodes them whole, measures the picture, re-encodes it if asked."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from ibq_scale.data.convert import (
    LARGE,
    MOST_PIXELS,
    Pixels,
    bicubic,
    decode,
    jpeg_orientation,
    shrunk,
    to_rgb,
    upright_size,
)
from ibq_scale.data.filters import Condition, picture_holds
from ibq_scale.data.pixel_rules import RULES, PixelRules

JPEG_QUALITY = 95
# Formats decoded by the stream itself, kept unchanged. MPO is a phone's JPEG followed by more pictures.
KEPT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
# Lossy formats, re-encoded as JPEG: a second loss hardly adds to the first. Lossless ones become PNG.
LOSSY = {"JPEG", "MPO", "WEBP", "AVIF", "JPEG2000"}
# Before resizing, a JPEG is decoded at a fraction of its size, at least this multiple of its new size.
GAP = 2
# Pillow's modes by the colour space in a JPEG's header. Decoders agree on these.
MODES = {"Gray": "L", "YCbCr": "RGB"}
# JPEG's own limit of a side, and the limit of a resized picture's pixels: 200 MB in memory.
LONGEST_SIDE, MOST_RESIZED = 65_500, 1 << 26


class UnusableError(Exception):
    """A sample has no whole picture or no usable label. The message is the same in every run."""


class UnwantedError(Exception):
    """A sample does not meet the conditions."""


@dataclass(frozen=True)
class Encoding:
    """Settings for a picture's bytes in a shard, and for the selection of pictures."""

    size: int | None = None
    """New shortest side in pixels. None keeps the picture's size."""
    conditions: tuple[Condition, ...] = ()
    max_aspect: float = 0.0
    """Greatest ratio of the longer side to the shorter. 0: any."""
    rules: PixelRules = RULES


@dataclass(frozen=True)
class Picture:
    """The bytes to write, their extension, and the source picture's format, mode and size."""

    data: bytes
    extension: str
    format: str
    mode: str
    size: tuple[int, int]
    """Width and height of the source, upright."""


def encode_picture(data: bytes, encoding: Encoding) -> Picture:
    """The same bytes, or re-encoded ones for `size` (JPEG) or a format not in `KEPT` (JPEG, PNG if lossless).

    UnusableError if they do not decode to the end, UnwantedError if a condition on the picture fails.
    """
    try:
        return _quickly(data, encoding) or _by_pillow(data, encoding)
    except (UnwantedError, UnusableError):
        raise
    except UnidentifiedImageError:
        raise UnusableError("no picture in a known format") from None
    except Exception as e:
        # On arbitrary bytes decoders raise any error.
        raise UnusableError(_reason(e)) from None


def _quickly(data: bytes, encoding: Encoding) -> Picture | None:
    """Handles a usual, faultless JPEG by libjpeg-turbo alone. None for all others."""
    if data[:3] != b"\xff\xd8\xff":
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        mode = MODES.get(colours)
        if mode is None:
            return None
        turns = jpeg_orientation(data) > 4
        size = (height, width) if turns else (width, height)
        _check(*size, encoding)
        if encoding.size is None:
            # This reads every bit, and makes an eighth of each side.
            simplejpeg.decode_jpeg(data, "GRAY", min_height=-(-height // 8), min_width=-(-width // 8))
            return Picture(data, "jpg", "JPEG", mode, size)
        pixels = decode(data, GAP * encoding.size, encoding.rules)
    except ValueError:
        return None
    return Picture(_jpeg(pixels, encoding.size), "jpg", "JPEG", mode, size)


def _by_pillow(data: bytes, encoding: Encoding) -> Picture:
    with Image.open(io.BytesIO(data)) as image:
        width, height = upright_size(image)
        kind, mode = image.format or "", image.mode
        _check(width, height, encoding)
        if encoding.size is None and kind in ("JPEG", "MPO") and width * height > LARGE:
            # This reads all of it, and makes an eighth of each side.
            image.draft(None, (width // 8, height // 8))
        # A cut file opens well and fails only at its end.
        image.load()
        is_kept = encoding.size is None and kind in KEPT
        # In these formats only modes I and F may lack a known white: `to_rgb` checks them.
        if not is_kept or mode in ("I", "F"):
            rgb = to_rgb(shrunk(image, encoding.size and GAP * encoding.size), encoding.rules)
    if is_kept:
        return Picture(data, KEPT[kind], kind, mode, (width, height))
    if encoding.size is not None:
        return Picture(_jpeg(np.asarray(rgb), encoding.size), "jpg", kind, mode, (width, height))
    form, extension = ("JPEG", "jpg") if kind in LOSSY else ("PNG", "png")
    return Picture(_saved(rgb, form), extension, kind, mode, (width, height))


def _check(width: int, height: int, encoding: Encoding) -> None:
    if width * height > MOST_PIXELS:
        raise UnusableError(f"decompression bomb: {width} x {height} are too many pixels")
    if not picture_holds(encoding.conditions, width, height):
        raise UnwantedError
    aspect = max(width, height) / max(min(width, height), 1)
    if encoding.max_aspect and aspect > encoding.max_aspect:
        raise UnusableError(f"{width} x {height} pixels are beyond the greatest aspect, {encoding.max_aspect:g}")
    if encoding.size is None:
        return
    longest = round(encoding.size * aspect)
    if longest > LONGEST_SIDE or longest * encoding.size > MOST_RESIZED:
        raise UnusableError(
            f"{width} x {height} pixels would become {longest:,} pixels long: too thin for a shortest side of "
            f"{encoding.size}"
        )


def shortest_side(rgb: Image.Image, size: int) -> Image.Image:
    """Resizes the shortest side to `size` pixels by bicubic interpolation."""
    scale = size / min(rgb.size)
    sides = (max(size, round(rgb.width * scale)), max(size, round(rgb.height * scale)))
    return rgb.resize(sides, Image.Resampling.BICUBIC)


def _jpeg(pixels: Pixels, size: int) -> bytes:
    """Resizes the shortest side to `size` pixels and encodes as JPEG."""
    height, width = pixels.shape[:2]
    scale = size / min(height, width)
    sides = (max(size, round(width * scale)), max(size, round(height * scale)))
    small = pixels if sides == (width, height) else bicubic(pixels, sides)
    encoded: bytes = simplejpeg.encode_jpeg(np.ascontiguousarray(small), JPEG_QUALITY, "RGB", "420")
    return encoded


def _saved(rgb: Image.Image, form: str) -> bytes:
    out = io.BytesIO()
    rgb.save(out, form, quality=JPEG_QUALITY)
    return out.getvalue()


def _reason(error: Exception) -> str:
    """The error's text without memory addresses, since they differ between runs."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(error)) or type(error).__name__
