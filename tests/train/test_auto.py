"""A run with open settings, on CPU ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests import nursery
from tests.train.runs import lines, words

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
OPEN = ("train.micro_batch=auto", "codebook_group=auto", "deepspeed.config=auto", "data.workers=0")


def _train(data: str, run: Path, ranks: int, steps: int) -> str:
    done = nursery.run([*words(data, run, *OPEN, f"train.steps={steps}"), "--ranks", str(ranks)])
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_a_run_settles_what_is_open_anew_on_other_ranks(dataset: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    said = _train(dataset, run, 2, 2)
    assert "auto: train.micro_batch=4 (no GPU's memory is known here); codebook_group=0" in said
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["train"]["micro_batch"], config["deepspeed"]["config"]) == (4, "zero1")
    said = _train(dataset, run, 4, 3)
    assert "auto: train.micro_batch=2 " in said
    assert "resuming from" in said
    assert [line["step"] for line in lines(run)] == [1, 2, 3]
