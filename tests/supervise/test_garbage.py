"""Garbage is collected on all ranks after the same steps, and at no other time of a training."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

from ibq_scale.supervise.garbage import collected_together
from tests.train.runs import each_rank, told_by

TELLS = """
import gc
from ibq_scale.supervise import garbage
from ibq_scale.train.tokenizer_task import TokenizerTask
garbage.EVERY_STEPS = 2
steps, collected = [0], []
gc.callbacks.append(lambda phase, info: collected.append((steps[0], info["generation"])) if phase == "start" else None)
def train_step(self, batches, real=TokenizerTask.train_step):
    steps[0] += 1
    junk = [[] for _ in range(100_000)]
    for inner in junk:
        inner.append(inner)
    out = real(self, batches)
    if steps[0] == 5:
        print("collected", *(f"{step}:{generation}" for step, generation in collected if step), flush=True)
    return out
TokenizerTask.train_step = train_step
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_ranks_collect_after_the_same_steps(dataset: str, tmp_path: Path) -> None:
    more = ("train.steps=5", "train.checkpoint_every=3", "data.workers=0", "train.log_every=10")
    with each_rank(dataset, tmp_path / "run", *more, before=TELLS) as ranks:
        # After steps 2 and 4, and all with the checkpoint of step 3.
        assert told_by(ranks, "collected") == ["collected 2:1 3:2 4:1"] * 2


def _fails() -> None:
    with collected_together():
        assert not gc.isenabled()
        raise RuntimeError


def test_it_is_as_before_behind_a_training_that_fails() -> None:
    with pytest.raises(RuntimeError):
        _fails()
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
