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
    found = git(ROOT, "rev-parse", "HEAD")
    return found and found.strip()


def git(root: Path, *words: str) -> str | None:
    """The output of ``git WORDS`` in `root`. None if it fails, or without git."""
    try:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, encoding="utf-8", errors="replace")
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None
