"""What is damaged in the newest checkpoint is named by `verify`, and by a run that goes on from the one before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ibq_scale.checkpoint.files import TensorFile, TextFile
from ibq_scale.checkpoint.saving import CheckpointFolder, Retention
from ibq_scale.cli.main import main
from ibq_scale.distributed.world import World
from tests.docs.pages import commands, section
from tests.ranks import run_ranks


def _checkpoints(rank: int, size: int, run: Path) -> CheckpointFolder:
    return CheckpointFolder(run / "checkpoints", World(rank, size, rank, torch.device("cpu")), Retention(2))


def _save(rank: int, size: int, run: Path) -> None:
    checkpoints = _checkpoints(rank, size, run)
    for step in (1, 2):
        tensors = {"x": torch.full((100,), float(step))}
        checkpoints.save({"step": step}, [TensorFile("x.safetensors", tensors), TextFile("y.json", "[1, 2]")])
        assert checkpoints.finish()


def _newest(rank: int, size: int, run: Path) -> int:
    found = _checkpoints(rank, size, run).newest()
    return 0 if found is None else found.step


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 128
    path.write_bytes(content)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("name", "harm", "said"),
    [
        ("x.safetensors", _cut, "x.safetensors: "),
        ("x.safetensors", _flip, "x.safetensors: content changed (sha256 differs)"),
        ("y.json", _cut, "y.json: 0 bytes instead of 6"),
        ("y.json", Path.unlink, "y.json: missing"),
        ("manifest.json", _cut, "manifest.json is damaged"),
        ("manifest.json", _flip, "manifest.json is damaged"),
        ("manifest.json", Path.unlink, "is no whole checkpoint: it has no manifest.json"),
    ],
)
def test_what_is_damaged_is_named_and_the_one_before_taken(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, harm: Callable[[Path], None], said: str
) -> None:
    run_ranks(_save, 1, tmp_path)
    assert main(["checkpoint", "verify", str(tmp_path)]) == 0
    newest = tmp_path / "checkpoints/step-00000002"
    harm(newest / name)
    capfd.readouterr()
    assert main(["checkpoint", "verify", str(tmp_path)]) == 1
    told = capfd.readouterr().err
    assert said in told
    assert str(newest) in told
    assert run_ranks(_newest, 1, tmp_path) == [1]
    told = capfd.readouterr().err
    assert said in told
    assert str(newest) in told
    (symptom,) = [words for words in ("is damaged and left out", "it is left out") if words in told]
    assert ["checkpoint", "verify", "runs/tok"] in list(commands(section(symptom, told)))
