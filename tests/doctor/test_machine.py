"""Limits of the node."""

from __future__ import annotations

import resource
import shutil
from pathlib import Path

import pytest

from ibq_scale.doctor import machine
from ibq_scale.doctor.tools import Subject


def test_this_machine() -> None:
    found = {line.name: line for line in machine.machine(Subject())}
    assert {"CPU", "shared memory", "open files", "clock"} <= set(found)
    assert "GB of memory" in found["CPU"].text
    assert "FAIL" not in {line.level for line in found.values()}


def test_limits_that_are_too_low(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(64 << 20, 0, 64 << 20))
    assert machine._shared_memory().text == "67.11 MB of 67.11 MB free in /dev/shm"
    assert machine._shared_memory().level == "warn"
    monkeypatch.setattr(machine.resource, "getrlimit", lambda which: (1024, 524288))
    assert machine._files().todo == "ulimit -n 65536 before the start"
    monkeypatch.setattr(machine.resource, "getrlimit", lambda which: (1024, 1024))
    assert "administrators" in machine._files().todo


def test_infiniband(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "INFINIBAND", tmp_path)
    assert machine._infiniband() == []
    for name, state in {"mlx5_0": "4: ACTIVE", "mlx5_1": "1: DOWN"}.items():
        (tmp_path / name / "ports/1").mkdir(parents=True)
        (tmp_path / name / "ports/1/state").write_text(f"{state}\n")
    monkeypatch.setattr(machine.resource, "getrlimit", lambda which: (resource.RLIM_INFINITY,) * 2)
    assert machine._infiniband()[0].text == "1 of 2 ports active, not mlx5_1:1"
    (tmp_path / "mlx5_1/ports/1/state").write_text("4: ACTIVE\n")
    assert machine._infiniband()[0].level == "ok"
    monkeypatch.setattr(machine.resource, "getrlimit", lambda which: (65536, 65536))
    assert machine._infiniband()[0].text == "only 65,536 bytes of memory may be locked"


def test_memory_that_a_control_group_allows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    (tmp_path / "memory.max").write_text("8000000000\n")
    assert machine._limits() == [8_000_000_000]
    assert machine._cores().text.endswith("8.00 GB of memory")
