"""Data sets as others write them, made of the pictures of an ImageFolder."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from pyarrow import parquet


class Picture(NamedTuple):
    data: bytes
    extension: str
    label: int


def pictures_of(folder: Path) -> list[Picture]:
    """Sorted by name, so that neighbours are of one class."""
    names = sorted(p.name for p in folder.iterdir())
    files = [(label, p) for label, name in enumerate(names) for p in sorted((folder / name).iterdir())]
    return [Picture(p.read_bytes(), p.suffix[1:], label) for label, p in files]


def write_tar(path: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> None:
    """(key, members by extension) into a tar of Python's default format."""
    with tarfile.open(path, "w") as tar:
        for key, members in samples:
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def _webdataset(i: int, p: Picture) -> Mapping[str, bytes]:
    return {"cls": str(p.label).encode(), p.extension: p.data}


def _img2dataset(i: int, p: Picture) -> Mapping[str, bytes]:
    meta = {"url": f"http://host/{i}", "aesthetic": i / 2, "label": p.label, "width": 1, "nested": {"score": i}}
    return {"jpg": p.data, "json": json.dumps(meta).encode(), "txt": b"a caption"}


def _pretraining(i: int, p: Picture) -> Mapping[str, bytes]:
    return {"txt": b"a caption", "mask.npy": b"\0" * 700, f"jpeg.{p.extension}": p.data, "CLS": str(p.label).encode()}


LAYOUTS: dict[str, Callable[[int, Picture], Mapping[str, bytes]]] = {
    "webdataset": _webdataset,
    "img2dataset": _img2dataset,
    "pretraining": _pretraining,
}


def write_tars(folder: Path, pictures: list[Picture], layout: str, *, samples: int = 7, prefix: str = "") -> None:
    """Tars of `samples` each, keys unique over all of them."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, begin in enumerate(range(0, len(pictures), samples)):
        part = [
            (f"{prefix}{i:09d}", LAYOUTS[layout](i, p)) for i, p in enumerate(pictures[begin : begin + samples], begin)
        ]
        write_tar(folder / f"{number:05d}.tar", part)


def write_parquet(folder: Path, pictures: list[Picture], column: str = "image", **columns: list[Any]) -> None:
    """Two files of row groups of five, as Hugging Face's `datasets` writes them."""
    (folder / "data").mkdir(parents=True)
    values: list[Any] = [{"bytes": p.data, "path": None} for p in pictures]
    if column != "image":
        values = [p.data for p in pictures]
    table = pa.table({column: values, **columns})
    if "label" in columns:
        features = {"info": {"features": {"label": {"names": ["apples", "birds", "cars"], "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    half = len(pictures) // 2
    for number, part in enumerate((table.slice(0, half), table.slice(half))):
        parquet.write_table(part, folder / f"data/train-{number:05d}-of-00002.parquet", row_group_size=5)
