"""Checkpoints in two places: a bare node goes on from the other, and trouble there is no trouble here."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ibq_scale.checkpoint.files import TensorFile, TextFile
from ibq_scale.checkpoint.mirror import Mirror
from ibq_scale.checkpoint.reading import verify, whole_checkpoints
from ibq_scale.checkpoint.saving import CheckpointFolder, Retention
from ibq_scale.distributed.environment import World
from tests.ranks import run_ranks


def _folder(rank: int, size: int, folder: Path, mirror: str) -> CheckpointFolder:
    world = World(rank, size, rank, torch.device("cpu"))
    return CheckpointFolder(folder, world, Retention(1), Mirror(mirror))


def _save(rank: int, size: int, folder: Path, mirror: str) -> bool:
    checkpoints = _folder(rank, size, folder, mirror)
    for step in (1, 2):
        tensors = {"x": torch.full((1000,), 10.0 * step + rank)}
        files = [TensorFile(f"part/rank-{rank}.safetensors", tensors), TextFile(f"rank-{rank}.txt", str(step))]
        checkpoints.save({"step": step}, files)
    return checkpoints.finish()


def _newest(rank: int, size: int, folder: Path, mirror: str) -> int:
    found = _folder(rank, size, folder, mirror).newest()
    assert found is None or verify(found) == []
    return 0 if found is None else found.step


@pytest.mark.distributed
def test_a_bare_node_goes_on_from_the_mirror(tmp_path: Path, new_prefix: Callable[[], str]) -> None:
    """Written by two ranks, fetched by three; a copy without its manifest does not count."""
    url = new_prefix()
    here = tmp_path / "checkpoints"
    assert run_ranks(_save, 2, here, url) == [True, True]
    assert [c.step for c in whole_checkpoints(here)] == [2]
    assert sorted(path.name for path in here.iterdir()) == ["latest", "step-00000002"]
    mirror = Mirror(url)
    assert mirror.newest() == "step-00000002"
    mirror.store.write("step-00000009/part/rank-0.safetensors", b"half a copy")
    shutil.rmtree(here)
    assert run_ranks(_newest, 3, here, url) == [2, 2, 2]
    assert (here / "latest").read_text() == "step-00000002\n"
    assert (here / "step-00000002" / "rank-1.txt").read_text() == "2"


@pytest.mark.distributed
def test_a_mirror_that_refuses_is_told_and_costs_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mirror").write_text("a file, no folder")
    here = tmp_path / "checkpoints"
    assert run_ranks(_save, 2, here, str(tmp_path / "mirror")) == [True, True]
    assert [c.step for c in whole_checkpoints(here)] == [2]
    assert "step-00000002 COULD NOT BE COPIED THERE" in capfd.readouterr().err


@pytest.mark.distributed
def test_nothing_anywhere_is_a_new_run(tmp_path: Path) -> None:
    assert run_ranks(_newest, 1, tmp_path / "checkpoints", str(tmp_path / "mirror")) == [0]
