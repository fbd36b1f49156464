"""The tools behind the tables of docs/library.md."""

from __future__ import annotations

import pytest

from tests.tools import library_collapse, library_costs


@pytest.mark.slow
def test_every_form_takes_a_step() -> None:
    seconds = library_costs.seconds(4)
    assert {"`IBQ`", "`VQ`", "`SimVQ`", "`LFQ`", "`FSQ`"} <= set(seconds)
    assert all(time > 0 for time in seconds.values())


def test_the_collapse_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library_collapse, "STEPS", 2)
    monkeypatch.setattr(library_collapse, "LAST", 1)
    monkeypatch.setattr(library_collapse, "TOKENS", 16)
    for settings, norm in library_collapse.VARIANTS.values():
        used, beside, _, _ = library_collapse.measure(8, settings, norm, seed=0)
        assert 0 < used <= 16 / 1024
        assert 0 <= beside <= 1
