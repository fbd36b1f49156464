"""The order by aspects: a step has one bucket, every sample comes once an epoch, on any ranks and after any restart."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ibq_scale.config.aspects import crop_sizes, nearest
from ibq_scale.config.layers import resolve
from ibq_scale.config.run import DataConfig
from ibq_scale.data.buckets import Buckets
from ibq_scale.data.describe import describe
from ibq_scale.data.images import shard_index
from ibq_scale.data.order import VERSIONS
from ibq_scale.data.prepare import prepare_images
from ibq_scale.data.sets import DataSets, open_sets
from ibq_scale.data.stream import image_stream, rank_positions, validation_images
from ibq_scale.errors import UserError
from ibq_scale.supervise.compatible import open_held_out

ASPECTS = ("1:1", "4:3")


def _order(sizes: list[list[int]], buckets: list[int], batch: int, lanes: int, version: int = 2) -> Buckets:
    bucket_of = iter(buckets)
    return Buckets(sizes, [np.array([next(bucket_of) for _ in part]) for part in sizes], batch, 3, lanes, 2, version)


@settings(max_examples=40)
@given(
    sizes=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=3),
    buckets=st.lists(st.sampled_from([0, 2, 3]), min_size=12, max_size=12),
    batch=st.sampled_from([4, 8]),
    lanes=st.integers(1, 6),
    version=st.sampled_from(sorted(VERSIONS)),
)
def test_a_step_has_one_bucket_and_every_sample_comes_once_an_epoch(
    sizes: list[list[int]], buckets: list[int], batch: int, lanes: int, version: int
) -> None:
    order = _order(sizes, buckets, batch, lanes, version)
    total = sum(map(sum, sizes))
    steps = 3 * total
    places = [order.locate(position) for position in range(steps * batch)]
    number = {(p.source, p.shard): int(order.set_of(p.source, np.array([p.shard]))[0]) for p in places}
    of_step = [{number[p.source, p.shard] for p in places[s * batch : (s + 1) * batch]} for s in range(steps)]
    assert all(len(found) == 1 for found in of_step)
    for bucket, part in enumerate(order.passes(steps * batch)):
        taken = sum(bucket in found for found in of_step)
        # Here of whole periods the share is exact. On the way it is nearly so.
        assert part.read == taken * batch == 3 * part.samples * batch
        for step in range(0, steps, 7):
            done = sum(bucket in found for found in of_step[:step])
            assert abs(done - step * part.samples / total) <= 1.5
            assert order.passes(step * batch)[bucket].read == done * batch
        seen = Counter((p.epoch, p[0], *p[2:]) for p in places if number[p.source, p.shard] == bucket)
        assert set(seen.values()) == {1}
        assert Counter(epoch for epoch, *_ in seen) == dict.fromkeys(range(part.read // part.samples), part.samples)


def test_ranks_and_restarts_do_not_change_a_step() -> None:
    order = _order([[30, 11, 17, 9, 24, 40]], [0, 1, 0, 2, 1, 1], 16, 8)
    expected = [sorted(range(first, first + 16)) for first in range(0, 160, 16)]
    for world, micro in ((1, 16), (1, 4), (2, 4), (4, 2), (4, 4)):
        for start in (0, 48):
            streams = [rank_positions(order, start, rank, world, micro) for rank in range(world)]
            found = [
                sorted(p for _ in range(16 // (world * micro)) for stream in streams for p in next(stream))
                for _ in range(3)
            ]
            assert found == expected[start // 16 : start // 16 + 3]
    # Each rank reads its own part of the line.
    place = order.locate(0)
    assert sum(order.part(place, n / 4, (n + 1) / 4) > 0 for n in range(4)) >= 1


@pytest.fixture(scope="module")
def bucketed(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    to = str(tmp_path_factory.mktemp("bucketed"))
    prepare_images(pictures, to, shard_bytes=8_000, aspects=["8:6", "1:1"])
    return to


def _open(url: str, batch: int = 4, aspects: tuple[str, ...] = ASPECTS) -> DataSets:
    return open_sets(DataConfig(train=url, aspects=aspects, workers=0), "images", batch)


def test_shards_have_pictures_of_one_aspect(bucketed: str, dataset: str, pictures: Path, tmp_path: Path) -> None:
    sets, plain = _open(bucketed), open_sets(DataConfig(train=dataset), "images").parts[0]
    manifest = sets.parts[0].manifest
    assert manifest.aspects is not None
    assert manifest.aspects.names == ASPECTS
    names: list[str] = []
    for shard, bucket in enumerate(manifest.aspects.of_shard):
        assert manifest.shards[shard].name.endswith(f"{ASPECTS[bucket].replace(':', 'x')}.tar")
        for member in shard_index(sets.parts[0], shard).members:
            # Its number is in the picture's width: see `write_pictures`.
            assert nearest(ASPECTS, 40 + 4 * int(Path(member.source).stem), 48) == bucket
            names.append(member.source)
    others = [m.source for shard in range(len(plain.manifest.shards)) for m in shard_index(plain, shard).members]
    assert sorted(names) == sorted(others)
    assert describe(bucketed, pick=0).facts["samples"] == 24
    # Stopped within its shards it goes on, and writes the same.
    again = tmp_path / "again"
    prepare_images(pictures, str(again), shard_bytes=8_000, aspects=ASPECTS)
    before = {path.name: path.read_bytes() for path in again.iterdir()}
    (again / manifest.shards[0].name).unlink()
    report = prepare_images(pictures, str(again), shard_bytes=8_000, aspects=ASPECTS)
    assert 0 < report.reused_shards < report.shards
    assert {path.name: path.read_bytes() for path in again.iterdir()} == before
    assert report.manifest == manifest.hash


def test_batches_have_the_crops_of_their_aspect(bucketed: str) -> None:
    sets, crops = _open(bucketed), crop_sizes(ASPECTS, 32, 4)
    assert crops == ((32, 32), (36, 28))
    where = {"resolution": 32, "seed": 5, "crops": crops}
    whole = list(islice(image_stream(sets, rank=0, world_size=1, micro_batch=4, start=0, **where), 12))
    shapes = Counter(tuple(batch.images_u8.shape[1:]) for batch in whole)
    assert shapes == {(3, 32, 32): 6, (3, 28, 36): 6}
    halves = [image_stream(sets, rank=rank, world_size=2, micro_batch=2, start=12, **where) for rank in range(2)]
    for batch in whole[3:6]:
        parts = [next(stream) for stream in halves]
        pixels = {int(r[0]): image for part in parts for r, image in zip(part.requests, part.images_u8, strict=True)}
        for request, image in zip(batch.requests, batch.images_u8, strict=True):
            assert (pixels[int(request[0])] == image).all()


def test_validation_takes_its_share_of_each_aspect(bucketed: str, pictures: Path, tmp_path: Path) -> None:
    prepare_images(pictures, str(tmp_path), aspects=ASPECTS, seed=1)
    words = [
        f"data.train={bucketed}",
        "data.aspects=[1:1,4:3]",
        "model.resolution=32",
        "model.attention_resolutions=[]",
    ]
    run = resolve("tokenizer/tiny", [*words, f"validation.data={tmp_path}"]).config
    sets = open_held_out(run, _open(bucketed), "images")
    assert sets.config.aspects == ASPECTS

    def taken(world_size: int, limit: int) -> tuple[dict[int, tuple[int, ...]], Counter[tuple[int, ...]]]:
        options = {
            "resolution": 32,
            "world_size": world_size,
            "batch": 2,
            "limit": limit,
            "crops": ((32, 32), (36, 28)),
        }
        found, shapes = {}, Counter[tuple[int, ...]]()
        for together in zip(*(validation_images(sets, rank=r, **options) for r in range(world_size)), strict=True):
            assert len({batch.images_u8.shape for batch, _ in together}) == 1, "all ranks have one shape at a time"
            for batch, weights in together:
                real = batch.requests[weights > 0]
                found |= {int(request[0]): tuple(request[3:].tolist()) for request in real}
                shapes[tuple(batch.images_u8.shape[2:])] += len(real)
        return found, shapes

    assert taken(1, 9) == taken(3, 9)
    assert (sorted(taken(2, 9)[0]), taken(2, 9)[1]) == (list(range(10)), {(32, 32): 5, (28, 36): 5})
    assert len(set(taken(2, 10**6)[0].values())) == 24
    # Of other aspects: squares.
    run = resolve("tokenizer/tiny", [*words, "data.aspects=[1:1]", f"validation.data={tmp_path}"]).config
    assert open_held_out(run, _open(bucketed), "images").config.aspects == ()


def test_sets_that_do_not_fit_are_refused(bucketed: str, dataset: str) -> None:
    with pytest.raises(UserError, match=r"was prepared without aspects, data\.aspects has 1:1, 4:3: write it with"):
        _open(dataset)
    with pytest.raises(UserError, match=r"was prepared in the aspects 1:1, 4:3, data\.aspects has 2:1"):
        _open(bucketed, aspects=("2:1",))
    with pytest.raises(UserError, match="only 12 images have the aspect 1:1, a batch of 16 would repeat them"):
        _open(bucketed, 16)
    # Without the key it is a set as any other.
    squares = open_sets(DataConfig(train=bucketed, workers=0), "images")
    batch = next(image_stream(squares, resolution=32, seed=5, rank=0, world_size=1, micro_batch=24, start=0))
    assert batch.images_u8.shape == (24, 3, 32, 32)
