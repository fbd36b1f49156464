"""The commit of this code."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Beside the package in a copy outside of git, such as a submitted job's.
COMMIT = "COMMIT"


def current_commit() -> str | None:
    """Hash of the checkout's commit, or of the commit behind a copy. None if unknown."""
    if (ROOT / COMMIT).is_file():
        return (ROOT / COMMIT).read_text(encoding="utf-8").strip()
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
            encoding="utf-8",
            errors="replace",
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
