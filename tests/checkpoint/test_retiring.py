"""A checkpoint that goes is gone, also when the process dies while it removes it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ibq_scale.checkpoint.files import TextFile
from ibq_scale.checkpoint.reading import whole_checkpoints
from ibq_scale.checkpoint.saving import CheckpointFolder, Retention
from ibq_scale.distributed.world import World
from tests.ranks import run_ranks

# Dies within the first removal, when some of the files are gone.
DIES = """
import os, shutil, socket, sys
from pathlib import Path
import torch.distributed as dist
from tests.checkpoint.test_retiring import save
def die(path, **kwargs):
    next(p for p in Path(path).iterdir()).unlink()
    os._exit(9)
shutil.rmtree = die
with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
save(0, 1, Path(sys.argv[1]), [1, 2])
"""


def save(rank: int, size: int, folder: Path, steps: list[int]) -> None:
    """Checkpoints of two files; one is kept."""
    checkpoints = CheckpointFolder(folder, World(rank, size, rank, torch.device("cpu")), Retention(1))
    for step in steps:
        checkpoints.save({"step": step}, [TextFile("x", "x"), TextFile("y", "y")])
        assert checkpoints.finish()


@pytest.mark.slow
@pytest.mark.distributed
def test_what_a_crash_left_half_removed_goes_with_the_next_save(tmp_path: Path) -> None:
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    died = subprocess.run([sys.executable, "-c", DIES, str(tmp_path)], env=environ, check=False)
    assert died.returncode == 9
    assert [c.step for c in whole_checkpoints(tmp_path)] == [2]
    assert len(list(tmp_path.iterdir())) > 2, "nothing was left half removed"
    run_ranks(save, 1, tmp_path, [3])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000003"]


def test_what_a_kill_within_the_last_save_left_goes_when_the_run_has_nothing_to_do(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    folder = tmp_path / "checkpoints"
    try:
        checkpoints = CheckpointFolder(folder, World(0, 1, 0, torch.device("cpu")), Retention(2))
        for step in (1, 2):
            checkpoints.save({"step": step}, [TextFile("x", "x")])
            assert checkpoints.finish()
        (folder / ".partial-retired-step-00000000").mkdir()
        checkpoints.keep = Retention(1)
        checkpoints.tidy(whole_checkpoints(folder)[0])
        assert len(list(folder.iterdir())) == 4, "a newer one stands: perhaps it is damaged"
        checkpoints.tidy(whole_checkpoints(folder)[-1])
    finally:
        dist.destroy_process_group()
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-00000002"]
