"""A run with open settings, on CPU ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ibq_scale.checkpoint.reading import whole_checkpoints
from tests import nursery
from tests.train.runs import lines, wait_until, words

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
OPEN = ("train.micro_batch=auto", "codebook_group=auto", "deepspeed.config=auto", "data.workers=0")

# 3, 5 and 8 ranks divide this batch. Only 8 divide the 64 codes. The discriminator's batch norms see a micro-batch, and
# Adam's first steps are those of signs unless eps is large: without these a run does not depend on its ranks.
SAVED = (
    "train.global_batch=120",
    "train.checkpoint_every=1",
    "loss.adversarial_weight=0",
    "quantizer.entropy_temperature=1.0",
    "optimizer.lr=0.01",
    "optimizer.eps=0.01",
)


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


def _until(data: str, run: Path, ranks: int, steps: int) -> str:
    done = nursery.run([*words(data, run, *OPEN, *SAVED, f"train.steps={steps}"), "--ranks", str(ranks)])
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.long
def test_a_killed_run_of_8_ranks_goes_on_with_3_and_5(dataset: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    started = nursery.command([*words(dataset, run, *OPEN, *SAVED, "train.steps=100000"), "--ranks", "8"])
    wait_until(lambda: len(whole_checkpoints(run / "checkpoints")) >= 2, started)
    started.kill()
    _, said = started.communicate()
    assert "120 = 3 micro × 5 accumulation × 8 ranks" in said
    assert "the codebook over groups of 8\n" in said
    saved = whole_checkpoints(run / "checkpoints")[-1].step
    said = _until(dataset, run, 3, saved + 2)
    assert "resuming from" in said
    assert "120 = 4 micro × 10 accumulation × 3 ranks" in said
    assert "groups of 1 (3 ranks do not divide 64 codes)" in said
    said = _until(dataset, run, 5, saved + 4)
    assert "120 = 4 micro × 6 accumulation × 5 ranks" in said
    _until(dataset, tmp_path / "undisturbed", 2, saved + 4)
    whole, parts = ({line["step"]: line for line in lines(folder)} for folder in (tmp_path / "undisturbed", run))
    assert list(parts) == list(whole) == list(range(1, saved + 5))
    for step, line in whole.items():
        assert parts[step]["samples"] == line["samples"] == 120 * step
        assert parts[step]["loss"] == pytest.approx(line["loss"], rel=1e-3), step
