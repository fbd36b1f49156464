"""Converts any picture to RGB as a viewer shows it. All training pixels are made here.

The rules' version is part of a data set's stamp (`PixelRules` in the manifest), so a set always reads the same.
"""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor

from ibq_scale.data.pixel_rules import RULES, PixelRules
from ibq_scale.errors import UserError

Pixels = NDArray[np.uint8]
# Pillow's own limit.
MOST_PIXELS = 178_956_970
# Pixels above which copies of a picture are avoided, to save memory.
LARGE = 1 << 24
# Rows converted at once.
BAND = 256
_ORIENTATION = 0x0112
_TURNS: dict[int, Any] = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}
_PILLOW_TURNS = dict(
    enumerate(
        (
            Image.Transpose.FLIP_LEFT_RIGHT,
            Image.Transpose.ROTATE_180,
            Image.Transpose.FLIP_TOP_BOTTOM,
            Image.Transpose.TRANSPOSE,
            Image.Transpose.ROTATE_270,
            Image.Transpose.TRANSVERSE,
            Image.Transpose.ROTATE_90,
        ),
        2,
    )
)


def parse_colour(text: str) -> tuple[int, int, int]:
    """Parses ``white`` or ``#ff8800``. UserError for anything else."""
    try:
        return ImageColor.getcolor(text, "RGB")[:3]  # type: ignore[index,return-value]
    except ValueError:
        raise UserError(f"'{text}' is no colour: write a name like white, or #rrggbb") from None


# Such pictures are whole, and only the orientation is read from EXIF.
warnings.filterwarnings("ignore", message="Corrupt EXIF data", category=UserWarning)


def decode(data: bytes, least: int | None, rules: PixelRules = RULES) -> Pixels:
    """Decodes to uint8 (H, W, 3). A JPEG may come at a fraction of its size, with no side below `least`.

    JPEGs by simplejpeg, 1.4 times as fast as Pillow here. JPEGs unknown to it (e.g. CMYK) and other formats by Pillow.
    Raises OSError, ValueError or SyntaxError if it is no picture, DecompressionBombError above `MOST_PIXELS`.
    """
    if data[:2] == b"\xff\xd8":
        # In the extra 'train' only: reports import this module without it.
        import simplejpeg

        try:
            # A header of a few bytes may ask for 13 GB.
            height, width, *_ = simplejpeg.decode_jpeg_header(data)
            if height * width > MOST_PIXELS:
                raise Image.DecompressionBombError(f"{width} x {height} are too many pixels")
            least_sides = (least or 0, least or 0) if not rules.version else fraction(height, width, least)
            pixels: Pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=least_sides[0], min_width=least_sides[1])
            return turned(pixels, jpeg_orientation(data) if rules.version else 1)
        except ValueError:
            pass
    with Image.open(io.BytesIO(data)) as image:
        if least is not None:
            image.draft("RGB", (least, least))
        return np.asarray(to_rgb(shrunk(image, least) if rules.version else image, rules))


def fraction(height: int, width: int, least: int | None) -> tuple[int, int]:
    """Sides of an eighth, a quarter or a half of a JPEG, none below `least`. Zeros for the whole.

    Decoders have fast code for these only: three quarters take twice the time of the whole.
    """
    for eighths in (1, 2, 4):
        sides = (-(-height * eighths // 8), -(-width * eighths // 8))
        if least is not None and min(sides) >= least:
            return sides
    return 0, 0


def shrunk(image: Image.Image, least: int | None) -> Image.Image:
    """Reduces a large RGB or L picture by an integer factor, no side below `least`: copies would take gigabytes."""
    factor = min(image.size) // least if least else 1
    if factor < 2 or image.width * image.height <= LARGE or image.mode not in ("RGB", "L"):
        return image
    turn = _PILLOW_TURNS.get(orientation_of(image))
    small = image.reduce(factor)
    return small if turn is None else small.transpose(turn)


def bicubic(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """Resizes to (width, height) with antialiasing by torch: many times as fast as Pillow, and within a level of it."""
    import torch
    from torch.nn.functional import interpolate

    # torch warns of read-only arrays.
    source = pixels if pixels.flags.writeable and pixels.flags.c_contiguous else pixels.copy()
    # Permuted after the batch axis is added, the tensor is channels-last for torch, and so is the result.
    image_13HW = torch.from_numpy(source)[None].permute(0, 3, 1, 2)
    found = interpolate(image_13HW, size=(size[1], size[0]), mode="bicubic", antialias=True)
    resized: Pixels = found[0].permute(1, 2, 0).numpy()
    return resized


def mirrored(pixels: Pixels) -> Pixels:
    """Left and right exchanged. numpy's reversed view would cost three times as much when it is copied to a batch."""
    import torch

    # torch warns of read-only arrays.
    source = pixels if pixels.flags.writeable else pixels.copy()
    found: Pixels = torch.from_numpy(source).flip(1).numpy()
    return found


def to_rgb(image: Image.Image, rules: PixelRules = RULES) -> Image.Image:
    """Converts an opened picture to RGB. ValueError if the value of white is unknown, or the mode has no colours."""
    if not rules.version:
        return image.convert("RGB")
    image.load()
    turn = _PILLOW_TURNS.get(orientation_of(image))
    upright = image if turn is None else image.transpose(turn)
    if upright.mode in ("F", "I") or upright.mode.startswith("I;16"):
        return Image.fromarray(_scaled(np.asarray(upright), upright.mode)).convert("RGB")
    if upright.has_transparency_data:
        return _over(upright, rules.background)
    # A conversion to the same mode would be a copy.
    return upright if upright.mode == "RGB" else upright.convert("RGB")


def _over(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Composites a transparent picture over a colour, in bands, since it takes several copies."""
    out = Image.new("RGB", image.size)
    for top in range(0, image.height, BAND):
        band = image.crop((0, top, image.width, min(top + BAND, image.height))).convert("RGBA")
        ground = Image.new("RGBA", band.size, (*background, 255))
        out.paste(Image.alpha_composite(ground, band).convert("RGB"), (0, top))
    return out


def turned(pixels: Pixels, orientation: int) -> Pixels:
    """Turns pixels upright by their EXIF orientation."""
    turn = _TURNS.get(orientation)
    return pixels if turn is None else np.ascontiguousarray(turn(pixels))


def jpeg_orientation(data: bytes) -> int:
    """The EXIF (or XMP) orientation of a JPEG, 1 if it has none."""
    # Both are in APP1 segments. Most pictures have none and need no parser of Pillow's.
    at = 2
    while data[at : at + 2] != b"\xff\xe1":
        if data[at : at + 1] != b"\xff" or data[at + 1 : at + 2] in (b"\xda", b"\xd9"):
            return 1
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    try:
        with Image.open(io.BytesIO(data)) as image:
            return orientation_of(image)
    except Exception:
        return 1


def orientation_of(image: Image.Image) -> int:
    """1 to 8. 1 if the picture has none, or its EXIF is damaged."""
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except Exception:
        # Pillow's parsers meet arbitrary bytes here.
        return 1
    return found if found in range(1, 9) else 1


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height as in a viewer, from the header."""
    # Pillow turns TIFF itself.
    turned = image.format != "TIFF" and orientation_of(image) > 4
    return (image.height, image.width) if turned else image.size


def _scaled(values: NDArray[Any], mode: str) -> Pixels:
    """Scales 16-bit and float values to 8 bits. White: 1 for floats up to 1, 255 for floats up to 255, else 65,535."""
    least, most = float(values.min()), float(values.max())
    if least < 0 or not most <= 65535:
        raise ValueError(f"has values from {least:g} to {most:g} (mode {mode}): what is white in it is not known")
    white = 65535.0 if mode != "F" or most > 255 else 255.0 if most > 1 else 1.0
    levels = np.empty(values.shape, np.uint8)
    for top in range(0, len(values), BAND):
        levels[top : top + BAND] = np.rint(values[top : top + BAND].astype(np.float32) * (255.0 / white))
    return levels
