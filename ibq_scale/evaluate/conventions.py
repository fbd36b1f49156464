"""Conventions of FID: the steps from pictures to a figure in each suite, and the suite behind each published figure.

The same pictures have other figures in another suite. Results carry the texts of this table, and ``ibq-scale evaluate
conventions`` prints it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ibq_scale.errors import UserError

# Side of the extractor's input.
SIDE = 299
# The suites run one network, Inception v3 of 2015-12-05, in different files. This program runs torch-fidelity's.
NETWORK = "Inception v3 of 2015-12-05, torch-fidelity's port"


def tensorflow_bilinear(images: Tensor) -> Tensor:
    """Pixels 0 … 255 (B, 3, H, W) → the extractor's input (B, 3, 299, 299): TensorFlow 1's resize, (x − 128) / 128.

    It aligns the first pixels' corners, with no antialiasing. The code is torch-fidelity's.
    """
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    resized: Tensor = interpolate_bilinear_2d_like_tensorflow1x(images.float(), size=(SIDE, SIDE), align_corners=False)
    return (resized - 128) / 128


def pillow_bicubic(images: Tensor) -> Tensor:
    """As `tensorflow_bilinear`, with Pillow's antialiased bicubic resize of float planes, clipped to 0 … 255."""
    planes = images.float().cpu().numpy().reshape(-1, *images.shape[2:])
    bicubic = Image.Resampling.BICUBIC
    resized = np.stack([np.asarray(Image.fromarray(plane).resize((SIDE, SIDE), bicubic)) for plane in planes])
    pixels = torch.from_numpy(resized).view(-1, 3, SIDE, SIDE).to(images.device).clamp_(0, 255)
    return (pixels - 128) / 128


def pytorch_bilinear(images: Tensor) -> Tensor:
    """As `tensorflow_bilinear`, with PyTorch's resize on half pixels without antialiasing, and 2 · x / 255 − 1."""
    return 2 * F.interpolate(images.float() / 255, size=(SIDE, SIDE), mode="bilinear", align_corners=False) - 1


@dataclass(frozen=True)
class Convention:
    """One suite's way from pictures to figures, in words and as code.

    `file`: the network's file in the suite. `prepare`: pixels 0 … 255 to the extractor's input. `key`: ending of the
    names ``mu`` and ``sigma`` in a reference file, one for each resize. `split`: images in a part of the inception
    score, in order, 0 for ten shuffled parts, None if the suite has neither it nor precision and recall. `spatial`: it
    has sFID.
    """

    name: str
    suite: str
    file: str
    resize: str = "TensorFlow 1 bilinear to 299, not antialiased, (x - 128) / 128"
    quantisation: str = "none after the resize"
    prepare: Callable[[Tensor], Tensor] = tensorflow_bilinear
    key: str = ""
    split: int | None = None
    spatial: bool = False

    @property
    def extractor(self) -> str:
        return f"{NETWORK} (the suite's file: {self.file})"


CONVENTIONS = {
    c.name: c
    for c in (
        Convention(
            "torch-fidelity",
            "torch-fidelity: FID, IS over ten shuffled parts, precision and recall",
            "the same",
            split=0,
        ),
        Convention(
            "adm",
            "the guided-diffusion evaluator: FID, sFID, IS over parts of 5,000 in order, precision and recall",
            "a TensorFlow graph",
            split=5_000,
            spatial=True,
        ),
        Convention(
            "clean-fid",
            "clean-fid, its mode clean: FID",
            "NVIDIA's TorchScript",
            resize="Pillow bicubic to 299, antialiased, float planes, (x - 128) / 128",
            quantisation="none after the resize, clipped to 0 … 255",
            prepare=pillow_bicubic,
            key="_clean-fid",
        ),
        Convention(
            "pytorch-fid",
            "pytorch-fid, and clean-fid's mode legacy_pytorch: FID",
            "the same weights",
            resize="PyTorch bilinear to 299 on half pixels, not antialiased, 2 x / 255 - 1",
            prepare=pytorch_bilinear,
            key="_pytorch-fid",
        ),
    )
}
DEFAULT = "torch-fidelity"


def chosen(names: str | None) -> tuple[Convention, ...]:
    """``all``, names with commas, or None for the default. The first gives a report's own figures.

    UserError for an unknown name.
    """
    if names == "all":
        return tuple(CONVENTIONS.values())
    wanted = dict.fromkeys(name.strip() for name in (names or DEFAULT).split(","))
    for name in wanted:
        if name not in CONVENTIONS:
            raise UserError(f"there is no convention '{name}': --conventions takes all, or {', '.join(CONVENTIONS)}")
    return tuple(CONVENTIONS[name] for name in wanted)


@dataclass(frozen=True)
class ConventionResult:
    """Figures of one convention with their origin.

    A figure is None if the suite has none, or with the reason in `not_measured`. `images`, `reference_images`: numbers
    of pictures on both sides. `reference_images` is None for a file without a stamp.
    """

    convention: str
    resize: str
    quantisation: str
    extractor: str
    extractor_sha256: str
    reference: str
    reference_images: int | None
    images: int
    fid: float | None = None
    sfid: float | None = None
    inception_score: float | None = None
    inception_score_std: float | None = None
    precision: float | None = None
    recall: float | None = None
    not_measured: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Published:
    """A published figure: its convention (empty: not told) and reference, and the source of both."""

    figure: str
    convention: str
    reference: str
    source: str


TRAINING, VALIDATION = "statistics of the training images (VIRTUAL_imagenet256)", "the same validation images"
PUBLISHED = (
    Published("IBQ rFID 1.37, 1.00", "pytorch-fid, --pixels float", VALIDATION, "SEED-Voken evaluation_image.py"),
    Published("IBQ gFID 2.88 … 2.05", "adm", TRAINING, "SEED-Voken #55"),
    Published("LlamaGen rFID 2.19", "adm", f"{VALIDATION} as an .npz", "LlamaGen #48 (val.sh), reproduced there"),
    Published("the same tokenizer, rFID 4.28", "adm", TRAINING, "LlamaGen #34"),
    Published("the same tokenizer, rFID 2.11", "clean-fid", VALIDATION, "LlamaGen #34"),
    Published("LlamaGen gFID 3.07 … 2.18", "adm", TRAINING, "LlamaGen GETTING_STARTED.md"),
    Published("VAR gFID 1.97 … 1.80", "adm", TRAINING, "VAR README.md"),
    Published("VAR rFID 0.92", "", VALIDATION, "VAR #45, #85"),
    Published("the same tokenizer, rFID 2.70", "adm", TRAINING, "guided-diffusion #161"),
    Published("MaskGIT rFID 2.28", "", VALIDATION, "1d-tokenizer #46, MaskGIT README.md"),
    Published("TiTok rFID 2.21, 1.71", "torch-fidelity", VALIDATION, "1d-tokenizer evaluator/ (8 bit, cut)"),
    Published("RAR gFID 1.48", "adm", TRAINING, "1d-tokenizer #46"),
)
