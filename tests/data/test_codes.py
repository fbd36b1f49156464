"""Code shards: small on disk, whole when read, stamped with what made them."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from ibq_scale.config.run import DataConfig
from ibq_scale.data import codes, stream
from ibq_scale.data.cache import ShardCache
from ibq_scale.data.codes import (
    CodeShard,
    find_code_shard,
    finish_codes,
    read_code_row,
    read_code_shard,
    write_code_shard,
)
from ibq_scale.data.fetching import FetchingSampler
from ibq_scale.data.manifest import CodesInfo, ConditionInfo
from ibq_scale.data.sets import open_sets
from ibq_scale.data.store import open_store
from ibq_scale.data.stream import CodeBatch, code_stream
from ibq_scale.errors import UserError


def _info(size: int = 1024) -> CodesInfo:
    return CodesInfo(codebook_size=size, grid=(4, 4), tokenizer="t" * 64, source="s" * 64)


def _shard(seed: int, size: int = 1024, samples: int = 6, crops: int = 1) -> CodeShard:
    rng = np.random.default_rng(seed)
    return CodeShard(rng.integers(size, size=(samples, crops, 4, 4)), rng.integers(3, size=samples))


def _by_position(config: DataConfig, world: int, count: int) -> torch.Tensor:
    """The first `count` samples' codes, as `world` ranks get them together."""
    rows = {}
    for rank in range(world):
        sets = open_sets(config, "codes")
        stream = code_stream(sets, seed=1, rank=rank, world_size=world, micro_batch=2, start=0)
        for batch in islice(stream, count // (2 * world)):
            rows |= dict(zip(batch.requests[:, 0].tolist(), batch.codes, strict=True))
    return torch.stack([rows[p] for p in range(count)])


@pytest.mark.parametrize(("size", "bytes_a_code"), [(1024, 2), (65_536, 2), (262_144, 4)])
def test_codes_come_back_whole_and_small(tmp_path: Path, size: int, bytes_a_code: int) -> None:
    store = open_store(str(tmp_path))
    shard = _shard(0, size, samples=200)
    shard.codes[0, 0, 0, 0] = size - 1
    info = write_code_shard(store, "codes-000000.safetensors", shard, _info(size))
    assert info.bytes < shard.codes.size * bytes_a_code + 200 * 4 + 1024
    back = read_code_shard(store.read(info.name), info.name)
    assert np.array_equal(back.codes, shard.codes)
    assert np.array_equal(back.labels, shard.labels)


def test_only_a_shard_of_the_same_tokenizer_and_images_is_taken_over(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    written = write_code_shard(store, "codes.safetensors", _shard(0), _info())
    assert find_code_shard(store, "codes.safetensors", _info(), 6) == written
    assert find_code_shard(store, "absent.safetensors", _info(), 6) is None
    other = _info().model_copy(update={"tokenizer": "u" * 64})
    assert find_code_shard(store, "codes.safetensors", other, 6) is None


def test_the_stream_of_codes_is_one_sequence_for_any_ranks(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    shards = [write_code_shard(store, f"codes-{n}.safetensors", _shard(n), _info()) for n in range(4)]
    finish_codes(store, shards, ("a", "b", "c"), _info())
    config = DataConfig(train=str(tmp_path), workers=0, lanes=2, window=2)

    whole = _by_position(config, 1, 24)
    assert whole.shape == (24, 16)
    assert torch.equal(whole, _by_position(config, 3, 24))
    expected = np.concatenate([_shard(n).codes.reshape(6, 16) for n in range(4)])
    assert np.array_equal(np.unique(whole, axis=0), np.unique(expected, axis=0))


def test_damage_is_found(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    shards = [write_code_shard(store, "codes-0.safetensors", _shard(0), _info())]
    finish_codes(store, shards, ("a",), _info())
    content = bytearray(store.read("codes-0.safetensors"))
    content[-1] ^= 1
    store.write("codes-0.safetensors", bytes(content))
    config = DataConfig(train=str(tmp_path), workers=0)
    with pytest.raises(UserError, match="is not what the manifest says"):
        next(code_stream(open_sets(config, "codes"), seed=0, rank=0, world_size=1, micro_batch=2, start=0))
    with pytest.raises(UserError, match="is damaged"):
        read_code_shard(b"short", "name")


def test_samples_of_large_cold_shards_are_read_by_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    condition = ConditionInfo(encoder="words", tokens=3, width=2, captions="c" * 64)
    info = _info().model_copy(update={"condition": condition, "crops": 2})
    store = open_store(str(tmp_path / "set"))
    rng, infos = np.random.default_rng(0), []
    for number in range(4):
        spans = np.array([[0, 2], [0, 2], [2, 0], [2, 3], [5, 1], [6, 3]])
        plain = _shard(number, crops=2)
        shard = plain._replace(vectors=rng.normal(size=(9, 2)), spans=spans)
        infos.append(write_code_shard(store, f"codes-{number}.safetensors", shard, info))
    finish_codes(store, infos, ("a", "b", "c"), info)

    def batches(cache: str) -> list[CodeBatch]:
        config = DataConfig(train=str(tmp_path / "set"), workers=0, lanes=2, window=2, cache_dir=cache)
        place = {"rank": 0, "world_size": 1, "micro_batch": 3, "start": 0}
        return list(islice(code_stream(open_sets(config, "codes"), seed=1, conditions=True, **place), 12))

    whole = batches(str(tmp_path / "whole"))
    for module in (codes, stream):
        monkeypatch.setattr(module, "LARGE", 0)
    monkeypatch.setattr(codes, "HEAD", 700)
    downloads: list[int] = []
    monkeypatch.setattr(FetchingSampler, "_ask", lambda *_: downloads.append(1))
    monkeypatch.setattr(ShardCache, "_download", lambda *_: pytest.fail("a shard was downloaded"))
    singly = batches(str(tmp_path / "singly"))
    assert downloads
    for one, other in zip(whole, singly, strict=True):
        assert all(map(torch.equal, one[:5], other[:5]))


def test_damage_of_a_part_is_found(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    info = write_code_shard(store, "codes-0.safetensors", _shard(0), _info())
    data = store.read(info.name)

    def row(number: int, data: bytes, size: int = 1024) -> CodeShard:
        return read_code_row(lambda start, stop: data[start:stop], "name", number, _info(size))

    assert np.array_equal(row(5, data).codes[0], _shard(0).codes[5])
    for number, changed, size in (
        (6, data, 1024),
        (-1, data, 1024),
        (5, data, int(_shard(0).codes[5].max())),
        (5, data.replace(b'"data_offsets":[0,', b'"data_offsets":[-9,'), 1024),
        (5, data.replace(b"U16", b"U99"), 1024),
        (5, data[:60], 1024),
        (5, b"", 1024),
    ):
        with pytest.raises(UserError, match="code shard name is damaged"):
            row(number, changed, size)


def test_of_several_crops_each_epoch_draws_one_the_same_for_any_ranks(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    shard = _shard(0, samples=8, crops=10)
    finish_codes(store, [write_code_shard(store, "codes-0.safetensors", shard, _info())], ("a", "b", "c"), _info())
    config = DataConfig(train=str(tmp_path), workers=0, lanes=2, window=2)

    seen = _by_position(config, 1, 80)
    assert torch.equal(seen, _by_position(config, 2, 80))
    crops = torch.from_numpy(shard.codes).flatten(2)
    drawn = {tuple(match) for codes in seen for match in (crops == codes).all(dim=2).nonzero().tolist()}
    assert {image for image, _ in drawn} == set(range(8))
    # Ten draws of ten crops for each of eight images: about 52 different ones.
    assert 35 < len(drawn) <= 80
