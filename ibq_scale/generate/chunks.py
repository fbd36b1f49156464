"""Files of a sampling job: one per chunk of images, and at the end one ``.npz`` and a grid of pictures."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import zipfile
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ibq_scale.documents import read_json
from ibq_scale.outputs import FACTS, GRID, SAMPLES
from ibq_scale.pictures import image_grid, save_png

GRID_CLASSES, GRID_COLUMNS = 16, 8
PARTS = ".parts"
Images = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]


@dataclass(frozen=True)
class Job:
    """The images to make: `labels`, with `per_class` consecutive images a class, cut into chunks of `batch`.

    `depends`: the other inputs of the images: weights, settings, precision. `side`: pixels.
    """

    labels: tuple[int, ...]
    per_class: int
    batch: int
    side: int
    depends: dict[str, Any]

    @cached_property
    def hash(self) -> str:
        """sha256 (hex), stored in chunks to tell the chunks of another job."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    @property
    def chunks(self) -> int:
        return math.ceil(len(self.labels) / self.batch)

    def size(self, chunk: int) -> int:
        """Number of images in a chunk. The last one may have fewer."""
        return min(self.batch, len(self.labels) - chunk * self.batch)

    def rows(self, chunk: int) -> tuple[list[int], list[int]]:
        """Labels of a full batch, and each image's index in its class. The last chunk repeats its last image."""
        first = chunk * self.batch
        places = [min(i, len(self.labels) - 1) for i in range(first, first + self.batch)]
        return [self.labels[i] for i in places], [i % self.per_class for i in places]


class Chunks:
    """The chunks of a job in DIR/.parts, each an ``.npz`` with the job's hash. The zip's CRCs detect damage."""

    def __init__(self, folder: Path, job: Job) -> None:
        self.folder, self.job = folder, job
        self._parts = folder / PARTS

    def write(self, number: int, images_BHW3: Images) -> None:
        self._parts.mkdir(parents=True, exist_ok=True)
        partial = self._parts / f".{number}.{os.getpid()}.partial"
        with partial.open("wb") as f:
            np.savez(f, arr_0=images_BHW3, job=np.array(self.job.hash))
        partial.replace(self._path(number))

    def read(self, number: int) -> Images | None:
        """uint8 (B, H, W, 3), None if the chunk is missing, damaged, or of another job."""
        try:
            with np.load(self._path(number)) as content:
                if str(content["job"]) != self.job.hash:
                    return None
                images: Images = content["arr_0"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None
        whole = images.shape == (self.job.size(number), self.job.side, self.job.side, 3) and images.dtype == np.uint8
        return images if whole else None

    def assemble(self, facts: str, part: int) -> bool:
        """Writes the job's files from its chunks, one at a time, and removes the chunks. False if one is missing.

        `part`: separates the temporary files of two array tasks that end together.
        """
        if not all(self._path(number).is_file() for number in range(self.job.chunks)):
            return is_finished(self.folder, self.job)
        partial = self.folder / f".{SAMPLES}.{part}.partial"
        pictures = self._stream(partial)
        if pictures is None:
            partial.unlink()
            # Another task may have assembled the job and removed its chunks meanwhile.
            return is_finished(self.folder, self.job)
        partial.replace(self.folder / SAMPLES)
        columns = min(self.job.per_class, GRID_COLUMNS)
        save_png(self.folder / GRID, image_grid(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2), columns))
        partial = self.folder / f".{FACTS}.{part}.partial"
        partial.write_text(facts, encoding="utf-8")
        partial.replace(self.folder / FACTS)
        shutil.rmtree(self._parts, ignore_errors=True)
        return True

    def _stream(self, path: Path) -> list[Images] | None:
        """Streams an ``.npz``, a zip of ``.npy`` files. numpy's own writer needs the whole array in memory.

        Returns the grid's pictures, None if a chunk is damaged.
        """
        job, pictures = self.job, []
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(job.labels), job.side, job.side, 3)}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            # ZipInfo has a fixed date, so the same images give the same bytes.
            with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as f:
                np.lib.format.write_array_header_1_0(f, header)
                for number in range(job.chunks):
                    images = self.read(number)
                    if images is None:
                        return None
                    f.write(images.tobytes())
                    first = number * job.batch
                    pictures += [images[i] for i in range(len(images)) if self._in_grid(first + i)]
            with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as f:
                np.lib.format.write_array(f, np.asarray(job.labels, dtype=np.int64))
        return pictures

    def _in_grid(self, image: int) -> bool:
        """The first images of the first classes, one row per class."""
        return image // self.job.per_class < GRID_CLASSES and image % self.job.per_class < GRID_COLUMNS

    def _path(self, number: int) -> Path:
        return self._parts / f"{number:06d}.npz"


def is_finished(folder: Path, job: Job) -> bool:
    """Whether all files of the job exist. Reads the ``.npz`` once to check its CRCs."""
    try:
        if read_json(folder / FACTS).get("job") != job.hash or not (folder / GRID).is_file():
            return False
        with zipfile.ZipFile(folder / SAMPLES) as archive:
            return archive.testzip() is None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return False
