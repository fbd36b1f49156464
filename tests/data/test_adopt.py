"""Others' tars become a data set as they are: the stream reads them, their bytes stay."""

from __future__ import annotations

import hashlib
import io
import json
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import webdataset as wds
from PIL import Image

from ibq_scale.config.run import DataConfig
from ibq_scale.data import adopt, ranges
from ibq_scale.data.adopt import adopt_tars
from ibq_scale.data.index import ShardIndex, index_name
from ibq_scale.data.manifest import load_manifest
from ibq_scale.data.prepare import prepare_images
from ibq_scale.data.sets import open_sets
from ibq_scale.data.store import open_store
from ibq_scale.data.stream import image_stream, shard_images
from ibq_scale.data.verify import verify
from ibq_scale.errors import UserError
from tests.data.layouts import LAYOUTS, Picture, pictures_of, write_tar, write_tars


@pytest.fixture(scope="module")
def originals(pictures: Path) -> list[Picture]:
    return pictures_of(pictures)


def _hashes(folder: Path, pattern: str = "*") -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob(pattern))}


def _index(folder: Path, tar: str) -> ShardIndex:
    return ShardIndex.from_json((folder / index_name(tar)).read_text())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block", [700, 4 << 20])
def test_the_index_finds_each_picture_and_the_tars_stay(
    originals: list[Picture], tmp_path: Path, layout: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "BLOCK", block)
    write_tars(tmp_path, originals, layout)
    before = _hashes(tmp_path)
    report = adopt_tars(str(tmp_path))
    assert (report.samples, report.shards, report.classes, report.rejected) == (24, 4, 3, 0)
    assert _hashes(tmp_path, "*.tar") == before
    found = []
    for shard in load_manifest(str(tmp_path), "images").shards:
        assert shard.sha256 == before[shard.name]
        data = (tmp_path / shard.name).read_bytes()
        for member in _index(tmp_path, shard.name).members:
            picture = data[member.offset : member.offset + member.size]
            assert zlib.crc32(picture) == member.crc
            found.append((member.label, picture))
    assert found == [(p.label, p.data) for p in originals]
    keys = [s["__key__"] for s in wds.WebDataset([str(tmp_path / n) for n in before], shardshuffle=False)]
    assert [m.key for n in before for m in _index(tmp_path, n).members] == keys
    assert verify(str(tmp_path)).faults == ()


@pytest.mark.slow
def test_the_stream_reads_an_adopted_set_from_s3(
    originals: list[Picture], new_prefix: Callable[[], str], tmp_path: Path
) -> None:
    write_tars(tmp_path, originals, "pretraining")
    url = new_prefix()
    for path in tmp_path.iterdir():
        open_store(url).upload(path, f"deep/{path.name}")
    adopt_tars(f"{url}/deep")
    prepare_images(tmp_path, str(tmp_path.parent / "prepared"))

    def epoch(train: str) -> list[tuple[int, bytes]]:
        config = DataConfig(train=train, workers=0, lanes=2, window=2, augment="center_crop", flip=False)
        batch = next(
            image_stream(
                open_sets(config, "images"), resolution=32, seed=0, rank=0, world_size=1, micro_batch=24, start=0
            )
        )
        images = [image.numpy().tobytes() for image in batch.images_u8]
        return sorted(zip(batch.labels.tolist(), images, strict=True))

    assert len(set(epoch(f"{url}/deep"))) == 24
    assert epoch(f"{url}/deep") == epoch(str(tmp_path.parent / "prepared"))


def test_what_is_unusable_or_unwanted_is_only_not_indexed(originals: list[Picture], tmp_path: Path) -> None:
    write_tars(tmp_path, originals, "img2dataset")
    broken = [
        ("x1", {"jpg": b"no picture", "json": b'{"label": 1, "aesthetic": 9}'}),
        ("x2", {"txt": b"a caption"}),
        ("x3", {"jpg": originals[0].data}),
    ]
    write_tar(tmp_path / "99999.tar", broken)
    report = adopt_tars(str(tmp_path), where=["aesthetic>=4"])
    assert (report.samples, report.filtered) == (16, 9)
    rejects = [json.loads(line)["path"] for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert rejects == ["99999.tar/x1", "99999.tar/x2"]
    assert [s.name for s in load_manifest(str(tmp_path), "images").shards] == ["00001.tar", "00002.tar", "00003.tar"]


@pytest.mark.slow
def test_a_second_run_and_more_workers_write_the_same(
    originals: list[Picture], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tars(tmp_path, originals, "webdataset")
    adopt_tars(str(tmp_path))
    first = _hashes(tmp_path)
    (tmp_path / index_name("00002.tar")).unlink()
    assert adopt_tars(str(tmp_path), workers=2).reused_shards == 3
    assert _hashes(tmp_path) == first


def test_keys_that_occur_twice_are_refused(
    originals: list[Picture], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = ([(key, {"jpg": originals[0].data})] for key in ("same", "same"))
    (tmp_path / "over").mkdir()
    write_tar(tmp_path / "over/a.tar", one)
    write_tar(tmp_path / "over/b.tar", two)
    with pytest.raises(UserError, match=r"the key 'same' occurs in a\.tar and in b\.tar"):
        adopt_tars(str(tmp_path / "over"))
    (tmp_path / "within").mkdir()
    write_tar(tmp_path / "within/a.tar", [*one, ("other", {"jpg": originals[1].data}), *two])
    with pytest.raises(UserError, match=r"the key 'same' occurs twice in a\.tar"):
        adopt_tars(str(tmp_path / "within"))
    assert not list(tmp_path.rglob("manifest.json"))
    # Different keys with one hash are two samples.
    (tmp_path / "fine").mkdir()
    write_tar(tmp_path / "fine/a.tar", [*one, ("other", {"jpg": originals[1].data})])
    monkeypatch.setattr(adopt, "_hash", lambda key: 7)
    assert adopt_tars(str(tmp_path / "fine")).samples == 2


def test_tars_that_cannot_be_adopted(originals: list[Picture], dataset: str, pictures: Path, tmp_path: Path) -> None:
    write_tars(tmp_path / "cut", originals, "webdataset")
    whole = (tmp_path / "cut/00001.tar").read_bytes()
    (tmp_path / "cut/00001.tar").write_bytes(whole[: len(whole) // 2 // 512 * 512])
    with pytest.raises(UserError, match=r"00001\.tar (breaks off|is no whole tar)"):
        adopt_tars(str(tmp_path / "cut"))
    before = _hashes(Path(dataset))
    with pytest.raises(UserError, match="is a prepared data set already"):
        adopt_tars(dataset)
    assert _hashes(Path(dataset)) == before
    with pytest.raises(UserError, match=r"holds no \.tar files"):
        adopt_tars(str(pictures))


def test_other_formats_are_read_as_they_are(tmp_path: Path) -> None:
    """webp has no reader of JPEG's; the stream's decoder must take it from the index alone."""
    random = torch.Generator().manual_seed(0)
    samples = []
    for i in range(4):
        out = io.BytesIO()
        pixels = torch.randint(256, (40, 40, 3), generator=random, dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(out, "WEBP", lossless=True)
        samples.append((f"{i}", {"webp": out.getvalue(), "cls": str(i).encode()}))
    write_tar(tmp_path / "a.tar", samples)
    adopt_tars(str(tmp_path))
    batch = next(shard_images(str(tmp_path), 0, resolution=40, batch=4))
    assert batch.labels.tolist() == [0, 1, 2, 3]
    random = torch.Generator().manual_seed(0)
    for image in batch.images_u8:
        assert torch.equal(image.permute(1, 2, 0), torch.randint(256, (40, 40, 3), generator=random, dtype=torch.uint8))
