"""The small presets of docs/curves.json train as they did."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import nursery
from tests.tools.curves import STEPS, Kept, drifts, kept, train


@pytest.mark.slow
@pytest.mark.parametrize("preset", kept())
def test_a_preset_trains_as_its_kept_curve(preset: str, tmp_path: Path) -> None:
    found = train(preset, tmp_path, nursery.run)
    assert list(drifts(kept()[preset], found)) == []


@pytest.mark.slow
def test_another_recipe_is_a_drift(tmp_path: Path) -> None:
    found = train("ar/demo", tmp_path, nursery.run, "optimizer.betas=[0.9,0.9]")
    assert any(line.startswith("loss: ") for line in drifts(kept()["ar/demo"], found))


def test_every_small_preset_has_a_curve() -> None:
    assert set(kept()) == set(STEPS)
    assert {len(curve.values["loss"]) for curve in kept().values()} == set(STEPS.values())


def test_a_drift_is_named_at_its_first_step() -> None:
    reference = Kept({"loss": [2.0, 1.0, 0.5]}, {"loss": [0.0, 0.001, 0.01]})
    assert list(drifts(reference, {"loss": [2.001, 1.005, 0.45]})) == []
    said = "loss: 1.0 kept, 1.01 now, at step 2 (tolerance 0.006)"
    assert list(drifts(reference, {"loss": [2.001, 1.01, 0.7]})) == [said]
