"""Runs are made once, by the commands that a user would type, and what is finished stays."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ibq_scale.config.layers import resolve
from ibq_scale.distributed.launch import launch
from ibq_scale.errors import UserError
from ibq_scale.experiments.plan import Configuration, Trial
from ibq_scale.experiments.results import collect
from ibq_scale.experiments.run import EVALUATION, run_trials, same_training
from ibq_scale.report.runs import load_run

SMALL = ("train.global_batch=2", "train.micro_batch=2", "train.log_every=1", "quantizer.codebook_size=32")


def _trial(steps: int) -> Trial:
    return Trial(Configuration("ibq-1024", "collapse", (*SMALL, f"train.steps={steps}")), seed=3)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    random = np.random.default_rng(0)
    for i in range(5):
        Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.distributed
def test_trained_evaluated_collected_and_then_left_alone(photographs: Path, tmp_path: Path) -> None:
    assert run_trials(photographs, tmp_path, [_trial(2)]) == 0
    run = tmp_path / "ibq-1024/seed-3"
    (result,) = collect(tmp_path)
    assert (result.name, result.seed, result.codes, result.batch_tokens) == ("ibq-1024", 3, 32, 128)
    assert result.steps == [1, 2]
    assert result.tokens == 16 * 64, "one picture of five, 4 × 4 tiles of 8 × 8 codes"
    assert 0 < result.usage <= 1
    assert 3 < result.psnr < 60
    times = {path: path.stat().st_mtime_ns for path in (run / EVALUATION, run / "metrics.jsonl")}
    assert run_trials(photographs, tmp_path, [_trial(2)]) == 0
    assert {path: path.stat().st_mtime_ns for path in times} == times

    (run / EVALUATION).unlink()
    assert run_trials(photographs, tmp_path, [_trial(2)]) == 0, "what is only trained is evaluated"
    assert json.loads((run / EVALUATION).read_text())["codebook_size"] == 32
    assert [point.step for point in load_run(run).points("step")] == [1, 2]

    with pytest.raises(UserError, match="is a run of another config"):
        run_trials(photographs, tmp_path, [_trial(3)])


@pytest.mark.slow
@pytest.mark.distributed
def test_a_part_of_a_run_is_not_evaluated_in_its_place(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def only_one_step(words: Sequence[str], ranks: int) -> int:
        """A training that ends early and says that all is well."""
        assert launch([w.replace("train.steps=2", "train.steps=1") for w in words], ranks) == 0
        return 0

    monkeypatch.setattr("ibq_scale.experiments.run.launch", only_one_step)
    assert run_trials(photographs, tmp_path, [_trial(2)]) == 1
    assert "ended at step 1 of 2" in capsys.readouterr().err
    assert not (tmp_path / "ibq-1024/seed-3" / EVALUATION).exists()


@pytest.mark.slow
@pytest.mark.distributed
def test_a_command_that_fails_ends_the_series_with_its_code(photographs: Path, tmp_path: Path) -> None:
    wrong = Trial(Configuration("ibq-1024", "collapse", (*SMALL, "train.steps=1", "deepspeed.config=none")), seed=0)
    assert run_trials(photographs, tmp_path, [wrong, _trial(1)]) == 2
    assert not (tmp_path / "ibq-1024/seed-3").exists()


def test_values_chosen_at_the_start_are_those_of_the_same_training() -> None:
    words = ["data.train=d", "train.global_batch=8", "train.micro_batch=auto", "deepspeed.config=auto"]
    asked = resolve("tokenizer/tiny", words, "tokenizer").config
    chosen = ["data.order=2", "data.lanes=8", "data.window=4", "data.workers=3", "train.micro_batch=4", "out=elsewhere"]
    run = resolve("tokenizer/tiny", [*words, *chosen, "deepspeed.config=zero1"], "tokenizer").config
    assert same_training(run, asked)
    for other in ("data.lanes=4", "optimizer.lr=1", "train.micro_batch=2"):
        assert not same_training(run, resolve("tokenizer/tiny", [*words, other], "tokenizer").config), other
    assert not same_training(asked, run)


def test_a_folder_of_photographs_is_needed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        run_trials(tmp_path / "missing", tmp_path, [_trial(1)])
