"""The stability bench: the measure is that of its definition, a curve is a function of its trial."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ibq_scale.cli.main import main
from ibq_scale.errors import UserError
from ibq_scale.experiments import stability
from ibq_scale.experiments.stability import VARIANTS, Curve, Sizes, Trial, trials, ur_auc
from ibq_scale.experiments.stability_run import _alone, in_dimensions, measure
from ibq_scale.experiments.stability_tables import figures, markdown
from ibq_scale.quantize.kinds import KINDS

# 64 tokens a step, and a window of four steps.
SMALL = Sizes(steps=12, window=256, more=("train.global_batch=1", "train.micro_batch=1"))
CODES = 64
WAY = "quantizer.straight_through"


def _curve(name: str, scale: float | None, seed: int, usage: list[float]) -> Curve:
    steps = [4 * (i + 1) for i in range(len(usage))]
    return Curve(name, 1024, scale, seed, 64, 0.01, 64, 256, "features-x", steps, usage, 1.5, "2")


def _features(count: int = 1024) -> torch.Tensor:
    return torch.randn(count, 64, generator=torch.Generator().manual_seed(0))


def _trial(name: str, scale: float | None, seed: int = 0) -> Trial:
    (variant,) = (v for v in VARIANTS if v.name == name)
    return Trial(variant, CODES, scale, seed)


def test_ur_auc_is_the_mean_over_scales_of_the_mean_over_time() -> None:
    ramp, flat = _curve("vq", 0.1, 0, [0.0, 0.5, 1.0]), _curve("vq", 1.0, 0, [0.2, 0.2, 0.2])
    assert ramp.area == pytest.approx(0.5)
    assert ur_auc([ramp, flat]) == pytest.approx([35.0])
    uneven = replace(ramp, steps=[4, 5, 9])
    assert uneven.area == pytest.approx((1 * 0.25 + 4 * 0.75) / 5), "an integral over steps, not a mean of points"
    other = [replace(c, seed=1, usage=[1.0, 1.0, 1.0]) for c in (ramp, flat)]
    assert ur_auc([*other, ramp, flat]) == pytest.approx([35.0, 100.0])


def test_every_quantizer_has_rows_and_those_that_learn_nothing_no_scale() -> None:
    chosen = trials()
    assert {t.run().quantizer.kind for t in trials(seeds=[0], codes=[1024], scales=[1.0])} == set(KINDS)
    assert {t.variant.name for t in chosen if t.scale is None} == {"lfq", "fsq"}
    assert len({t.file for t in chosen}) == len(chosen)
    assert {t.run().quantizer.codebook_size for t in trials(["fsq", "lfq"], [0])} == set(stability.CODES)
    with pytest.raises(UserError, match="no row named vqq: there are ibq"):
        trials(["vqq"])
    with pytest.raises(UserError, match="power of two"):
        trials(["fsq"], [0], [1000])[0].run()


def test_a_curve_is_a_function_of_its_trial_and_starts_at_its_scale() -> None:
    with _alone() as world:
        one, same = (measure(_trial("ibq", 1.0), _features(), "f", SMALL, world) for _ in range(2))
        other = measure(_trial("ibq", 1.0, seed=1), _features(), "f", SMALL, world)
    assert one.steps == [4, 8, 12], "no point before a whole window"
    assert replace(one, cpu_seconds=0.0) == replace(same, cpu_seconds=0.0)
    assert one.usage != other.usage
    assert 0.5 < one.usage[0] <= 1.0, "normal codes serve normal features"


@pytest.mark.parametrize("name", ["vq", "simvq"])
def test_a_codebook_far_too_large_collapses(name: str) -> None:
    with _alone() as world:
        large = measure(_trial(name, 100.0), _features(), "f", SMALL, world)
        fitting = measure(_trial(name, 1.0), _features(), "f", SMALL, world)
    assert large.usage[0] < 0.1 < fitting.usage[0]


@pytest.mark.parametrize("switch", ["dynamic", "rotation"])
def test_another_gradient_to_the_encoder_changes_no_curve(switch: str) -> None:
    trial = _trial("vq", 1.0)
    other = replace(trial, variant=replace(trial.variant, overrides=(*trial.variant.overrides, f"{WAY}={switch}")))
    with _alone() as world:
        one, same = (measure(t, _features(), "f", SMALL, world) for t in (trial, other))
    assert one.usage == same.usage, "which is why these switches have no row"


def test_region_serves_a_codebook_far_too_small() -> None:
    with _alone() as world:
        plain, region = (measure(_trial(n, 0.01), _features(), "f", SMALL, world) for n in ("vq", "vq-region"))
    assert region.usage[-1] > plain.usage[-1] + 0.2


def test_quantizers_without_a_codebook_stay_flat() -> None:
    with _alone() as world:
        curves = [measure(_trial(name, None), _features(), "f", SMALL, world) for name in ("lfq", "fsq")]
    assert [c.dim for c in curves] == [6, 2]
    for curve in curves:
        assert max(curve.usage) - min(curve.usage) < 0.1
        assert min(curve.usage) > 0.8


def test_fewer_dimensions_are_principal_components_of_unit_variance() -> None:
    wide_TD = _features(16384) * torch.tensor([10.0, 5.0, *([0.01] * 62)])
    narrow_TD = in_dimensions(wide_TD - wide_TD.mean(dim=0), 2)
    torch.testing.assert_close(narrow_TD.T @ narrow_TD / len(narrow_TD), torch.eye(2), rtol=1e-3, atol=1e-3)
    against = torch.corrcoef(torch.cat([narrow_TD, wide_TD[:, :2]], dim=1).T)[:2, 2:].abs()
    torch.testing.assert_close(against, torch.eye(2), rtol=0, atol=0.05)


def test_table_and_figure_say_what_was_run() -> None:
    curves = [_curve("vq", m, seed, [0.1, 0.2, 0.3]) for m in (0.1, 1.0) for seed in (0, 1)]
    text = markdown([*curves, _curve("fsq", None, 0, [1.0, 1.0, 1.0])])
    assert "12 steps of 64 tokens" in text
    assert "| VQ | 1,024 | 64 | 20.0 ± 0.0 | 30.0 ± 0.0 % | 30.0 ± 0.0 % | 6 s | 2 |" in text
    assert "| FSQ | 1,024 | 64 | 100.0 | 100.0 % | 100.0 % | 2 s | 1 |" in text
    shown = [t.text for t in ElementTree.fromstring(figures(curves)["stability.svg"]).iter() if t.text]
    assert {"VQ", "1,024 codes"} <= set(shown)
    assert figures([]) == {}


def test_only_seeds_with_every_scale_are_collected(tmp_path: Path) -> None:
    curves = [_curve("vq", 0.1, 0, [0.1]), _curve("vq", 1.0, 0, [0.2]), _curve("vq", 1.0, 1, [0.3])]
    curves += [_curve("fsq", None, 1, [1.0])]
    for i, curve in enumerate(curves):
        stability.save([curve], tmp_path / stability.FOLDER / f"{curve.name}-1024" / f"{i}.json")
    assert [(c.name, c.scale, c.seed) for c in stability.collect(tmp_path)] == [
        ("vq", 0.1, 0),
        ("vq", 1.0, 0),
        ("fsq", None, 1),
    ]


@pytest.mark.slow
def test_the_command_measures_once_and_prints_what_it_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(0)
    for i in range(5):
        Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    small = replace(SMALL, more=(*SMALL.more, "train.steps=1", "model.channels=32"))
    monkeypatch.setattr(stability, "Sizes", lambda steps=12: replace(small, steps=steps))
    words = ["experiments", "run", "stability", str(tmp_path), "--to", str(tmp_path / "to"), "--codes", "64"]
    words += ["--only", "vq", "fsq", "--scales", "1", "--seeds", "0", "--workers", "1"]
    assert main([*words, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert [(row["name"], row["codes"], len(row["ur_auc"])) for row in values["rows"]] == [
        ("vq", 64, 1),
        ("fsq", 64, 1),
    ]
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "to/stability").rglob("*.json")}
    assert len(times) == 2
    assert main(words) == 0
    assert "UR-AUC" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert [c.name for c in stability.collect(tmp_path / "to")] == ["vq", "fsq"]
    assert main([*words, "--steps", "16"]) == 2
    assert "is of other sizes or pictures" in capsys.readouterr().err


def test_options_of_the_bench_are_refused_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["experiments", "run", str(tmp_path), "--codes", "64"]) == 2
    assert "--codes: only for 'experiments run stability" in capsys.readouterr().err
    assert main(["experiments", "run", "stability", "--scales", "0"]) == 2
    assert "--scales must be above 0" in capsys.readouterr().err
