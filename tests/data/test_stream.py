"""The stream a run sees: one sequence, whatever the ranks, the workers or the restart."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ibq_scale.config.run import DataConfig
from ibq_scale.data import images as images_module
from ibq_scale.data import stream as stream_module
from ibq_scale.data.folder import LocalStore, Store
from ibq_scale.data.images import BadSampleError, ImageDataset, ImageSample, Request, shard_index
from ibq_scale.data.index import ShardIndex
from ibq_scale.data.manifest import load_manifest, save_manifest
from ibq_scale.data.prepare import shard_info
from ibq_scale.data.sets import open_sets
from ibq_scale.data.store import S3Store, open_store
from ibq_scale.data.stream import (
    PREFETCH,
    DataWorkerDiedError,
    ImageBatch,
    evaluation_images,
    image_stream,
    shard_images,
    validation_images,
)
from ibq_scale.errors import UserError
from tests.nursery import PATIENCE
from tests.samples import damaged_copy

GLOBAL, MICRO = 8, 2


def load_index(store: Path) -> ShardIndex:
    return ShardIndex.from_json((store / "images-000000.tar.index.json").read_text())


def _stream(config: DataConfig, rank: int, world: int, start: int = 0) -> list[ImageBatch]:
    """A rank's micro-batches of five optimizer steps."""
    stream = image_stream(
        open_sets(config, "images"), resolution=32, seed=5, rank=rank, world_size=world, micro_batch=MICRO, start=start
    )
    return list(islice(stream, 5 * GLOBAL // (MICRO * world)))


def _global(config: DataConfig, world: int, start: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels of all ranks, by position."""
    batches = [batch for rank in range(world) for batch in _stream(config, rank, world, start)]
    order = torch.cat([b.requests[:, 0] for b in batches]).argsort()
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
    first = next(
        image_stream(open_sets(config, "images"), resolution=32, seed=5, rank=0, world_size=1, micro_batch=24, start=0)
    )
    second = next(
        image_stream(open_sets(config, "images"), resolution=32, seed=5, rank=0, world_size=1, micro_batch=24, start=24)
    )
    assert Counter(first.labels.tolist()) == Counter(second.labels.tolist()) == {0: 8, 1: 8, 2: 8}
    assert not torch.equal(first.images_u8, second.images_u8)


@pytest.mark.slow
def test_workers_with_a_cache_read_no_store_and_give_the_same(config: DataConfig, dataset: str, tmp_path: Path) -> None:
    """The shards are taken away once they are cached: a worker that went to the store would fail."""
    shutil.copytree(dataset, tmp_path / "store")
    cached = config.model_copy(
        update={"train": str(tmp_path / "store"), "cache_dir": str(tmp_path / "cache"), "workers": 2}
    )
    sets = open_sets(cached, "images")
    images = ImageDataset(sets, resolution=32, random_crop=True, flip=True, seed=5, training=True)
    for shard in range(len(sets.parts[0].manifest.shards)):
        images.fetch(0, shard)
    for tar in (tmp_path / "store").glob("*.tar*"):
        tar.unlink()
    got, labels = _global(cached, 1)
    want, same = _global(config, 1)
    assert torch.equal(got, want)
    assert torch.equal(labels, same)


def _before_samples(monkeypatch: pytest.MonkeyPatch, store: type[Store], call: Callable[[int], object]) -> None:
    """`call` gets the bytes of each range of a shard before it is read. Tables of shards are read by ranges too."""
    read_range = store.read_range

    def watched(self: Store, path: str, start: int, stop: int) -> bytes:
        if path.endswith(".tar"):
            call(stop - start)
        return read_range(self, path, start, stop)

    monkeypatch.setattr(store, "read_range", watched)


def test_the_first_batch_costs_its_own_bytes_and_an_epoch_each_shard_once(
    config: DataConfig, dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through a cache: samples are read singly until their shards are there; then nothing is asked of the store."""
    singly: list[int] = []
    downloads: Counter[str] = Counter()
    download = LocalStore.download

    def counted_download(self: LocalStore, path: str, local: Path) -> None:
        downloads[path] += 1
        download(self, path, local)

    _before_samples(monkeypatch, LocalStore, singly.append)
    monkeypatch.setattr(LocalStore, "download", counted_download)
    monkeypatch.setattr(images_module, "BETWEEN", -1)
    sets = open_sets(config.model_copy(update={"cache_dir": str(tmp_path)}), "images")
    stream = image_stream(sets, resolution=32, seed=5, rank=0, world_size=1, micro_batch=4, start=0)
    rows = [shard_index(sets.parts[0], r[3]).members[r[4]].size for r in next(stream).requests.tolist()]
    assert sorted(singly) == sorted(rows)
    assert not downloads
    part, deadline = sets.parts[0], time.monotonic() + PATIENCE
    while not all(part.cache.has(shard) for shard in part.manifest.shards):
        assert time.monotonic() < deadline
        next(stream)
    assert downloads == {shard.name: 1 for shard in part.manifest.shards}
    # Batches on their way may have been read before.
    list(islice(stream, 2))
    del singly[:]
    list(islice(stream, 12))
    assert not singly
    assert set(downloads.values()) == {1}


@pytest.mark.slow
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    parts=st.lists(
        st.tuples(
            st.sampled_from([1, 2, 3, 4, 8, 16]), st.integers(0, 4), st.sampled_from([1, 2, 3]), st.integers(1, 2)
        ),
        min_size=1,
        max_size=2,
    ),
    lanes=st.integers(1, 5),
    seed=st.integers(0, 3),
)
def test_a_run_killed_and_resumed_with_other_ranks_and_workers_gets_what_the_pure_order_says(
    config: DataConfig, parts: list[tuple[int, int, int, int]], lanes: int, seed: int
) -> None:
    """Each part has its world, workers, micro-batch and steps; then its streams go, with what they had prefetched."""
    done, seen = 0, {}
    batch = math.lcm(*(world * micro for world, _, micro, _ in parts))
    for world, workers, micro, steps in parts:
        # Workers of a few ranks are enough for one machine: the others read alone.
        sets = [
            open_sets(config.model_copy(update={"workers": workers if rank < 2 else 0, "lanes": lanes}), "images")
            for rank in range(world)
        ]
        streams = [
            image_stream(s, resolution=8, seed=seed, rank=rank, world_size=world, micro_batch=micro, start=done)
            for rank, s in enumerate(sets)
        ]
        for _ in range(steps * batch // (world * micro)):
            for stream in streams:
                got = next(stream)
                for request, label in zip(got.requests.tolist(), got.labels.tolist(), strict=True):
                    assert request[0] not in seen
                    seen[request[0]] = (tuple(request[1:]), label)
        del streams
        done += steps * batch
    order = sets[0].order(seed)
    assert sorted(seen) == list(range(done))
    index = {shard: shard_index(sets[0].parts[0], shard) for shard in range(len(sets[0].parts[0].manifest.shards))}
    for position, (place, label) in seen.items():
        assert place == tuple(order.locate(position))
        assert label == index[place[2]].members[place[3]].label
    for epoch in range(done // 24):
        assert len({seen[p][0][2:] for p in range(24 * epoch, 24 * epoch + 24)}) == 24


@pytest.mark.parametrize("world", [1, 3])
def test_evaluation_sees_every_image_once(dataset: str, world: int) -> None:
    seen: Counter[int] = Counter()
    batches = []
    for rank in range(world):
        stream = list(evaluation_images(dataset, resolution=32, rank=rank, world_size=world, batch=5))
        batches.append(len(stream))
        for batch, weights in stream:
            assert len(weights) == 5
            seen.update(batch.requests[:, 0][weights > 0].tolist())
    assert len(set(batches)) == 1, "ranks with fewer batches would hang the others' collectives"
    assert seen == dict.fromkeys(range(24), 1)


def test_an_evaluation_reads_a_few_batches_ahead(dataset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the first batch is being looked at, the next ones are read; and not all of them."""
    plain = [batch.images_u8 for batch, _ in evaluation_images(dataset, resolution=32, rank=0, world_size=1, batch=2)]
    reads: list[int] = []
    ahead = threading.Event()
    original = ImageDataset.__getitems__

    def counted(self: ImageDataset, requests: list[Request]) -> list[ImageSample]:
        found = original(self, requests)
        reads.append(requests[0].position)
        if len(reads) == 1 + PREFETCH:
            ahead.set()
        return found

    monkeypatch.setattr(ImageDataset, "__getitems__", counted)
    stream = evaluation_images(dataset, resolution=32, rank=0, world_size=1, batch=2)
    first, _ = next(stream)
    assert ahead.wait(300), "nothing is read while the caller computes"
    time.sleep(0.05)
    assert reads == [0, 2, 4, 6, 8]
    rest = [batch.images_u8 for batch, _ in stream]
    assert all(torch.equal(a, b) for a, b in zip([first.images_u8, *rest], plain, strict=True))


def test_validation_takes_images_of_everywhere(dataset: str) -> None:
    """Not the first, which are of one class, perhaps; the same each time, and on any number of ranks."""
    sets = open_sets(DataConfig(train=dataset), "images")

    def taken(world_size: int) -> dict[int, tuple[int, ...]]:
        options = {"resolution": 32, "world_size": world_size, "batch": 2, "limit": 9}
        streams = [validation_images(sets, rank=rank, **options) for rank in range(world_size)]
        batches = [(batch.requests, weights) for stream in streams for batch, weights in stream]
        return {int(r[0]): tuple(r[3:].tolist()) for rs, ws in batches for r, w in zip(rs, ws, strict=True) if w > 0}

    assert taken(1) == taken(1) == taken(3)
    assert sorted(taken(1)) == list(range(9))
    natural = evaluation_images(dataset, resolution=32, rank=0, world_size=1, batch=9, limit=9)
    assert list(taken(1).values()) != [tuple(r[3:].tolist()) for r in next(natural)[0].requests]


def test_evaluation_at_native_sizes(dataset: str) -> None:
    """Pictures are 40, 44, … 68 wide and 48 high: cropped in the middle to multiples of 16, never scaled."""
    options = {"resolution": None, "rank": 0, "world_size": 1, "batch": 1}
    whole = [images.images_u8[0] for images, _ in evaluation_images(dataset, **options)]
    cropped = [images.images_u8[0] for images, _ in evaluation_images(dataset, **options, multiple=16)]
    assert {tuple(image.shape) for image in whole} == {(3, 48, width) for width in range(40, 72, 4)}
    for full, image in zip(whole, cropped, strict=True):
        width = full.shape[2] // 16 * 16
        left = (full.shape[2] - width) // 2
        assert torch.equal(image, full[:, :, left : left + width])
    with pytest.raises(UserError, match="48 pixels, 64 are the least"):
        list(evaluation_images(dataset, **options, multiple=64))


def test_shard_images_are_those_of_the_index(dataset: str) -> None:
    batches = list(shard_images(dataset, 1, resolution=32, batch=3))
    size = load_manifest(dataset, "images").shards[1].samples
    assert sum(len(b.labels) for b in batches) == size


@pytest.mark.slow
def test_s3_gives_the_same_stream_as_a_folder(
    config: DataConfig, pictures: Path, new_prefix: Callable[[], str]
) -> None:
    from ibq_scale.data.prepare import prepare_images

    url = new_prefix()
    prepare_images(pictures, url, shard_bytes=8_000)
    images, _ = _global(config.model_copy(update={"train": url}), 2)
    assert torch.equal(images, _global(config, 2)[0])


@pytest.mark.slow
def test_s3_is_read_through_a_cache_unless_one_asks_for_ranges(
    config: DataConfig, pictures: Path, new_prefix: Callable[[], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ibq_scale.data.prepare import prepare_images

    url = new_prefix()
    prepare_images(pictures, url, shard_bytes=8_000)
    monkeypatch.setenv("SLURM_TMPDIR", str(tmp_path / "job"))
    remote = config.model_copy(update={"train": url})
    assert open_sets(config, "images").parts[0].cache is None, "a folder needs no copy"
    assert open_sets(remote.model_copy(update={"cache_dir": None}), "images").parts[0].cache is None
    cache = open_sets(remote, "images").parts[0].cache
    assert cache is not None
    assert cache.folder == tmp_path / "job" / f"ibq_scale-cache-{os.getuid()}"
    assert cache.folder.stat().st_mode & 0o777 == 0o700
    assert 0 < cache.limit < shutil.disk_usage(tmp_path).free
    images, _ = _global(remote, 1)
    assert torch.equal(images, _global(config, 1)[0])
    manifest = load_manifest(url, "images")
    assert {shard.sha256 for shard in manifest.shards} <= {path.name for path in cache.folder.iterdir()}
    os.chown(cache.folder, 12345, -1)
    with pytest.raises(UserError, match="belongs to another user"):
        open_sets(remote, "images")


@pytest.mark.slow
def test_requests_of_a_batch_wait_together(
    config: DataConfig, pictures: Path, new_prefix: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a cache samples are requests of their own where they do not touch; all at once, so one's wait is all."""
    from ibq_scale.data.prepare import prepare_images

    url = new_prefix()
    prepare_images(pictures, url, shard_bytes=8_000)
    together = threading.Barrier(24)
    _before_samples(monkeypatch, S3Store, lambda _: together.wait(PATIENCE))
    monkeypatch.setattr(images_module, "BETWEEN", -1)
    sets = open_sets(config.model_copy(update={"train": url, "cache_dir": None}), "images")
    batch = next(image_stream(sets, resolution=32, seed=5, rank=0, world_size=1, micro_batch=24, start=0))
    whole = open_sets(config, "images")
    expected = next(image_stream(whole, resolution=32, seed=5, rank=0, world_size=1, micro_batch=24, start=0))
    assert torch.equal(batch.images_u8, expected.images_u8)


def test_a_damaged_sample_is_replaced_by_its_neighbour_on_any_number_of_ranks(
    dataset: str, config: DataConfig, tmp_path: Path
) -> None:
    plain = config.model_copy(update={"augment": "center_crop", "flip": False})
    damaged = plain.model_copy(update={"train": str(damaged_copy(dataset, tmp_path / "store", [1]))})
    order = open_sets(plain, "images").order(5)
    bad, neighbour = (next(p for p in range(24) if order.locate(p)[2:] == (0, row)) for row in (1, 2))
    streams = {world: [batch for rank in range(world) for batch in _stream(damaged, rank, world)] for world in (1, 2)}
    assert streams[1][0].images_u8.shape == (MICRO, 3, 32, 32)
    for batches in streams.values():
        images = {int(p): i for b in batches for p, i in zip(b.requests[:, 0], b.images_u8, strict=True)}
        assert torch.equal(images[bad], images[neighbour])
        faults = [fault for b in batches for fault in b.faults]
        # Position 0 … 39 is more than one epoch of 24.
        assert len(faults) == sum(order.locate(p)[2:] == (0, 1) for p in range(5 * GLOBAL))
        assert "images-000000.tar, sample 1 is not what was prepared" in faults[0]
    with pytest.raises(BadSampleError, match="is not what was prepared"):
        list(evaluation_images(damaged.sources[0], resolution=32, rank=0, world_size=1, batch=8))


def test_a_shard_without_one_good_sample_stops(dataset: str, config: DataConfig, tmp_path: Path) -> None:
    rows = list(range(len(load_index(Path(dataset)).members)))
    damaged = config.model_copy(update={"train": str(damaged_copy(dataset, tmp_path / "store", rows))})
    with pytest.raises(BadSampleError, match="no sample of the shard is good"):
        _global(damaged, 1)


def test_a_cache_takes_no_shard_that_has_changed(dataset: str, config: DataConfig, tmp_path: Path) -> None:
    damaged = config.model_copy(update={"train": str(damaged_copy(dataset, tmp_path / "store", [2]))})
    with pytest.raises(UserError, match="is not what the manifest says"):
        _global(damaged.model_copy(update={"cache_dir": str(tmp_path / "cache")}), 1)


def test_shards_indexed_anew_are_read_by_the_new_index_through_an_old_cache(
    dataset: str, config: DataConfig, tmp_path: Path
) -> None:
    """The tar stays, its index gets other labels: what lies in the cache belongs to the old one."""
    shutil.copytree(dataset, tmp_path / "store")
    cached = config.model_copy(update={"train": str(tmp_path / "store"), "cache_dir": str(tmp_path / "cache")})
    before = _global(cached, 1)[1]
    manifest = load_manifest(str(tmp_path / "store"), "images")
    shards = []
    for info in manifest.shards:
        path = tmp_path / "store" / f"{info.name}.index.json"
        index = ShardIndex.from_json(path.read_text())
        members = tuple(dataclasses.replace(m, label=(m.label + 1) % 3) for m in index.members)
        path.write_text(dataclasses.replace(index, members=members).to_json())
        shards.append(shard_info(info.name, dataclasses.replace(index, members=members)))
        # As in sets of earlier versions: indices only.
        path.with_name(f"{info.name}.table").unlink()
    with pytest.raises(UserError, match="is not the one that the manifest means"):
        _global(cached.model_copy(update={"cache_dir": None}), 1)
    save_manifest(open_store(str(tmp_path / "store")), manifest.model_copy(update={"shards": tuple(shards)}))
    assert torch.equal(_global(cached, 1)[1], (before + 1) % 3)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_users_error_comes_out_of_a_worker_as_it_is(
    dataset: str, config: DataConfig, tmp_path: Path, workers: int
) -> None:
    store = shutil.copytree(dataset, tmp_path / "store")
    for index in store.glob("*.index.json"):
        index.write_text(index.read_text() + " ")
        index.with_name(index.name.replace(".index.json", ".table")).write_bytes(b"damaged")
    broken = config.model_copy(update={"train": str(store), "cache_dir": None, "workers": workers})
    with pytest.raises(UserError, match="is not the one that the manifest means") as told:
        next(
            image_stream(
                open_sets(broken, "images"), resolution=32, seed=5, rank=0, world_size=1, micro_batch=2, start=0
            )
        )
    assert len(str(told.value).splitlines()) == 1


def test_sources_are_mixed_by_weight_or_make_one_set(dataset: str, config: DataConfig, tmp_path: Path) -> None:
    shutil.copytree(dataset, tmp_path / "second")
    both = {"train": (dataset, str(tmp_path / "second"))}
    union = config.model_copy(update=both)
    first = next(
        image_stream(open_sets(union, "images"), resolution=32, seed=5, rank=0, world_size=1, micro_batch=48, start=0)
    )
    assert Counter(first.labels.tolist()) == {0: 16, 1: 16, 2: 16}, "each sample of both once"
    weighted = config.model_copy(update=both | {"weights": (3.0, 1.0)})
    assert torch.equal(_global(weighted, 1)[0], _global(weighted, 4)[0])
    tiny = config.model_copy(update=both | {"weights": (1.0, 1e-5)})
    with pytest.raises(UserError, match="would never come up"):
        _global(tiny, 1)


def test_the_indices_of_many_shards_stay_small(dataset: str, config: DataConfig) -> None:
    sets = open_sets(config, "images")
    images = ImageDataset(sets, resolution=32, random_crop=False, flip=False, seed=0, training=True, shards_in_memory=2)
    for shard, info in enumerate(sets.parts[0].manifest.shards):
        images[Request(0, 0, 0, shard, info.samples - 1)]
        assert len(images._tables) <= 2


@pytest.mark.slow
def test_a_killed_worker_ends_the_stream_and_does_not_hang(config: DataConfig) -> None:
    sets = open_sets(config.model_copy(update={"workers": 1}), "images")
    stream = image_stream(sets, resolution=32, seed=5, rank=0, world_size=1, micro_batch=2, start=0)
    next(stream)
    workers = [
        child
        for child in psutil.Process().children(recursive=True)
        if "forkserver" in " ".join(child.cmdline()) and child.children() == []
    ]
    assert workers
    for worker in workers:
        worker.kill()
    # What torch raises depends on what the worker was doing; it is one error here.
    with pytest.raises(DataWorkerDiedError, match=r"a data worker on .* died"):
        list(islice(stream, 100))


@pytest.mark.parametrize(
    ("met", "raised"),
    [
        # Its socket closed, or broke, while a batch's memory was taken over.
        (EOFError(), DataWorkerDiedError),
        (ConnectionResetError("reset by peer"), DataWorkerDiedError),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), DataWorkerDiedError),
        # A living worker met these: they are the sample's or the store's fault.
        (EOFError("Caught EOFError in DataLoader worker process 0."), EOFError),
        (ConnectionError("Caught ConnectionError in DataLoader worker process 0."), ConnectionError),
        (RuntimeError("shapes do not match"), RuntimeError),
    ],
)
def test_a_dead_workers_error_is_told_from_others(met: Exception, raised: type[Exception]) -> None:
    def batches() -> Iterator[int]:
        yield 1
        raise met

    stream = stream_module._until_a_worker_dies(batches())
    assert next(stream) == 1
    with pytest.raises(raised) as caught:
        next(stream)
    assert type(caught.value) is raised


@pytest.mark.slow
def test_workers_outlive_a_signal_to_their_group_but_not_their_trainers_exit(dataset: str) -> None:
    """The program keeps its iterator to the end, as a traceback would: its exit must not wait for ever."""
    program = (
        "import os, signal, subprocess; from ibq_scale.config.run import DataConfig;"
        "from ibq_scale.data.sets import open_sets; from ibq_scale.data.stream import image_stream;"
        f"data = DataConfig(train={dataset!r}, workers=1);"
        "sets = open_sets(data, 'images');"
        "s = image_stream(sets, resolution=32, seed=0, rank=0, world_size=1, micro_batch=2, start=0);"
        "next(s);"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.signal(signal.SIGUSR1, signal.SIG_IGN);"
        # Sent by another process, as Slurm does.
        "[subprocess.run(['kill', '-' + s, '--', f'-{os.getpgid(0)}']) for s in ('TERM', 'USR1')];"
        "[next(s) for _ in range(500)]; print('alive', flush=True); keep = [s]; raise SystemExit(3)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], start_new_session=True, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (3, "alive\n"), done.stderr
