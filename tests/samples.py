"""Small data to train on: pictures and codes, made from seeds."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image

CLASSES = ("apples", "birds", "cars")
PICTURES_A_CLASS = 8


def write_pictures(root: Path, seed: int = 0) -> None:
    """An ImageFolder of 3 classes × 8 small smooth pictures of several sizes, JPEG and PNG."""
    random = np.random.default_rng(seed)
    for label, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for i in range(PICTURES_A_CLASS):
            coarse = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            coarse[..., label] = 230
            size = (40 + 4 * i, 48)
            picture = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
            picture.save(root / name / f"{i}.{'png' if i % 4 == 3 else 'jpg'}")


def damaged_copy(dataset: str, folder: Path, rows: list[int]) -> Path:
    """A copy whose first shard has a wrong byte inside these samples."""
    from ibq_scale.data.index import ShardIndex, index_name

    shutil.copytree(dataset, folder)
    tar = folder / "images-000000.tar"
    members = ShardIndex.from_json((folder / index_name(tar.name)).read_text()).members
    content = bytearray(tar.read_bytes())
    for row in rows:
        content[members[row].offset + 20] ^= 1
    tar.write_bytes(content)
    return folder


# Of the classes of `write_codes`, one of them empty.
CAPTIONS = ("a red apple", "", "two birds")
# A transformer for the codes of `write_codes`.
SMALL_AR = (
    "model.codebook_size=40",
    "model.tokens=16",
    "model.classes=3",
    "model.depth=2",
    "model.width=32",
    "model.heads=2",
)


def write_codes(
    folder: Path | str,
    seed: int = 0,
    tokenizer: str = "t" * 64,
    *,
    captions: bool = False,
    side: int = 4,
    codebook_size: int = 40,
) -> None:
    """Three shards of 20 samples, side × side of the first 40 codes each, of three classes that the codes tell.

    `captions`: with `CAPTIONS` of the classes, by the encoder ``hash:8`` in 4 vectors.
    """
    from ibq_scale.data.codes import CodeShard, finish_codes, write_code_shard
    from ibq_scale.data.manifest import CodesInfo, ConditionInfo
    from ibq_scale.data.store import open_store
    from ibq_scale.pretrained.text import text_encoder

    store = open_store(str(folder))
    stored = ConditionInfo(encoder="hash:8", tokens=4, width=8, captions="c" * 64) if captions else None
    grid = (side, side)
    info = CodesInfo(codebook_size=codebook_size, grid=grid, tokenizer=tokenizer, source="s" * 64, condition=stored)
    rows = text_encoder("hash:8", 4).encode(CAPTIONS)
    spans = torch.tensor([[sum(map(len, rows[:n])), len(rows[n])] for n in range(3)])
    g = torch.Generator().manual_seed(seed)
    shards = []
    for n in range(3):
        labels = torch.randint(3, (20,), generator=g)
        content = (labels[:, None, None] * 10 + torch.randint(4, (20, side, side), generator=g)) % 40
        condition = (torch.cat(rows).numpy(), spans[labels].numpy()) if captions else ()
        shard = CodeShard(content[:, None].numpy(), labels.numpy(), *condition)
        shards.append(write_code_shard(store, f"codes-{n}.safetensors", shard, info))
    finish_codes(store, shards, ("a", "b", "c"), info)
