"""Class-conditional images: codes from the transformer, pixels from the tokenizer, an ``.npz`` and a PNG grid.

Image i of a job is a pure function of (weights, settings, i, its label): ranks and batches only divide the work.
"""

from __future__ import annotations

import json
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from ibq_scale.distributed.environment import World
from ibq_scale.errors import UserError
from ibq_scale.models.sampling import SamplingSettings
from ibq_scale.pictures import image_grid, save_png, to_uint8
from ibq_scale.pretrained.loading import ARModel, Tokenizer

GRID_CLASSES, GRID_COLUMNS = 16, 8
CHUNK = 256
SAMPLES, GRID, FACTS = "samples.npz", "grid.png", "samples.json"


@dataclass(frozen=True)
class SampleReport:
    """What a job wrote. `tokens_per_s` counts codes of all ranks over the whole job's time, decoding included."""

    folder: str
    images: int
    classes: list[int]
    per_class: int
    settings: SamplingSettings
    tokenizer: str
    seconds: float
    images_per_s: float
    tokens_per_s: float


def check_pair(ar: ARModel, tokenizer: Tokenizer) -> None:
    """UserError where the transformer's codes are not this tokenizer's."""
    if ar.tokenizer_hash is not None and ar.tokenizer_hash != tokenizer.hash:
        raise UserError(
            f"the transformer was trained on codes of tokenizer {ar.tokenizer_hash[:12]}…, this is "
            f"{tokenizer.hash[:12]}…: give the checkpoint that wrote its codes"
        )
    if ar.config.codebook_size != tokenizer.quantizer_config.codebook_size:
        raise UserError(
            f"the transformer knows {ar.config.codebook_size} codes, the tokenizer "
            f"{tokenizer.quantizer_config.codebook_size}: they do not belong together"
        )


def sample(
    ar: ARModel,
    tokenizer: Tokenizer,
    classes: Sequence[int],
    per_class: int,
    settings: SamplingSettings,
    to: Path,
    world: World,
    *,
    batch: int,
) -> SampleReport:
    """Writes `per_class` images of each class: ``samples.npz`` (arr_0 uint8 (N, H, W, 3), arr_1 labels int64 (N,)),
    ``grid.png`` and ``samples.json``. Collective.

    UserError for a class that the model has not, or a tokenizer that is not the transformer's.
    """
    begin = time.perf_counter()
    check_pair(ar, tokenizer)
    wrong = [c for c in classes if not 0 <= c < ar.config.classes]
    if wrong or not classes:
        raise UserError(f"class {wrong[0] if wrong else '(none)'}: the model has classes 0 to {ar.config.classes - 1}")
    labels = np.repeat(np.asarray(classes, dtype=np.int64), per_class)
    if world.is_main:
        to.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    shares = np.array_split(np.arange(len(labels)), world.size)
    _write_part(ar, tokenizer, labels, shares[world.rank], settings, _part(to, world.rank), batch)
    dist.barrier()
    seconds = time.perf_counter() - begin
    report = SampleReport(
        folder=str(to),
        images=len(labels),
        classes=list(classes),
        per_class=per_class,
        settings=settings,
        tokenizer=tokenizer.hash,
        seconds=seconds,
        images_per_s=len(labels) / seconds,
        tokens_per_s=len(labels) * ar.config.tokens / seconds,
    )
    if world.is_main:
        _assemble(to, [_part(to, rank) for rank in range(world.size)], labels, per_class, report)
    dist.barrier()
    return report


def _part(folder: Path, rank: int) -> Path:
    return folder / f".part-{rank:05d}.npy"


@torch.inference_mode()
def _write_part(
    ar: ARModel,
    tokenizer: Tokenizer,
    labels: np.ndarray[tuple[int, ...], np.dtype[np.int64]],
    ids: np.ndarray[tuple[int, ...], np.dtype[np.int64]],
    settings: SamplingSettings,
    path: Path,
    batch: int,
) -> None:
    """One rank's images, in the order of their ids, straight to disk: 50,000 images need no memory."""
    side = ar.config.grid * tokenizer.downsampling
    if len(ids) == 0:
        np.save(path, np.empty((0, side, side, 3), np.uint8))
        return
    out = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(len(ids), side, side, 3))
    for first in range(0, len(ids), batch):
        chosen = ids[first : first + batch]
        codes_BT = ar.generate(
            torch.from_numpy(labels[chosen]),
            **asdict(settings),
            ids=torch.from_numpy(chosen),
        )
        # One by one: convolutions of another number of images round otherwise, and a pixel may be another then.
        for place, codes_T in enumerate(codes_BT, start=first):
            image = tokenizer.decode(codes_T.view(1, ar.config.grid, ar.config.grid))
            out[place] = to_uint8(image)[0].permute(1, 2, 0).cpu().numpy()
    out.flush()


def _assemble(
    folder: Path,
    parts: list[Path],
    labels: np.ndarray[tuple[int, ...], np.dtype[np.int64]],
    per_class: int,
    report: SampleReport,
) -> None:
    arrays = [np.load(part, mmap_mode="r") for part in parts]
    partial = folder / f".{SAMPLES}.partial"
    # An .npz is a zip of .npy files: streamed here, because numpy's own writer wants the whole array in memory.
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as f:
            header = {"descr": "|u1", "fortran_order": False, "shape": (len(labels), *arrays[0].shape[1:])}
            np.lib.format.write_array_header_1_0(f, header)
            for array in arrays:
                for first in range(0, len(array), CHUNK):
                    f.write(array[first : first + CHUNK].tobytes())
        with archive.open("arr_1.npy", "w") as f:
            np.lib.format.write_array(f, labels)
    partial.replace(folder / SAMPLES)
    shown = list(_grid_rows(arrays, len(labels), per_class))
    columns = min(per_class, GRID_COLUMNS)
    save_png(folder / GRID, image_grid(torch.from_numpy(np.stack(shown)).permute(0, 3, 1, 2), columns))
    (folder / FACTS).write_text(json.dumps(asdict(report), indent=1) + "\n")
    for part in parts:
        part.unlink()


def _grid_rows(
    arrays: list[np.ndarray[tuple[int, ...], np.dtype[np.uint8]]], count: int, per_class: int
) -> Iterator[np.ndarray[tuple[int, ...], np.dtype[np.uint8]]]:
    """The first images of the first classes, a class a row."""
    starts = np.cumsum([0, *(len(a) for a in arrays)])
    for first in range(0, min(count, GRID_CLASSES * per_class), per_class):
        for i in range(first, first + min(per_class, GRID_COLUMNS)):
            part = int(np.searchsorted(starts, i, side="right")) - 1
            yield np.asarray(arrays[part][i - starts[part]])
