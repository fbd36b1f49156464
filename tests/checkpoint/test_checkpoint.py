"""A checkpoint is whole or it is none, whatever moment a crash picks."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import time
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from ibq_scale.checkpoint import saving
from ibq_scale.checkpoint.files import TensorFile, TextFile, Written
from ibq_scale.checkpoint.reading import (
    newest_or_this,
    read_checkpoint,
    verify,
    whole_checkpoints,
)
from ibq_scale.checkpoint.retention import Retention
from ibq_scale.checkpoint.saving import CheckpointFolder
from ibq_scale.distributed.world import World
from ibq_scale.errors import UserError
from tests.ranks import run_ranks


def _saved(checkpoints: CheckpointFolder, facts: dict[str, Any], files: list[Any]) -> bool:
    checkpoints.save(facts, files)
    return checkpoints.finish()


def _save(rank: int, world_size: int, folder: str, steps: list[int], keep: int) -> None:
    checkpoints = CheckpointFolder(Path(folder), World(rank, world_size, rank, torch.device("cpu")), Retention(keep))
    for step in steps:
        file = TextFile(f"part/rank-{rank}.bin", str(step % 10) * (100 + rank))
        checkpoints.save({"step": step, "samples": 8 * step, "world_size": world_size}, [file])
    assert checkpoints.finish()


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
    manifest = (step3 / "manifest.json").read_text()
    (step3 / "manifest.json").write_text(manifest.replace('"step": 3', '"step": 7'))
    with pytest.raises(UserError, match="is damaged: its sha256 differs"):
        read_checkpoint(step3)
    (step3 / "manifest.json").write_text(json.dumps({"format_version": 99}))
    with pytest.raises(UserError, match="format version 99"):
        read_checkpoint(step3)
    (step3 / "manifest.json").unlink()
    with pytest.raises(UserError, match="is no whole checkpoint"):
        read_checkpoint(step3)


@pytest.mark.parametrize("broken", ["write", "rename", "pointer"])
def test_a_crash_at_any_moment_leaves_the_last_good_one(
    alone: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    folder = tmp_path / "checkpoints"
    checkpoints = CheckpointFolder(folder, alone, Retention(2))
    assert _saved(checkpoints, {"step": 1}, [TextFile("x", "one")])

    def crash(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    class Crashing(TextFile):
        def write(self, folder: Path) -> Written:
            written = super().write(folder)
            crash()
            return written

    file = (Crashing if broken == "write" else TextFile)("x", "two")
    with monkeypatch.context() as patch:
        if broken != "write":
            patch.setattr(Path, "rename" if broken == "rename" else "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            _saved(checkpoints, {"step": 2}, [file])
    newest = checkpoints.newest()
    assert newest is not None
    assert verify(newest) == []
    assert newest.step == (2 if broken == "pointer" else 1)
    assert _saved(checkpoints, {"step": 2}, [TextFile("x", "two")])
    assert (folder / "latest").read_text() == "step-00000002\n"
    assert [c.step for c in whole_checkpoints(folder)] == [1, 2]


def _full(rank: int, world_size: int, folder: str) -> list[bool]:
    """Rank 1 may write 64 bytes a file, as if its disk were full, then as much as it likes."""
    checkpoints = CheckpointFolder(Path(folder), World(rank, world_size, rank, torch.device("cpu")), Retention(2))
    files = [TensorFile(f"rank-{rank}.safetensors", {"x": torch.ones(1000)}), TextFile(f"rank-{rank}.txt", "1" * 100)]
    saved = [_saved(checkpoints, {"step": 1}, files)]
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, resource.RLIM_INFINITY))
    saved += [_saved(checkpoints, {"step": 2}, files), _saved(checkpoints, {"step": 3}, files[1:])]
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert whole_checkpoints(Path(folder))[-1].step == 1
    dist.barrier()
    return [*saved, _saved(checkpoints, {"step": 4}, files)]


@pytest.mark.distributed
def test_a_full_disk_of_one_rank_fails_that_save_on_all_and_no_other(tmp_path: Path) -> None:
    assert run_ranks(_full, 2, str(tmp_path)) == [[True, False, False, True]] * 2
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["latest", "step-00000001", "step-00000004"]
    assert (tmp_path / "latest").read_text() == "step-00000004\n"


def _refuse(*_: Any) -> None:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def _read_only(rank: int, world_size: int, folder: str) -> tuple[bool, bool]:
    """The file system is read-only from the first file on: no rank writes its part, and none can leave word of that."""
    checkpoints = CheckpointFolder(Path(folder), World(rank, world_size, rank, torch.device("cpu")), Retention(1))
    begun = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "write_whole", _refuse)
        patch.setattr(Path, "touch", _refuse)
        patch.setattr(TextFile, "write", _refuse)
        whole = _saved(checkpoints, {"step": 1}, [TextFile(f"rank-{rank}.txt", "1")])
    return whole, time.monotonic() - begun < saving.PATIENCE_SECONDS / 10


@pytest.mark.distributed
def test_a_disk_that_turns_read_only_in_a_save_holds_up_no_rank(tmp_path: Path) -> None:
    assert run_ranks(_read_only, 2, str(tmp_path)) == [(False, True)] * 2
    assert whole_checkpoints(tmp_path) == []


def _newest(rank: int, world_size: int, folder: str) -> int:
    found = CheckpointFolder(Path(folder), World(rank, world_size, rank, torch.device("cpu")), Retention(2)).newest()
    return 0 if found is None else found.step


@pytest.mark.distributed
def test_a_damaged_checkpoint_is_told_and_the_one_before_taken(
    saved: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "checkpoints/step-00000003/part/rank-1.bin"
    content = bytearray(path.read_bytes())
    content[7] ^= 4
    path.write_bytes(content)
    assert run_ranks(_newest, 3, str(tmp_path / "checkpoints")) == [2, 2, 2]
    assert "part/rank-1.bin: content changed (sha256 differs)" in capfd.readouterr().err


@pytest.mark.distributed
def test_hashes_can_be_left_unread(alone: World, saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "run")
    path = tmp_path / "run/checkpoints/step-00000003/part/rank-1.bin"
    path.write_bytes(path.read_bytes()[::-1].replace(b"3", b"4"))
    checkpoints = CheckpointFolder(tmp_path / "run/checkpoints", alone, Retention(2))
    found = [checkpoints.newest(), checkpoints.newest(check_hashes=False)]
    assert [checkpoint and checkpoint.step for checkpoint in found] == [2, 3]


@pytest.mark.distributed
def test_the_pointer_is_mended(alone: World, saved: Path, tmp_path: Path) -> None:
    """A kill between a checkpoint's rename and its pointer leaves the one before's, or none."""
    shutil.copytree(saved, tmp_path / "run")
    pointer = tmp_path / "run/checkpoints/latest"
    for left in ("step-00000002\n", None):
        pointer.unlink()
        if left is not None:
            pointer.write_text(left)
        CheckpointFolder(tmp_path / "run/checkpoints", alone, Retention(2)).newest()
        assert pointer.read_text() == "step-00000003\n"


def _of_format(version: int, manifest: Path) -> str:
    """The manifest as earlier programs wrote it: without a hash of itself."""
    content = json.loads(manifest.read_text()) | {"format_version": version}
    del content["manifest_sha256"]
    return json.dumps(content)


@pytest.mark.distributed
def test_the_format_before_is_read(alone: World, saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "run")
    manifest = tmp_path / "run/checkpoints/step-00000003/manifest.json"
    manifest.write_text(_of_format(2, manifest))
    found = CheckpointFolder(tmp_path / "run/checkpoints", alone, Retention(2)).newest()
    assert found is not None
    assert found.step == 3


@pytest.mark.distributed
def test_a_run_of_another_format_is_refused_and_not_begun_anew(alone: World, saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "run")
    manifest = tmp_path / "run/checkpoints/step-00000002/manifest.json"
    manifest.write_text(_of_format(1, manifest))
    with pytest.raises(UserError, match="has format version 1, this program reads 2 and 3"):
        CheckpointFolder(tmp_path / "run/checkpoints", alone, Retention(2)).newest()


def test_a_checkpoint_that_the_disk_has_no_room_for_is_not_begun(
    alone: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    checkpoints = CheckpointFolder(tmp_path / "checkpoints", alone, Retention(2))
    assert not _saved(checkpoints, {"step": 1}, [TensorFile("x", {"x": torch.ones(1000)})])
    assert _saved(checkpoints, {"step": 1}, [TextFile("x", "small")])


def test_training_goes_on_while_a_checkpoint_is_written(alone: World, tmp_path: Path) -> None:
    """What is saved is the state of that moment, and only the next save waits."""
    began, may_end = Event(), Event()

    class Slow(TextFile):
        def write(self, folder: Path) -> Written:
            began.set()
            assert may_end.wait(300)
            return super().write(folder)

    checkpoints = CheckpointFolder(tmp_path, alone, Retention(2))
    weights = torch.zeros(3)
    checkpoints.save({"step": 1}, [Slow("slow", "x"), TensorFile("w.safetensors", {"w": weights})])
    assert began.wait(300)
    weights += 1
    assert whole_checkpoints(tmp_path) == []
    may_end.set()
    checkpoints.save({"step": 2}, [TensorFile("w.safetensors", {"w": weights})])
    assert [c.step for c in whole_checkpoints(tmp_path)][:1] == [1]
    assert checkpoints.finish()
    values = [load_file(tmp_path / f"step-0000000{step}/w.safetensors")["w"].tolist() for step in (1, 2)]
    assert values == [[0.0] * 3, [1.0] * 3]


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        (Retention(1), [5]),
        (Retention(2, every=2), [2, 4, 5]),
        (Retention(1, best="l1"), [3, 5]),
        (Retention(1, best="-usage"), [1, 5]),
        (Retention(1, best="absent"), [5]),
    ],
)
def test_what_stays(alone: World, tmp_path: Path, keep: Retention, left: list[int]) -> None:
    checkpoints = CheckpointFolder(tmp_path, alone, keep)
    for step, (l1, usage) in enumerate([(0.5, 0.9), (0.3, 0.8), (0.1, 0.2), (0.2, 0.1), (0.4, 0.3)], start=1):
        assert _saved(checkpoints, {"step": step, "metrics": {"l1": l1, "usage": usage}}, [TextFile("x", "x")])
    assert [c.step for c in whole_checkpoints(tmp_path)] == left
