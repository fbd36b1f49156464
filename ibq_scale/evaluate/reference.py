"""References for generated images: statistics of real images, with a stamp of their origin."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch
from torch import Tensor

from ibq_scale import __version__
from ibq_scale.distributed.world import World
from ibq_scale.documents import parse_json
from ibq_scale.errors import UserError
from ibq_scale.evaluate.conventions import CONVENTIONS, DEFAULT, Convention, chosen
from ibq_scale.evaluate.fid import INCEPTION, Inception, Moments
from ibq_scale.evaluate.images import ImageSet, Size, open_images
from ibq_scale.evaluate.scores import gather_rows
from ibq_scale.evaluate.suites import SPATIAL, Sums

# Number of real images for precision and recall in the usual evaluation suite.
FEATURES_KEPT = 10_000
UNSTAMPED = "unstamped"


@dataclass(frozen=True)
class Stamp:
    """The origin of statistics.

    `content`: a data set's manifest hash, for other images the sha256 of their pixels in order. `resolution`: height
    and width. `features`: number of images with stored features. Hashes are sha256, hex.
    """

    data: str
    content: str
    images: int
    crop: str
    resolution: Size
    features: int
    extractor: str
    extractor_sha256: str
    program: str

    @property
    def words(self) -> str:
        return f"{self.images} images of {self.data}, crop {self.crop}, {self.resolution[0]} x {self.resolution[1]}"

    @property
    def hash(self) -> str:
        """Identity of the reference: sha256 of all fields except the data's address and the program's version."""
        values = asdict(self)
        del values["data"], values["program"]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Reference:
    """Moments of all images, and features (R, F) of some of them for precision and recall (None if unknown).

    `moments`: by key, as in `Sums`. `hash`: the stamp's hash, or for a file without one ``unstamped:`` and the sha256
    of its moments.
    """

    moments: dict[str, Moments]
    features_RF: Tensor | None
    hash: str
    stamp: Stamp | None


def measure_reference(
    images: ImageSet,
    inception: Inception,
    world: World,
    *,
    batch: int,
    features: int,
    conventions: Sequence[Convention] = chosen(None),
) -> Reference:
    """Statistics of a set, with features of `features` evenly spaced images, the same on any number of ranks.

    Collective. UserError for fewer than two images.
    """
    if images.count < 2:
        raise UserError(f"{images.name} holds {images.count} image: statistics need two at least")
    kept = torch.from_numpy(np.linspace(0, images.count - 1, min(features, images.count)).round().astype(np.int64))
    sums = Sums(conventions, inception, world.device)
    indices, rows = [], []
    digests: list[int] = []
    for part in images.batches(world, batch):
        seen = sums.update(part.images_u8.to(world.device), part.weights_B)
        # A prepared data set already has a hash.
        digests.extend(0 if images.manifest_hash else _digest(image) for image in part.images_u8)
        indices.append(torch.where(part.weights_B > 0, part.indices_B, -1))
        if seen is not None:
            rows.append(seen.features_BF[torch.isin(indices[-1], kept).to(world.device)])
    index_n = torch.cat(indices)
    features_RF = gather_rows(index_n[torch.isin(index_n, kept)], torch.cat(rows)) if rows else None
    pixels_N = gather_rows(index_n[index_n >= 0], torch.tensor(digests)[index_n >= 0][:, None].to(world.device))
    stamp = Stamp(
        data=images.name,
        content=images.manifest_hash or hashlib.sha256(pixels_N.cpu().numpy().tobytes()).hexdigest(),
        images=images.count,
        crop="centre" if images.manifest_hash else "none",
        resolution=images.size,
        features=0 if features_RF is None else len(features_RF),
        extractor=INCEPTION,
        extractor_sha256=inception.sha256,
        program=__version__,
    )
    return Reference(sums.moments(), features_RF, stamp.hash, stamp)


def write_reference(
    data: str,
    to: Path,
    size: Size | None,
    world: World,
    *,
    batch: int,
    features: int = FEATURES_KEPT,
    conventions: str | None = None,
) -> Stamp:
    """Measures the images at `data`, prepared ones at the centre crop `size`, and writes an ``.npz``. Collective.

    It holds ``mu`` (F,), ``sigma`` (F, F), ``features`` float32 (R, F) and ``stamp``, JSON. `conventions`: names as for
    `chosen`. They add ``mu_s`` and ``sigma_s`` (2023) for ``adm``, and ``mu_NAME`` and ``sigma_NAME`` for those with
    another resize. UserError if the images, the extractor's weights or the file are unusable.
    """
    # The default comes first, since every file holds ``mu`` and ``features``.
    wanted = chosen(f"{DEFAULT},{conventions}") if conventions not in (None, "all") else chosen(conventions)
    reference = measure_reference(
        open_images(data, size), Inception(world.device), world, batch=batch, features=features, conventions=wanted
    )
    assert reference.stamp is not None
    assert reference.features_RF is not None
    if world.is_main:
        arrays: dict[str, Any] = {
            **{f"{name}{key}": array for key, pair in reference.moments.items() for name, array in pair.items()},
            "features": reference.features_RF.cpu().numpy(),
            "stamp": np.array(json.dumps(asdict(reference.stamp))),
        }
        partial = to.with_name(f".{to.name}.partial")
        try:
            to.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as f:
                np.savez(f, **arrays)
            partial.replace(to)
        except OSError as e:
            raise UserError(f"cannot write {to}: {e.strerror}") from None
    return reference.stamp


def load_reference(
    source: str,
    inception: Inception,
    size: Size,
    world: World,
    *,
    batch: int,
    conventions: Sequence[Convention] = chosen(None),
) -> Reference:
    """The reference for images of `size`: a file of `write_reference`, the usual suite's ``.npz``, or images.

    A file may lack the statistics of some conventions. Collective. UserError if it is damaged, or has another
    resolution or extractor.
    """
    path = Path(source)
    arrays = _moments_file(path) if path.suffix == ".npz" and path.is_file() else None
    if arrays is None:
        images = open_images(source, size)
        return measure_reference(images, inception, world, batch=batch, features=FEATURES_KEPT, conventions=conventions)
    moments = {}
    for key in {"", SPATIAL, *(convention.key for convention in CONVENTIONS.values())}:
        if not {f"mu{key}", f"sigma{key}"} <= arrays.keys():
            continue
        width = inception.spatial_width if key == SPATIAL else inception.width
        mu, sigma = arrays[f"mu{key}"], arrays[f"sigma{key}"]
        if mu.shape != (width,) or sigma.shape != (width, width):
            raise UserError(f"{path}: mu{key} {mu.shape} and sigma{key} {sigma.shape} are not Inception's")
        moments[key] = {"mu": mu.astype(np.float64), "sigma": sigma.astype(np.float64)}
    if "stamp" in arrays:
        stamp = _fitting_stamp(path, str(arrays["stamp"]), inception, size)
        features = torch.from_numpy(arrays["features"]).to(world.device)
        return Reference(moments, features, stamp.hash, stamp)
    digest = hashlib.sha256(moments[""]["mu"].tobytes() + moments[""]["sigma"].tobytes()).hexdigest()
    features_RF = None
    if "arr_0" in arrays:
        images = open_images(source, size)
        features_RF = measure_reference(images, inception, world, batch=batch, features=images.count).features_RF
    return Reference(moments, features_RF, f"{UNSTAMPED}:{digest}", None)


def _moments_file(path: Path) -> dict[str, Any] | None:
    """The small arrays of a statistics file, None for an ``.npz`` of images only. ``arr_0`` is listed, not read."""
    try:
        with np.load(cast(BinaryIO, path), allow_pickle=False) as file:
            if not {"mu", "sigma"} <= set(file.files):
                return None
            wanted = [name for name in file.files if name.startswith(("arr_0", "mu", "sigma", "features", "stamp"))]
            return {name: None if name == "arr_0" else file[name] for name in wanted}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as e:
        raise UserError(f"{path} is damaged or no .npz: {e}") from None


def _fitting_stamp(path: Path, text: str, inception: Inception, size: Size) -> Stamp:
    try:
        values = parse_json(text)
        stamp = Stamp(**values | {"resolution": tuple(values["resolution"])})
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{path} has a stamp that this program cannot read: compute it again") from None
    if stamp.extractor_sha256 != inception.sha256:
        raise UserError(
            f"{path} was computed with another extractor (weights {stamp.extractor_sha256[:12]}…, here "
            f"{inception.sha256[:12]}…): their distances are not comparable"
        )
    if stamp.resolution != size:
        raise UserError(
            f"{path} was computed at {stamp.resolution[0]} x {stamp.resolution[1]}, the images are "
            f"{size[0]} x {size[1]}: different resolutions are not comparable"
        )
    return stamp


def _digest(image_u8: Tensor) -> int:
    """63 bits of an image's sha256."""
    content = np.ascontiguousarray(image_u8.permute(1, 2, 0).numpy()).tobytes()
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big") >> 1
