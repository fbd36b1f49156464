"""A checkpoint is whole or it is none, whatever moment a crash picks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ibq_scale.distributed.environment import World
from ibq_scale.errors import UserError
from ibq_scale.train.checkpoint import (
    CheckpointFolder,
    newest_or_this,
    read_checkpoint,
    verify,
    whole_checkpoints,
)
from tests.ranks import run_ranks


def _save(rank: int, world_size: int, folder: str, steps: list[int], keep: int) -> None:
    checkpoints = CheckpointFolder(Path(folder), World(rank, world_size, rank, torch.device("cpu")), keep)
    for step in steps:

        def write(directory: Path, step: int = step) -> None:
            (directory / "part").mkdir(exist_ok=True)
            (directory / "part" / f"rank-{rank}.bin").write_bytes(bytes([step % 256]) * (100 + rank))

        checkpoints.save({"step": step, "samples": 8 * step, "world_size": world_size}, write)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 2 and 3, by two ranks, step 1 retired."""
    run = tmp_path_factory.mktemp("run")
    run_ranks(_save, 2, str(run / "checkpoints"), [1, 2, 3], 2)
    return run


@pytest.mark.distributed
def test_the_newest_ones_are_kept_whole(saved: Path) -> None:
    found = whole_checkpoints(saved / "checkpoints")
    assert [c.step for c in found] == [2, 3]
    assert (saved / "checkpoints/latest").read_text() == "step-00000003\n"
    assert sorted(p.name for p in (saved / "checkpoints").iterdir()) == ["latest", "step-00000002", "step-00000003"]
    assert set(found[0].manifest["files"]) == {"part/rank-0.bin", "part/rank-1.bin"}
    assert found[0].bytes == 201
    assert verify(found[0]) == []
    assert newest_or_this(saved).step == 3


@pytest.mark.distributed
def test_damage_is_seen(saved: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    step2, step3 = tmp_path / "checkpoints/step-00000002", tmp_path / "checkpoints/step-00000003"
    (step3 / "part/rank-1.bin").write_bytes(b"short")
    assert [c.step for c in whole_checkpoints(tmp_path / "checkpoints")] == [2], "the newest whole one counts"
    assert verify(read_checkpoint(step3)) == ["part/rank-1.bin: 5 bytes instead of 101"]
    content = bytearray((step2 / "part/rank-0.bin").read_bytes())
    content[50] ^= 1
    (step2 / "part/rank-0.bin").write_bytes(content)
    assert verify(read_checkpoint(step2)) == ["part/rank-0.bin: content changed (sha256 differs)"]
    (step2 / "part/rank-0.bin").unlink()
    assert verify(read_checkpoint(step2)) == ["part/rank-0.bin: missing"]
    (step3 / "manifest.json").write_text(json.dumps({"format_version": 99}))
    with pytest.raises(UserError, match="format version 99"):
        read_checkpoint(step3)
    (step3 / "manifest.json").unlink()
    with pytest.raises(UserError, match="is no whole checkpoint"):
        read_checkpoint(step3)


@pytest.fixture
def alone(tmp_path: Path) -> Any:
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield World(0, 1, 0, torch.device("cpu"))
    dist.destroy_process_group()


@pytest.mark.parametrize("broken", ["write", "rename", "pointer"])
def test_a_crash_at_any_moment_leaves_the_last_good_one(
    alone: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    folder = tmp_path / "checkpoints"
    checkpoints = CheckpointFolder(folder, alone, keep=2)
    checkpoints.save({"step": 1}, lambda d: (d / "x").write_bytes(b"one") and None)

    def crash(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    def write(directory: Path) -> None:
        (directory / "x").write_bytes(b"two")
        if broken == "write":
            crash()

    with monkeypatch.context() as patch:
        if broken != "write":
            patch.setattr(Path, "rename" if broken == "rename" else "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.save({"step": 2}, write)
    newest = checkpoints.newest()
    assert newest is not None
    assert verify(newest) == []
    assert newest.step == (2 if broken == "pointer" else 1)
    checkpoints.save({"step": 2}, lambda d: (d / "x").write_bytes(b"two") and None)
    assert (folder / "latest").read_text() == "step-00000002\n"
    assert [c.step for c in whole_checkpoints(folder)] == [1, 2]
