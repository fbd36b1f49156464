"""A picture's bytes on their way into a shard: decoded whole, measured, and re-encoded where asked."""

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
# Formats that the stream decodes as they are. MPO is a phone's JPEG with more pictures behind it.
KEPT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
# Whose pictures have no loss to hide a second one behind.
LOSSY = {"JPEG", "MPO", "WEBP", "AVIF", "JPEG2000"}
# A JPEG is decoded at a fraction of its size that is at least so many times what it is resized to.
GAP = 2
# By the colours of a JPEG's header: those that decoders agree on.
MODES = {"Gray": "L", "YCbCr": "RGB"}
# JPEG's own limit of a side, and what a resized picture may have: 200 MB in memory.
LONGEST_SIDE, MOST_RESIZED = 65_500, 1 << 26


class UnusableError(Exception):
    """What is no whole picture, or has no usable label; the message is the same in every run."""


class UnwantedError(Exception):
    """What the conditions leave out."""


@dataclass(frozen=True)
class Encoding:
    """What decides a picture's bytes in a shard, and which pictures are taken."""

    size: int | None = None
    """Of the shortest side, in pixels."""
    conditions: tuple[Condition, ...] = ()
    max_aspect: float = 0.0
    """Of the longer side to the shorter; 0: any."""
    rules: PixelRules = RULES


@dataclass(frozen=True)
class Picture:
    """The bytes to write, their extension, and what the picture was."""

    data: bytes
    extension: str
    format: str
    mode: str
    size: tuple[int, int]
    """Width and height of the source, upright."""


def encode_picture(data: bytes, encoding: Encoding) -> Picture:
    """The same bytes, or others where `size` or the format asks for it: JPEG, PNG for what was stored without loss.

    UnusableError where they do not decode to the end; UnwantedError where a condition on the picture fails.
    """
    try:
        return _quickly(data, encoding) or _by_pillow(data, encoding)
    except (UnwantedError, UnusableError):
        raise
    except UnidentifiedImageError:
        raise UnusableError("no picture in a known format") from None
    except Exception as e:
        # Decoders meet arbitrary bytes here, and raise what they like.
        raise UnusableError(_reason(e)) from None


def _quickly(data: bytes, encoding: Encoding) -> Picture | None:
    """A usual, faultless JPEG by libjpeg-turbo alone; None for all else."""
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
            # Every bit of it is read, and an eighth of each side made.
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
            # All of it is read, and an eighth of each side made.
            image.draft(None, (width // 8, height // 8))
        # A cut file opens well and fails only at its end.
        image.load()
        # In these formats all modes but these have a meaning.
        if encoding.size is None and kind in KEPT and mode not in ("I", "F"):
            return Picture(data, KEPT[kind], kind, mode, (width, height))
        rgb = to_rgb(shrunk(image, encoding.size and GAP * encoding.size), encoding.rules)
    if encoding.size is None and kind in KEPT:
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
    """The picture with its shortest side `size` pixels long, by bicubic interpolation."""
    scale = size / min(rgb.size)
    sides = (max(size, round(rgb.width * scale)), max(size, round(rgb.height * scale)))
    return rgb.resize(sides, Image.Resampling.BICUBIC)


def _jpeg(pixels: Pixels, size: int) -> bytes:
    """The picture with its shortest side `size` pixels long, as JPEG."""
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
    """Without memory addresses, which differ from run to run."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(error)) or type(error).__name__
