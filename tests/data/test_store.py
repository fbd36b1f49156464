"""Both stores behave alike; what a user can mend is said in a line, what may pass is tried again."""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from botocore.exceptions import EndpointConnectionError

from ibq_scale.data import folder as folder_module
from ibq_scale.data import store as store_module
from ibq_scale.data.folder import Store
from ibq_scale.data.store import S3Store, open_store
from ibq_scale.errors import StoreUnavailableError, UserError
from tests.faults import Exchange, FaultProxy, expired, slow_down


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


@pytest.mark.slow
def test_a_range_beyond_the_end_is_an_error_and_not_fewer_bytes(store: Store) -> None:
    store.write("short", b"abc")
    for start in (1, 5):
        with pytest.raises(UserError, match="short ends before byte 9"):
            store.read_range("short", start, 9)


@pytest.mark.parametrize("size", [0, 7, 50])
def test_large_files_come_in_ranges(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    for module in (store_module, folder_module):
        monkeypatch.setattr(module, "DOWNLOAD_CHUNK", 7)
    content = bytes(range(size))
    store.write("large", content)
    (tmp_path / "copy").write_bytes(b"something longer that was there before, and of which nothing may stay")
    store.download("large", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == content == store.read("large")


def test_files_are_removed_and_absent_ones_are_no_fault(store: Store, tmp_path: Path) -> None:
    for path in ("a/b/one", "a/two", "three"):
        store.write(path, b"x")
    store.delete(["a/b/one", "a/b/absent", "absent"])
    assert list(store.files()) == ["a/two", "three"]
    store.delete(["a/two"])
    assert list(store.files()) == ["three"]
    assert store.unfinished() == []


def test_a_file_that_a_killed_upload_left_in_a_folder_is_found(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "folder"))
    store.write("a/file.bin", b"x")
    (tmp_path / "folder/a/.other.bin.123.partial").write_bytes(b"half")
    assert [upload.path for upload in store.unfinished()] == ["a/other.bin"]
    store.abort(store.unfinished()[0])
    assert list(store.files()) == ["a/file.bin"]


def test_a_stopped_store_ends_what_is_under_way(store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    store.stop()
    with pytest.raises(UserError, match="stopped"):
        store.upload(tmp_path / "file", "file")


def test_a_missing_bucket_is_named(s3_server: None) -> None:
    store = open_store("s3://no-such-bucket/prefix")
    with pytest.raises(UserError, match=r"bucket 'no-such-bucket' does not exist"):
        store.write("file", b"x")
    with pytest.raises((UserError, FileNotFoundError)):
        store.read("file")


@pytest.mark.slow
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

    assert store._call(action, "a request") == "done"
    assert not left


@pytest.mark.slow
def test_one_loop_retries_and_none_inside_it(
    new_prefix: Callable[[], str], proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """botocore tries five times and s3fs five times that."""
    store = open_store(new_prefix())
    store.write("file", b"x")
    proxy.inject(slow_down)
    monkeypatch.setattr(store_module, "DEADLINE_SECONDS", 0.0)
    said = r"get_object file failed 1 time in \d+ s: .*SlowDown.*, status 503"
    with pytest.raises(StoreUnavailableError, match=said):
        store.read("file")
    assert len(proxy.log) == 2, proxy.log


def test_pauses_grow_and_are_jittered_until_the_deadline(
    new_prefix: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now, pauses = [0.0], []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(store_module, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))

    def action(fs: object) -> None:
        raise ConnectionResetError("reset")

    with pytest.raises(StoreUnavailableError, match=r"a request failed \d+ times in \d+ s: reset"):
        S3Store(new_prefix())._call(action, "a request")
    assert 80 < now[0] < 120 + 1.5 * store_module.LONGEST_PAUSE_SECONDS
    assert all(0.5 * 0.2 * 2**i <= pause <= 1.5 * 0.2 * 2**i for i, pause in enumerate(pauses[:7]))
    assert max(pauses) <= 1.5 * store_module.LONGEST_PAUSE_SECONDS
    assert len({round(pause / (0.2 * 2**i), 6) for i, pause in enumerate(pauses[:7])}) > 1, "no jitter"


def test_an_endpoint_that_has_answered_may_come_back(
    new_prefix: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "PAUSE_SECONDS", 0.0)
    store = S3Store(new_prefix())
    store.write("file", b"x")
    left = [EndpointConnectionError(endpoint_url="http://there", error="refused")]

    def action(fs: object) -> str:
        if left:
            raise left.pop()
        return "done"

    assert store._call(action, "a request") == "done"


def test_an_endpoint_that_cannot_be_reached_is_a_mistake_for_a_command_and_passes_for_a_rank(
    new_prefix: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a thousand ranks that start at once, some meet a refused connection; and a gateway may be starting."""
    monkeypatch.setattr(store_module, "PAUSE_SECONDS", 0.0)
    refused = EndpointConnectionError(endpoint_url="http://there", error="refused")
    left = [refused] * 3

    def action(fs: object) -> str:
        if left:
            raise left.pop()
        return "done"

    with pytest.raises(UserError, match="check AWS_ENDPOINT_URL") as told:
        S3Store(new_prefix())._call(action, "a request")
    assert told.value.exit_code == 2
    monkeypatch.setenv("RANK", "3")
    assert S3Store(new_prefix())._call(action, "a request") == "done"
    left += [refused] * 100
    monkeypatch.setattr(store_module, "DEADLINE_SECONDS", 0.0)
    with pytest.raises(
        StoreUnavailableError, match=r"a request failed 1 time in \d+ s: cannot connect to .* \(.*\): check"
    ):
        S3Store(new_prefix())._call(action, "a request")


@pytest.mark.slow
def test_an_object_overwritten_during_a_download_is_an_error(
    new_prefix: Callable[[], str], tmp_path: Path, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "DOWNLOAD_CHUNK", 4)
    store = open_store(new_prefix())
    store.write("file", b"0123456789")
    writer = open_store(store.url)

    def overwrite(exchange: Exchange) -> None:
        writer.write("file", b"9876543210")

    proxy.inject(overwrite, "file", times=1)
    with pytest.raises(UserError, match="file changed while it was read"):
        store.download("file", tmp_path / "copy")


class Credentials:
    """A credentials file, named by the environment, and a server that takes one key only."""

    def __init__(self, folder: Path, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
        self.file = folder / "credentials"
        self.good = "old"
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(self.file))
        (folder / "config").write_text("[profile cluster]\nregion = eu-west-3\n")
        monkeypatch.setenv("AWS_CONFIG_FILE", str(folder / "config"))
        monkeypatch.setenv("AWS_PROFILE", "cluster")
        self.write("old")
        for method in ("GET", "HEAD", "PUT"):
            proxy.inject(self.check, method=method)

    def write(self, key: str) -> None:
        self.file.write_text(f"[cluster]\naws_access_key_id = {key}\naws_secret_access_key = secret\n")

    def check(self, exchange: Exchange) -> None:
        if f"Credential={self.good}/" not in exchange.headers["Authorization"]:
            expired(exchange)


@pytest.fixture
def credentials(tmp_path: Path, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> Credentials:
    return Credentials(tmp_path, proxy, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["read", "size"])
def test_credentials_that_expire_are_read_again(
    new_prefix: Callable[[], str], credentials: Credentials, method: str
) -> None:
    store = open_store(new_prefix())
    store.write("file", b"x")
    credentials.good = "new"
    with pytest.raises(UserError, match="credentials"):
        getattr(store, method)("file")
    credentials.write("new")
    assert getattr(store, method)("file") in (b"x", 1)


def _request(store: Store, proxy: FaultProxy, method: str) -> Exchange:
    """What the store sends for a GET or a PUT, as the server sees it."""
    seen: list[Exchange] = []
    proxy.inject(seen.append, method=method)
    if method == "PUT":
        store.write("file", b"x")
    else:
        with suppress(FileNotFoundError):
            store.read("file")
    return seen[0]


def test_profile_and_region_are_the_environments(
    new_prefix: Callable[[], str], credentials: Credentials, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = new_prefix()
    signature = _request(open_store(url), proxy, "GET").headers["Authorization"]
    assert "Credential=old/" in signature
    assert "/eu-west-3/s3/" in signature
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-west-2")
    assert "/us-west-2/s3/" in _request(open_store(url), proxy, "GET").headers["Authorization"]
    monkeypatch.setenv("AWS_PROFILE", "absent")
    with pytest.raises(UserError, match=r"profile.*absent"):
        open_store(url).read("file")


@pytest.mark.slow
def test_anonymous_requests_are_unsigned(
    new_prefix: Callable[[], str], proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = new_prefix()
    assert "Authorization" in _request(open_store(url), proxy, "GET").headers
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("IBQ_SCALE_S3_ANONYMOUS", "1")
    assert "Authorization" not in _request(open_store(url), proxy, "GET").headers
    monkeypatch.setenv("IBQ_SCALE_S3_ANONYMOUS", "yes")
    with pytest.raises(UserError, match="IBQ_SCALE_S3_ANONYMOUS=yes: write 1"):
        open_store(url).read("file")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "method", "header"),
    [
        ("AWS_REQUEST_CHECKSUM_CALCULATION", "PUT", "x-amz-checksum-crc32"),
        ("AWS_RESPONSE_CHECKSUM_VALIDATION", "GET", "x-amz-checksum-mode"),
    ],
)
def test_checksums_are_left_out_where_not_required(
    new_prefix: Callable[[], str],
    proxy: FaultProxy,
    monkeypatch: pytest.MonkeyPatch,
    setting: str,
    method: str,
    header: str,
) -> None:
    url = new_prefix()
    assert header in map(str.lower, _request(open_store(url), proxy, method).headers)
    monkeypatch.setenv(setting, "when_required")
    assert header not in map(str.lower, _request(open_store(url), proxy, method).headers)


@pytest.mark.slow
def test_a_store_travels_to_a_worker_without_its_client(new_prefix: Callable[[], str]) -> None:
    store = open_store(new_prefix())
    store.write("file", b"x")
    assert pickle.loads(pickle.dumps(store)).read("file") == b"x"


@pytest.mark.parametrize("url", ["s3://", "gs://bucket/x", "http://host/x"])
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(UserError):
        open_store(url)


@pytest.mark.parametrize(
    ("endpoint", "said"),
    [
        ("minio:9000", "AWS_ENDPOINT_URL is 'minio:9000': write it with its scheme, as http://minio:9000"),
        ("s3://minio", "write it with its scheme"),
        ("http://", "write it with its scheme"),
        ("http://user:password@minio:9000", "an address holds no credentials"),
    ],
)
def test_an_endpoint_that_no_client_takes(endpoint: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(UserError, match=said) as told:
        open_store("s3://bucket/prefix")
    assert "password" not in str(told.value).replace("no credentials", "")


@pytest.mark.slow
def test_a_file_that_is_too_large_takes_no_memory(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (store_module, folder_module):
        monkeypatch.setattr(module, "DOWNLOAD_CHUNK", 7)
    monkeypatch.setattr(folder_module, "MOST_WHOLE", 20)
    store.write("most", bytes(20))
    store.write("more", bytes(21))
    assert store.read("most") == bytes(20)
    with pytest.raises(UserError, match="more: it has 21 bytes, and 20 are the most"):
        store.read("more")


def test_threads_that_begin_together_share_one_client(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    begin = threading.Barrier(8)

    def make() -> object:
        time.sleep(0.01)
        made.append(object())
        return made[-1]

    def client(_: int) -> object:
        begin.wait()
        return store._fs

    monkeypatch.setattr(store_module, "_new_client", make)
    store = S3Store("s3://bucket/prefix")
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(client, range(8))) == set(made)
    assert len(made) == 1
