"""The tool that times our step against the published one: what it needs, and how it takes turns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tools.published_step import compare, main


def test_a_folder_without_the_published_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--published", str(tmp_path)]) == 2
    assert "has no src/IBQ" in capsys.readouterr().err


def test_trainings_take_turns_after_one_unmeasured_step() -> None:
    steps = []

    def training(name: str) -> Callable[[], float]:
        def train() -> float:
            steps.append(name)
            return float(len(steps))

        return train

    seconds, first = compare({"a": training("a"), "b": training("b")}, 2)
    assert steps == ["a", "b"] * 3
    assert first == {"a": 1.0, "b": 2.0}
    assert {name: len(spent) for name, spent in seconds.items()} == {"a": 2, "b": 2}
