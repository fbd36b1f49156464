"""The stream a run sees: one sequence, whatever the ranks, the workers or the restart."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch

from ibq_scale.config.run import DataConfig
from ibq_scale.data.cache import ShardCache
from ibq_scale.data.images import CorruptSampleError
from ibq_scale.data.index import ShardIndex
from ibq_scale.data.manifest import load_manifest
from ibq_scale.data.store import open_store
from ibq_scale.data.stream import ImageBatch, evaluation_images, image_stream, shard_images
from ibq_scale.errors import UserError

GLOBAL, MICRO = 8, 2


def load_index(store: Path) -> ShardIndex:
    return ShardIndex.from_json((store / "images-000000.tar.index.json").read_text())


def _stream(config: DataConfig, rank: int, world: int, start: int = 0) -> list[ImageBatch]:
    """A rank's micro-batches of five optimizer steps."""
    stream = image_stream(config, resolution=32, seed=5, rank=rank, world_size=world, micro_batch=MICRO, start=start)
    return list(islice(stream, 5 * GLOBAL // (MICRO * world)))


def _global(config: DataConfig, world: int, start: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels of all ranks, by position."""
    batches = [batch for rank in range(world) for batch in _stream(config, rank, world, start)]
    order = torch.cat([b.positions for b in batches]).argsort()
    return torch.cat([b.images_u8 for b in batches])[order], torch.cat([b.labels for b in batches])[order]


@pytest.fixture(scope="module")
def config(dataset: str) -> DataConfig:
    return DataConfig(train=dataset, workers=0, lanes=3, window=2, flip=True)


def test_any_number_of_ranks_sees_the_same_samples_with_the_same_crops(config: DataConfig) -> None:
    images, labels = _global(config, 1)
    for world in (2, 4):
        more, same = _global(config, world)
        assert torch.equal(more, images)
        assert torch.equal(same, labels)


def test_a_restart_takes_up_the_sequence(config: DataConfig) -> None:
    images, _ = _global(config, 2)
    later, _ = _global(config, 1, start=2 * GLOBAL)
    assert torch.equal(images[2 * GLOBAL :], later[: 3 * GLOBAL])


def test_an_epoch_holds_every_sample_once_and_the_next_crops_otherwise(config: DataConfig) -> None:
    first = next(image_stream(config, resolution=32, seed=5, rank=0, world_size=1, micro_batch=24, start=0))
    second = next(image_stream(config, resolution=32, seed=5, rank=0, world_size=1, micro_batch=24, start=24))
    assert Counter(first.labels.tolist()) == Counter(second.labels.tolist()) == {0: 8, 1: 8, 2: 8}
    assert not torch.equal(first.images_u8, second.images_u8)


@pytest.mark.slow
def test_workers_with_a_cache_read_no_store_and_give_the_same(config: DataConfig, dataset: str, tmp_path: Path) -> None:
    """The shards are taken away once they are cached: a worker that went to the store would fail."""
    shutil.copytree(dataset, tmp_path / "store")
    cached = config.model_copy(
        update={"train": str(tmp_path / "store"), "cache_dir": str(tmp_path / "cache"), "workers": 2}
    )
    cache = ShardCache(tmp_path / "cache", 10**9, open_store(str(tmp_path / "store")))
    from ibq_scale.data.images import ImageDataset

    manifest = load_manifest(str(tmp_path / "store"), "images")
    images = ImageDataset(manifest, cache.store, cache, resolution=32, random_crop=True, flip=True, seed=5)
    for shard in range(len(manifest.shards)):
        images.fetch(shard)
    for tar in (tmp_path / "store").glob("*.tar*"):
        tar.unlink()
    got, labels = _global(cached, 1)
    want, same = _global(config, 1)
    assert torch.equal(got, want)
    assert torch.equal(labels, same)


@pytest.mark.parametrize("world", [1, 3])
def test_evaluation_sees_every_image_once(dataset: str, world: int) -> None:
    seen: Counter[int] = Counter()
    batches = []
    for rank in range(world):
        stream = list(evaluation_images(dataset, resolution=32, rank=rank, world_size=world, batch=5))
        batches.append(len(stream))
        for batch, weights in stream:
            assert len(weights) == 5
            seen.update(batch.positions[weights > 0].tolist())
    assert len(set(batches)) == 1, "ranks with fewer batches would hang the others' collectives"
    assert seen == dict.fromkeys(range(24), 1)


def test_shard_images_are_those_of_the_index(dataset: str) -> None:
    batches = list(shard_images(dataset, 1, resolution=32, batch=3))
    size = load_manifest(dataset, "images").shards[1].samples
    assert sum(len(b.labels) for b in batches) == size


def test_s3_gives_the_same_stream_as_a_folder(
    config: DataConfig, pictures: Path, new_prefix: Callable[[], str]
) -> None:
    from ibq_scale.data.prepare import prepare_images

    url = new_prefix()
    prepare_images(pictures, url, shard_bytes=8_000)
    images, _ = _global(config.model_copy(update={"train": url}), 2)
    assert torch.equal(images, _global(config, 2)[0])


def test_changed_bytes_are_never_trained_on(dataset: str, config: DataConfig, tmp_path: Path) -> None:
    shutil.copytree(dataset, tmp_path / "store")
    tar = tmp_path / "store/images-000000.tar"
    content = bytearray(tar.read_bytes())
    content[load_index(tmp_path / "store").members[2].offset + 20] ^= 1
    tar.write_bytes(content)
    damaged = config.model_copy(update={"train": str(tmp_path / "store")})
    with pytest.raises(CorruptSampleError, match="is not what was prepared"):
        _global(damaged, 1)
    with pytest.raises(UserError, match="is not what the manifest says"):
        _global(damaged.model_copy(update={"cache_dir": str(tmp_path / "cache")}), 1)


def test_the_cache_evicts_the_oldest_but_never_what_was_just_used(dataset: str, tmp_path: Path) -> None:
    import os

    manifest = load_manifest(dataset, "images")
    first, second, third = manifest.shards[:3]
    cache = ShardCache(tmp_path, first.bytes + second.bytes, open_store(dataset))
    cache.fetch(first)
    cache.fetch(second)
    os.utime(cache.path(first), (1, 1))
    cache.fetch(third)
    assert not cache.path(first).exists()
    assert cache.path(second).exists()
    assert cache.path(third).exists()
