"""A folder of pictures becomes shards: the same bytes always, nothing lost, nothing invented."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import webdataset as wds

from ibq_scale.config.run import DataConfig
from ibq_scale.data.images import picture_table, shard_index
from ibq_scale.data.index import read_table, table_of
from ibq_scale.data.manifest import Manifest, load_manifest
from ibq_scale.data.prepare import prepare_images
from ibq_scale.data.sets import open_sets
from ibq_scale.data.verify import verify
from ibq_scale.errors import UserError
from tests.samples import CLASSES, PICTURES_A_CLASS


def _hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def test_every_picture_is_there_once_with_its_bytes_and_class(pictures: Path, dataset: str) -> None:
    manifest = load_manifest(dataset, "images")
    assert manifest.classes == CLASSES
    assert len(manifest.shards) > 2
    # webdataset itself reads the shards: no reader of ours is needed.
    urls = [f"{dataset}/{shard.name}" for shard in manifest.shards]
    samples = list(wds.WebDataset(urls, shardshuffle=False))
    found = sorted((int(s["cls"]), s.get("jpg") or s["png"]) for s in samples)
    files = sorted((label, p.read_bytes()) for label, name in enumerate(CLASSES) for p in (pictures / name).iterdir())
    assert found == files
    assert len({s["__key__"] for s in samples}) == len(CLASSES) * PICTURES_A_CLASS


def test_classes_are_mixed_over_the_shards(dataset: str) -> None:
    first = load_manifest(dataset, "images").shards[0]
    index = json.loads((Path(dataset) / f"{first.name}.index.json").read_text())
    assert len({member["label"] for member in index["members"]}) > 1


def test_a_second_run_and_more_workers_write_the_same_bytes(pictures: Path, dataset: str, tmp_path: Path) -> None:
    for workers, name in ((1, "one"), (2, "two")):
        prepare_images(pictures, str(tmp_path / name), shard_bytes=8_000, workers=workers)
        assert _hashes(tmp_path / name) == _hashes(Path(dataset))


def test_a_stopped_run_goes_on_where_it_was(pictures: Path, dataset: str, tmp_path: Path) -> None:
    shutil.copytree(dataset, tmp_path, dirs_exist_ok=True)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "images-000001.tar.index.json").unlink()
    # As left by an earlier version.
    (tmp_path / "images-000002.tar.table").unlink()
    report = prepare_images(pictures, str(tmp_path), shard_bytes=8_000)
    assert report.reused_shards == report.shards - 1
    assert _hashes(tmp_path) == _hashes(Path(dataset))


def test_files_that_are_no_images_are_set_aside_and_named(pictures: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(pictures, source)
    (source / "apples" / "notes.txt").write_text("no picture")
    whole = (source / "apples" / "0.jpg").read_bytes()
    (source / "birds" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    report = prepare_images(source, str(tmp_path / "to"))
    assert (report.samples, report.rejected) == (24, 2)
    rejects = [json.loads(line) for line in (tmp_path / "to/rejects.jsonl").read_text().splitlines()]
    assert {r["path"] for r in rejects} == {"apples/notes.txt", "birds/cut.jpg"}
    assert all(r["reason"] for r in rejects)


def test_size_resizes_the_shortest_side(pictures: Path, tmp_path: Path) -> None:
    import io

    from PIL import Image

    prepare_images(pictures, str(tmp_path), size=32)
    for sample in wds.WebDataset(str(tmp_path / "images-000000.tar"), shardshuffle=False):
        assert min(Image.open(io.BytesIO(sample["jpg"])).size) == 32


def test_unusable_sources_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no folder"):
        prepare_images(tmp_path / "absent", str(tmp_path / "to"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no pictures"):
        prepare_images(tmp_path / "empty", str(tmp_path / "to"))
    (tmp_path / "text/a").mkdir(parents=True)
    (tmp_path / "text/a/x.jpg").write_text("text")
    with pytest.raises(UserError, match="no picture is left: 1 are unusable"):
        prepare_images(tmp_path / "text", str(tmp_path / "to"))
    assert not (tmp_path / "to/manifest.json").exists()


def test_verify_names_what_changed(dataset: str, tmp_path: Path) -> None:
    whole = verify(dataset)
    manifest = load_manifest(dataset, "images")
    assert (whole.shards, whole.samples, whole.faults) == (len(manifest.shards), 24, ())
    assert whole.bytes == sum(shard.bytes for shard in manifest.shards)
    shutil.copytree(dataset, tmp_path, dirs_exist_ok=True)
    index = json.loads((tmp_path / "images-000000.tar.index.json").read_text())
    for name, offset in (("images-000000.tar", index["members"][1]["offset"]), ("images-000003.tar", 600)):
        with (tmp_path / name).open("r+b") as f:
            f.seek(offset)
            f.write(b"?")
    (tmp_path / "images-000001.tar").unlink()
    (tmp_path / "images-000002.tar.index.json").write_text("{}")
    faults = verify(str(tmp_path), workers=1).faults
    assert verify(str(tmp_path), workers=8).faults == faults
    assert faults[:2] == (
        "images-000000.tar: content changed (sha256 differs)",
        f"images-000000.tar: sample {index['members'][1]['key']} changed (crc differs)",
    )
    assert [fault.partition(":")[0] for fault in faults[2:]] == [
        "images-000001.tar",
        "images-000002.tar.index.json",
        "images-000003.tar",
    ]


def test_the_stream_reads_tables_and_sets_without_them(dataset: str, tmp_path: Path) -> None:
    shutil.copytree(dataset, tmp_path, dirs_exist_ok=True)
    part = open_sets(DataConfig(train=str(tmp_path), workers=0), "images").parts[0]
    info = part.manifest.shards[0]
    path = tmp_path / "images-000000.tar.table"
    rows = read_table(part.store, info)
    assert rows is not None
    assert rows == table_of(shard_index(part, 0)).tobytes() == picture_table(part, 0).tobytes()
    # Of another index, cut, with a wrong bit, and absent.
    other = info.model_copy(update={"index_sha256": "0" * 64})
    assert read_table(part.store, other) is None
    for damaged in (path.read_bytes()[:-1], path.read_bytes()[:-1] + b"?", None):
        path.unlink()
        if damaged is not None:
            path.write_bytes(damaged)
        assert read_table(part.store, info) is None
        assert picture_table(part, 0).tobytes() == rows
    assert verify(str(tmp_path)).faults == ()


def test_verify_compares_tables_with_indices(dataset: str, tmp_path: Path) -> None:
    shutil.copytree(dataset, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "images-000000.tar.table"
    rows = bytearray(path.read_bytes()[64:])
    rows[-4] ^= 1
    path.write_bytes(path.read_bytes()[:32] + hashlib.sha256(rows).digest() + rows)
    assert verify(str(tmp_path)).faults == (
        "images-000000.tar.table: does not have the places of its index: prepare again",
    )


def test_verify_distrusts_the_index_too(dataset: str, tmp_path: Path) -> None:
    shutil.copytree(dataset, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "images-000000.tar.index.json"
    index = json.loads(path.read_text())
    index["members"][0]["size"] += 4096
    path.write_text(json.dumps(index))
    assert verify(str(tmp_path)).faults == (
        "images-000000.tar.index.json: is not the one that the manifest means (sha256 differs)",
    )
    # As if whoever wrote it had meant it.
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["shards"][0]["index_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    first, second = (member["key"] for member in index["members"][:2])
    assert verify(str(tmp_path)).faults == (
        f"images-000000.tar.index.json: samples {first} and {second} overlap",
        f"images-000000.tar: sample {first} changed (crc differs)",
    )


def test_the_manifest_is_checked(dataset: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no manifest\.json"):
        load_manifest(str(tmp_path), "images")
    with pytest.raises(UserError, match="holds images, codes are needed"):
        load_manifest(dataset, "codes")
    values = json.loads((Path(dataset) / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(values | {"version": 7}))
    with pytest.raises(UserError, match="has version 7, this program reads 1"):
        load_manifest(str(tmp_path), "images")
    (tmp_path / "manifest.json").write_text(json.dumps(values)[:-20])
    with pytest.raises(UserError, match="is damaged"):
        load_manifest(str(tmp_path), "images")


def test_the_hash_ignores_formatting_and_nothing_else(dataset: str) -> None:
    manifest = load_manifest(dataset, "images")
    again = Manifest.model_validate_json(manifest.model_dump_json())
    assert again.hash == manifest.hash
    other = manifest.model_copy(update={"shards": manifest.shards[::-1]})
    assert Manifest.model_validate(other.model_dump()).hash != manifest.hash
