"""Slurm's commands as shell scripts: they note how they were called, and answer from files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_SBATCH = """
if [ "$1" = --test-only ]; then
    cat > "$FAKE/tested"
    if [ -f "$FAKE/refusal" ]; then cat "$FAKE/refusal" >&2; exit 1; fi
    echo "sbatch: Job 99 to start at 2026-11-24T16:30:39 using 2 processors on nodes node0 in partition main" >&2
    exit 0
fi
number=$(($(cat "$FAKE/number") + 1))
echo $number > "$FAKE/number"
if [ -f "$FAKE/limit" ] && [ $number -gt "$(cat "$FAKE/limit")" ]; then
    echo "sbatch: error: Batch job submission failed: too many jobs" >&2
    exit 1
fi
echo "$number;cluster"
"""
_SCANCEL = """
for job in "$@"; do
    # What is asked to save is gone too, a moment later.
    sed -i "/^$job|/d" "$FAKE/queue"
done
"""
_NO_CLUSTER = """
echo "squeue: fatal: Could not establish a configuration source" >&2
exit 1
"""


class FakeSlurm:
    """Scripts in `folder`/bin, to be first on PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir()
        (folder / "number").write_text("100")
        (folder / "queue").write_text("")
        (folder / "calls").write_text("")
        self._write("sbatch", _SBATCH)
        self._write("squeue", 'cat "$FAKE/queue"')
        self._write("scancel", _SCANCEL)
        self._write("scontrol", "")

    def _write(self, name: str, text: str) -> None:
        path = self.folder / "bin" / name
        path.write_text(f'#!/bin/sh\nFAKE={self.folder}\necho {name} "$@" >> "$FAKE/calls"\n{text}')
        path.chmod(0o755)

    @property
    def calls(self) -> list[str]:
        """What was called, but for looks at the queue."""
        lines = (self.folder / "calls").read_text().splitlines()
        return [line for line in lines if not line.startswith("squeue") and "--test-only" not in line]

    @property
    def tested(self) -> str:
        """The script that was given to ``sbatch --test-only``."""
        return (self.folder / "tested").read_text()

    def queue(self, *jobs: str) -> None:
        """Lines of squeue: ``id|STATE|nodes|node list|reason|comment``."""
        (self.folder / "queue").write_text("".join(f"{job}\n" for job in jobs))

    def refuse(self, said: str) -> None:
        (self.folder / "refusal").write_text(said)

    def limit(self, last: int) -> None:
        """No job gets a number above."""
        (self.folder / "limit").write_text(str(last))

    def lead_nowhere(self) -> None:
        """As on a machine that has the packages and no cluster."""
        for name in ("sbatch", "squeue", "scancel", "scontrol"):
            self._write(name, _NO_CLUSTER)


def install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """Puts the scripts first on PATH; no settings of this machine's user count."""
    slurm = FakeSlurm(folder)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
    for name in ("IBQ_SCALE_CLUSTERS", "SLURM_JOB_ID", "WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(folder))
    return slurm
