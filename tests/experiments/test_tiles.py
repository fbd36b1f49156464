"""Tiles: what is held out is never trained on, and the same tiles come again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ibq_scale.data.manifest import load_manifest
from ibq_scale.data.stream import evaluation_images
from ibq_scale.errors import UserError
from ibq_scale.experiments.tiles import PHOTOGRAPHS_SIDE, TILE, prepare_tiles

COUNT, HELD_OUT = 10, (4, 9)


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """Ten pictures, twice as wide as high, each of one grey that tells which it is."""
    folder = tmp_path / "plain"
    folder.mkdir()
    for i in range(COUNT):
        Image.new("RGB", (96, 48), (20 * i, 20 * i, 20 * i)).save(folder / f"{i}.png")
    return folder


def _greys(url: str) -> set[int]:
    batches = evaluation_images(url, resolution=TILE, rank=0, world_size=1, batch=8)
    return {int(value) for images, _ in batches for value in images.images_u8[:, 0, 0, 0]}


def test_held_out_pictures_are_whole_ones_that_training_never_sees(plain: Path, tmp_path: Path) -> None:
    urls = prepare_tiles("photographs", plain, tmp_path / "tiles")
    assert _greys(urls["held-out"]) == {20 * i for i in HELD_OUT}
    assert _greys(urls["train"]) == {20 * i for i in range(COUNT) if i not in HELD_OUT}
    tiles_each = (PHOTOGRAPHS_SIDE // TILE) * (2 * PHOTOGRAPHS_SIDE // TILE)
    assert load_manifest(urls["train"], "images").samples == 8 * tiles_each
    assert not (tmp_path / "tiles/cut").exists()


def test_what_is_there_is_not_made_again(plain: Path, tmp_path: Path) -> None:
    urls = prepare_tiles("photographs", plain, tmp_path / "tiles")
    before = load_manifest(urls["train"], "images").hash
    Image.new("RGB", (64, 64)).save(plain / "late.png")
    assert prepare_tiles("photographs", plain, tmp_path / "tiles") == urls
    assert load_manifest(urls["train"], "images").hash == before


def test_too_few_pictures(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds 0 pictures"):
        prepare_tiles("photographs", tmp_path, tmp_path / "tiles")


@pytest.mark.slow
def test_of_ten_other_photographs_the_lowest_rows_are_held_out(tmp_path: Path) -> None:
    urls = prepare_tiles("ten", tmp_path, tmp_path / "tiles")
    samples = {part: load_manifest(url, "images").samples for part, url in urls.items()}
    assert samples["held-out"] == pytest.approx(sum(samples.values()) / 5, rel=0.02)
    (images, _), *_ = evaluation_images(urls["train"], resolution=TILE, rank=0, world_size=1, batch=64)
    assert np.std(images.images_u8.numpy()) > 20, "photographs, not one flat colour"
