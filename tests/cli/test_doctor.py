"""``ibq-scale doctor`` as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def _doctor(*words: str, home: Path) -> subprocess.CompletedProcess[str]:
    """Without the tools of a cluster, and nobody's settings."""
    env = os.environ | {"HOME": str(home), "NETRC": str(home / "netrc"), "PATH": str(Path(sys.executable).parent)}
    command = [sys.executable, "-m", "ibq_scale", "doctor", *words]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_machine_that_can_train(dataset: str, tmp_path: Path) -> None:
    done = _doctor("--data", dataset, "--run-dir", str(tmp_path), "--json", home=tmp_path)
    assert done.returncode == 0, done.stdout
    report = json.loads(done.stdout)
    lines = {line["what"]: line for line in report["lines"]}
    assert report["failed"] == 0
    assert {"packages", "device", "attention", "quantizer", "DeepSpeed", "weights", "data", "all-reduce"} <= set(lines)
    assert lines["run directory"]["seen"].startswith(f"{tmp_path}: ")
    assert all(line["todo"] for line in report["lines"] if line["state"] == "warn")
    assert report["seconds"] > 0


@pytest.mark.slow
@pytest.mark.distributed
def test_what_fails_is_said_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = _doctor("--data", str(tmp_path), "--run-dir", str(tmp_path / "file/run"), home=tmp_path)
    assert done.returncode == 1
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert f"FAIL  run directory         {tmp_path}/file is not a folder" in lines
    assert any(line.startswith("FAIL  data ") and "has no manifest.json" in line for line in lines)
    assert lines[-1].startswith("2 FAILED (run directory, data), ")
