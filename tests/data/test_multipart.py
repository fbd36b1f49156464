"""Large files go in parts, each retried alone, and an upload that was cut off goes on with the parts that are there."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import s3fs

from ibq_scale.data import multipart
from ibq_scale.data import store as store_module
from ibq_scale.data.folder import Store
from ibq_scale.data.store import open_store
from ibq_scale.errors import UserError
from tests.faults import Exchange, Fault, FaultProxy, cut, expired, slow_down


@pytest.mark.slow
def test_large_files_go_in_parts_each_retried_alone(
    new_prefix: Callable[[], str], proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "UPLOAD_PART", 5 << 20)
    (tmp_path / "large").write_bytes(Random(0).randbytes(11 << 20))
    proxy.inject(slow_down, "large", method="PUT", skip=1, times=2)
    store = open_store(new_prefix())
    store.upload(tmp_path / "large", "large")
    assert sum(line.startswith("PUT") for line in proxy.log) == 3 + 2
    assert store.read("large") == (tmp_path / "large").read_bytes()


def test_an_upload_that_fails_leaves_no_parts(
    new_prefix: Callable[[], str], proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "UPLOAD_PART", 5 << 20)
    proxy.inject(lambda exchange: exchange.refuse(501, "NotImplemented"), "large", method="PUT")
    store = open_store(new_prefix())
    with pytest.raises(UserError, match=r"refused \(NotImplemented.*AWS_REQUEST_CHECKSUM_CALCULATION=when_required"):
        store.write("large", bytes(6 << 20))
    assert [line for line in proxy.log if line.startswith("DELETE") and "uploadId" in line]
    assert not store.exists("large")


def _cut_short(store: Store, proxy: FaultProxy, local: Path, parts: int) -> None:
    """An upload of `local` that ends when so many of its parts are in the store, as a kill would end it."""
    one_at_a_time = multipart.CONNECTIONS
    multipart.CONNECTIONS = 1
    proxy.inject(lambda exchange: exchange.refuse(501, "Killed"), method="PUT", skip=parts - 1)
    try:
        with pytest.raises(UserError, match="Killed"):
            store.upload_resumable(local, "large")
    finally:
        multipart.CONNECTIONS = one_at_a_time
    proxy.clear()


def _parts_sent(proxy: FaultProxy) -> list[int]:
    return sorted(int(re.findall(r"partNumber=(\d+)", line)[0]) for line in proxy.log if line.startswith("PUT"))


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of five parts."""
    monkeypatch.setattr(store_module, "UPLOAD_PART", 5 << 20)
    path = tmp_path / "large"
    path.write_bytes(Random(0).randbytes((21 << 20) + 1))
    return path


@pytest.mark.slow
def test_an_upload_goes_on_with_the_parts_that_are_there(
    new_prefix: Callable[[], str], proxy: FaultProxy, large: Path
) -> None:
    store = open_store(new_prefix())
    _cut_short(store, proxy, large, 3)
    assert [upload.path for upload in store.unfinished()] == ["large"]
    store.upload_resumable(large, "large")
    assert _parts_sent(proxy) == [4, 5]
    assert store.read("large") == large.read_bytes()
    assert store.unfinished() == []
    proxy.clear()
    store.upload_resumable(large, "large")
    assert _parts_sent(proxy) == [], "it is there already"


@pytest.mark.slow
def test_no_part_of_another_content_is_completed(new_prefix: Callable[[], str], proxy: FaultProxy, large: Path) -> None:
    store = open_store(new_prefix())
    _cut_short(store, proxy, large, 3)
    content = bytearray(large.read_bytes())
    content[6 << 20] ^= 1
    large.write_bytes(content + b"and longer")
    store.upload_resumable(large, "large")
    assert _parts_sent(proxy) == [2, 4, 5]
    assert store.read("large") == large.read_bytes()


@pytest.mark.slow
def test_the_fullest_of_several_uploads_is_gone_on_with(
    new_prefix: Callable[[], str], proxy: FaultProxy, large: Path
) -> None:
    store = open_store(new_prefix())
    client = s3fs.S3FileSystem(skip_instance_cache=True)
    bucket, _, key = f"{store.url}/large".removeprefix("s3://").partition("/")
    client.call_s3("create_multipart_upload", Bucket=bucket, Key=key)
    _cut_short(store, proxy, large, 2)
    client.call_s3("create_multipart_upload", Bucket=bucket, Key=key)
    store.upload_resumable(large, "large")
    assert _parts_sent(proxy) in ([3, 4, 5], [1, 2, 3, 4, 5])
    assert store.read("large") == large.read_bytes()
    assert store.unfinished() == []


@pytest.mark.slow
def test_where_the_store_encrypts_parts_are_sent_again(
    new_prefix: Callable[[], str], proxy: FaultProxy, large: Path
) -> None:
    """An ETag is no MD5 then."""
    store = open_store(new_prefix())
    _cut_short(store, proxy, large, 3)

    def hide(exchange: Exchange) -> None:
        exchange.body = re.sub(rb"(<ETag>[^0-9a-f]*)[0-9a-f]{32}", rb"\g<1>" + b"0" * 32, exchange.body)

    proxy.inject(hide, "large")
    store.upload_resumable(large, "large")
    assert _parts_sent(proxy) == [1, 2, 3, 4, 5]
    proxy.clear()
    assert store.read("large") == large.read_bytes()


@pytest.mark.slow
def test_who_may_not_list_uploads_sends_everything(
    new_prefix: Callable[[], str], proxy: FaultProxy, large: Path
) -> None:
    store = open_store(new_prefix())
    _cut_short(store, proxy, large, 3)
    proxy.inject(lambda e: e.refuse(403, "AccessDenied") if e.query.startswith("uploads") else None)
    store.upload_resumable(large, "large")
    assert _parts_sent(proxy) == [1, 2, 3, 4, 5]
    assert store.read("large") == large.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("fault", [slow_down, cut, expired])
def test_a_lost_answer_is_no_lost_upload(
    new_prefix: Callable[[], str], proxy: FaultProxy, large: Path, fault: Fault
) -> None:
    """The object is complete; who asks again hears that there is no such upload."""
    store = open_store(new_prefix())
    completed = []

    def lose(exchange: Exchange) -> None:
        if "uploadId" in exchange.query:
            completed.append(exchange)
            if len(completed) == 1:
                fault(exchange)

    proxy.inject(lose, method="POST")
    store.upload_resumable(large, "large")
    assert len(completed) == 2
    assert _parts_sent(proxy) == [1, 2, 3, 4, 5]
    assert store.read("large") == large.read_bytes()


@pytest.mark.slow
def test_parts_pass_through_what_networks_do(new_prefix: Callable[[], str], proxy: FaultProxy, large: Path) -> None:
    store = open_store(new_prefix())
    for i, fault in enumerate([slow_down, cut, slow_down]):
        proxy.inject(fault, method="PUT", skip=2 * i, times=1)
    proxy.inject(expired, method="PUT", skip=7, times=1)
    store.upload_resumable(large, "large")
    assert store.read("large") == large.read_bytes()
