"""Files made to do harm: they cost a sample, and neither memory nor a file outside."""

from __future__ import annotations

import io
import json
import resource
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ibq_scale.data import tars
from ibq_scale.data.convert import MOST_PIXELS, decode
from ibq_scale.data.index import UnfitIndexError, index_of
from ibq_scale.data.manifest import load_manifest
from ibq_scale.data.prepare import prepare_images
from ibq_scale.errors import UserError
from tests.data.layouts import write_tar

SIDE = 60_000


def _jpeg(side: int | None = None) -> bytes:
    """A JPEG of 64 × 64 pixels, whose header may claim other sides."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((64, 64, 3), 90, np.uint8)).save(buffer, "JPEG")
    data = bytearray(buffer.getvalue())
    if side is not None:
        at = data.find(b"\xff\xc0") + 5
        assert struct.unpack(">HH", data[at : at + 4]) == (64, 64)
        data[at : at + 4] = struct.pack(">HH", side, side)
    return bytes(data)


def _png(side: int) -> bytes:
    """A PNG of one colour, 1,000 times smaller than its pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    row = zlib.compress(bytes(1 + 3 * side))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", row) + chunk(b"IEND", b"")


@pytest.mark.parametrize("least", [None, 256])
@pytest.mark.parametrize("bomb", [_jpeg(SIDE), _png(SIDE)], ids=["jpeg", "png"])
def test_a_picture_that_claims_billions_of_pixels_is_refused_before_memory_is_taken(
    bomb: bytes, least: int | None
) -> None:
    assert SIDE**2 > MOST_PIXELS
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(Image.DecompressionBombError):
        decode(bomb, least)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "kilobytes"


def test_bombs_are_rejected_where_data_is_prepared(tmp_path: Path) -> None:
    folder = tmp_path / "pictures/a"
    folder.mkdir(parents=True)
    for name, data in {"good.jpg": _jpeg(), "bomb.jpg": _jpeg(SIDE), "bomb.png": _png(SIDE)}.items():
        (folder / name).write_bytes(data)
    report = prepare_images(folder.parent, str(tmp_path / "to"))
    assert (report.samples, report.rejected) == (1, 2)
    rejects = [json.loads(line) for line in (tmp_path / "to/rejects.jsonl").read_text().splitlines()]
    assert {Path(r["path"]).name for r in rejects} == {"bomb.jpg", "bomb.png"}
    assert all("decompression bomb" in r["reason"] for r in rejects)


def test_names_in_a_tar_that_lead_outside_write_nothing_there(tmp_path: Path) -> None:
    source = tmp_path / "in/deep"
    source.mkdir(parents=True)
    names = ["../../escaped", "/tmp/ibq-escaped", "a/../../escaped", "plain"]
    write_tar(source / "0.tar", [(name, {"jpg": _jpeg(), "cls": b"0"}) for name in names])
    before = set(tmp_path.rglob("*"))
    report = prepare_images(str(source / "0.tar"), str(tmp_path / "to"))
    assert report.samples >= 1
    new = set(tmp_path.rglob("*")) - before
    assert all(path.is_relative_to(tmp_path / "to") for path in new)
    assert not Path("/tmp/ibq-escaped.jpg").exists()


def test_a_member_too_large_for_memory_is_rejected_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tars, "MOST_BYTES", 5_000)
    large, small = {"jpg": _jpeg() + bytes(6_000)}, {"jpg": _jpeg(), "mp4": bytes(6_000)}
    write_tar(tmp_path / "0.tar", [("large", large), ("json", small | {"json": bytes(6_000)}), ("good", small)])
    report = prepare_images(str(tmp_path / "0.tar"), str(tmp_path / "to"))
    assert (report.samples, report.rejected) == (1, 2)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sha256", "{precious}"),
        ("sha256", "../precious"),
        ("index_sha256", "{precious}"),
        ("name", "{precious}"),
        ("name", "../precious"),
        ("name", "a\0b"),
        ("bytes", -1),
        ("samples", "many"),
        ("shards", 3),
        ("classes", None),
    ],
)
def test_a_manifest_that_names_files_elsewhere_is_refused_and_touches_none(
    dataset: str, tmp_path: Path, key: str, value: object
) -> None:
    precious = tmp_path / "precious"
    precious.write_text("thesis")
    manifest = json.loads(Path(dataset, "manifest.json").read_text())
    value = value.format(precious=precious) if isinstance(value, str) else value
    (manifest if key in ("shards", "classes") else manifest["shards"][0])[key] = value
    (tmp_path / "data").mkdir()
    (tmp_path / "data/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"manifest\.json is damaged") as told:
        load_manifest(str(tmp_path / "data"), "images")
    assert len(str(told.value).splitlines()) == 1
    assert precious.read_text() == "thesis"


@pytest.mark.parametrize("text", ["", "[", "[" * 100_000, "\xff", "3", '{"version": 1}', "null", '"a"'])
def test_a_manifest_that_is_none_is_told_in_a_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"manifest\.json") as told:
        load_manifest(str(tmp_path), "images")
    assert len(str(told.value).splitlines()) == 1


@pytest.mark.parametrize(
    "harm",
    [
        lambda index: [1],
        lambda index: None,
        lambda index: index | {"members": 3},
        lambda index: index | {"members": [index["members"][0] | {"offset": -1}]},
        lambda index: index | {"members": [index["members"][0] | {"offset": "x"}]},
        lambda index: index | {"members": [index["members"][0] | {"size": 10**30}]},
        lambda index: index | {"members": [index["members"][0] | {"label": "dog"}]},
        lambda index: index | {"members": [index["members"][0] | {"more": 1}]},
        lambda index: index | {"rejects": [1]},
    ],
)
def test_an_index_of_other_content_is_unfit(dataset: str, harm: Callable[[Any], Any]) -> None:
    shard = load_manifest(dataset, "images").shards[0]
    index = json.loads(Path(dataset, f"{shard.name}.index.json").read_text())
    with pytest.raises(UnfitIndexError, match="damaged"):
        index_of(json.dumps(harm(index)).encode(), shard)
    with pytest.raises(UnfitIndexError, match="damaged"):
        index_of(b"[" * 100_000, shard)
