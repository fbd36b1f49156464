"""Paths that no file system takes, and outputs that no disk holds, end in a line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ibq_scale.cli.main import main

LONG = "x" * 300
LOOP = "loop"


@pytest.mark.parametrize("name", [LONG, LOOP])
@pytest.mark.parametrize(
    "words",
    [
        ["prepare", "images", "PICTURES", "--to", "NAME/set"],
        ["data", "index", "NAME"],
        ["data", "stats", "NAME"],
        ["config", "show", "NAME.yaml"],
        ["jobs", "NAME"],
        ["report", "NAME"],
        ["cancel", "NAME"],
        ["checkpoint", "ls", "NAME"],
        ["checkpoint", "import", "NAME", "--to", "x"],
        ["checkpoint", "export", "NAME", "--to", "x"],
        ["scale", "plan", "NAME.yaml"],
        ["submit", "ar/tiny", "data.train=CODES", "out=NAME/run", "--nodes", "1", "--dry-run"],
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_a_path_that_cannot_be(
    words: list[str],
    name: str,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for loop in (LOOP, f"{LOOP}.yaml"):
        Path(loop).symlink_to(loop)
    code = main([word.replace("NAME", name).replace("PICTURES", str(pictures)) for word in words])
    said = capsys.readouterr().err
    assert code == 2, said
    assert "ibq-scale: " in said
    assert len(said.splitlines()) <= 3 + 20 * (words[0] == "submit"), said
    assert "Traceback" not in said


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.slow
def test_an_output_on_a_full_disk() -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "ibq_scale", "config", "reference"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=os.environ)
    assert done.returncode == 1
    assert done.stderr.startswith("ibq-scale: the output could not be written: ")
    assert len(done.stderr.splitlines()) == 1
