"""Both stores behave alike; what a user can mend is said in a line, what may pass is tried again."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from ibq_scale.data import store as store_module
from ibq_scale.data.store import S3Store, Store, open_store
from ibq_scale.errors import UserError


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return open_store(str(tmp_path / "folder"))
    return open_store(request.getfixturevalue("new_prefix")())


def test_what_is_written_is_read(store: Store, tmp_path: Path) -> None:
    store.write("deep/file.bin", b"0123456789")
    assert store.read("deep/file.bin") == b"0123456789"
    assert store.read_range("deep/file.bin", 3, 7) == b"3456"
    assert store.size("deep/file.bin") == 10
    store.write("deep/file.bin", b"new")
    assert store.read("deep/file.bin") == b"new"
    store.download("deep/file.bin", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"new"


def test_a_missing_file_is_a_missing_file(store: Store) -> None:
    store.write("there", b"x")
    assert not store.exists("absent")
    with pytest.raises(FileNotFoundError):
        store.read("absent")
    with pytest.raises(FileNotFoundError):
        store.size("absent")


def test_a_range_beyond_the_end_is_an_error_and_not_fewer_bytes(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "DEADLINE_SECONDS", 0.0)
    store.write("short", b"abc")
    with pytest.raises((OSError, UserError)):
        store.read_range("short", 1, 9)


def test_large_files_come_in_ranges(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "DOWNLOAD_CHUNK", 7)
    content = bytes(range(50))
    store.write("large", content)
    store.download("large", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == content


def test_a_missing_bucket_is_named(s3_server: None) -> None:
    store = open_store("s3://no-such-bucket/prefix")
    with pytest.raises(UserError, match=r"bucket 'no-such-bucket' does not exist"):
        store.write("file", b"x")
    with pytest.raises((UserError, FileNotFoundError)):
        store.read("file")


def test_an_unreachable_endpoint_is_named(s3_server: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(store_module, "DEADLINE_SECONDS", 0.0)
    with pytest.raises(UserError, match=r"cannot connect to http://127\.0\.0\.1:9|gave up"):
        open_store("s3://bucket/prefix").read("file")


def test_transient_failures_are_retried(new_prefix: Callable[[], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module.time, "sleep", lambda seconds: None)
    store = S3Store(new_prefix())
    store.write("file", b"x")
    left = [ConnectionResetError("reset"), TimeoutError("slow")]

    def action(fs: object) -> str:
        if left:
            raise left.pop()
        return "done"

    assert store._call(action) == "done"
    assert not left


def test_a_store_travels_to_a_worker_without_its_client(new_prefix: Callable[[], str]) -> None:
    store = open_store(new_prefix())
    store.write("file", b"x")
    assert pickle.loads(pickle.dumps(store)).read("file") == b"x"


@pytest.mark.parametrize("url", ["s3://", "gs://bucket/x", "http://host/x"])
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(UserError):
        open_store(url)
