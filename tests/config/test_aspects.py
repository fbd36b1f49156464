"""Aspects: how they are written, which one a picture has, and the size of its crops."""

from __future__ import annotations

from itertools import product

import pytest

from ibq_scale.config.aspects import crop_sizes, nearest, parsed
from ibq_scale.config.layers import resolve
from ibq_scale.errors import UserError


def test_aspects_are_in_lowest_terms_from_tall_to_wide() -> None:
    assert parsed(["32:18", "1:1", "3:4"]) == ("3:4", "1:1", "16:9")
    for texts, said in ((["4/3"], "is no aspect"), (["9:1"], "at most 8:1"), (["4:3", "8:6"], "given twice")):
        with pytest.raises(ValueError, match=said):
            parsed(texts)


def test_a_picture_has_the_aspect_that_cuts_least_of_it() -> None:
    aspects = ("3:4", "1:1", "4:3")
    sizes = {(300, 400): 0, (86, 100): 0, (87, 100): 1, (115, 100): 1, (116, 100): 2, (5000, 100): 2}
    assert {size: nearest(aspects, *size) for size in sizes} == sizes


def test_crops_have_at_most_the_squares_pixels_and_nearly_their_aspect() -> None:
    aspects = parsed(["1:2", "9:16", "2:3", "3:4", "1:1", "4:3", "3:2", "16:9", "2:1"])
    for resolution, multiple in ((256, 16), (256, 8), (512, 16), (64, 4)):
        found = crop_sizes(aspects, resolution, multiple)
        assert found[4] == (resolution, resolution)
        assert found == tuple((height, width) for width, height in reversed(found))
        for aspect, (width, height) in zip(aspects, found, strict=True):
            a, b = map(int, aspect.split(":"))
            assert width % multiple == height % multiple == 0
            assert 0.85 * resolution**2 <= width * height <= resolution**2
            assert abs(width * b / (height * a) - 1) < 0.1
    assert crop_sizes(("4:3",), 256, 16) == ((288, 224),)
    for resolution, text in product((16, 32), ("8:1", "1:8")):
        assert min(crop_sizes((text,), resolution, 16)[0]) == 16


def test_a_run_reads_them_from_yaml_without_base_60() -> None:
    run = resolve("tokenizer/tiny", ["data.aspects=[4:3,1:1]"]).config
    assert run.data.aspects == ("1:1", "4:3")
    for setting, said in (
        (["tokenizer/tiny", "data.aspects=[4:3,1:1]", "data.train=[a,b]", "data.weights=[1,2]"], "both shares"),
        (["ar/tiny", "data.aspects=[1:1]"], "is for tokenizers"),
    ):
        with pytest.raises(UserError, match=said):
            resolve(setting[0], setting[1:])
