"""What networks and object stores do, done to a stream: the samples that it must give, or a clear error."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from ibq_scale.config.run import DataConfig
from ibq_scale.data import fetching
from ibq_scale.data import store as store_module
from ibq_scale.data import stream as stream_module
from ibq_scale.data.sets import open_sets
from ibq_scale.data.store import open_store
from ibq_scale.data.stream import ImageBatch, image_stream
from ibq_scale.errors import UserError
from tests.faults import (
    Exchange,
    Fault,
    FaultProxy,
    cut,
    expired,
    flipped,
    overwritten,
    shortened,
    slow_down,
    stalled,
    trickling,
    truncated,
)

TAR, INDEX = r"\.tar$", r"\.index\.json$"


@pytest.fixture(autouse=True)
def _one_batch_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error is seen once what was begun has ended too."""
    monkeypatch.setattr(fetching, "FETCH_AHEAD", 1)
    monkeypatch.setattr(fetching, "SAMPLES_AHEAD", 1)


@pytest.fixture(scope="module")
def shared_url(dataset: str, new_prefix: Callable[[], str]) -> str:
    """`dataset` in the bucket. Read only."""
    return _upload(dataset, new_prefix())


@pytest.fixture
def url(dataset: str, new_prefix: Callable[[], str]) -> str:
    """As `shared_url`, to be written over."""
    return _upload(dataset, new_prefix())


def _upload(folder: str, url: str) -> str:
    store = open_store(url)
    for path in Path(folder).iterdir():
        store.upload(path, path.name)
    return url


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every batch waits for its shards, the first too."""
    monkeypatch.setattr(stream_module, "_before_fetching", lambda workers: 0)


@pytest.fixture(params=["direct", "cached", "singly"])
def data(request: pytest.FixtureRequest, shared_url: str, tmp_path: Path, proxy: FaultProxy) -> DataConfig:
    """Read through the proxy: by ranges without a cache, through the cache, or by ranges since shards have not come."""
    cache = None if request.param == "direct" else str(tmp_path / "cache")
    if request.param == "cached":
        request.getfixturevalue("fetched")
    return DataConfig(train=shared_url, cache_dir=cache, workers=0, lanes=3, window=2)


def _epoch(data: DataConfig) -> ImageBatch:
    return next(
        image_stream(open_sets(data, "images"), resolution=32, seed=5, rank=0, world_size=1, micro_batch=24, start=0)
    )


@pytest.fixture
def expected(data: DataConfig, dataset: str) -> ImageBatch:
    """The same epoch from the folder it was prepared in."""
    return _epoch(data.model_copy(update={"train": dataset, "cache_dir": None}))


def _same(batch: ImageBatch, expected: ImageBatch) -> bool:
    return (
        torch.equal(batch.images_u8, expected.images_u8)
        and torch.equal(batch.labels, expected.labels)
        and torch.equal(batch.requests[:, 0], expected.requests[:, 0])
    )


@pytest.mark.slow
def test_a_trickle_is_given_up_and_asked_again(
    data: DataConfig, expected: ImageBatch, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "BODY_SECONDS", 0.5)
    proxy.inject(trickling, TAR, skip=1, times=1)
    assert _same(_epoch(data), expected)


@pytest.mark.slow
@pytest.mark.parametrize("fault", [slow_down, cut, truncated, shortened])
def test_a_burst_passes(data: DataConfig, expected: ImageBatch, proxy: FaultProxy, fault: Fault) -> None:
    for name in (r"manifest\.json$", INDEX, TAR):
        proxy.inject(fault, name, times=3)
    assert _same(_epoch(data), expected)


@pytest.mark.slow
def test_every_other_request_fails_somehow(data: DataConfig, expected: ImageBatch, proxy: FaultProxy) -> None:
    faults = [slow_down, cut, truncated, shortened]
    for i, fault in enumerate(faults * 5):
        proxy.inject(fault, skip=2 * i, times=1)
    assert _same(_epoch(data), expected)
    assert len(proxy.log) >= 20


@pytest.mark.slow
def test_two_seconds_of_silence_are_waited_for(data: DataConfig, expected: ImageBatch, proxy: FaultProxy) -> None:
    proxy.inject(stalled(2.0), TAR, skip=1, times=1)
    assert _same(_epoch(data), expected)


@pytest.mark.slow
def test_a_longer_silence_is_given_up_and_asked_again(
    data: DataConfig, expected: ImageBatch, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "READ_TIMEOUT_SECONDS", 0.3)
    proxy.inject(stalled(1.5), TAR, skip=1, times=1)
    assert _same(_epoch(data), expected)


@pytest.mark.slow
@pytest.mark.parametrize("fault", [slow_down, cut, truncated, shortened])
def test_what_does_not_pass_is_an_error_by_the_deadline(
    data: DataConfig, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    monkeypatch.setattr(store_module, "DEADLINE_SECONDS", 0.3)
    proxy.inject(fault, TAR, skip=2)
    with pytest.raises(UserError, match=r"get_object .*tar failed \d+ times? in \d+ s"):
        _epoch(data)


@pytest.mark.slow
def test_expired_credentials_are_an_error(data: DataConfig, proxy: FaultProxy) -> None:
    proxy.inject(expired, TAR, skip=2)
    with pytest.raises(UserError, match=r"the credentials have expired .*: renew them"):
        _epoch(data)


@pytest.mark.slow
def test_credentials_that_are_replaced_in_time_go_unnoticed(
    data: DataConfig, expected: ImageBatch, proxy: FaultProxy
) -> None:
    proxy.inject(expired, TAR, skip=2, times=1)
    assert _same(_epoch(data), expected)


def _unhashed(fault: Fault) -> Fault:
    """As old stores answer, without a checksum by which the client itself would see it."""

    def damage(exchange: Exchange) -> None:
        exchange.answer = {k: v for k, v in exchange.answer.items() if not k.lower().startswith("x-amz-checksum")}
        fault(exchange)

    return damage


@pytest.mark.slow
@pytest.mark.parametrize("fault", [flipped, overwritten])
def test_other_bytes_once_are_seen(data: DataConfig, expected: ImageBatch, proxy: FaultProxy, fault: Fault) -> None:
    """By the shard's hash or the sample's: the right ones are read again, or the run stops."""
    proxy.inject(_unhashed(fault), TAR, times=1)
    # Without a cache it may be the sample's own check that stops the run.
    with suppress(*([RuntimeError] if data.cache_dir is None else [])):
        assert _same(_epoch(data), expected)


@pytest.mark.usefixtures("fetched")
@pytest.mark.slow
@pytest.mark.parametrize("fault", [flipped, overwritten])
def test_a_changed_shard_never_enters_the_cache(
    shared_url: str, tmp_path: Path, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    proxy.inject(_unhashed(fault), TAR)
    data = DataConfig(train=shared_url, cache_dir=str(tmp_path / "cache"), workers=0, lanes=3, window=2)
    with pytest.raises(UserError, match="is not what the manifest says"):
        _epoch(data)
    # The fetch behind the failed one may be under way still.
    assert {path.name for path in (tmp_path / "cache").iterdir() if path.suffix != ".partial"} == {"lock"}


@pytest.mark.usefixtures("fetched")
@pytest.mark.slow
@pytest.mark.parametrize("size", [10, 100_000], ids=["shorter", "longer"])
def test_an_object_overwritten_between_ranges_is_never_mixed(
    url: str, tmp_path: Path, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(store_module, "DOWNLOAD_CHUNK", 2048)
    writer = open_store(url)

    def overwrite(exchange: Exchange) -> None:
        writer.write(exchange.path.rpartition("/")[2], bytes(size))

    proxy.inject(overwrite, TAR, times=1)
    data = DataConfig(train=url, cache_dir=str(tmp_path / "cache"), workers=0, lanes=3, window=2)
    with pytest.raises(UserError, match="changed while it was read"):
        _epoch(data)


@pytest.mark.usefixtures("fetched")
@pytest.mark.slow
def test_a_cache_smaller_than_what_is_in_use_gives_the_same(shared_url: str, dataset: str, tmp_path: Path) -> None:
    largest = max(path.stat().st_size for path in Path(dataset).glob("*.tar"))
    data = DataConfig(
        train=shared_url, cache_dir=str(tmp_path / "cache"), cache_bytes=largest, workers=0, lanes=3, window=2
    )
    assert _same(_epoch(data), _epoch(data.model_copy(update={"train": dataset, "cache_dir": None})))
