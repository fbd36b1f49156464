"""Which rules turned a data set's pictures into pixels: a part of its manifest, and so of its stamp."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator

from ibq_scale.config.base import Section

NEWEST = 1


def _known(version: int) -> int:
    if not 0 <= version <= NEWEST:
        raise ValueError(f"this program knows up to version {NEWEST}")
    return version


class PixelRules(Section):
    """How pictures are converted.

    Version 1: turned by their EXIF orientation, transparency over `background`, 16 bits and floats scaled to 8; resized
    by torch's antialiased bicubic, within a level of Pillow's as a rule. Version 0, of sets that name none: Pillow's
    ``convert("RGB")`` and resize alone.
    """

    version: Annotated[int, AfterValidator(_known)] = NEWEST
    background: tuple[int, int, int] = (255, 255, 255)


RULES, OLD_RULES = PixelRules(), PixelRules(version=0)
