"""The demo's photographs: real, by class, the same every time."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from ibq_scale.demo.photographs import PHOTOGRAPHS, write_crops


@pytest.mark.slow
def test_crops_are_an_image_folder_and_the_same_bytes_again(tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert write_crops(tmp_path / name, per_photograph=2) == 20
    assert {p.name for p in (tmp_path / "one").iterdir()} == set(PHOTOGRAPHS)
    for path in (tmp_path / "one").rglob("*.jpg"):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()
        assert Image.open(path).size == (96, 96)
