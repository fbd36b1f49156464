"""Images to code shards: every image's codes once, whatever the ranks, and a stopped job goes on."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ibq_scale.data.codes import read_code_shard
from ibq_scale.data.manifest import load_manifest
from ibq_scale.data.store import open_store
from ibq_scale.data.stream import shard_images, to_float
from ibq_scale.distributed.world import World
from ibq_scale.generate.codes import ten_crops, tokenize
from ibq_scale.pretrained.loading import load_tokenizer
from tests.ranks import run_ranks


def _tokenize(
    rank: int, world_size: int, checkpoint: str, data: str, to: str, options: dict[str, Any]
) -> dict[str, Any]:
    world = World(rank, world_size, rank, torch.device("cpu"))
    return dataclasses.asdict(tokenize(checkpoint, data, to, world, batch=4, **options))


@pytest.mark.distributed
def test_codes_of_every_image_on_any_ranks_and_after_a_stop(tokenizer_dir: Path, dataset: str, tmp_path: Path) -> None:
    first = run_ranks(_tokenize, 2, str(tokenizer_dir), dataset, str(tmp_path / "two"), {})[0]
    images, codes = load_manifest(dataset, "images"), load_manifest(str(tmp_path / "two"), "codes")
    assert codes.shard_sizes == images.shard_sizes
    assert codes.classes == images.classes
    tokenizer = load_tokenizer(tokenizer_dir)
    assert codes.codes is not None
    assert (codes.codes.tokenizer, codes.codes.source) == (tokenizer.hash, images.hash)
    assert (first["images"], first["reused_shards"], first["grid"]) == (24, 0, (8, 8))
    store = open_store(str(tmp_path / "two"))
    for number, info in enumerate(codes.shards):
        shard = read_code_shard(store.read(info.name), info.name)
        batch = next(shard_images(dataset, number, resolution=32, batch=100))
        assert np.array_equal(shard.labels, batch.labels)
        assert np.array_equal(shard.codes[:, 0], tokenizer.encode(to_float(batch.images_u8)))

    shutil.copytree(tmp_path / "two", tmp_path / "one")
    (tmp_path / "one/manifest.json").unlink()
    (tmp_path / "one" / codes.shards[1].name).unlink()
    again = run_ranks(_tokenize, 1, str(tokenizer_dir), dataset, str(tmp_path / "one"), {})[0]
    assert again["reused_shards"] == len(codes.shards) - 1
    assert load_manifest(str(tmp_path / "one"), "codes").hash == codes.hash


def _array(rank: int, world_size: int, checkpoint: str, data: str, to: str) -> list[tuple[bool, int]]:
    """Three tasks of an array, one after the other, with ten crops."""
    reports = [
        _tokenize(rank, world_size, checkpoint, data, to, {"crops": "ten", "part": (part, 3)}) for part in (2, 0, 1)
    ]
    return [(report["complete"], report["shards"]) for report in reports]


@pytest.mark.distributed
def test_the_last_task_of_an_array_writes_the_manifest(tokenizer_dir: Path, dataset: str, tmp_path: Path) -> None:
    found = run_ranks(_array, 1, str(tokenizer_dir), dataset, str(tmp_path))[0]
    assert [complete for complete, _ in found] == [False, False, True]
    images, codes = load_manifest(dataset, "images"), load_manifest(str(tmp_path), "codes")
    assert sum(shards for _, shards in found) == len(images.shards) >= 3
    assert codes.shard_sizes == images.shard_sizes
    assert codes.codes is not None
    assert codes.codes.crops == 10
    store = open_store(str(tmp_path))
    shard = read_code_shard(store.read(codes.shards[0].name), codes.shards[0].name)
    square = next(shard_images(dataset, 0, resolution=35, batch=100)).images_u8
    tokenizer = load_tokenizer(tokenizer_dir)
    for crop, part in enumerate(ten_crops(square, 32)):
        assert np.array_equal(shard.codes[:, crop], tokenizer.encode(to_float(part)))
    assert torch.equal(ten_crops(square, 32)[9], square[:, :, 1:33, 1:33].flip(3))
