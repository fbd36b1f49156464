"""Pretrained weights that metrics and losses need, from a local folder: nothing downloads inside a job."""

from __future__ import annotations

import os
from pathlib import Path

from ibq_scale.errors import UserError

SOURCES = {
    "vgg16-397923af.pth": "torchvision's VGG16 (ImageNet)",
    "alexnet-owt-7be5be79.pth": "torchvision's AlexNet (ImageNet)",
    "weights-inception-2015-12-05-6726825d.pth": "torch-fidelity's Inception v3 (FID)",
}


def weights_folder() -> Path:
    """$IBQ_SCALE_WEIGHTS, else ~/.cache/ibq-scale/weights."""
    return Path(os.environ.get("IBQ_SCALE_WEIGHTS") or Path.home() / ".cache/ibq-scale/weights")


def missing(name: str) -> str | None:
    """What to do about an absent file, in one line; None where it is there."""
    path = weights_folder() / name
    if path.is_file():
        return None
    return f"{name} is not in {path.parent}: put {SOURCES[name]} there (or set IBQ_SCALE_WEIGHTS to its folder)"


def weight_file(name: str) -> Path:
    """The path of a weight file. UserError that names the file, its source and its place when it is absent."""
    fault = missing(name)
    if fault is not None:
        raise UserError(fault)
    return weights_folder() / name
