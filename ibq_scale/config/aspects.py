"""Aspects of pictures, width to height as in ``4:3``, and the size of the crop that a batch of each has."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from math import sqrt

# Beyond this a crop has few codes on its shorter side.
WIDEST = 8


def parsed(texts: Sequence[str]) -> tuple[str, ...]:
    """Aspects in lowest terms, from the tallest to the widest. ValueError for other texts, and for one given twice."""
    found = sorted(_ratio(text) for text in texts)
    if len(set(found)) < len(found):
        raise ValueError(f"aspects {', '.join(texts)}: one of them is given twice")
    return tuple(f"{ratio.numerator}:{ratio.denominator}" for ratio in found)


@cache
def _ratio(text: str) -> Fraction:
    match = re.fullmatch(r"([1-9]\d{0,3}):([1-9]\d{0,3})", text)
    ratio = Fraction(int(match[1]), int(match[2])) if match else Fraction(0)
    if not Fraction(1, WIDEST) <= ratio <= WIDEST:
        raise ValueError(f"'{text}' is no aspect: write width:height as in 4:3, at most {WIDEST}:1 or 1:{WIDEST}")
    return ratio


def nearest(aspects: Sequence[str], width: int, height: int) -> int:
    """The number of the aspect with the smallest crop of a picture, the first of equal ones."""
    own = Fraction(width, height)

    def cut(ratio: Fraction) -> Fraction:
        return max(own / ratio, ratio / own)

    return min(range(len(aspects)), key=lambda number: cut(_ratio(aspects[number])))


def crop_sizes(aspects: Sequence[str], resolution: int, multiple: int) -> tuple[tuple[int, int], ...]:
    """Width and height in pixels of each aspect's crops: multiples of `multiple`, with at most resolution² pixels.

    So no aspect needs more memory than the square of side `resolution`.
    """
    return tuple(_crop_size(_ratio(text), resolution, multiple) for text in aspects)


def _crop_size(ratio: Fraction, resolution: int, multiple: int) -> tuple[int, int]:
    if ratio < 1:
        return _crop_size(1 / ratio, resolution, multiple)[::-1]
    short = max(1, round(resolution / sqrt(ratio) / multiple)) * multiple
    most = resolution**2 // short // multiple
    return max(1, min(most, round(short * ratio / multiple))) * multiple, short
