"""Sources that a disk or a hostile tar does not give: a reject each, and never the end of `prepare`."""

from __future__ import annotations

import errno
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from ibq_scale.data import folder
from ibq_scale.data.manifest import load_manifest
from ibq_scale.data.prepare import PrepareReport, prepare_images
from tests.data.wild import jpeg


def _rejects(to: Path) -> str:
    return (to / "rejects.jsonl").read_text()


def test_a_picture_whose_read_fails_is_a_reject(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_regular(path: Path, real: Any = folder.open_regular) -> BinaryIO:
        if path.name == "3.png":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        file: BinaryIO = real(path)
        return file

    monkeypatch.setattr(folder, "open_regular", open_regular)
    report = prepare_images(pictures, str(tmp_path / "set"))
    assert (report.samples, report.rejected) == (21, 3)
    assert _rejects(tmp_path / "set").count("Input/output error") == 3


def test_a_tar_of_which_a_part_cannot_be_read_gives_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tars").mkdir()
    for number in range(2):
        _write(tmp_path / f"tars/{number}.tar", [(f"{number}{i}.jpg", jpeg(i)) for i in range(4)])

    def read_range(self: folder.LocalStore, path: str, *rest: int, real: Any = folder.LocalStore.read_range) -> bytes:
        if path == "0.tar":
            raise folder.UnreadableError(f"cannot read {path}: Input/output error")
        data: bytes = real(self, path, *rest)
        return data

    monkeypatch.setattr(folder.LocalStore, "read_range", read_range)
    assert prepare_images(tmp_path / "tars", str(tmp_path / "set")).samples == 4
    assert "Input/output error" in _rejects(tmp_path / "set")


def _write(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def _size(data: bytearray, at: int) -> None:
    """−2^60, in base 256."""
    data[at + 124 : at + 136] = b"\xff" * 4 + (-(2**60)).to_bytes(8, "big", signed=True)


def _sparse(data: bytearray, at: int) -> None:
    """A GNU sparse file whose map is no numbers."""
    data[at + 156 : at + 157] = b"S"
    data[at + 386 : at + 482] = b"not a number" * 8


def _no_type(data: bytearray, at: int) -> None:
    data[at + 156 : at + 157] = b"\xfe"


@pytest.mark.parametrize("harm", [_size, _sparse, _no_type])
def test_a_broken_header_ends_no_more_than_its_tar(harm: Any, tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    for number in range(2):
        _write(tmp_path / f"tars/{number}.tar", [(f"{number}{i}.jpg", jpeg(i)) for i in range(4)])
    data = bytearray((tmp_path / "tars/0.tar").read_bytes())
    at = [offset for offset in range(0, len(data), 512) if data[offset + 257 : offset + 262] == b"ustar"][2]
    harm(data, at)
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    (tmp_path / "tars/0.tar").write_bytes(data)
    report = prepare_images(tmp_path / "tars", str(tmp_path / "set"))
    assert _all_told(report, tmp_path / "set")
    assert report.samples >= 4


def _all_told(report: PrepareReport, to: Path) -> bool:
    return load_manifest(str(to), "images").samples == report.samples


def test_json_of_any_depth_is_none(tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    deep = b'{"label": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    members = [(f"{i}.{end}", data) for i in range(20) for end, data in (("jpg", jpeg(i)), ("json", b'{"label": 1}'))]
    members[1] = ("0.json", deep)
    _write(tmp_path / "tars/0.tar", members)
    report = prepare_images(tmp_path / "tars", str(tmp_path / "set"))
    assert (report.samples, report.rejected) == (19, 1)
    assert "has no label" in json.dumps(_rejects(tmp_path / "set"))
