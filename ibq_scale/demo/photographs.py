"""Photographs for the demo: crops from pictures inside the wheels of scikit-image and scikit-learn."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ibq_scale.errors import UserError

# A crop keeps most of its picture, so a class looks like one object.
LEAST_SIDE = 0.55
CROP_PIXELS = 96


class Photograph(NamedTuple):
    package: str
    path: str


PHOTOGRAPHS = {
    "astronaut": Photograph("skimage", "data/astronaut.png"),
    "cat": Photograph("skimage", "data/chelsea.png"),
    "coffee": Photograph("skimage", "data/coffee.png"),
    "flower": Photograph("sklearn", "datasets/images/flower.jpg"),
    "galaxies": Photograph("skimage", "data/hubble_deep_field.jpg"),
    "grass": Photograph("skimage", "data/grass.png"),
    "pagoda": Photograph("sklearn", "datasets/images/china.jpg"),
    "retina": Photograph("skimage", "data/retina.jpg"),
    "rocket": Photograph("skimage", "data/rocket.jpg"),
    "tissue": Photograph("skimage", "data/ihc.png"),
}


def write_crops(folder: Path, per_photograph: int, seed: int = 0) -> int:
    """Writes an ImageFolder of square JPEG crops, one class per photograph. Equal seeds give equal bytes.

    Returns their number. UserError without the packages of the photographs.
    """
    for label, (name, photograph) in enumerate(PHOTOGRAPHS.items()):
        target = folder / name
        target.mkdir(parents=True, exist_ok=True)
        random = np.random.default_rng((seed, label))
        image = open_photograph(photograph)
        for i in range(per_photograph):
            side = int(random.uniform(LEAST_SIDE, 1.0) * min(image.size))
            left = int(random.integers(image.width - side + 1))
            top = int(random.integers(image.height - side + 1))
            crop = image.crop((left, top, left + side, top + side))
            crop = crop.resize((CROP_PIXELS, CROP_PIXELS), Image.Resampling.BICUBIC)
            crop.save(target / f"{name}-{i:04d}.jpg", quality=95)
    return per_photograph * len(PHOTOGRAPHS)


def open_photograph(photograph: Photograph) -> Image.Image:
    """The photograph, RGB. UserError without its package."""
    try:
        with (files(photograph.package) / photograph.path).open("rb") as f:
            return Image.open(f).convert("RGB")
    except (ModuleNotFoundError, FileNotFoundError):
        raise UserError(
            f"the demo needs the photographs in {photograph.package}: pip install 'ibq-scale[demo]'"
        ) from None
