"""Folders that can be written, and those that cannot."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from ibq_scale.doctor import disks
from ibq_scale.doctor.tools import Subject
from ibq_scale.findings import Finding


def _run_dir(path: Path) -> Finding:
    (line,) = disks.run_directory(Subject(run_dir=str(path)))
    return line


@pytest.fixture
def roomy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disks.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**13, 0, 10**13))
    monkeypatch.setattr(disks, "SLOW", 0.0)
    monkeypatch.setattr(disks, "file_system", lambda path: "ext4")


@pytest.mark.slow
def test_a_folder_and_one_to_be_made(tmp_path: Path, roomy: None) -> None:
    assert _run_dir(tmp_path).level == "ok"
    line = _run_dir(tmp_path / "runs/new")
    assert line.level == "ok"
    assert line.text.startswith(f"{tmp_path}/runs/new (to be made in {tmp_path}): ")
    assert list(tmp_path.iterdir()) == []


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    assert _run_dir(tmp_path / "runs/new").text == f"{tmp_path}/runs is not a folder"


def test_a_disk_without_room(tmp_path: Path, roomy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(folder: Path, size: int) -> float:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr("ibq_scale.bench.disk.write_rate", full)
    line = _run_dir(tmp_path)
    assert line.level == "FAIL"
    assert line.text == f"{tmp_path} cannot be written: Disk quota exceeded"
    assert line.todo.startswith("make room or raise the quota")
    monkeypatch.setattr(disks.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
    assert _run_dir(tmp_path).text == f"{tmp_path}: 1.00 MB free"


@pytest.mark.slow
def test_what_is_unusual_about_a_disk(tmp_path: Path, roomy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disks, "SLOW", 1e18)
    assert "train.checkpoint_every" in _run_dir(tmp_path).todo
    monkeypatch.setattr(disks, "SLOW", 0.0)
    monkeypatch.setattr(disks, "file_system", lambda path: "lustre")
    assert _run_dir(tmp_path).level == "ok", "checkpoints belong on a shared one"
    monkeypatch.setenv("SLURM_TMPDIR", str(tmp_path))
    (line,) = disks.cache_folder(Subject())
    assert line.level == "warn"
    assert "data.cache_dir=…" in line.todo
    monkeypatch.setattr(disks, "_skew_and_lock", lambda folder: 90.0)
    assert "its clock is +90 s off this node's" in _run_dir(tmp_path).text


def test_the_kind_of_a_file_system() -> None:
    assert disks.file_system(Path("/proc/self/no/such")) == "proc"
    assert not disks.is_shared(Path("/proc"))
