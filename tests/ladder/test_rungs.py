"""A ladder's file: every rung's run follows from it, and what cannot be is said before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from ibq_scale.cli.main import main
from ibq_scale.config.layers import resolve
from ibq_scale.errors import UserError
from ibq_scale.ladder.rungs import Rung, rungs_of
from ibq_scale.ladder.schema import ladder_names, load_ladder

PLAIN = {
    "name": "plain",
    "preset": "ar/tiny",
    "sizes": [{"name": "a", "depth": 1, "heads": 2, "width": 32}, {"name": "b", "depth": 2, "heads": 2, "width": 64}],
    "codes": {"train": "codes/{codebook}", "validation": "held/{codebook}", "codebooks": [40, 80]},
}


def _ladder(tmp_path: Path, *overrides: str, **changes: object) -> list[Rung]:
    file = tmp_path / "ladder.yaml"
    file.write_text(yaml.safe_dump(PLAIN | changes))
    return rungs_of(load_ladder(str(file), [f"out={tmp_path}", *overrides]))


@pytest.mark.slow
def test_sizes_budgets_codebooks_and_seeds_are_crossed(tmp_path: Path) -> None:
    rungs = _ladder(tmp_path, "budget.samples=[160,320]", "seeds=[0,1]")
    assert len({rung.name for rung in rungs}) == len(rungs) == 16
    assert {(r.size, r.codebook, r.seed, r.run.train.total_samples) for r in rungs} == {
        (size, codebook, seed, samples)
        for size in "ab"
        for codebook in (40, 80)
        for seed in (0, 1)
        for samples in (160, 320)
    }
    assert [r.flops for r in rungs] == sorted(r.flops for r in rungs), "what is cheap tells first what is wrong"
    for rung in rungs:
        run = rung.run
        assert run == resolve(rung.preset, rung.words, "ar").config, "the command makes this very run"
        assert (run.data.train, run.validation.data) == (f"codes/{rung.codebook}", f"held/{rung.codebook}")
        assert run.model.codebook_size == rung.codebook
        assert run.train.seed == rung.seed
        assert run.validation.every == run.train.total_steps
        assert rung.folder == tmp_path / "rungs" / rung.name


def test_a_budget_of_flops_gives_the_smaller_model_more_data(tmp_path: Path) -> None:
    a, b = (rung for rung in _ladder(tmp_path, "budget.flops=[1e12]", "codes.codebooks=[40]"))
    if a.size == "b":
        a, b = b, a
    assert a.tokens > 2 * b.tokens
    for rung in (a, b):
        # Whole steps of 16 images within it.
        step = rung.flops / rung.run.train.total_steps
        assert 1e12 - step < rung.flops <= 1e12


def test_rates_by_rule(tmp_path: Path) -> None:
    constant = {r.size: r.run.optimizer.lr for r in _ladder(tmp_path)}
    assert constant == {"a": 2e-3, "b": 2e-3}
    by_width = {
        r.size: r.run.optimizer.lr for r in _ladder(tmp_path, rate={"rule": "width", "lr": 1e-3, "base_width": 64})
    }
    assert by_width == pytest.approx({"a": 2e-3, "b": 1e-3})


def test_warmup_is_a_share_of_each_budget(tmp_path: Path) -> None:
    rungs = _ladder(tmp_path, "budget.samples=[320,1600]", "warmup=0.1")
    assert {r.run.train.total_samples: r.run.schedule.warmup_samples for r in rungs} == {320: 32, 1600: 160}


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["budget.sample=[1]"], "did you mean 'budget.samples'"),
        (["budget.samples=[160]", "budget.flops=[1e9]"], "not as both"),
        (["budget.samples=[8]"], "less than one train.global_batch"),
        (["rate.rule=width"], "needs lr and base_width"),
        (["codes.train=codes"], "need {codebook} in it"),
        (["sizes=[{name: a},{name: a}]"], "names of their own"),
        (["overrides=[model.dept=3]"], "did you mean 'model.depth'"),
        (["seeds=[]"], "seeds"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        _ladder(tmp_path, *overrides)


def test_names_of_ladders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'published'"):
        load_ladder("publishd")
    with pytest.raises(UserError, match="not found"):
        load_ladder(str(tmp_path / "no.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ladder_names())
def test_every_ladder_that_comes_along_is_planned(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scale", "plan", name, "--json"]) == 0
    rungs = json.loads(capsys.readouterr().out)
    assert len(rungs) >= 4
    assert all(rung["flops"] > 0 and rung["fits"] is not False for rung in rungs)


def test_the_published_ladder_is_the_published_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    rungs = rungs_of(load_ladder("published"))
    assert [rung.size for rung in rungs] == ["b", "l", "xl", "xxl"]
    for rung in rungs:
        preset = resolve(f"ar/{rung.size}", (), "ar").config
        assert rung.run.model == preset.model
        assert (rung.run.optimizer, rung.run.schedule) == (preset.optimizer, preset.schedule)
        assert rung.run.train.total_samples == preset.train.total_samples


@pytest.mark.slow
def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scale", "plan", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "w24-2.5e11-k256-seed0" in said
    assert "together: 8 rungs, 5e+12 FLOPs, hours unknown" in said


def test_a_ladder_reads_no_environment_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    for text, more in (("name: ${oc.env:SECRET}\n", []), ("name: x\n", ["out=${oc.env:SECRET}"])):
        (tmp_path / "ladder.yaml").write_text(text)
        with pytest.raises(UserError, match="does not read environment variables") as told:
            load_ladder(str(tmp_path / "ladder.yaml"), more)
        assert "hunter2" not in str(told.value)
