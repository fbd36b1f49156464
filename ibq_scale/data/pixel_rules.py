"""The rules for converting a data set's pictures to pixels. Part of its manifest, and so of its hash."""

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
    """The conversion of pictures.

    Version 1: rotated by EXIF orientation, transparency over `background`, 16 bits and floats scaled to 8 bits, resized
    by torch's antialiased bicubic, usually within one level of Pillow's. Version 0, for sets without a version: only
    Pillow's ``convert("RGB")`` and resize.
    """

    version: Annotated[int, AfterValidator(_known)] = NEWEST
    background: tuple[int, int, int] = (255, 255, 255)


RULES, OLD_RULES = PixelRules(), PixelRules(version=0)
