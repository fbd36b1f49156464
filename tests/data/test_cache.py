"""The cache of shards: whole files or none, within its limit, whoever is killed or comes at the same time."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ibq_scale.data.cache import ShardCache
from ibq_scale.data.folder import LocalStore, Store
from ibq_scale.data.index import index_name
from ibq_scale.data.manifest import ShardInfo, load_manifest
from ibq_scale.data.store import open_store
from ibq_scale.errors import UserError
from tests.faults import Exchange, FaultProxy
from tests.nursery import PATIENCE


class CountingStore(LocalStore):
    """Counts downloads; each waits until it may go on."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.downloads: list[str] = []
        self.may_go_on = threading.Event()
        self.may_go_on.set()

    def download(self, path: str, local: Path) -> None:
        self.downloads.append(path)
        assert self.may_go_on.wait(300)
        super().download(path, local)


@pytest.fixture
def store(tmp_path: Path) -> CountingStore:
    return CountingStore(tmp_path / "store")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def _shards(store: Store, *sizes: int) -> list[ShardInfo]:
    """Shards of these sizes and an index each."""
    shards = []
    for i, size in enumerate(sizes):
        data = bytes([i]) * size
        store.write(f"{i}.tar", data)
        store.write(index_name(f"{i}.tar"), b"index")
        shards.append(ShardInfo(name=f"{i}.tar", samples=1, bytes=size, sha256=hashlib.sha256(data).hexdigest()))
    return shards


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"lock"}


def _table(cache: ShardCache, shard: ShardInfo) -> bytes:
    return bytes(cache.table(shard, lambda: cache.store.read(index_name(shard.name)).upper()))


def _fetch(cache: ShardCache, shard: ShardInfo, used: float | None = None) -> None:
    cache.fetch(shard)
    _table(cache, shard)
    if used is not None:
        for path in cache.folder.glob(f"{shard.sha256}*"):
            os.utime(path, (used, used))


def test_the_longest_unused_go_first_with_their_indices(store: CountingStore, folder: Path) -> None:
    first, second, third = _shards(store, 100, 100, 100)
    cache = ShardCache(folder, 250, store)
    _fetch(cache, first, used=2)
    _fetch(cache, second, used=1)
    _fetch(cache, first)
    _fetch(cache, third)
    assert {name[:64] for name in _names(folder)} == {first.sha256, third.sha256}
    assert len(_names(folder)) == 4
    assert store.downloads == ["0.tar", "1.tar", "2.tar"]


def test_nothing_else_piles_up(store: CountingStore, folder: Path) -> None:
    shards = _shards(store, *[100] * 20)
    cache = ShardCache(folder, 350, store)
    for shard in shards * 2:
        _fetch(cache, shard)
    assert len(_names(folder)) <= 2 * 3
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 350


def test_files_of_others_are_neither_counted_nor_removed(store: CountingStore, folder: Path) -> None:
    folder.mkdir()
    (folder / "thesis.tex").write_bytes(bytes(10_000))
    os.utime(folder / "thesis.tex", (1, 1))
    shards = _shards(store, 100, 100)
    cache = ShardCache(folder, 250, store)
    for shard in shards:
        _fetch(cache, shard)
    assert (folder / "thesis.tex").exists()
    assert all(cache.path(shard).exists() for shard in shards)


def test_what_was_evicted_before_it_was_read_comes_again_with_a_warning(
    store: CountingStore, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = _shards(store, 100, 100)
    cache = ShardCache(folder, 150, store)
    with caplog.at_level(logging.WARNING):
        for shard in (first, second) * 2:
            _fetch(cache, shard)
    assert caplog.text.count("data.cache_bytes=150 is less than the shards in use") == 1
    assert cache.read_range(first, 10, 20) == bytes([0]) * 10
    assert cache.read(second) == bytes([1]) * 100
    assert _table(cache, first) == b"INDEX"


def test_a_limit_below_a_shard_is_an_error(store: CountingStore, folder: Path) -> None:
    (shard,) = _shards(store, 100)
    with pytest.raises(UserError, match=r"data\.cache_bytes=99 does not hold .*0\.tar of 100 bytes: raise it"):
        ShardCache(folder, 99, store).fetch(shard)
    assert not _names(folder)


def test_a_missing_shard_or_index_is_an_error(store: CountingStore, folder: Path) -> None:
    (shard,) = _shards(store, 100)
    cache = ShardCache(folder, 1000, store)
    with pytest.raises(FileNotFoundError):
        cache.table(shard, lambda: store.read("absent"))
    with pytest.raises(UserError, match=r"absent is missing, though the manifest names it"):
        cache.fetch(shard.model_copy(update={"name": "absent", "sha256": "0" * 64}))
    assert not _names(folder)


def test_a_full_disk_is_an_error_and_leaves_nothing(
    store: CountingStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (shard,) = _shards(store, 100)

    def fill(path: str, local: Path) -> None:
        local.write_bytes(b"some")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store, "download", fill)
    with pytest.raises(UserError, match=r"is full: lower data\.cache_bytes"):
        ShardCache(folder, 1000, store).fetch(shard)
    assert not _names(folder)


def test_a_shard_of_another_size_is_replaced(store: CountingStore, folder: Path) -> None:
    (shard,) = _shards(store, 100)
    cache = ShardCache(folder, 1000, store)
    cache.fetch(shard)
    os.truncate(cache.path(shard), 50)
    assert cache.read_range(shard, 0, 100) == bytes(100)


def test_leftovers_are_removed_and_files_at_work_are_not(store: CountingStore, folder: Path) -> None:
    (first,) = _shards(store, 100)
    folder.mkdir()
    for name in (f"{'a' * 64}.partial", f"{'c' * 64}.{'0' * 16}.table.partial"):
        (folder / name).write_bytes(b"half")
    ShardCache(folder, 1000, store)
    assert not _names(folder)
    store.may_go_on.clear()
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(ShardCache(folder, 250, store).fetch, first)
        _wait(lambda: (folder / f"{first.sha256}.partial").exists() and store.downloads)
        taken = (folder / f"{first.sha256}.partial").stat().st_size
        ShardCache(folder, 250, store)
        assert _names(folder) == {f"{first.sha256}.partial"}
        store.may_go_on.set()
        done.result()
    assert taken == 100, "others count the room that a download will need"
    assert ShardCache(folder, 250, store).read(first) == bytes(100)


def test_those_who_want_the_same_shard_download_it_once(store: CountingStore, folder: Path) -> None:
    """Each has a cache of its own, as ranks have; locks hold between open files, so threads stand for processes."""
    (shard,) = _shards(store, 100)
    store.may_go_on.clear()
    caches = [ShardCache(folder, 1000, store) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        done = [pool.submit(_fetch, cache, shard) for cache in caches]
        time.sleep(0.1)
        store.may_go_on.set()
        for future in done:
            future.result()
    assert store.downloads == ["0.tar"]


def test_ranks_that_evict_each_others_shards_all_read_the_right_bytes(store: CountingStore, folder: Path) -> None:
    shards = _shards(store, *[1000] * 6)

    def read(rank: int) -> None:
        cache = ShardCache(folder, 2500, store)
        for step in range(30):
            number = (step * (rank + 1) + rank) % 6
            assert cache.read(shards[number]) == bytes([number]) * 1000
            assert _table(cache, shards[number]) == b"INDEX"

    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(read, rank) for rank in range(4)]:
            future.result()
    assert not [name for name in _names(folder) if name.endswith(".partial")]


_DOWNLOADER = """
import sys
from pathlib import Path
from ibq_scale.data import store
from ibq_scale.data.cache import ShardCache
from ibq_scale.data.manifest import load_manifest
store.DOWNLOAD_CHUNK = 512
source = store.open_store(sys.argv[1])
ShardCache(Path(sys.argv[2]), 10**9, source).fetch(load_manifest(source, "images").shards[0])
"""


def test_an_index_may_come_before_its_shard_and_goes_when_it_is_not_used(store: CountingStore, folder: Path) -> None:
    """An old version's, as JSON, goes alike."""
    first, second = _shards(store, 100, 100)
    cache = ShardCache(folder, 104, store)
    assert _table(cache, first) == _table(ShardCache(folder, 104, store), first) == b"INDEX"
    (folder / f"{'b' * 64}.{'0' * 16}.index").write_bytes(b"old")
    for path in folder.iterdir():
        os.utime(path, (1, 1))
    cache.fetch(second)
    assert _names(folder) == {second.sha256}
    assert not cache.has(first)
    assert not cache.touch(first)
    assert cache.touch(second)


def test_files_are_listed_when_there_is_no_room_and_not_for_each_download(
    store: CountingStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = _shards(store, *[100] * 64)
    listed: list[int] = []
    evict = ShardCache._evict
    monkeypatch.setattr(ShardCache, "_evict", lambda self, needed: listed.append(needed) or evict(self, needed))
    cache = ShardCache(folder, 3_200, store)
    for number, shard in enumerate(shards):
        cache.fetch(shard)
        os.utime(cache.path(shard), (number, number))
    # Once to begin with; then each makes room for two more than it needs, a sixteenth of the limit.
    assert len(listed) == 1 + -(-32 // 3)
    assert 2_800 <= sum(path.stat().st_size for path in folder.glob("?" * 64)) <= 3_200


@pytest.mark.slow
def test_kill_9_in_the_middle_of_a_download_harms_nobody(
    dataset: str, new_prefix: Callable[[], str], proxy: FaultProxy, folder: Path
) -> None:
    """Nor does it hold up who waits for the same shard."""
    source = open_store(new_prefix())
    for path in Path(dataset).iterdir():
        source.upload(path, path.name)
    shard = load_manifest(source, "images").shards[0]
    killed = threading.Event()

    def stall(exchange: Exchange) -> None:
        killed.wait(300)

    proxy.inject(stall, rf"{shard.name}$", skip=3)
    process = subprocess.Popen([sys.executable, "-c", _DOWNLOADER, source.url, str(folder)])
    try:
        _wait(lambda: any(f"{shard.name} bytes=1536" in line for line in proxy.log))
        half = folder / f"{shard.sha256}.partial"
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(ShardCache(folder, 10**9, source).read, shard)
            assert half.exists(), "a newcomer may not remove what is at work"
            assert not waiting.done()
            process.kill()
            process.wait()
            proxy.clear()
            killed.set()
            content = waiting.result(PATIENCE)
    finally:
        process.kill()
        killed.set()
    assert hashlib.sha256(content).hexdigest() == shard.sha256
    assert _names(folder) == {shard.sha256}


def _wait(condition: Callable[[], object], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_cache_evicts_the_oldest_but_never_what_was_just_used(dataset: str, tmp_path: Path) -> None:
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
