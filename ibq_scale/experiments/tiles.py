"""Tiles: small squares from photographs, some held out of training.

A few hundred photographs have too few tokens to test a codebook of 16,384 codes. Their tiles have enough. A tile looks
like one token's field of view in a large picture.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from ibq_scale.data.convert import to_rgb
from ibq_scale.data.encode import shortest_side
from ibq_scale.data.listing import list_files
from ibq_scale.data.manifest import NAME as MANIFEST
from ibq_scale.data.prepare import prepare_images
from ibq_scale.demo.photographs import PHOTOGRAPHS, open_photograph
from ibq_scale.errors import UserError
from ibq_scale.experiments.plan import Pictures

TILE = 16
SUFFIXES = (".jpg", ".jpeg", ".png")
# Shortest side of a picture before its cut. Many pictures give few tiles each, ten give many.
PHOTOGRAPHS_SIDE, TEN_SIDE = 64, 320
# One in so many pictures, or of the ten pictures' rows of tiles from below.
HELD_OUT_SHARE = 5
SHARD_BYTES = 4 << 20
PARTS = ("train", "held-out")


def prepare_tiles(pictures: Pictures, source: Path, to: Path) -> dict[str, str]:
    """Cuts and prepares both parts under `to`, unless they exist. Returns the URL of each part.

    `source`, a folder of photographs, is read for ``photographs`` only. Every fifth of them, in the order of their
    paths, is held out whole. Of the ``ten`` from scikit-image and scikit-learn, the lowest fifth of each is held out.
    UserError for too few pictures, or without the packages of the ten.
    """
    urls = {part: str(to / part) for part in PARTS}
    if all((to / part / MANIFEST).is_file() for part in PARTS):
        return urls
    cut = to / "cut"
    shutil.rmtree(cut, ignore_errors=True)
    for part in PARTS:
        (cut / part).mkdir(parents=True)
    for part, name, tile in _of_photographs(source) if pictures == "photographs" else _of_ten():
        tile.save(cut / part / f"{name}.png")
    for part, url in urls.items():
        prepare_images(cut / part, url, shard_bytes=SHARD_BYTES)
    shutil.rmtree(cut)
    return urls


def _of_photographs(source: Path) -> Iterator[tuple[str, str, Image.Image]]:
    paths = [source / name for name in list_files(str(source)).ending(*SUFFIXES)]
    if len(paths) < HELD_OUT_SHARE:
        raise UserError(f"{source} holds {len(paths)} pictures ({', '.join(SUFFIXES)}): give a folder of more")
    for i, path in enumerate(paths):
        part = PARTS[i % HELD_OUT_SHARE == HELD_OUT_SHARE - 1]
        for row, column, tile in _tiles(to_rgb(Image.open(path)), PHOTOGRAPHS_SIDE):
            yield part, f"{i:06d}-{row:02d}-{column:02d}", tile


def _of_ten() -> Iterator[tuple[str, str, Image.Image]]:
    for name, photograph in PHOTOGRAPHS.items():
        tiles = list(_tiles(open_photograph(photograph), TEN_SIDE))
        rows = 1 + max(row for row, _, _ in tiles)
        for row, column, tile in tiles:
            part = PARTS[row >= rows - rows // HELD_OUT_SHARE]
            yield part, f"{name}-{row:02d}-{column:02d}", tile


def _tiles(image: Image.Image, side: int) -> Iterator[tuple[int, int, Image.Image]]:
    image = shortest_side(image, side)
    for row in range(image.height // TILE):
        for column in range(image.width // TILE):
            left, top = column * TILE, row * TILE
            yield row, column, image.crop((left, top, left + TILE, top + TILE))
