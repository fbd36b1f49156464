"""Tars and parquet of any layout become the same samples as the folder that they were made of."""

from __future__ import annotations

import builtins
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import webdataset as wds

from ibq_scale.data import ranges
from ibq_scale.data.index import ShardIndex, index_name
from ibq_scale.data.listing import list_files
from ibq_scale.data.manifest import load_manifest
from ibq_scale.data.parquet import ParquetSource
from ibq_scale.data.prepare import PrepareReport, prepare_images
from ibq_scale.data.sources import open_source
from ibq_scale.data.store import open_store
from ibq_scale.errors import UserError
from tests.data.layouts import LAYOUTS, Picture, pictures_of, write_parquet, write_tar, write_tars
from tests.samples import CLASSES


@pytest.fixture(scope="module")
def originals(pictures: Path) -> list[Picture]:
    return pictures_of(pictures)


def _samples(url: str) -> list[tuple[int, bytes]]:
    """What plain webdataset reads from the shards that the manifest names."""
    urls = [f"{url}/{shard.name}" for shard in load_manifest(url, "images").shards]
    found = list(wds.WebDataset(urls, shardshuffle=False))
    assert len({s["__key__"] for s in found}) == len(found)
    return sorted((int(s["cls"]), s.get("jpg") or s["png"]) for s in found)


def _expected(originals: list[Picture]) -> list[tuple[int, bytes]]:
    return sorted((p.label, p.data) for p in originals)


def _hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def _rejects(folder: Path) -> dict[str, str]:
    return {r["path"]: r["reason"] for r in map(json.loads, (folder / "rejects.jsonl").read_text().splitlines())}


def _counts(report: PrepareReport) -> tuple[int, int, int]:
    return report.samples, report.filtered, report.rejected


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shard_bytes", [3_000, 12_000, 1 << 20])
def test_tars(originals: list[Picture], tmp_path: Path, layout: str, shard_bytes: int) -> None:
    """Shards smaller than a tar, of a few tars, and of all."""
    write_tars(tmp_path / "source", originals, layout)
    # img2dataset's own files beside each tar.
    (tmp_path / "source/00000_stats.json").write_text("{}")
    (tmp_path / "source/00000.parquet").write_bytes(b"no picture here")
    report = prepare_images(tmp_path / "source", str(tmp_path / "to"), shard_bytes=shard_bytes)
    assert _counts(report) == (24, 0, 0)
    assert _samples(report.url) == _expected(originals)
    assert load_manifest(report.url, "images").classes == ("0", "1", "2")


@pytest.mark.parametrize("column", ["image", "jpg"])
def test_parquet(originals: list[Picture], tmp_path: Path, column: str) -> None:
    write_parquet(tmp_path / "source", originals, column, label=[p.label for p in originals])
    report = prepare_images(tmp_path / "source", str(tmp_path / "to"), shard_bytes=6_000)
    assert _counts(report) == (24, 0, 0)
    assert report.shards > 2
    assert _samples(report.url) == _expected(originals)
    assert load_manifest(report.url, "images").classes == CLASSES


def test_what_has_no_labels_is_one_class(originals: list[Picture], tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    for i, p in enumerate(originals):
        (tmp_path / f"flat/{i}.{p.extension}").write_bytes(p.data)
    write_tar(tmp_path / "caption.tar", [(str(i), {"jpg": p.data, "txt": b"x"}) for i, p in enumerate(originals)])
    write_parquet(tmp_path / "hub", originals, text=["x"] * 24)
    # As on the Hub: the labels of a test split.
    write_parquet(tmp_path / "hidden", originals, label=[-1] * 24)
    for source in ("flat", "caption.tar", "hub", "hidden"):
        report = prepare_images(tmp_path / source, str(tmp_path / f"to-{source}"))
        assert (_counts(report), report.classes) == ((24, 0, 0), 1), source
        assert _samples(report.url) == sorted((0, p.data) for p in originals)


def _write_all(folder: Path, originals: list[Picture]) -> list[Path]:
    write_tars(folder / "tars", originals, "img2dataset")
    (folder / "tars/00001.tar").write_bytes((folder / "tars/00001.tar").read_bytes()[:-12_000])
    write_parquet(folder / "parquet", [*originals[:-1], Picture(b"no picture", "jpg", 0)])
    return [folder / "tars", folder / "parquet"]


@pytest.mark.slow
def test_a_second_run_more_workers_and_a_resumed_run_write_the_same_bytes(
    originals: list[Picture], tmp_path: Path
) -> None:
    """With rejects among them, and jobs of several shards."""
    for source in _write_all(tmp_path, originals):
        first = tmp_path / f"{source.name}-1"
        report = prepare_images(source, str(first), shard_bytes=2_000, where=["width>=44"])
        assert report.rejected
        assert report.filtered
        assert any(p.name.endswith("-001.tar") for p in first.iterdir())
        more = tmp_path / f"{source.name}-2"
        again = prepare_images(source, str(more), shard_bytes=2_000, where=["width>=44"], workers=2)
        assert _counts(again) == _counts(report)
        assert _hashes(more) == _hashes(first)
        removed = sorted(p for p in more.iterdir() if p.name.endswith(".index.json"))[1::2]
        for path in removed:
            path.unlink()
        (more / "manifest.json").unlink()
        resumed = prepare_images(source, str(more), shard_bytes=2_000, where=["width>=44"])
        assert 0 < resumed.reused_shards < resumed.shards
        assert _counts(resumed) == _counts(report)
        assert _hashes(more) == _hashes(first)


def test_a_unit_of_many_shards_is_read_once(
    originals: list[Picture], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_parquet(tmp_path / "source", originals)
    reads: list[tuple[Any, int]] = []
    read = ParquetSource.read

    def counted(self: ParquetSource, unit: Any, start: int) -> Any:
        reads.append((unit, start))
        return read(self, unit, start)

    monkeypatch.setattr(ParquetSource, "read", counted)
    report = prepare_images(tmp_path / "source", str(tmp_path / "to"), shard_bytes=2_000)
    # Besides the look at the first sample.
    assert len(reads[1:]) == len({unit for unit, _ in reads[1:]}) == 6
    assert report.shards > 6
    assert all(start == 0 for _, start in reads)


def test_another_seed_is_another_order_of_the_same_samples(originals: list[Picture], tmp_path: Path) -> None:
    write_tars(tmp_path / "source", originals, "webdataset")

    def order(seed: int) -> list[str]:
        to = tmp_path / str(seed)
        prepare_images(tmp_path / "source", str(to), seed=seed)
        return [m.source for m in ShardIndex.from_json((to / index_name("images-000000.tar")).read_text()).members]

    assert order(0) != order(1)
    assert sorted(order(0)) == sorted(order(1))
    assert order(0) != sorted(order(0))


def test_a_target_inside_the_source_would_become_part_of_it(originals: list[Picture], tmp_path: Path) -> None:
    write_tars(tmp_path, originals, "webdataset")
    for to in (tmp_path, tmp_path / "to", tmp_path / "x/../to"):
        with pytest.raises(UserError, match="lies inside the source"):
            prepare_images(tmp_path, str(to))


def test_conditions_leave_out_and_count(originals: list[Picture], tmp_path: Path) -> None:
    """The picture's width is its own, and not what the json says (1)."""
    write_tars(tmp_path / "tars", originals, "img2dataset")
    write_parquet(
        tmp_path / "hub", originals, aesthetic=[i / 2 for i in range(24)], nested=[{"score": i} for i in range(24)]
    )
    for source in ("tars", "hub"):
        for where, left in (
            (["aesthetic>=8"], 8),
            (["aesthetic>=8", "nested.score<20"], 4),
            (["width>=60", "width<68", "aspect<=1.25"], 3),
            (["width<=40", "height!=48"], 0),
        ):
            to = str(tmp_path / "-".join([source, *where]))
            if not left:
                with pytest.raises(UserError, match="24 fail a condition"):
                    prepare_images(tmp_path / source, to, where=where)
                continue
            assert _counts(prepare_images(tmp_path / source, to, where=where)) == (left, 24 - left, 0), (source, where)
        with pytest.raises(UserError, match=r"no column 'aestetic': did you mean 'aesthetic'\?"):
            prepare_images(tmp_path / source, str(tmp_path / "to"), where=["aestetic>1"])


def test_cut_and_odd_tars_lose_only_what_is_not_there(originals: list[Picture], tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_tars(source, originals, "webdataset", samples=6)
    whole = (source / "00000.tar").read_bytes()
    inside = open_source(str(source / "00000.tar"))
    starts = [position for position, _ in inside.source.read(inside.units[0], 0)]
    # In a picture; at a member's end, inside a sample; in nothing at all.
    (source / "00000.tar").write_bytes(whole[: starts[4] + 1536 + 300])
    second = (source / "00001.tar").read_bytes()
    (source / "00001.tar").write_bytes(second[:1024])
    (source / "00002.tar").write_bytes(b"x" * 2000)
    write_tar(
        source / "00004.tar",
        [("a", {"txt": b"x"}), ("b", {"jpg": originals[0].data}), ("c", {"jpg": b"", "cls": b"1"})],
    )
    report = prepare_images(source, str(tmp_path / "to"))
    assert report.samples == 4 + 0 + 0 + 6 + 0
    reasons = _rejects(tmp_path / "to")
    assert "breaks off" in reasons["00000.tar"]
    assert "no end-of-archive mark" in reasons["00001.tar"]
    assert "no whole tar" in reasons["00002.tar"]
    assert "no picture among its members (txt)" in reasons["00004.tar/a"]
    assert "has no label" in reasons["00004.tar/b"]
    assert "00004.tar/c" in reasons


def test_long_names_and_folders_in_tars(originals: list[Picture], tmp_path: Path) -> None:
    """Their headers are several blocks; a shard that begins at one must read them all."""
    (tmp_path / "source/deep").mkdir(parents=True)
    write_tars(tmp_path / "source/deep", originals, "webdataset", prefix="folder.of/" + "long" * 40 + "/")
    report = prepare_images(tmp_path / "source", str(tmp_path / "to"), shard_bytes=2_000)
    assert report.shards > 8
    assert _samples(report.url) == _expected(originals)


def test_small_blocks_read_the_same(originals: list[Picture], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every edge of a block inside headers, pictures and footers."""
    monkeypatch.setattr(ranges, "BLOCK", 100)
    write_tars(tmp_path / "tars", originals, "pretraining")
    write_parquet(tmp_path / "hub", originals, label=[p.label for p in originals])
    for source in ("tars", "hub"):
        report = prepare_images(tmp_path / source, str(tmp_path / f"to-{source}"), shard_bytes=4_000)
        assert _samples(report.url) == _expected(originals)


def test_patterns_files_and_folders(originals: list[Picture], tmp_path: Path) -> None:
    write_tars(tmp_path / "source", originals, "webdataset")
    (tmp_path / "source/.hidden.tar").write_bytes(b"")

    def names(pattern: str) -> list[str]:
        return list(list_files(f"{tmp_path}/{pattern}").files)

    every = [f"{i:05d}.tar" for i in range(4)]
    assert names("source") == every
    assert names("source/*.tar") == every
    assert names("source/{00001..00002}.tar") == every[1:3]
    assert names("source/0000[03].tar") == [every[0], every[3]]
    assert names("source/00003.tar") == every[3:]
    assert names("{source,source}/00003.tar") == ["source/00003.tar"]
    for absent in ("source/00009.tar", "source/{00003..00004}.tar", "source/*.zip"):
        with pytest.raises(UserError, match="does not exist"):
            names(absent)
    with pytest.raises(UserError, match="is no folder"):
        names("absent/*.tar")
    with pytest.raises(UserError, match="is no pattern"):
        names("source/{00000..00001.tar")


@pytest.mark.slow
def test_sources_in_s3(originals: list[Picture], new_prefix: Callable[[], str], pictures: Path, tmp_path: Path) -> None:
    write_tars(tmp_path / "tars", originals, "img2dataset")
    write_parquet(tmp_path / "hub", originals, label=[p.label for p in originals])
    for folder, pattern in (
        (tmp_path / "tars", "{00000..00003}.tar"),
        (tmp_path / "hub", "data/train-*"),
        (pictures, ""),
    ):
        url = new_prefix()
        store = open_store(url)
        for path in folder.rglob("*.*"):
            store.upload(path, path.relative_to(folder).as_posix())
        report = prepare_images(f"{url}/{pattern}".rstrip("/"), str(tmp_path / f"to-{folder.name}"))
        assert _samples(report.url) == _expected(originals)


def test_without_pyarrow_one_line_says_what_to_install(
    originals: list[Picture], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_parquet(tmp_path / "source", originals)
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "pyarrow":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install 'ibq-scale\[parquet\]'"):
        prepare_images(tmp_path / "source", str(tmp_path / "to"))


def test_parquet_that_is_no_set_of_pictures_is_refused(originals: list[Picture], tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    write_parquet(tmp_path / "splits", originals)
    (tmp_path / "splits/data/test-00000-of-00001.parquet").write_bytes(b"")
    with pytest.raises(UserError, match=r"splits test, train: name one, like 'test-\*.parquet'"):
        open_source(str(tmp_path / "splits"))
    parquet.write_table(pa.table({"url": ["x"]}), tmp_path / "urls.parquet")
    with pytest.raises(UserError, match="no column of pictures' bytes, only url"):
        open_source(str(tmp_path / "urls.parquet"))
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "urls.parquet").read_bytes()[:-20])
    with pytest.raises(UserError, match="is no whole parquet file"):
        open_source(str(tmp_path / "cut.parquet"))


def test_damaged_pages_of_parquet_are_rejected(originals: list[Picture], tmp_path: Path) -> None:
    write_parquet(tmp_path / "source", originals)
    path = tmp_path / "source/data/train-00000-of-00002.parquet"
    data = bytearray(path.read_bytes())
    data[4:60] = b"\xff" * 56
    path.write_bytes(data)
    report = prepare_images(tmp_path / "source", str(tmp_path / "to"))
    assert 12 <= report.samples < 24
    assert any("unreadable from row 0 on" in reason for reason in _rejects(tmp_path / "to").values())
