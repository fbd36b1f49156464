"""An open micro-batch that runs out of memory on one rank: all ranks go on with half of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import nursery
from tests.ports import free_port
from tests.samples import SMALL_AR
from tests.train.runs import lines

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
WORDS = (
    *SMALL_AR,
    "model.depth=1",
    "data.lanes=3",
    "data.workers=0",
    "schedule.kind=tests.train.pressure:constant",
    "train.global_batch=8",
    "train.log_every=1",
    "train.steps=4",
)


def _words(codes: str, run: Path, micro_batch: object) -> list[str]:
    return ["train", "ar", "tiny", f"data.train={codes}", f"out={run}", *WORDS, f"train.micro_batch={micro_batch}"]


def _losses(run: Path) -> list[float]:
    return [line["loss"] for line in lines(run)]


def test_all_ranks_start_again_with_half_of_the_micro_batch(codes: str, tmp_path: Path) -> None:
    done = nursery.run([*_words(codes, tmp_path / "auto", "auto"), "--ranks", "2"])
    assert done.returncode == 0, done.stderr
    told = "train.micro_batch=4 ran out of memory on rank 1 in step 2: starting again with at most 2 and the same"
    assert done.stderr.count(told) == 1
    assert "4 ran out of memory here on rank 1 in step 2 (auto.json)" in done.stderr
    assert json.loads((tmp_path / "auto/auto.json").read_text())["CPU"]["micro_batch"] == 2
    done = nursery.run([*_words(codes, tmp_path / "two", 2), "--ranks", "2"])
    assert done.returncode == 0, done.stderr
    assert _losses(tmp_path / "auto") == _losses(tmp_path / "two")
    assert len(_losses(tmp_path / "auto")) == 4


def test_a_micro_batch_of_the_user_ends_the_run_in_words(codes: str, tmp_path: Path) -> None:
    done = nursery.run([*_words(codes, tmp_path / "run", 4), "--ranks", "2"])
    assert done.returncode == 1
    assert "(train.micro_batch=4 is set, so it stays: 2 or auto would fit, with the same global batch)" in done.stderr
    assert not (tmp_path / "run/auto.json").exists()


@pytest.mark.long
def test_torchrun_does_not_notice(codes: str, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "SLURM_PROCID")}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    words = [*launcher, "-m", "ibq_scale", *_words(codes, tmp_path / "run", "auto")]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "starting again with at most 2" in done.stderr
    assert len(_losses(tmp_path / "run")) == 4
