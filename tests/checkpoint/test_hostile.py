"""Manifests of checkpoints and mirrors made to do harm: nothing outside of them is read, written or removed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ibq_scale.checkpoint.mirror import Mirror
from ibq_scale.checkpoint.reading import (
    FORMAT_VERSION,
    Checkpoint,
    NotWholeError,
    file_sha256,
    parse_manifest,
    verify,
    whole_checkpoints,
)

GOOD = {"bytes": 6, "sha256": "0" * 64}


def _manifest(**changed: Any) -> dict[str, Any]:
    return {"format_version": FORMAT_VERSION, "step": 1, "samples": 8, "files": {"a": GOOD}} | changed


@pytest.mark.parametrize(
    "changed",
    [
        {"files": {"../../../.bashrc": GOOD}},
        {"files": {"/etc/passwd": GOOD}},
        {"files": {"a\0": GOOD}},
        {"files": ["a"]},
        {"files": None},
        {"files": {"a": None}},
        {"files": {"a": GOOD | {"bytes": -1}}},
        {"files": {"a": GOOD | {"bytes": "6"}}},
        {"files": {"a": GOOD | {"sha256": "/etc/passwd"}}},
        {"step": "1"},
        {"step": None},
    ],
)
def test_a_manifest_of_other_content_is_no_checkpoints(changed: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(NotWholeError, match="is damaged") as told:
        parse_manifest(json.dumps(_manifest(**changed)), tmp_path)
    assert len(str(told.value).splitlines()) == 1


@pytest.mark.parametrize("text", ["", "[" * 100_000, "3", "{}", "null", '{"format_version": 3}'])
def test_a_text_that_is_no_manifest_is_told(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"manifest|format version"):
        parse_manifest(text, tmp_path)


def test_files_with_a_checkpoints_name_and_folders_with_a_manifests_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "step-00000099").write_text("")
    (tmp_path / "step-00000098/manifest.json").mkdir(parents=True)
    assert whole_checkpoints(tmp_path) == []


def test_a_link_out_of_a_checkpoint_is_a_fault_and_is_not_read(tmp_path: Path) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "step-00000001"
    outside.write_text("thesis")
    folder.mkdir()
    (folder / "a").symlink_to(outside)
    info = {"bytes": 6, "sha256": file_sha256(outside)}
    (folder / "manifest.json").write_text(json.dumps(_manifest(files={"a": info})))
    assert whole_checkpoints(tmp_path) == []
    assert verify(Checkpoint(folder, _manifest(files={"a": info}))) == ["a: leads out of the checkpoint"]


def test_a_mirror_writes_through_no_link(tmp_path: Path) -> None:
    store, into, outside = tmp_path / "mirror", tmp_path / "run", tmp_path / "outside"
    for folder in (store / "step-00000001/part", into, outside):
        folder.mkdir(parents=True)
    (store / "step-00000001/part/a").write_text("hacked")
    (into / "part").symlink_to(outside)
    copy = Checkpoint(Path("step-00000001"), _manifest(files={"part/a": GOOD}))
    assert Mirror(str(store)).fetch(copy, ["part/a"], into) == ["part/a: leads out of the checkpoint"]
    assert list(outside.iterdir()) == []


def test_a_mirror_removes_nothing_behind_a_link(tmp_path: Path) -> None:
    store, outside = tmp_path / "mirror", tmp_path / "outside"
    store.mkdir()
    outside.mkdir()
    for name in ("thesis", "manifest.json"):
        (outside / name).write_text("precious")
    (store / "step-00000001").symlink_to(outside)
    assert Mirror(str(store)).copies().files == {}
    assert sorted(path.name for path in outside.iterdir()) == ["manifest.json", "thesis"]
