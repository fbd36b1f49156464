"""The tool that times the quantizer's step against the published formula: its forms agree, and they take turns."""

from __future__ import annotations

import pytest

from tests.tools.published_quantizer import TOLERANCE, Step, compare, main, steps


def test_all_forms_have_one_loss_and_one_gradient_and_take_turns() -> None:
    calls: list[str] = []

    def noted(name: str, step: Step) -> Step:
        return lambda: (calls.append(name), step())[1]

    forms = {name: noted(name, step) for name, step in steps(8, 32, 4, None).items()}
    seconds, off = compare(forms, 2)
    assert calls == ["ours", "dense oracle", "published formula"] * 3
    assert {len(spent) for spent in seconds.values()} == {2}
    assert off["ours"] == 0.0
    assert 0.0 < max(off.values()) < TOLERANCE


def test_another_result_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--tokens", "8", "--codes", "32", "--dim", "4", "--turns", "1"]
    assert main(words) == 0
    assert "published formula" in capsys.readouterr().out
    monkeypatch.setattr("tests.tools.published_quantizer.TOLERANCE", 0.0)
    assert main(words) == 1
