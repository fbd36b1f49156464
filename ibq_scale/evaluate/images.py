"""Images to evaluate: a prepared data set, a folder of pictures, an ``.npz``, or output of ``sample``."""

from __future__ import annotations

import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ibq_scale.data.convert import decode
from ibq_scale.data.listing import is_picture_name, list_files
from ibq_scale.data.manifest import NAME, load_manifest
from ibq_scale.data.stream import evaluation_images, shares
from ibq_scale.distributed.world import World
from ibq_scale.errors import UserError
from ibq_scale.names import expand_home
from ibq_scale.outputs import SAMPLES

Size = tuple[int, int]
"""Height and width in pixels."""


class Part(NamedTuple):
    """A rank's batch. Images of weight 0 are padding."""

    indices_B: Tensor
    """int64 (B,), in the whole set."""
    images_u8: Tensor
    """uint8 (B, 3, H, W)."""
    weights_B: Tensor
    """float32 (B,), 0 or 1."""


class ImageSet(ABC):
    """Images of one size. `manifest_hash`: hash of a prepared data set, None for others."""

    manifest_hash: str | None = None

    def __init__(self, name: str, count: int, size: Size) -> None:
        self.name = name
        self.count = count
        self.size = size

    @abstractmethod
    def batches(self, world: World, batch: int) -> Iterator[Part]:
        """Every image once over the ranks, with equally many batches of equal size on each rank.

        Batch b of the set goes to rank b mod W, so its content does not depend on the number of ranks.
        """


class PreparedImages(ImageSet):
    def __init__(self, url: str, side: int, limit: int | None) -> None:
        manifest = load_manifest(url, "images")
        super().__init__(url, min(manifest.samples, limit or manifest.samples), (side, side))
        self.manifest_hash = manifest.hash

    def batches(self, world: World, batch: int) -> Iterator[Part]:
        stream = evaluation_images(
            self.name, resolution=self.size[0], rank=world.rank, world_size=world.size, batch=batch, limit=self.count
        )
        for images, weights_B in stream:
            yield Part(images.requests[:, 0], images.images_u8, weights_B)


class _ReadImages(ImageSet):
    @abstractmethod
    def read(self, places: Sequence[int]) -> NDArray[np.uint8]:
        """uint8 (B, H, W, 3) at ascending positions. Positions also grow from call to call."""

    def batches(self, world: World, batch: int) -> Iterator[Part]:
        for places, taken, weights_B in shares(self.count, world.rank, world.size, batch):
            pixels = torch.from_numpy(self.read(taken))
            yield Part(torch.tensor(places), pixels.permute(0, 3, 1, 2), weights_B)


class FolderImages(_ReadImages):
    """Picture files of one size from `list_files`, at any depth, sorted by name."""

    def __init__(self, folder: Path, limit: int | None) -> None:
        self.files = [folder / name for name in list_files(str(folder)).files if is_picture_name(name)][:limit]
        if not self.files:
            raise UserError(f"{folder} holds no pictures, no {SAMPLES} and no {NAME}: there is nothing to measure")
        first = _picture(self.files[0])
        super().__init__(str(folder), len(self.files), (first.shape[0], first.shape[1]))

    def read(self, places: Sequence[int]) -> NDArray[np.uint8]:
        pictures = [_picture(self.files[place]) for place in places]
        for place, picture in zip(places, pictures, strict=True):
            if picture.shape[:2] != self.size:
                raise UserError(
                    f"{self.files[place]} is {picture.shape[0]} x {picture.shape[1]} pixels, others of the folder are "
                    f"{self.size[0]} x {self.size[1]}: 'prepare images' makes a data set of such a folder"
                )
        return np.stack(pictures)


class NpzImages(_ReadImages):
    """``arr_0``, uint8 (N, H, W, 3), of an ``.npz``, streamed, since 50,000 images are 10 GB."""

    def __init__(self, path: Path, limit: int | None) -> None:
        self.path = path
        self._place = -1
        self._stream, shape = self._open()
        self._begin = self._stream.tell()
        count = min(shape[0], limit or shape[0])
        super().__init__(str(path), count, (shape[1], shape[2]))

    def read(self, places: Sequence[int]) -> NDArray[np.uint8]:
        pictures: list[NDArray[np.uint8]] = []
        for place in places:
            # The last one may come again. A stream goes back by reading all before it once more.
            if place != self._place:
                self._last, self._place = self._image(place), place
            pictures.append(np.frombuffer(self._last, np.uint8).reshape(*self.size, 3))
        return np.stack(pictures)

    def _open(self) -> tuple[Any, tuple[int, ...]]:
        try:
            with zipfile.ZipFile(self.path) as archive:
                # The stream keeps the file open.
                stream = archive.open("arr_0.npy")
            version = np.lib.format.read_magic(stream)
            header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
            shape, fortran, dtype = header(stream)
        except FileNotFoundError:
            raise UserError(f"{self.path} does not exist") from None
        except (KeyError, ValueError, OSError, zipfile.BadZipFile):
            raise UserError(f"{self.path} holds no images: expected arr_0 in an .npz") from None
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran or not shape[0]:
            raise UserError(f"{self.path}: arr_0 is {dtype} {shape}, not uint8 (N, height, width, 3)")
        return stream, shape

    def _image(self, place: int) -> bytes:
        count = self.size[0] * self.size[1] * 3
        try:
            self._stream.seek(self._begin + place * count)
            data: bytes = self._stream.read(count)
        except (OSError, EOFError, zipfile.BadZipFile) as e:
            raise UserError(f"{self.path} is damaged: {e}") from None
        if len(data) != count:
            raise UserError(f"{self.path} is truncated")
        return data


def open_images(source: str, size: Size | None, limit: int | None = None) -> ImageSet:
    """The images at `source`. Prepared data are cropped to the square `size`. Others must have `size`, if given.

    UserError if there are none, or of another size.
    """
    path = expand_home(source)
    prepared = "://" in source or (path / NAME).is_file()
    images: ImageSet
    if prepared:
        if size is None:
            raise UserError(f"{source} is a prepared data set: give its --resolution")
        if size[0] != size[1]:
            raise UserError(f"{source} can be cropped to squares only, not to {size[0]} x {size[1]}")
        images = PreparedImages(source, size[0], limit)
    elif path.suffix == ".npz":
        images = NpzImages(path, limit)
    elif (path / SAMPLES).is_file():
        images = NpzImages(path / SAMPLES, limit)
    elif path.is_dir():
        images = FolderImages(path, limit)
    else:
        raise UserError(f"{source} does not exist: give a folder of pictures, an .npz or a prepared data set")
    if size is not None and images.size != size:
        raise UserError(
            f"{source} has images of {images.size[0]} x {images.size[1]} pixels, {size[0]} x {size[1]} are needed: "
            "different resolutions are not comparable"
        )
    return images


def _picture(path: Path) -> NDArray[np.uint8]:
    try:
        return decode(path.read_bytes(), None)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        raise UserError(f"{path} is no picture: {e}") from None
