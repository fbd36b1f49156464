"""No damaged or hostile file ends a program in a traceback, holds it up, or reaches out of its folder.

A seed's input again: ``python -m tests.fuzz.loop TARGET SEED 1 FOLDER``.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.targets import TARGETS
from tests.nursery import program

SHORT, LONG = 12, 300
PATIENCE = 3600.0


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_a_few_of_each_kind(name: str, tmp_path: Path) -> None:
    _fuzz(name, range(SHORT), tmp_path / "fuzz")


@pytest.mark.long
@pytest.mark.parametrize("name", TARGETS)
def test_hundreds_of_each_kind(name: str, tmp_path: Path) -> None:
    _fuzz(name, range(SHORT, SHORT + LONG), tmp_path / "fuzz")


def _fuzz(name: str, seeds: range, folder: Path) -> None:
    code = f"""
from pathlib import Path
from tests.fuzz.loop import fuzz
from tests.fuzz.targets import TARGETS
fuzz(TARGETS[{name!r}], {seeds!r}, Path({str(folder)!r}))
"""
    process = program(code)
    try:
        process.wait(PATIENCE)
    finally:
        process.kill()
    lines = (folder / "log").read_text().splitlines()
    wrong = [line for line in lines if not line.endswith(" ok")]
    stacks = (folder / "stacks").read_text()
    assert (wrong, len(lines)) == ([], len(seeds)), "\n".join([*wrong, stacks, process.said()])
