"""A real S3 server, which checks signatures, keeps parts and has ETags of its own: Ceph's RADOS gateway."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from itertools import count, islice
from pathlib import Path
from random import Random

import pytest
import s3fs
import torch
import torch.distributed as dist

from ibq_scale.checkpoint.files import TextFile
from ibq_scale.checkpoint.mirror import Mirror
from ibq_scale.checkpoint.reading import verify
from ibq_scale.checkpoint.retention import Retention
from ibq_scale.checkpoint.saving import CheckpointFolder
from ibq_scale.config.run import DataConfig
from ibq_scale.data import store as store_module
from ibq_scale.data.prepare import prepare_images
from ibq_scale.data.sets import open_sets
from ibq_scale.data.store import open_store
from ibq_scale.data.stream import ImageBatch, image_stream
from ibq_scale.distributed.world import World
from ibq_scale.errors import UserError
from tests.faults import Exchange, cut, fault_proxy, slow_down
from tests.services.conftest import BUCKET, lead_to

pytestmark = [pytest.mark.slow, pytest.mark.services]


@pytest.fixture(autouse=True)
def _environment(server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    lead_to(monkeypatch, server)


@pytest.fixture(scope="module")
def new_url() -> Callable[[], str]:
    numbers = count()
    return lambda: f"s3://{BUCKET}/{next(numbers)}"


def _epoch(data: DataConfig, world: int) -> ImageBatch:
    """24 samples of `world` ranks, by position."""
    streams = [
        image_stream(
            open_sets(data, "images"), resolution=32, seed=5, rank=rank, world_size=world, micro_batch=4, start=0
        )
        for rank in range(world)
    ]
    batches = [batch for stream in streams for batch in islice(stream, 24 // 4 // world)]
    order = torch.cat([batch.requests[:, 0] for batch in batches]).argsort()
    return ImageBatch(*(torch.cat([getattr(b, name) for b in batches])[order] for name in ImageBatch._fields[:3]))


def test_prepared_there_and_streamed_from_there_each_sample_comes_once(
    new_url: Callable[[], str], pictures: Path, dataset: str, tmp_path: Path
) -> None:
    url = new_url()
    prepare_images(pictures, url, shard_bytes=8_000)
    local = DataConfig(train=dataset, workers=0, lanes=3, window=2)
    expected = _epoch(local, 1)
    for world, update in ((1, {}), (2, {"cache_dir": str(tmp_path)})):
        batch = _epoch(local.model_copy(update={"train": url, **update}), world)
        assert batch.requests[:, 0].tolist() == list(range(24))
        assert torch.equal(batch.images_u8, expected.images_u8)
        assert torch.equal(batch.labels, expected.labels)


@pytest.mark.parametrize("checksums", ["when_supported", "when_required"])
def test_large_objects_go_in_parts_and_come_in_ranges(
    new_url: Callable[[], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checksums: str
) -> None:
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", checksums)
    monkeypatch.setenv("AWS_RESPONSE_CHECKSUM_VALIDATION", checksums)
    monkeypatch.setattr(store_module, "UPLOAD_PART", 5 << 20)
    monkeypatch.setattr(store_module, "DOWNLOAD_CHUNK", 3 << 20)
    store, content = open_store(new_url()), Random(0).randbytes((11 << 20) + 7)
    store.write("large", content)
    assert store.size("large") == len(content)
    assert store.read("large") == content
    store.download("large", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == content
    for start, stop in ((0, 1), ((5 << 20) - 3, (5 << 20) + 3), (len(content) - 1, len(content))):
        assert store.read_range("large", start, stop) == content[start:stop]
    with pytest.raises(UserError, match="large ends before byte"):
        store.read_range("large", len(content) - 1, len(content) + 1)
    with pytest.raises(UserError, match="large ends before byte"):
        store.read_range("large", len(content), len(content) + 1)


def test_objects_are_replaced_missing_and_empty_as_files_are(new_url: Callable[[], str], tmp_path: Path) -> None:
    store = open_store(new_url())
    assert not store.exists("file")
    with pytest.raises(FileNotFoundError):
        store.read("file")
    store.write("file", b"old")
    store.write("file", b"newer")
    assert store.read("file") == b"newer"
    store.write("file", b"")
    assert store.read("file") == b""
    store.download("file", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b""


def test_faults_before_it_are_got_over_and_an_overwritten_object_is_seen(
    new_url: Callable[[], str], server: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(store_module, "DOWNLOAD_CHUNK", 1 << 20)
    writer, content = open_store(new_url()), Random(0).randbytes(5 << 20)
    writer.write("file", content)
    with fault_proxy(server["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        store = open_store(writer.url)
        proxy.inject(slow_down, times=2)
        proxy.inject(cut, skip=3, times=3)
        assert store.read("file") == content

        def overwrite(exchange: Exchange) -> None:
            writer.write("file", content[::-1])

        proxy.clear()
        proxy.inject(overwrite, times=1)
        with pytest.raises(UserError, match="file changed while it was read"):
            store.download("file", tmp_path / "copy")


def test_a_killed_upload_goes_on_with_the_parts_that_are_there(
    new_url: Callable[[], str], server: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 while parts are under way. Another content after it: only the parts with other bytes are sent."""
    monkeypatch.setattr(store_module, "UPLOAD_PART", 5 << 20)
    content, stored = bytearray(Random(0).randbytes((41 << 20) + 7)), []
    (tmp_path / "large").write_bytes(content)
    with fault_proxy(server["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        store = open_store(new_url())
        child = subprocess.Popen([sys.executable, "-c", UPLOAD, store.url, str(tmp_path / "large")])

        def kill(exchange: Exchange) -> None:
            if exchange.status == 200:
                stored.append(int(re.findall(r"partNumber=(\d+)", exchange.query)[0]))
            if len(stored) == 4:
                child.kill()

        proxy.inject(kill, method="PUT")
        assert child.wait(300) == -signal.SIGKILL
        while proxy.under_way:
            time.sleep(0.1)
        proxy.clear()
        assert [upload.path for upload in store.unfinished()] == ["large"]
        assert 4 <= len(stored) < 9
        changed = min(stored)
        content[(changed - 1) * (5 << 20)] ^= 1
        (tmp_path / "large").write_bytes(content)
        proxy.inject(slow_down, method="PUT", times=1)
        store.upload_resumable(tmp_path / "large", "large")
        sent = [int(number) for line in proxy.log for number in re.findall(r"^PUT.*partNumber=(\d+)", line)]
        assert set(sent) == {*range(1, 10)} - {*stored} | {changed}
        assert len(sent) == len(set(sent)) + 1
        assert store.read("large") == content
        assert store.unfinished() == []
        proxy.clear()
        store.upload_resumable(tmp_path / "large", "large")
        assert not [line for line in proxy.log if not line.startswith("HEAD")], "it is there: its ETag says so"
        store.delete(["large", "absent"])
        assert store.files() == {}


UPLOAD = """
import sys
from pathlib import Path
from ibq_scale.data import multipart, store
store.UPLOAD_PART, multipart.CONNECTIONS = 5 << 20, 2
store.open_store(sys.argv[1]).upload_resumable(Path(sys.argv[2]), "large")
"""


def test_a_lost_answer_is_no_lost_upload(
    new_url: Callable[[], str], server: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "UPLOAD_PART", 5 << 20)
    monkeypatch.setattr(store_module, "PAUSE_SECONDS", 0.01)
    content = Random(0).randbytes(11 << 20)
    with fault_proxy(server["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        store = open_store(new_url())
        proxy.inject(cut, method="POST", skip=1, times=1)
        store.write("large", content)
        assert sum("partNumber" in line for line in proxy.log) == 3
        assert store.read("large") == content


def test_the_mirror_retires_catches_up_and_leads_back(
    new_url: Callable[[], str], server: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two saves while the store is away, two after it; the newest copy is damaged when a bare node comes."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    here, url, alone = tmp_path / "checkpoints", new_url(), World(0, 1, 0, torch.device("cpu"))
    try:
        with fault_proxy(server["AWS_ENDPOINT_URL"]) as proxy:
            monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
            monkeypatch.setattr(store_module, "DEADLINE_SECONDS", 1.0)
            proxy.down = True
            _save(CheckpointFolder(here, alone, Retention(2), Mirror(url)), 1, 2)
            proxy.down = False
            assert open_store(url).files() == {}
            monkeypatch.setattr(store_module, "DEADLINE_SECONDS", 120.0)
            _save(CheckpointFolder(here, alone, Retention(2), Mirror(url)), 3, 4)
            store = open_store(url)
            assert sorted({path.split("/")[0] for path in store.files()}) == ["step-00000003", "step-00000004"]
            store.write("step-00000004/file", b"another")
            shutil.rmtree(here)
            found = CheckpointFolder(here, alone, Retention(2), Mirror(url)).newest()
            assert found is not None
            assert found.step == 3
            assert verify(found) == []
    finally:
        dist.destroy_process_group()


def _save(checkpoints: CheckpointFolder, *steps: int) -> None:
    with closing(checkpoints):
        for step in steps:
            checkpoints.save({"step": step}, [TextFile("file", str(step))])
            assert checkpoints.finish()
        checkpoints.finish_mirror()


def test_a_missing_bucket_is_named() -> None:
    store = open_store("s3://no-such-bucket/prefix")
    with pytest.raises(UserError, match="bucket 'no-such-bucket' does not exist"):
        store.write("file", b"x")
    with pytest.raises(UserError, match="bucket 'no-such-bucket' does not exist"):
        store.read("file")


@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_credentials_are_an_error(new_url: Callable[[], str], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    store = open_store(new_url())
    store.write("file", b"x")
    monkeypatch.setenv(name, os.environ[name] + "-wrong")
    for use in (lambda s: s.read("file"), lambda s: s.size("file"), lambda s: s.write("file", b"y")):
        with pytest.raises(UserError, match=r"access denied .*: check the credentials"):
            use(open_store(store.url))


def test_anonymous_readers_see_what_is_public_and_nothing_else(
    new_url: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(new_url())
    store.write("public", b"x")
    store.write("private", b"y")
    s3fs.S3FileSystem(skip_instance_cache=True).chmod(f"{store.url}/public", acl="public-read")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("IBQ_SCALE_S3_ANONYMOUS", "1")
    anyone = open_store(store.url)
    assert anyone.read("public") == b"x"
    with pytest.raises(UserError, match="access denied"):
        anyone.read("private")
