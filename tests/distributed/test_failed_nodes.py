"""Nodes by the names that a scheduler knows."""

from __future__ import annotations

from pathlib import Path

import pytest

from ibq_scale.distributed.failed_nodes import Faults, expand, recorded


@pytest.mark.parametrize(
    ("listed", "names"),
    [
        ("", []),
        ("login", ["login"]),
        ("node[0-2,7]", ["node0", "node1", "node2", "node7"]),
        ("gpu[08-10],cpu3,x[1]-ib", ["gpu08", "gpu09", "gpu10", "cpu3", "x1-ib"]),
        ("rack[1-2]node[1-2]", []),
    ],
)
def test_lists_as_slurm_writes_them(listed: str, names: list[str]) -> None:
    assert expand(listed) == names


def test_what_another_attempt_recorded_is_not_this_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert recorded(tmp_path / "run") is None
    # A run that has not begun has no directory.
    Faults({"node1": "no room"}, 2).record(tmp_path / "run")
    assert recorded(tmp_path / "run") == Faults({"node1": "no room"}, 2)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert recorded(tmp_path / "run") is None
