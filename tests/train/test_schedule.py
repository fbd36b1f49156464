"""Learning rate and weight decay at the published schedules' corners."""

from __future__ import annotations

import pytest

from ibq_scale.config.layers import resolve
from ibq_scale.config.optimizer import SCHEDULES, OptimizerConfig, ScheduleConfig
from ibq_scale.config.run import TokenizerRun
from ibq_scale.errors import UserError
from ibq_scale.train.schedule import SHAPES, codebook_lr, lr_factor, weight_decay

IMAGENET = 1_281_167


def test_the_published_tokenizers_steps() -> None:
    run = resolve("tokenizer/ibq-16384").config
    factors = [
        lr_factor(run.schedule, epoch * IMAGENET + 1000, run.train.total_samples) for epoch in (0, 249, 250, 300)
    ]
    assert factors == pytest.approx([1.0, 1.0, 0.1, 0.01])


def test_the_published_transformers_warm_up_and_line() -> None:
    schedule = ScheduleConfig(kind="linear", warmup_samples=100, constant_fraction=0.05, final_factor=0.01)
    total = 1100
    assert lr_factor(schedule, 0, total) == pytest.approx(0.005)
    assert lr_factor(schedule, 50, total) == pytest.approx(0.5025)
    assert lr_factor(schedule, 150, total) == 1.0
    assert lr_factor(schedule, 100 + 525, total) == pytest.approx(1 - 0.99 * 0.5)
    assert lr_factor(schedule, total, total) == pytest.approx(0.01)
    assert lr_factor(schedule, 5 * total, total) == pytest.approx(0.01)


def test_the_shapes_by_their_usual_names() -> None:
    line = ScheduleConfig(kind="linear", warmup_samples=100, constant_fraction=0.2, final_factor=0.1)
    wsd, cosine = line.model_copy(update={"kind": "wsd"}), line.model_copy(update={"kind": "cosine"})
    places = range(0, 1300, 50)
    assert [lr_factor(wsd, at, 1100) for at in places] == [lr_factor(line, at, 1100) for at in places]
    assert [lr_factor(cosine, at, 1100) for at in (50, 300)] == [lr_factor(line, at, 1100) for at in (50, 300)]
    assert [lr_factor(cosine, at, 1100) for at in (500, 700, 900, 1100, 2000)] == pytest.approx(
        [0.1 + 0.45 * (1 + 0.5**0.5), 0.55, 0.1 + 0.45 * (1 - 0.5**0.5), 0.1, 0.1]
    )


def test_every_built_in_name_has_a_shape() -> None:
    assert tuple(SHAPES) == SCHEDULES


def test_the_largest_models_weight_decay_rises_on_a_cosine() -> None:
    optimizer = OptimizerConfig(weight_decay=0.05, weight_decay_end=0.08)
    assert [weight_decay(optimizer, s, 100) for s in (0, 50, 100)] == pytest.approx([0.05, 0.065, 0.08])
    assert weight_decay(OptimizerConfig(weight_decay=0.05), 70, 100) == 0.05


def test_the_codebook_has_a_rate_and_a_schedule_of_its_own() -> None:
    line = ("optimizer.lr=1e-4", "schedule.kind=linear", "schedule.warmup_samples=160", "train.steps=100")
    own = ("optimizer.codebook_lr=1e-3", "optimizer.codebook_schedule.kind=constant")
    for words, rates in (
        ((), [0.5e-6, 1e-4, 1e-5]),
        (own[:1], [0.5e-5, 1e-3, 1e-4]),
        (own[1:], [1e-4, 1e-4, 1e-4]),
        (own, [1e-3, 1e-3, 1e-3]),
    ):
        run = resolve("tokenizer/tiny", [*line, *words]).config
        assert isinstance(run, TokenizerRun)
        found = [codebook_lr(run.optimizer, run.schedule, at, run.train.total_samples) for at in (0, 160, 1600)]
        assert found == pytest.approx(rates), words
    with pytest.raises(UserError, match=r"unknown key 'optimizer\.codebook_lr'"):
        resolve("ar/tiny", ["optimizer.codebook_lr=1e-3"])
