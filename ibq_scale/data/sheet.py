"""A contact sheet of random samples, uncropped, with class and size below each."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ibq_scale.data.convert import to_rgb
from ibq_scale.data.describe import Picked
from ibq_scale.data.pixel_rules import RULES, PixelRules
from ibq_scale.errors import UserError

CELL, GAP, LINE = 160, 12, 15
GROUND, INK, FAINT = (255, 255, 255), (20, 20, 20), (120, 120, 120)


def save_sheet(path: Path, picked: Sequence[Picked], classes: Sequence[str], rules: PixelRules = RULES) -> None:
    """Draws `picked` as a nearly square grid into a PNG file. UserError if it cannot be written."""
    columns = math.ceil(math.sqrt(len(picked)))
    rows = math.ceil(len(picked) / columns)
    step = (CELL + GAP, CELL + 2 * LINE + GAP)
    sheet = Image.new("RGB", (columns * step[0] + GAP, rows * step[1] + GAP), GROUND)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(12)
    for i, sample in enumerate(picked):
        left, top = i % columns * step[0] + GAP, i // columns * step[1] + GAP
        with Image.open(io.BytesIO(sample.picture)) as image:
            image.draft("RGB", (CELL, CELL))
            small = to_rgb(image, rules)
        small.thumbnail((CELL, CELL))
        sheet.paste(small, (left, top + CELL - small.height))
        name = _fitting(classes[sample.member.label], font, draw)
        draw.text((left, top + CELL + 1), name, INK, font)
        # Pillow's default font has no × and no ….
        draw.text((left, top + CELL + 1 + LINE), f"{sample.size[0]} x {sample.size[1]}", FAINT, font)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path, "PNG")
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror or e}") from None


def _fitting(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, draw: ImageDraw.ImageDraw) -> str:
    """The text, cut to a cell's width."""
    if draw.textlength(text, font) <= CELL:
        return text
    while text and draw.textlength(f"{text}...", font) > CELL:
        text = text[:-1]
    return f"{text}..."
