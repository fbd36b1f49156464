"""Stand-ins for tools of a cluster, put on PATH."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

Fake = Callable[..., None]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """``fake(name, {words: answer})``: an executable that prints the first answer whose words are among its own."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def make(name: str, answers: dict[str, str], code: int = 0) -> None:
        cases = []
        for number, (words, answer) in enumerate(answers.items()):
            (folder / f"{name}.{number}").write_text(answer)
            cases.append(f'  *"{words}"*) cat "{folder}/{name}.{number}"; exit {code};;')
        script = ["#!/bin/sh", 'case " $* " in', *cases, "esac", "exit 3", ""]
        (folder / name).write_text("\n".join(script))
        (folder / name).chmod(0o755)

    return make
