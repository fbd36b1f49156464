"""Small pictures and files in the forms that people have them, made by code."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ibq_scale.data.index import ShardIndex, index_name
from ibq_scale.data.manifest import load_manifest

Items = Iterable[tuple[str, bytes]]


def photo(seed: int = 0, width: int = 24, height: int = 16) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 255, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def saved(image: Image.Image, form: str = "JPEG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **({"quality": 95} if form == "JPEG" else {}), **options)
    return out.getvalue()


def jpeg(seed: int = 0, **options: Any) -> bytes:
    return saved(photo(seed), **options)


def put(root: Path, *names: str, data: bytes | None = None) -> None:
    for seed, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(jpeg(seed) if data is None else data)


def tar(path: Path, items: Items, mode: str = "w") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode, format=tarfile.USTAR_FORMAT) as t:  # type: ignore[call-overload]
        for name, data in items:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            t.addfile(info, io.BytesIO(data))


def as_json(**values: Any) -> bytes:
    return json.dumps(values).encode()


def samples_of(to: Path) -> list[tuple[str, str, bytes]]:
    """Of a data set: (source name, class name, picture's bytes), sorted."""
    manifest = load_manifest(str(to), "images")
    found = []
    for shard in manifest.shards:
        content = (to / shard.name).read_bytes()
        for m in ShardIndex.from_json((to / index_name(shard.name)).read_text(encoding="utf-8")).members:
            found.append((m.source, manifest.classes[m.label], content[m.offset : m.offset + m.size]))
    return sorted(found)


def labels_of(to: Path) -> dict[str, int]:
    """Samples by class name; a class without one has 0."""
    found = Counter(label for _, label, _ in samples_of(to))
    return {name: found[name] for name in load_manifest(str(to), "images").classes}
